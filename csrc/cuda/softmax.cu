// The softmax of attention over rows of scores: a kernel for each order and dtype. The matrix
// products around it are the caller's.
//
// The formulas are those of softmax.h. Of a row that its threads can hold at a time everything is
// read once.
#include "../softmax.h"

#include <cmath>

#include "rows.cuh"

namespace gn_kernels::cuda {
namespace {

// Short rows, such as the windows of 49 of a Swin, take few elements a thread.
template <class T, bool is_short>
constexpr int kElements = is_short         ? 2
                          : sizeof(T) == 8 ? 4
                                           : 8;

constexpr int kShort = 2 * kWarp;
constexpr int kMaxThreads =
    256;  // the double backward of four tensors needs more than 128 registers

// The part of bias, or of its cotangent, that belongs to a row of scores.
template <class T>
struct BiasRow {
  const T* data;
  std::int64_t stride;

  __device__ BiasRow(const SoftmaxBias& bias, const Softmax& a, std::int64_t row)
      : data(static_cast<const T*>(bias.data)), stride(bias.key) {
    if (data == nullptr) return;
    const auto at = std::uint32_t(row), n = std::uint32_t(a.n), heads = std::uint32_t(a.heads);
    const std::uint32_t head = at / n, element = head / heads;
    data += element % std::uint32_t(a.period) * bias.element + head % heads * bias.head +
            at % n * bias.query;
  }
};

template <class T, bool is_short>
class Row {
 public:
  static constexpr int elements = kElements<T, is_short>;
  using R = Wide<T>;
  using Values = R[elements];

  __device__ Row(const Softmax& a, std::int64_t row, const RowTiling& t, int thread)
      : place(t, thread), a(a), row(row), n(t.n) {}

  template <class U>
  __device__ __forceinline__ void load(const U* from, int chunk, Values& to,
                                       R otherwise = 0) const {
    place.load(from == nullptr ? nullptr : from + row * n, chunk, to, otherwise);
  }

  template <class U>
  __device__ __forceinline__ void store(const Values& from, U* to, int chunk) const {
    if (to != nullptr) place.store(from, to + row * n, chunk);
  }

  // Adds bias where there is one.
  __device__ __forceinline__ void add(const SoftmaxBias& bias, int chunk, Values& to) const {
    const BiasRow<T> here(bias, a, row);
    if (here.data == nullptr) return;
    if (bias.vectors) {
      Values values;
      place.load(here.data, chunk, values);
#pragma unroll
      for (int e = 0; e < elements; ++e) to[e] += values[e];
    } else {
      place.for_each(chunk,
                     [&](int e, int column) { to[e] += widen(here.data[column * here.stride]); });
    }
  }

  const Place<T, elements> place;

 private:
  const Softmax& a;
  const std::int64_t row;
  const int n;
};

template <class T, bool is_short>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* products, SoftmaxBias bias, T* probabilities, Wide<T>* log_sums, Softmax a,
            RowTiling t) {
  using R = Wide<T>;
  using P = Precision<T>;
  constexpr int elements = kElements<T, is_short>;
  constexpr R infinity = R(INFINITY);
  const int thread = int(threadIdx.x);
  for (std::int64_t at = std::int64_t(blockIdx.x) * t.together + threadIdx.y; at < a.rows;
       at += std::int64_t(gridDim.x) * t.together) {
    const Row<T, is_short> row(a, at, t, thread);
    int chunk = 0;
    R s[elements];
    const auto load = [&] {
      row.load(products, chunk, s);
#pragma unroll
      for (int e = 0; e < elements; ++e) s[e] *= R(a.scale);
      row.add(bias, chunk, s);
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
    const R log_sum = total[0] == 0 ? infinity : shift + std::log(total[0]);
    sweep(chunk, t.chunks, load, [&] {
      R out[elements];
#pragma unroll
      for (int e = 0; e < elements; ++e) out[e] = softmax::probability<P>(s[e], log_sum);
      row.store(out, probabilities, chunk);
    });
    if (thread == 0) log_sums[at] = log_sum;
  }
}

template <class T, bool is_short>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
             T* probabilities, T* ds, Softmax a, RowTiling t) {
  using R = Wide<T>;
  constexpr int elements = kElements<T, is_short>;
  const int thread = int(threadIdx.x);
  for (std::int64_t at = std::int64_t(blockIdx.x) * t.together + threadIdx.y; at < a.rows;
       at += std::int64_t(gridDim.x) * t.together) {
    const Row<T, is_short> row(a, at, t, thread);
    const R log_sum = log_sums[at];
    int chunk = 0;
    R p[elements], d[elements];
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load(dp, chunk, d);
#pragma unroll
      for (int e = 0; e < elements; ++e) p[e] *= R(a.scale);
      row.add(bias, chunk, p);
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        p[e] = softmax::probability<Precision<T>>(p[e], log_sum);
      }
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
  }
}

template <class T, bool is_short>
__global__ void __launch_bounds__(kMaxThreads)
    double_backward(const T* products, SoftmaxBias bias, const Wide<T>* log_sums, const T* dp,
                    const T* t_products, SoftmaxBias t_bias, const T* u, T* probabilities, T* g,
                    T* ds, T* as, Softmax a, RowTiling t) {
  using R = Wide<T>;
  constexpr int elements = kElements<T, is_short>;
  const int thread = int(threadIdx.x);
  for (std::int64_t at = std::int64_t(blockIdx.x) * t.together + threadIdx.y; at < a.rows;
       at += std::int64_t(gridDim.x) * t.together) {
    const Row<T, is_short> row(a, at, t, thread);
    const R log_sum = log_sums[at];
    int chunk = 0;
    R p[elements], d[elements], ts[elements], us[elements];
    const auto load = [&] {
      row.load(products, chunk, p);
      row.load(dp, chunk, d);
      row.load(t_products, chunk, ts);
      row.load(u, chunk, us);
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        p[e] *= R(a.scale);
        ts[e] *= R(a.scale);
      }
      row.add(bias, chunk, p);
      row.add(t_bias, chunk, ts);
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        p[e] = softmax::probability<Precision<T>>(p[e], log_sum);
      }
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
  }
}

SoftmaxBias with_vectors(SoftmaxBias bias, const RowTiling& t, int lanes) {
  bias.vectors = t.vectors && bias.key == 1 && is_aligned(bias.data) && bias.element % lanes == 0 &&
                 bias.head % lanes == 0 && bias.query % lanes == 0;
  return bias;
}

// Calls f(element, is_short, tiling), the first two of which carry a type each.
template <class F>
Error with_rows(const Softmax& a, std::initializer_list<const void*> tensors, F f) {
  if (a.rows == 0) return nullptr;
  if (a.length >= std::int64_t(1) << 30) return "rows of 2^30 scores or more";
  if (a.rows >= std::int64_t(1) << 32) return "2^32 rows of scores or more";
  bool aligned = true;
  for (const void* tensor : tensors) aligned = aligned && is_aligned(tensor);
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (a.length <= kShort) {
      return f(element, std::true_type(),
               tiling_of(a.length, kElements<T, true>, kLanes<T>,
                         aligned && kElements<T, true> >= kLanes<T>));
    }
    return f(element, std::false_type(),
             tiling_of(a.length, kElements<T, false>, kLanes<T>, aligned, kMaxThreads));
  });
}

}  // namespace

Error softmax_forward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                      void* probabilities, void* log_sums, Stream stream) {
  return with_rows(a, {products, probabilities}, [&](auto element, auto is_short, RowTiling t) {
    using T = decltype(element);
    return launch(forward<T, decltype(is_short)::value>, grid_of(row_groups(t, a.rows)),
                  block_of(t), stream, static_cast<const T*>(products),
                  with_vectors(bias, t, kLanes<T>), static_cast<T*>(probabilities),
                  static_cast<Wide<T>*>(log_sums), a, t);
  });
}

Error softmax_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                       const void* log_sums, const void* dp, void* probabilities, void* ds,
                       Stream stream) {
  return with_rows(
      a, {products, dp, probabilities, ds}, [&](auto element, auto is_short, RowTiling t) {
        using T = decltype(element);
        return launch(backward<T, decltype(is_short)::value>, grid_of(row_groups(t, a.rows)),
                      block_of(t), stream, static_cast<const T*>(products),
                      with_vectors(bias, t, kLanes<T>), static_cast<const Wide<T>*>(log_sums),
                      static_cast<const T*>(dp), static_cast<T*>(probabilities),
                      static_cast<T*>(ds), a, t);
      });
}

Error softmax_double_backward(const Softmax& a, const void* products, const SoftmaxBias& bias,
                              const void* log_sums, const void* dp, const void* t_products,
                              const SoftmaxBias& t_bias, const void* u, void* probabilities,
                              void* g, void* ds, void* as, Stream stream) {
  return with_rows(a, {products, dp, t_products, u, probabilities, g, ds, as},
                   [&](auto element, auto is_short, RowTiling t) {
                     using T = decltype(element);
                     return launch(
                         double_backward<T, decltype(is_short)::value>,
                         grid_of(row_groups(t, a.rows)), block_of(t), stream,
                         static_cast<const T*>(products), with_vectors(bias, t, kLanes<T>),
                         static_cast<const Wide<T>*>(log_sums), static_cast<const T*>(dp),
                         static_cast<const T*>(t_products), with_vectors(t_bias, t, kLanes<T>),
                         static_cast<const T*>(u), static_cast<T*>(probabilities),
                         static_cast<T*>(g), static_cast<T*>(ds), static_cast<T*>(as), a, t);
                   });
}

}  // namespace gn_kernels::cuda
