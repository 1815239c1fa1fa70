// The softmax of attention over rows of scores: a kernel for each order and dtype. The matrix
// products around it are the caller's.
//
// The formulas are those of softmax.h. Of a row that its threads can hold at a time everything is
// read once. Most rows are short, of 49 or 197 scores: those have kernels of their own, in which a
// row has a part of a warp, and a thread enough elements to make up for its sums and addresses.
#include "../softmax.h"

#include <cmath>
#include <type_traits>

#include "rows.cuh"

namespace gn_kernels::cuda {
namespace {

// Elements of each tensor that a thread holds.
template <class T, int part>
constexpr int kElements = (part > 0 ? 2 : 1) * (sizeof(T) == 8 ? 4 : 8);

// The double backward of four tensors needs more than 128 registers.
constexpr int kMaxThreads = 256;

template <int part>
constexpr int kThreads = part > 0 ? kThreadsOfParts : kMaxThreads;
// At least on a multiprocessor: 128 registers for each thread. Without a number the compiler spills
// where that lets one block more in.
template <int part>
constexpr int kBlocks = 512 / kThreads<part>;

// What is read where a row has no scores.
enum class Beyond { Zero, MinusInfinity };

template <class T>
__device__ __forceinline__ std::uint32_t word_of(Beyond beyond, int word) {
  if (beyond == Beyond::Zero) return 0;
  if (sizeof(T) == 8) return word % 2 == 0 ? 0 : 0xfff00000;
  return sizeof(T) == 4 ? 0xff800000 : std::is_same_v<T, bfloat16> ? 0xff80ff80 : 0xfc00fc00;
}

// A tiling of rows that have `part` threads of a warp: what is a constant spares them all other
// code. Of rows that have more, part is 0.
template <int part>
__device__ __forceinline__ RowTiling of_part(RowTiling t) {
  if constexpr (part > 0) {
    t.threads = part, t.together = kThreadsOfParts / part, t.chunks = 1;
    t.vectors = true;
  }
  return t;
}

template <class T, int part>
class Row {
 public:
  using R = Wide<T>;
  static constexpr int elements = kElements<T, part>;
  using Values = R[elements];

  // A row that is not there is read as the last one.
  __device__ Row(const Scores& a, const RowTiling& t, R scale, std::uint32_t row)
      : number(row < a.rows ? row : a.rows - 1),
        is_there(row < a.rows),
        a(a),
        t(t),
        scale(scale),
        start(start_of_scores(number, a.pitch)) {}

  // Products; no score is less than what they have beyond the end of the row.
  __device__ __forceinline__ void load(const T* tensor, int chunk, Values& to) const {
    load_from(tensor, start, true, chunk, Beyond::MinusInfinity, to);
  }

  // Others. Zeros beyond the end of the row, and everywhere if there is no tensor.
  __device__ __forceinline__ void load_if_there(const T* tensor, int chunk, Values& to) const {
    load_from(tensor, start, tensor != nullptr, chunk, Beyond::Zero, to);
  }

  __device__ __forceinline__ void store(const Values& from, T* tensor, int chunk) const {
    if (tensor == nullptr) return;
    for_each_piece(chunk, [&](auto width, int e, int first, int offset, int rest) {
      T* const to = tensor + start + first + offset;
      if constexpr (width.value > 1) {
        if (is_whole(e) || rest > 0) store_vector(from + e, to);
      } else {
        if (rest > 0) narrow(from[e], *to);
      }
    });
  }

  // Makes scores of products: scales them, and adds bias where there is one.
  __device__ __forceinline__ void finish(const SoftmaxBias& bias, const ScoreRow& at, int chunk,
                                         Beyond beyond, Values& scores) const {
    if (scale != 1) {
      for_each_piece(chunk, [&](auto width, int e, int, int, int rest) {
#pragma unroll
        for (int l = 0; l < width.value; ++l) {
          const R scaled = scores[e + l] * scale;
          scores[e + l] = beyond == Beyond::Zero || l < rest ? scaled : -R(INFINITY);
        }
      });
    }
    if (bias.data == nullptr) return;
    const auto* data = static_cast<const T*>(bias.data);
    const std::int64_t here =
        at.element * bias.element + at.head * bias.head + at.query * bias.query;
    if (bias.vectors) {
      Values values;
      load_from(data, here, true, chunk, Beyond::Zero, values);
#pragma unroll
      for (int e = 0; e < elements; ++e) scores[e] += values[e];
    } else {
      for_each_piece(chunk, [&](auto width, int e, int first, int offset, int rest) {
        std::int64_t at = here + (first + offset) * bias.key;
#pragma unroll
        for (int l = 0; l < width.value; ++l, at += bias.key) {
          if (is_whole(e) || l < rest) scores[e + l] += widen(data[at]);
        }
      });
    }
  }

  const std::uint32_t number;
  const bool is_there;

 private:
  static constexpr int lanes = kLanes<T>;

  // Whether no row ends in the vector, or before it.
  static __device__ constexpr bool is_whole(int element) {
    return part > 0 && element < elements / 2;
  }

  // f(width, element, first, offset, rest) for each vector, or for each element if there are none:
  // where it begins, `offset` columns after the first one's column, and how much of the row is left
  // from there on.
  template <class F>
  __device__ __forceinline__ void for_each_piece(int chunk, F f) const {
    if (t.vectors) {
      for_each_piece(chunk, f, std::integral_constant<int, lanes>());
    } else {
      for_each_piece(chunk, f, std::integral_constant<int, 1>());
    }
  }

  template <class F, int width>
  __device__ __forceinline__ void for_each_piece(int chunk, F f,
                                                 std::integral_constant<int, width> of) const {
    const int thread = int(threadIdx.x);
    const int first = part > 0 ? start_of_vector(thread, 0, part, width)
                               : column_of_vector(t, chunk, thread, 0, elements, width);
#pragma unroll
    for (int e = 0; e < elements; e += width) {
      const int offset = part > 0 ? start_of_vector(0, e / width, part, width)
                                  : column_of_vector(t, 0, 0, e / width, elements, width);
      f(of, e, first, offset, t.n - first - offset);
    }
  }

  // What is there of the row that begins at `start`.
  __device__ __forceinline__ void load_from(const T* tensor, std::int64_t start, bool exists,
                                            int chunk, Beyond beyond, Values& to) const {
    for_each_piece(chunk, [&](auto width, int e, int first, int offset, int rest) {
      if constexpr (width.value > 1) {
        const bool has_end = !is_whole(e);
        std::uint32_t words[4] = {0, 0, 0, 0};
        if (exists && (!has_end || rest > 0)) {
          const T* const from = tensor + start + first + offset;
          const uint4 vector = __ldg(reinterpret_cast<const uint4*>(from));
          words[0] = vector.x, words[1] = vector.y, words[2] = vector.z, words[3] = vector.w;
        }
        if (has_end) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const std::uint32_t bits = rest >= lanes ? ~0u : rest > 0 ? a.last[k] : 0;
            words[k] = (words[k] & bits) | (word_of<T>(beyond, k) & ~bits);
          }
        }
        unpack_vector(make_uint4(words[0], words[1], words[2], words[3]), tensor, to + e);
      } else {
        to[e] = beyond == Beyond::Zero || rest > 0 ? R(0) : -R(INFINITY);
        if (exists && rest > 0) to[e] = widen(tensor[start + first + offset]);
      }
    });
  }

  const Scores& a;
  const RowTiling& t;
  const R scale;
  const std::int64_t start;
};

// f(row) for each row of the threads that are at a place along y. Of rows that have parts of a warp
// there may be fewer in the last block, but a warp stays together.
template <int part, class F>
__device__ __forceinline__ void for_each_row_of_scores(const RowTiling& t, std::int64_t rows, F f) {
  if constexpr (part > 0) {
    f(blockIdx.x * unsigned(t.together) + threadIdx.y);
  } else {
    for_each_row(t, rows, [&](std::int64_t row) { f(std::uint32_t(row)); });
  }
}

template <int part, class Join, class R, int count>
__device__ __forceinline__ void reduce_row(R (&values)[count], const RowTiling& t, Join join) {
  if constexpr (part == 0) {
    reduce(values, int(threadIdx.x), t.threads, join);
  } else {
    reduce_in_warp(values, part, join);
  }
}

template <class T, int part>
__global__ void __launch_bounds__(kThreads<part>, kBlocks<part>)
    forward(const T* products, SoftmaxBias bias, T* probabilities, Wide<T>* log_sums, Wide<T> scale,
            Scores a, RowTiling tiling) {
  using R = Wide<T>;
  using P = Precision<T>;
  constexpr R infinity = R(INFINITY);
  const RowTiling t = of_part<part>(tiling);
  for_each_row_of_scores<part>(t, a.rows, [&](std::uint32_t at) {
    const Row<T, part> row(a, t, scale, at);
    ScoreRow of_bias = {};
    if (bias.data != nullptr) of_bias = a.at(row.number);
    int chunk = 0;
    typename Row<T, part>::Values s;
    const auto load = [&] {
      row.load(products, chunk, s);
      row.finish(bias, of_bias, chunk, Beyond::MinusInfinity, s);
    };
    load();
    R largest[1] = {-infinity};
    sweep(chunk, t.chunks, load, [&] {
      for (const R one : s) largest[0] = Greater()(largest[0], one);
    });
    reduce_row<part>(largest, t, Greater());
    const R shift = largest[0] == -infinity ? R(0) : largest[0];
    const auto exponentiate = [&] {
      for (R& one : s) one = softmax::probability<P>(one, shift);
    };
    R total[1] = {0};
    sweep(chunk, t.chunks, load, [&] {
      exponentiate();
      for (const R one : s) total[0] += one;
    });
    reduce_row<part>(total, t, Add());
    const bool is_masked = total[0] == 0;
    if (!row.is_there) return;
    const R inverse = is_masked ? R(0) : quotient<P>(R(1), total[0]);
    const auto load_again = [&] {
      load();
      exponentiate();
    };
    sweep(chunk, t.chunks, load_again, [&] {
      typename Row<T, part>::Values p;
      for (int e = 0; e < row.elements; ++e) p[e] = s[e] * inverse;
      row.store(p, probabilities, chunk);
    });
    if (threadIdx.x == 0) {
      log_sums[row.number] = is_masked ? infinity : shift + softmax::log_of_sum<P>(total[0]);
    }
  });
}

template <class T, int part>
__global__ void __launch_bounds__(kThreads<part>, kBlocks<part>)
    backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
             T* probabilities, T* ds, Wide<T> scale, Scores a, RowTiling tiling) {
  using R = Wide<T>;
  using P = Precision<T>;
  const RowTiling t = of_part<part>(tiling);
  for_each_row_of_scores<part>(t, a.rows, [&](std::uint32_t at) {
    const Row<T, part> row(a, t, scale, at);
    ScoreRow of_bias = {};
    if (bias.data != nullptr) of_bias = a.at(row.number);
    const R log_sum = log_sums[row.number];
    int chunk = 0;
    typename Row<T, part>::Values p, d;
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load_if_there(dp, chunk, d);
      row.finish(bias, of_bias, chunk, Beyond::MinusInfinity, p);
      for (R& one : p) one = softmax::probability<P>(one, log_sum);
    };
    load();
    R delta[1] = {0};
    if (ds != nullptr) {
      sweep(chunk, t.chunks, load, [&] {
        for (int e = 0; e < row.elements; ++e) delta[0] += p[e] * d[e];
      });
      reduce_row<part>(delta, t, Add());
    }
    if (!row.is_there) return;
    sweep(chunk, t.chunks, load, [&] {
      typename Row<T, part>::Values out;
      for (int e = 0; e < row.elements; ++e) out[e] = softmax::backward(p[e], d[e] - delta[0]);
      row.store(p, probabilities, chunk);
      row.store(out, ds, chunk);
    });
  });
}

template <class T, int part>
__global__ void __launch_bounds__(kThreads<part>, kBlocks<part>)
    double_backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
                    const T* t_products, SoftmaxBias t_bias, const T* u, T* probabilities, T* g,
                    T* ds, T* as, Wide<T> scale, Scores a, RowTiling tiling) {
  using R = Wide<T>;
  using P = Precision<T>;
  const RowTiling t = of_part<part>(tiling);
  for_each_row_of_scores<part>(t, a.rows, [&](std::uint32_t at) {
    const Row<T, part> row(a, t, scale, at);
    ScoreRow of_bias = {};
    if (bias.data != nullptr || t_bias.data != nullptr) of_bias = a.at(row.number);
    const R log_sum = log_sums[row.number];
    int chunk = 0;
    typename Row<T, part>::Values p, d, ts, us;
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load_if_there(dp, chunk, d);
      row.load_if_there(t_products, chunk, ts);
      row.load_if_there(u, chunk, us);
      row.finish(bias, of_bias, chunk, Beyond::MinusInfinity, p);
      row.finish(t_bias, of_bias, chunk, Beyond::Zero, ts);
      for (R& one : p) one = softmax::probability<P>(one, log_sum);
    };
    load();
    R sums[3] = {0, 0, 0};  // P T, P dP, P (T dP + U)
    sweep(chunk, t.chunks, load, [&] {
      for (int e = 0; e < row.elements; ++e) {
        sums[0] += p[e] * ts[e];
        sums[1] += p[e] * d[e];
        sums[2] += p[e] * (ts[e] * d[e] + us[e]);
      }
    });
    reduce_row<part>(sums, t, Add());
    if (!row.is_there) return;
    const R tau = sums[0], delta = sums[1], rho = sums[2] - tau * delta;
    sweep(chunk, t.chunks, load, [&] {
      for (int e = 0; e < row.elements; ++e) ts[e] -= tau, d[e] -= delta;
      typename Row<T, part>::Values out;
      row.store(p, probabilities, chunk);
      if (g != nullptr) {
        for (int e = 0; e < row.elements; ++e) out[e] = softmax::for_dp(p[e], ts[e]);
        row.store(out, g, chunk);
      }
      if (ds != nullptr) {
        for (int e = 0; e < row.elements; ++e) out[e] = softmax::backward(p[e], d[e]);
        row.store(out, ds, chunk);
      }
      if (as != nullptr) {
        for (int e = 0; e < row.elements; ++e)
          out[e] = softmax::for_s(p[e], d[e], ts[e], us[e], rho);
        row.store(out, as, chunk);
      }
    });
  });
}

// Rows that begin where vectors do, with room after them for what the last one reads: a single row
// may have none.
SoftmaxBias with_vectors(SoftmaxBias bias, const RowTiling& t, int lanes) {
  const std::int64_t strides[] = {bias.element, bias.head, bias.query};
  bool vectors = t.vectors && bias.key == 1 && is_aligned(bias.data), one_row = true;
  for (const std::int64_t stride : strides) {
    vectors = vectors && stride % lanes == 0;
    one_row = one_row && stride == 0;
  }
  bias.vectors = vectors && (t.n % lanes == 0 || !one_row);
  return bias;
}

// A block for each group of rows that have parts of a warp: there is little that they could share.
unsigned grid_of_scores(const RowTiling& t, std::int64_t rows, int part) {
  const std::int64_t groups = row_groups(t, rows);
  return part > 0 ? unsigned(groups) : grid_of(groups);
}

template <int value>
using Part = std::integral_constant<int, value>;

// Calls f(element, part, scores, tiling), the first two of which carry a type and a constant.
template <class F>
Error with_rows(const Softmax& a, std::initializer_list<const void*> tensors, F f) {
  if (a.rows == 0) return nullptr;
  if (a.length >= std::int64_t(1) << 30) return "rows of 2^30 scores or more";
  if (a.rows > kMaxScoreRows) return "more than 2^32 - 128 rows of scores";
  if (a.pitch >= std::int64_t(1) << 31) return "rows of scores 2^31 elements apart or more";
  bool aligned = true;
  for (const void* tensor : tensors) aligned = aligned && is_aligned(tensor);
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    Scores scores{std::uint32_t(a.rows), std::uint32_t(a.pitch), {},
                  Divider(a.n),          Divider(a.heads),       Divider(a.period)};
    for (int k = 0; k < 4; ++k) {
      scores.last[k] = bits_of_lanes(int(a.length % kLanes<T>), k, int(sizeof(T)));
    }
    const int part = part_of_warp(a.length, kElements<T, 1>, kLanes<T>, a.pitch, aligned);
    const RowTiling t =
        tiling_of_scores(a.length, part, kElements<T, 0>, kLanes<T>, a.pitch, aligned, kMaxThreads);
    switch (part) {
      case 4: return f(element, Part<4>(), scores, t);
      case 8: return f(element, Part<8>(), scores, t);
      case 16: return f(element, Part<16>(), scores, t);
      case 32: return f(element, Part<32>(), scores, t);
    }
    return f(element, Part<0>(), scores, t);
  });
}

}  // namespace

Error softmax_forward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                      void* probabilities, void* log_sums, Stream stream) {
  return with_rows(a, {products, probabilities},
                   [&](auto element, auto part, const Scores& scores, const RowTiling& t) {
                     using T = decltype(element);
                     return launch(forward<T, part()>, grid_of_scores(t, a.rows, part()),
                                   block_of(t), stream, static_cast<const T*>(products),
                                   with_vectors(bias, t, kLanes<T>), static_cast<T*>(probabilities),
                                   static_cast<Wide<T>*>(log_sums), Wide<T>(a.scale), scores, t);
                   });
}

Error softmax_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                       const void* log_sums, const void* dp, void* probabilities, void* ds,
                       Stream stream) {
  return with_rows(a, {products, dp, probabilities, ds},
                   [&](auto element, auto part, const Scores& scores, const RowTiling& t) {
                     using T = decltype(element);
                     return launch(backward<T, part()>, grid_of_scores(t, a.rows, part()),
                                   block_of(t), stream, static_cast<const T*>(products),
                                   with_vectors(bias, t, kLanes<T>),
                                   static_cast<const Wide<T>*>(log_sums), static_cast<const T*>(dp),
                                   static_cast<T*>(probabilities), static_cast<T*>(ds),
                                   Wide<T>(a.scale), scores, t);
                   });
}

Error softmax_double_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                              const void* log_sums, const void* dp, const void* t_products,
                              const SoftmaxBias& t_bias, const void* u, void* probabilities,
                              void* g, void* ds, void* as, Stream stream) {
  return with_rows(
      a, {products, dp, t_products, u, probabilities, g, ds, as},
      [&](auto element, auto part, const Scores& scores, const RowTiling& t) {
        using T = decltype(element);
        return launch(double_backward<T, part()>, grid_of_scores(t, a.rows, part()), block_of(t),
                      stream, static_cast<const T*>(products), with_vectors(bias, t, kLanes<T>),
                      static_cast<const Wide<T>*>(log_sums), static_cast<const T*>(dp),
                      static_cast<const T*>(t_products), with_vectors(t_bias, t, kLanes<T>),
                      static_cast<const T*>(u), static_cast<T*>(probabilities), static_cast<T*>(g),
                      static_cast<T*>(ds), static_cast<T*>(as), Wide<T>(a.scale), scores, t);
      });
}

}  // namespace gn_kernels::cuda
