// Layer normalisation: a kernel for each order and dtype, over rows of any length.
//
// The formulas are those of layer_norm.h. Of a row that its threads can hold at a time everything
// is read once; if they read it in vectors too, kernels of its own spare it the code of other rows,
// a third of the instructions. Where gradients of parameters are asked for, a fixed number of rows
// of threads walks over the rows of x, each leaves its own sum, and column_sums adds those up: no
// atomics, and the same bits every time.
#include "../layer_norm.h"

#include "rows.cuh"

namespace gn_kernels::cuda {
namespace {

using layer_norm::Curvature;
using layer_norm::Projection;

template <class T>
constexpr int kElements = sizeof(T) == 8 ? 4 : 8;

// Blocks that walk over the rows, for each multiprocessor: enough to fill it, and few enough for
// their sums to stay small beside x.
constexpr std::int64_t kWalkers = 4;

// The kernels say that one block of threads on a multiprocessor is enough (the 1 in their bounds):
// else the compiler spills registers where that lets one more in.
template <class T, bool one_chunk_of_vectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    forward(const T* x, Parameter weight, Parameter bias, T* y, Wide<T>* means, Wide<T>* rstds,
            Wide<T> eps, std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = in_vectors<one_chunk_of_vectors>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements<T>> place(t, thread);
  for_each_row(t, rows, [&](std::int64_t row) {
    const T* x_row = x + start_of_row(t, row);
    int chunk = 0;
    R a[kElements<T>];
    const auto load = [&] { place.load(x_row, chunk, a); };
    load();
    // Relative to its first number a constant row is exactly 0, and its variance too. Relative to
    // the mean that this gives, what is left of the mean corrects it.
    const R shift = widen(x_row[0]);
    R total[1] = {0};
    sweep(chunk, t.chunks, load,
          [&] { place.for_each(chunk, [&](int e, int) { total[0] += a[e] - shift; }); });
    sum(total, thread, t.threads);
    const R about = shift + divide(total[0], R(t.n));
    R moments[2] = {0, 0};
    sweep(chunk, t.chunks, load, [&] {
      place.for_each(chunk, [&](int e, int) {
        const R centred = a[e] - about;
        moments[0] += centred;
        moments[1] += centred * centred;
      });
    });
    sum(moments, thread, t.threads);
    const R rest = divide(moments[0], R(t.n)), mean = about + rest;
    const R variance = divide(moments[1], R(t.n)) - rest * rest;
    const R r = 1 / std::sqrt((variance < 0 ? R(0) : variance) + eps);
    sweep(chunk, t.chunks, load, [&] {
      R w[kElements<T>], b[kElements<T>], out[kElements<T>];
      place.load(weight, chunk, w, R(1));
      place.load(bias, chunk, b, R(0));
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) out[e] = (a[e] - mean) * r * w[e] + b[e];
      place.store(out, y + start_of_row(t, row), chunk);
    });
    if (thread == 0) {
      means[row] = mean;
      rstds[row] = r;
    }
  });
}

// A walker's sum for a parameter: in registers, or in memory where a row takes several chunks.
template <class T>
class ColumnSum {
 public:
  using R = Wide<T>;

  // A row of `partials` for each walker, or null.
  __device__ ColumnSum(R* partials, const RowTiling& t) : partials(partials), t(t) {}

  __device__ __forceinline__ void add(const Place<T, kElements<T>>& place, int chunk, bool is_first,
                                      const R (&values)[kElements<T>]) {
    if (partials == nullptr) return;
    if (t.chunks == 1) {
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) held[e] += values[e];
    } else {
      R* const own = row();
      place.for_each(chunk, [&](int e, int column) {
        own[column] = is_first ? values[e] : own[column] + values[e];
      });
    }
  }

  __device__ __forceinline__ void finish(const Place<T, kElements<T>>& place) {
    if (partials != nullptr && t.chunks == 1) place.store(held, row(), 0);
  }

 private:
  __device__ __forceinline__ R* row() const {
    return partials + start_of_row(t, first_row(t, blockIdx.x, threadIdx.y));
  }

  R* const partials;
  const RowTiling& t;
  R held[kElements<T>] = {};
};

template <class T, bool one_chunk_of_vectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    backward(const T* grad, const T* x, Parameter weight, const Wide<T>* means,
             const Wide<T>* rstds, T* for_x, Wide<T>* for_weight, Wide<T>* for_bias,
             std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = in_vectors<one_chunk_of_vectors>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements<T>> place(t, thread);
  ColumnSum<T> sum_for_weight(for_weight, t), sum_for_bias(for_bias, t);
  bool is_first = true;
  for_each_row(t, rows, [&](std::int64_t row) {
    const R mean = means[row], r = rstds[row];
    int chunk = 0;
    R g[kElements<T>], x_hat[kElements<T>], w[kElements<T>];
    const auto load = [&] {
      place.load(grad + start_of_row(t, row), chunk, g);
      place.load(x + start_of_row(t, row), chunk, x_hat);
      place.load(weight, chunk, w, R(1));
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) x_hat[e] = (x_hat[e] - mean) * r;
    };
    load();
    R sums[2] = {0, 0};  // h, h x_hat
    if (for_x != nullptr) {
      sweep(chunk, t.chunks, load, [&] {
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
          const R h = g[e] * w[e];
          sums[0] += h;
          sums[1] += h * x_hat[e];
        }
      });
      sum(sums, thread, t.threads);
    }
    const Projection<R> projection{r, divide(sums[0], R(t.n)), divide(sums[1], R(t.n))};
    sweep(chunk, t.chunks, load, [&] {
      R out[kElements<T>];
      if (for_x != nullptr) {
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) out[e] = projection(g[e] * w[e], x_hat[e]);
        place.store(out, for_x + start_of_row(t, row), chunk);
      }
      sum_for_bias.add(place, chunk, is_first, g);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) out[e] = g[e] * x_hat[e];
      sum_for_weight.add(place, chunk, is_first, out);
    });
    is_first = false;
  });
  sum_for_weight.finish(place);
  sum_for_bias.finish(place);
}

// Absent cotangents v, u and t are 0.
template <class T, bool has_u, bool one_chunk_of_vectors>
__global__ void __launch_bounds__(kMaxRowThreads, 1)
    double_backward(const T* v, Parameter u, Parameter of_bias, const T* grad, const T* x,
                    Parameter weight, const Wide<T>* means, const Wide<T>* rstds, T* for_grad,
                    T* for_x, Wide<T>* for_weight, std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = in_vectors<one_chunk_of_vectors>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements<T>> place(t, thread);
  ColumnSum<T> sum_for_weight(for_weight, t);
  bool is_first = true;
  for_each_row(t, rows, [&](std::int64_t row) {
    const R mean = means[row], r = rstds[row];
    int chunk = 0;
    R a[kElements<T>], g[kElements<T>], x_hat[kElements<T>];
    const auto load = [&] {
      place.load_if_there(v, row, chunk, a);
      place.load(grad + start_of_row(t, row), chunk, g);
      place.load(x + start_of_row(t, row), chunk, x_hat);
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) x_hat[e] = (x_hat[e] - mean) * r;
    };
    load();
    R sums[has_u ? 7 : 5] = {};  // h, h x_hat, v, v x_hat, v h, k, k x_hat with k = g u
    sweep(chunk, t.chunks, load, [&] {
      R w[kElements<T>];
      place.load(weight, chunk, w, R(1));
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) {
        const R h = g[e] * w[e];
        sums[0] += h;
        sums[1] += h * x_hat[e];
        sums[2] += a[e];
        sums[3] += a[e] * x_hat[e];
        sums[4] += a[e] * h;
      }
      if constexpr (has_u) {
        place.load(u, chunk, w, R(0));
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
          const R k = g[e] * w[e];
          sums[5] += k;
          sums[6] += k * x_hat[e];
        }
      }
    });
    sum(sums, thread, t.threads);
    const R count = R(t.n);
    const Projection<R> of_h{r, divide(sums[0], count), divide(sums[1], count)};
    const Projection<R> of_v{r, divide(sums[2], count), divide(sums[3], count)};
    const Curvature<R> curvature(of_v, of_h, divide(sums[4], count));
    sweep(chunk, t.chunks, load, [&] {
      R w[kElements<T>], first[kElements<T>], second[kElements<T>];  // for grad and for x
      place.load(weight, chunk, w, R(1));
#pragma unroll
      for (int e = 0; e < kElements<T>; ++e) {
        const R r_pv = of_v(a[e], x_hat[e]);
        first[e] = r_pv * w[e];
        second[e] = curvature(r_pv, g[e] * w[e], x_hat[e]);
        w[e] = g[e] * r_pv;
      }
      sum_for_weight.add(place, chunk, is_first, w);
      if constexpr (has_u) {
        const Projection<R> of_k{r, divide(sums[5], count), divide(sums[6], count)};
        place.load(u, chunk, w, R(0));
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) {
          first[e] += x_hat[e] * w[e];
          second[e] += of_k(g[e] * w[e], x_hat[e]);
        }
      }
      if (for_grad != nullptr) {
        place.load(of_bias, chunk, w, R(0));
#pragma unroll
        for (int e = 0; e < kElements<T>; ++e) first[e] += w[e];
        place.store(first, for_grad + start_of_row(t, row), chunk);
      }
      if (for_x != nullptr) place.store(second, for_x + start_of_row(t, row), chunk);
    });
    is_first = false;
  });
  sum_for_weight.finish(place);
}

constexpr int kColumnThreads = 8, kRowThreads = 32;

// sums[j] = the sum over i of partials[i * n + j], rounded to the parameter's type; blockIdx.y
// chooses the first or the second sum.
template <class R>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    column_sums(const R* partials, std::int64_t count, int n, bool vectors, void* first,
                void* second, Dtype dtype) {
  constexpr int lanes = kLanes<R>, columns = kColumnThreads * lanes;
  __shared__ R of_rows[kRowThreads][columns];
  const int column = int(blockIdx.x) * columns + int(threadIdx.x) * lanes;
  partials += std::int64_t(blockIdx.y) * count * n;
  R total[lanes] = {};
  for (std::int64_t row = threadIdx.y; row < count; row += kRowThreads) {
    const R* from = partials + row * n + column;
    R values[lanes] = {};
    if (vectors) {
      if (column < n) load_vector(from, values);
    } else {
#pragma unroll
      for (int l = 0; l < lanes; ++l) {
        if (column + l < n) values[l] = from[l];
      }
    }
#pragma unroll
    for (int l = 0; l < lanes; ++l) total[l] += values[l];
  }
#pragma unroll
  for (int l = 0; l < lanes; ++l) of_rows[threadIdx.y][threadIdx.x * lanes + l] = total[l];
  __syncthreads();
  const int own = int(threadIdx.y) * kColumnThreads + int(threadIdx.x);
  const int to = int(blockIdx.x) * columns + own;
  if (own >= columns || to >= n) return;
  R result = 0;
  for (int row = 0; row < kRowThreads; ++row) result += of_rows[row][own];
  void* out = blockIdx.y == 0 ? first : second;
  if constexpr (sizeof(R) == 8) {
    static_cast<double*>(out)[to] = result;
  } else {
    switch (dtype) {
      case Dtype::Float16: return narrow(result, static_cast<float16*>(out)[to]);
      case Dtype::BFloat16: return narrow(result, static_cast<bfloat16*>(out)[to]);
      default: return narrow(result, static_cast<float*>(out)[to]);
    }
  }
}

bool is_wide(Dtype x, Dtype parameter) {
  return x == Dtype::Float64 || parameter != x || x == Dtype::Float32;
}

Parameter parameter_of(const LayerNorm& a, const void* data) {
  return {data, is_wide(a.dtype, a.parameter_dtype)};
}

template <class T>
RowTiling tiling(const LayerNorm& a, std::initializer_list<const void*> tensors) {
  bool aligned = true;
  for (const void* tensor : tensors) aligned = aligned && is_aligned(tensor);
  return tiling_of(a.length, kElements<T>, kLanes<T>, aligned);
}

bool one_chunk_of_vectors(const RowTiling& t) { return t.vectors && t.chunks == 1; }

std::int64_t walkers(std::int64_t groups) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return groups < kWalkers * processors ? groups : kWalkers * processors;
}

unsigned grid(const RowTiling& t, std::int64_t rows, bool walks) {
  const std::int64_t groups = row_groups(t, rows);
  return walks ? unsigned(walkers(groups)) : grid_of(groups);
}

// Adds up what `sums` of the walkers' rows lie one after the other in `partials`.
template <class R>
Error add_up(const LayerNorm& a, const R* partials, const RowTiling& t, void* first, void* second,
             Stream stream) {
  if (first == nullptr && second == nullptr) return nullptr;
  const std::int64_t count = std::int64_t(grid(t, a.rows, true)) * t.together;
  constexpr int columns = kColumnThreads * kLanes<R>;
  const dim3 blocks(unsigned((a.length + columns - 1) / columns),
                    first != nullptr && second != nullptr ? 2 : 1);
  const bool vectors = is_aligned(partials) && a.length % kLanes<R> == 0;
  return launch(column_sums<R>, blocks, dim3(kColumnThreads, kRowThreads), stream, partials, count,
                int(a.length), vectors, first != nullptr ? first : second, second,
                a.parameter_dtype);
}

Error check_rows(const LayerNorm& a) {
  return a.length < (std::int64_t(1) << 30) ? nullptr : "rows of 2^30 elements or more";
}

}  // namespace

std::int64_t layer_norm_partials(const LayerNorm& a) {
  const int elements = a.dtype == Dtype::Float64 ? 4 : 8;
  const RowTiling t = tiling_of(a.length, elements, 1, false);
  return walkers(row_groups(t, a.rows)) * t.together * a.length;
}

Error layer_norm_forward(const LayerNorm& a, const void* x, const void* weight, const void* bias,
                         double eps, void* y, void* mean, void* rstd, Stream stream) {
  if (a.rows == 0) return nullptr;
  if (const Error error = check_rows(a)) return error;
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const RowTiling t = tiling<T>(a, {x, weight, bias, y});
    const auto kernel = one_chunk_of_vectors(t) ? forward<T, true> : forward<T, false>;
    return launch(kernel, grid(t, a.rows, false), block_of(t), stream, static_cast<const T*>(x),
                  parameter_of(a, weight), parameter_of(a, bias), static_cast<T*>(y),
                  static_cast<Wide<T>*>(mean), static_cast<Wide<T>*>(rstd), Wide<T>(eps), a.rows,
                  t);
  });
}

Error layer_norm_backward(const LayerNorm& a, const void* grad, const void* x, const void* weight,
                          const void* mean, const void* rstd, void* for_x, void* for_weight,
                          void* for_bias, void* partials, Stream stream) {
  if (a.rows == 0) return "no rows";
  if (const Error error = check_rows(a)) return error;
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using R = Wide<T>;
    const bool walks = for_weight != nullptr || for_bias != nullptr;
    R* sums = static_cast<R*>(partials);
    R* sums_for_bias = sums + (for_weight != nullptr ? layer_norm_partials(a) : 0);
    const RowTiling t = tiling<T>(a, {grad, x, weight, for_x, partials});
    const auto kernel = one_chunk_of_vectors(t) ? backward<T, true> : backward<T, false>;
    const Error error = launch(
        kernel, grid(t, a.rows, walks), block_of(t), stream, static_cast<const T*>(grad),
        static_cast<const T*>(x), parameter_of(a, weight), static_cast<const R*>(mean),
        static_cast<const R*>(rstd), static_cast<T*>(for_x), for_weight != nullptr ? sums : nullptr,
        for_bias != nullptr ? sums_for_bias : nullptr, a.rows, t);
    return error != nullptr ? error : add_up(a, sums, t, for_weight, for_bias, stream);
  });
}

Error layer_norm_double_backward(const LayerNorm& a, const void* v, const void* u, const void* t,
                                 const void* grad, const void* x, const void* weight,
                                 const void* mean, const void* rstd, void* for_grad, void* for_x,
                                 void* for_weight, void* partials, Stream stream) {
  if (a.rows == 0) return "no rows";
  if (const Error error = check_rows(a)) return error;
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using R = Wide<T>;
    const RowTiling tiles = tiling<T>(a, {v, u, t, grad, x, weight, for_grad, for_x, partials});
    const bool in_one = one_chunk_of_vectors(tiles);
    const auto with_u = in_one ? double_backward<T, true, true> : double_backward<T, true, false>;
    const auto without =
        in_one ? double_backward<T, false, true> : double_backward<T, false, false>;
    const auto kernel = u != nullptr ? with_u : without;
    const Error error =
        launch(kernel, grid(tiles, a.rows, for_weight != nullptr), block_of(tiles), stream,
               static_cast<const T*>(v), parameter_of(a, u), parameter_of(a, t),
               static_cast<const T*>(grad), static_cast<const T*>(x), parameter_of(a, weight),
               static_cast<const R*>(mean), static_cast<const R*>(rstd), static_cast<T*>(for_grad),
               static_cast<T*>(for_x), for_weight != nullptr ? static_cast<R*>(partials) : nullptr,
               a.rows, tiles);
    return error != nullptr
               ? error
               : add_up(a, static_cast<const R*>(partials), tiles, for_weight, nullptr, stream);
  });
}

}  // namespace gn_kernels::cuda
