// The softmax of attention over rows of scores: a kernel for each order and dtype. The matrix
// products around it are the caller's.
//
// The formulas are those of softmax.h. Of a row that its threads can hold at a time everything is
// read once; rows that one warp can hold have kernels of their own.
#include "../softmax.h"

#include <cmath>

#include "rows.cuh"

namespace gn_kernels::cuda {
namespace {

// Elements of each tensor that a thread holds. Short rows, such as the windows of 49 of a Swin,
// have few for each thread. They are read one by one: a row of 49 scores does not start at the
// address of a vector, and nothing else of it would fill one.
template <class T>
constexpr int kElements = sizeof(T) == 8 ? 4 : 8;
constexpr int kFewElements = 2;

// The double backward of four tensors needs more than 128 registers.
constexpr int kMaxThreads = 256;

template <bool one_warp>
constexpr int kThreads = one_warp ? kRowsOfWarps * kWarp : kMaxThreads;
// At least on a multiprocessor: 128 registers for each thread. Without a number the compiler spills
// where that lets one block more in.
template <bool one_warp>
constexpr int kBlocks = 512 / kThreads<one_warp>;

template <class T, int elements>
class Row {
 public:
  using R = Wide<T>;
  using Values = R[elements];

  __device__ Row(const Softmax& a, const RowTiling& t, std::int64_t row, int thread, bool has_bias)
      : place(t, thread), a(a), t(t), row(row) {
    if (has_bias) at = score_row(row, a.n, a.heads, a.period);
  }

  __device__ __forceinline__ void load(const T* from, int chunk, Values& to) const {
    place.load_if_there(from, row, chunk, to);
  }

  __device__ __forceinline__ void store(const Values& from, T* to, int chunk) const {
    if (to != nullptr) place.store(from, to + start_of_row(t, row), chunk);
  }

  // Makes scores of products: scales them, and adds bias where there is one.
  __device__ __forceinline__ void finish(const SoftmaxBias& bias, int chunk, Values& scores) const {
#pragma unroll
    for (int e = 0; e < elements; ++e) scores[e] *= R(a.scale);
    if (bias.data == nullptr) return;
    const T* here = static_cast<const T*>(bias.data) + at.element * bias.element +
                    at.head * bias.head + at.query * bias.query;
    if (bias.vectors) {
      Values values;
      place.load(here, chunk, values);
#pragma unroll
      for (int e = 0; e < elements; ++e) scores[e] += values[e];
    } else {
      place.for_each(chunk,
                     [&](int e, int column) { scores[e] += widen(here[column * bias.key]); });
    }
  }

  // Makes P of scores.
  static __device__ __forceinline__ void normalise(R log_sum, Values& scores) {
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      scores[e] = softmax::probability<Precision<T>>(scores[e], log_sum);
    }
  }

  const Place<T, elements> place;

 private:
  const Softmax& a;
  const RowTiling& t;
  const std::int64_t row;
  ScoreRow at = {};
};

template <class T, int elements, bool one_warp>
__global__ void __launch_bounds__(kThreads<one_warp>, kBlocks<one_warp>)
    forward(const T* products, SoftmaxBias bias, T* probabilities, Wide<T>* log_sums, Softmax a,
            RowTiling tiling) {
  using R = Wide<T>;
  using P = Precision<T>;
  constexpr R infinity = R(INFINITY);
  const RowTiling t = in_a_warp<one_warp>(tiling);
  const int thread = int(threadIdx.x);
  for_each_row(t, a.rows, [&](std::int64_t at) {
    const Row<T, elements> row(a, t, at, thread, bias.data != nullptr);
    int chunk = 0;
    R s[elements];
    const auto load = [&] {
      row.load(products, chunk, s);
      row.finish(bias, chunk, s);
    };
    load();
    R largest[1] = {-infinity};
    sweep(chunk, t.chunks, load, [&] {
      row.place.for_each(chunk, [&](int e, int) { largest[0] = Greater()(largest[0], s[e]); });
    });
    reduce(largest, thread, t.threads, Greater());
    const R shift = largest[0] == -infinity ? R(0) : largest[0];
    R total[1] = {0};
    sweep(chunk, t.chunks, load, [&] {
      row.place.for_each(chunk,
                         [&](int e, int) { total[0] += softmax::probability<P>(s[e], shift); });
    });
    sum(total, thread, t.threads);
    const R log_total = std::log(total[0]);
    const R log_sum = log_total == -infinity ? infinity : shift + log_total;
    sweep(chunk, t.chunks, load, [&] {
      R out[elements];
#pragma unroll
      for (int e = 0; e < elements; ++e) out[e] = softmax::probability<P>(s[e], log_sum);
      row.store(out, probabilities, chunk);
    });
    if (thread == 0) log_sums[at] = log_sum;
  });
}

template <class T, int elements, bool one_warp>
__global__ void __launch_bounds__(kThreads<one_warp>, kBlocks<one_warp>)
    backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
             T* probabilities, T* ds, Softmax a, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = in_a_warp<one_warp>(tiling);
  const int thread = int(threadIdx.x);
  for_each_row(t, a.rows, [&](std::int64_t at) {
    const Row<T, elements> row(a, t, at, thread, bias.data != nullptr);
    const R log_sum = log_sums[at];
    int chunk = 0;
    R p[elements], d[elements];
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load(dp, chunk, d);
      row.finish(bias, chunk, p);
      row.normalise(log_sum, p);
    };
    load();
    R delta[1] = {0};
    if (ds != nullptr) {
      sweep(chunk, t.chunks, load, [&] {
#pragma unroll
        for (int e = 0; e < elements; ++e) delta[0] += p[e] * d[e];
      });
      sum(delta, thread, t.threads);
    }
    sweep(chunk, t.chunks, load, [&] {
      R out[elements];
#pragma unroll
      for (int e = 0; e < elements; ++e) out[e] = softmax::backward(p[e], d[e], delta[0]);
      row.store(p, probabilities, chunk);
      row.store(out, ds, chunk);
    });
  });
}

template <class T, int elements, bool one_warp>
__global__ void __launch_bounds__(kThreads<one_warp>, kBlocks<one_warp>)
    double_backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
                    const T* t_products, SoftmaxBias t_bias, const T* u, T* probabilities, T* g,
                    T* ds, T* as, Softmax a, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = in_a_warp<one_warp>(tiling);
  const int thread = int(threadIdx.x);
  for_each_row(t, a.rows, [&](std::int64_t at) {
    const Row<T, elements> row(a, t, at, thread, bias.data != nullptr || t_bias.data != nullptr);
    const R log_sum = log_sums[at];
    int chunk = 0;
    R p[elements], d[elements], ts[elements], us[elements];
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load(dp, chunk, d);
      row.load(t_products, chunk, ts);
      row.load(u, chunk, us);
      row.finish(bias, chunk, p);
      row.finish(t_bias, chunk, ts);
      row.normalise(log_sum, p);
    };
    load();
    R sums[3] = {0, 0, 0};  // P T, P dP, P (T dP + U)
    sweep(chunk, t.chunks, load, [&] {
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        sums[0] += p[e] * ts[e];
        sums[1] += p[e] * d[e];
        sums[2] += p[e] * (ts[e] * d[e] + us[e]);
      }
    });
    sum(sums, thread, t.threads);
    const softmax::DoubleBackward<R> of{sums[0], sums[1], sums[2] - 2 * sums[0] * sums[1]};
    sweep(chunk, t.chunks, load, [&] {
      R out[elements];
      row.store(p, probabilities, chunk);
      if (g != nullptr) {
#pragma unroll
        for (int e = 0; e < elements; ++e) out[e] = of.for_dp(p[e], ts[e]);
        row.store(out, g, chunk);
      }
      if (ds != nullptr) {
#pragma unroll
        for (int e = 0; e < elements; ++e) out[e] = softmax::backward(p[e], d[e], of.delta);
        row.store(out, ds, chunk);
      }
      if (as != nullptr) {
#pragma unroll
        for (int e = 0; e < elements; ++e) out[e] = of.for_s(p[e], d[e], ts[e], us[e]);
        row.store(out, as, chunk);
      }
    });
  });
}

SoftmaxBias with_vectors(SoftmaxBias bias, const RowTiling& t, int lanes) {
  bias.vectors = t.vectors && bias.key == 1 && is_aligned(bias.data) && bias.element % lanes == 0 &&
                 bias.head % lanes == 0 && bias.query % lanes == 0;
  return bias;
}

template <int value>
using Elements = std::integral_constant<int, value>;

// Calls f(element, elements, one_warp, tiling), the first three of which carry a type or a
// constant.
template <class F>
Error with_rows(const Softmax& a, std::initializer_list<const void*> tensors, F f) {
  if (a.rows == 0) return nullptr;
  if (a.length >= std::int64_t(1) << 30) return "rows of 2^30 scores or more";
  if (a.rows >= std::int64_t(1) << 32) return "2^32 rows of scores or more";
  bool aligned = true;
  for (const void* tensor : tensors) aligned = aligned && is_aligned(tensor);
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto tiling = [&](int elements) {
      return tiling_of(a.length, elements, kLanes<T>, aligned && elements >= kLanes<T>,
                       kMaxThreads);
    };
    if (a.length <= kFewElements * kWarp) {
      return f(element, Elements<kFewElements>(), std::true_type(), tiling(kFewElements));
    }
    const RowTiling t = tiling(kElements<T>);
    if (t.threads == kWarp) return f(element, Elements<kElements<T>>(), std::true_type(), t);
    return f(element, Elements<kElements<T>>(), std::false_type(), t);
  });
}

}  // namespace

Error softmax_forward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                      void* probabilities, void* log_sums, Stream stream) {
  return with_rows(
      a, {products, probabilities}, [&](auto element, auto elements, auto one_warp, RowTiling t) {
        using T = decltype(element);
        return launch(forward<T, elements(), one_warp()>, grid_of(row_groups(t, a.rows)),
                      block_of(t), stream, static_cast<const T*>(products),
                      with_vectors(bias, t, kLanes<T>), static_cast<T*>(probabilities),
                      static_cast<Wide<T>*>(log_sums), a, t);
      });
}

Error softmax_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                       const void* log_sums, const void* dp, void* probabilities, void* ds,
                       Stream stream) {
  return with_rows(a, {products, dp, probabilities, ds},
                   [&](auto element, auto elements, auto one_warp, RowTiling t) {
                     using T = decltype(element);
                     return launch(backward<T, elements(), one_warp()>,
                                   grid_of(row_groups(t, a.rows)), block_of(t), stream,
                                   static_cast<const T*>(products),
                                   with_vectors(bias, t, kLanes<T>),
                                   static_cast<const Wide<T>*>(log_sums), static_cast<const T*>(dp),
                                   static_cast<T*>(probabilities), static_cast<T*>(ds), a, t);
                   });
}

Error softmax_double_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                              const void* log_sums, const void* dp, const void* t_products,
                              const SoftmaxBias& t_bias, const void* u, void* probabilities,
                              void* g, void* ds, void* as, Stream stream) {
  return with_rows(a, {products, dp, t_products, u, probabilities, g, ds, as},
                   [&](auto element, auto elements, auto one_warp, RowTiling t) {
                     using T = decltype(element);
                     return launch(
                         double_backward<T, elements(), one_warp()>, grid_of(row_groups(t, a.rows)),
                         block_of(t), stream, static_cast<const T*>(products),
                         with_vectors(bias, t, kLanes<T>), static_cast<const Wide<T>*>(log_sums),
                         static_cast<const T*>(dp), static_cast<const T*>(t_products),
                         with_vectors(t_bias, t, kLanes<T>), static_cast<const T*>(u),
                         static_cast<T*>(probabilities), static_cast<T*>(g), static_cast<T*>(ds),
                         static_cast<T*>(as), a, t);
                   });
}

}  // namespace gn_kernels::cuda
