// Layer normalisation: a kernel for each order and dtype, over rows of any length.
//
// The formulas are those of layer_norm.h. Of a row that its threads can hold at a time everything
// is read once; if they read it in vectors too, kernels of its own spare it the code of other rows.
// Where gradients of parameters are asked for, a fixed number of rows of threads walks over the
// rows of x, each leaves its own sum, and column_sums adds those up: no atomics, and the same bits
// every time.
#include "../layer_norm.h"

#include "rows.cuh"

namespace gn_kernels::cuda {
namespace {

using layer_norm::Curvature;
using layer_norm::Projection;

constexpr int kElements = 8;

// At most for a row: in fp64 half as many, with twice the registers each.
template <class T>
constexpr int kThreads = kMaxRowThreads / (sizeof(T) == 8 ? 2 : 1);

// Blocks that walk over the rows, for each multiprocessor: enough to fill it, and few enough for
// their sums to stay small beside x.
constexpr std::int64_t kWalkers = 4;

// Where sums begin: to add a number to it takes no instruction, to 0 it does.
template <class R>
constexpr R kNone = R(-0.0);

// Of the threads along y. Where a row has a block to itself, the compiler sees that it is the same
// for all of them.
__device__ __forceinline__ unsigned place_of_row(const RowTiling& t) {
  return t.together == 1 ? 0 : threadIdx.y;
}

// As for_each_row, for blocks that have a row each: so have their threads, if one at a time.
template <class F>
__device__ __forceinline__ void walk(const RowTiling& t, std::int64_t rows, F f) {
  std::int64_t row = first_row(t, blockIdx.x, place_of_row(t));
  if (t.together > 1 && row >= rows) return;
  do {
    f(forgotten(row));  // addresses are made of the row, not kept for each tensor from row to row
    row += rows_of_grid(t, gridDim.x);
  } while (row < rows);
}

// A parameter's numbers for a thread. Where all rows have the same, they are loaded once.
template <class T, int kind>
class Columns {
 public:
  using R = Wide<T>;
  using Values = R[kElements];

  __device__ __forceinline__ Columns(const Place<T, kElements>& place, const Parameter& parameter,
                                     R otherwise)
      : place(place), parameter(parameter), otherwise(otherwise) {
    if (kind != kAnyRow) place.load(parameter, 0, values, otherwise);
  }

  __device__ __forceinline__ const Values& at(int chunk) {
    if (kind == kAnyRow) place.load(parameter, forgotten(chunk), values, otherwise);
    return values;
  }

 private:
  const Place<T, kElements>& place;
  const Parameter& parameter;
  const R otherwise;
  Values values;
};

// The kernels say that one block of threads on a multiprocessor is enough (the 1 in their bounds):
// else the compiler spills registers where that lets one more in.
template <class T, int kind>
__global__ void __launch_bounds__(kThreads<T>, 1)
    forward(const T* x, Parameter weight, Parameter bias, T* y, Wide<T>* means, Wide<T>* rstds,
            Wide<T> eps, std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = of_kind<kind>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements> place(t, thread);
  Columns<T, kind> of_weight(place, weight, R(1)), of_bias(place, bias, R(0));
  walk(t, rows, [&](std::int64_t row) {
    const T* x_row = x + start_of_row(t, row);
    int chunk = 0;
    R a[kElements];
    const auto load = [&] { place.load(x_row, chunk, a); };
    load();
    // Relative to its first number a constant row is exactly 0, and its variance too. Relative to
    // the mean that this gives, what is left of the mean corrects it.
    const R shift = widen(x_row[0]);
    R offset[1] = {kNone<R>};
    sweep(chunk, t.chunks, load,
          [&] { place.add_up(chunk, offset[0], [&](int e) { return a[e] - shift; }); });
    mean(offset, thread, t, 0);
    const R about = shift + offset[0];
    R moments[2] = {kNone<R>, kNone<R>};
    sweep(chunk, t.chunks, load, [&] {
      place.add_up(chunk, moments[0], [&](int e) { return a[e] - about; });
      place.add_up(chunk, moments[1], [&](int e) { return (a[e] - about) * (a[e] - about); });
    });
    mean(moments, thread, t, 1);
    const R mu = about + moments[0];
    const R variance = moments[1] - moments[0] * moments[0];
    const R r = layer_norm::reciprocal_root((variance < 0 ? R(0) : variance) + eps);
    sweep(chunk, t.chunks, load, [&] {
      R out[kElements];
      const auto &w = of_weight.at(chunk), &b = of_bias.at(chunk);
#pragma unroll
      for (int e = 0; e < kElements; ++e) out[e] = (a[e] - mu) * r * w[e] + b[e];
      place.store(out, y + start_of_row(t, row), chunk);
    });
    if (thread == 0) {
      means[row] = mu;
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

  // f(element) of each
  template <class F>
  __device__ __forceinline__ void add(const Place<T, kElements>& place, int chunk, bool is_first,
                                      F f) {
    if (t.chunks == 1) {  // asked for or not, which would take as long to find out
#pragma unroll
      for (int e = 0; e < kElements; ++e) held[e] += f(e);
    } else if (partials != nullptr) {
      R* const own = row();
      place.for_each(
          chunk, [&](int e, int column) { own[column] = is_first ? f(e) : own[column] + f(e); });
    }
  }

  __device__ __forceinline__ void finish(const Place<T, kElements>& place) {
    if (partials != nullptr && t.chunks == 1) place.store(held, row(), 0);
  }

 private:
  __device__ __forceinline__ R* row() const {
    return partials + start_of_row(t, first_row(t, blockIdx.x, place_of_row(t)));
  }

  R* const partials;
  const RowTiling& t;
  R held[kElements] = {};
};

// For what is not null; without has_sums for for_x alone, which spares it their registers.
template <class T, bool has_sums, int kind>
__global__ void __launch_bounds__(kThreads<T>, 1)
    backward(const T* grad, const T* x, Parameter weight, const Wide<T>* means,
             const Wide<T>* rstds, T* for_x, Wide<T>* for_weight, Wide<T>* for_bias,
             std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = of_kind<kind>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements> place(t, thread);
  Columns<T, kind> of_weight(place, weight, R(1));
  ColumnSum<T> sum_for_weight(for_weight, t), sum_for_bias(for_bias, t);
  bool is_first = true;
  int turn = 0;
  walk(t, rows, [&](std::int64_t row) {
    const R mu = means[row], r = rstds[row];
    int chunk = 0;
    R g[kElements], x_hat[kElements];
    const auto load = [&] {
      place.load(grad + start_of_row(t, row), chunk, g);
      place.load(x + start_of_row(t, row), chunk, x_hat);
#pragma unroll
      for (int e = 0; e < kElements; ++e) x_hat[e] = (x_hat[e] - mu) * r;
    };
    load();
    R means_of[2] = {kNone<R>, kNone<R>};  // h, h x_hat
    if (!has_sums || for_x != nullptr) {
      sweep(chunk, t.chunks, load, [&] {
        const auto& w = of_weight.at(chunk);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const R h = g[e] * w[e];
          means_of[0] += h;
          means_of[1] += h * x_hat[e];
        }
      });
      mean(means_of, thread, t, turn);
      if (has_sums) {
        turn ^= 1;
      } else if (t.together == 1) {
        __syncthreads();  // its memory is free again for another row, which blocks seldom have
      }
    }
    const Projection<R> projection{r, means_of[0], means_of[1]};
    sweep(chunk, t.chunks, load, [&] {
      if (!has_sums || for_x != nullptr) {
        R out[kElements];
        const auto& w = of_weight.at(chunk);
#pragma unroll
        for (int e = 0; e < kElements; ++e) out[e] = projection(g[e] * w[e], x_hat[e]);
        place.store(out, for_x + start_of_row(t, row), chunk);
      }
      if constexpr (has_sums) {
        sum_for_bias.add(place, chunk, is_first, [&](int e) { return g[e]; });
        sum_for_weight.add(place, chunk, is_first, [&](int e) { return g[e] * x_hat[e]; });
      }
    });
    is_first = false;
  });
  if constexpr (has_sums) {
    sum_for_weight.finish(place);
    sum_for_bias.finish(place);
  }
}

// Absent cotangents v, u and t are 0.
template <class T, bool has_u, int kind>
__global__ void __launch_bounds__(kThreads<T>, 1)
    double_backward(const T* v, Parameter u, Parameter of_bias, const T* grad, const T* x,
                    Parameter weight, const Wide<T>* means, const Wide<T>* rstds, T* for_grad,
                    T* for_x, Wide<T>* for_weight, std::int64_t rows, RowTiling tiling) {
  using R = Wide<T>;
  const RowTiling t = of_kind<kind>(tiling);
  const int thread = int(threadIdx.x);
  const Place<T, kElements> place(t, thread);
  Columns<T, kind> of_weight(place, weight, R(1)), with_u(place, u, R(0)),
      with_t(place, of_bias, R(0));
  ColumnSum<T> sum_for_weight(for_weight, t);
  bool is_first = true;
  int turn = 0;
  walk(t, rows, [&](std::int64_t row) {
    const R mu = means[row], r = rstds[row];
    int chunk = 0;
    R a[kElements], g[kElements], x_hat[kElements];
    const auto load = [&] {
      place.load_if_there(v, row, chunk, a);
      place.load(grad + start_of_row(t, row), chunk, g);
      place.load(x + start_of_row(t, row), chunk, x_hat);
#pragma unroll
      for (int e = 0; e < kElements; ++e) x_hat[e] = (x_hat[e] - mu) * r;
    };
    load();
    R means_of[has_u ? 7 : 5];  // h, h x_hat, v, v x_hat, v h, k, k x_hat with k = g u
#pragma unroll
    for (R& one : means_of) one = kNone<R>;
    sweep(chunk, t.chunks, load, [&] {
      const auto& w = of_weight.at(chunk);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const R h = g[e] * w[e];
        means_of[0] += h;
        means_of[1] += h * x_hat[e];
        means_of[2] += a[e];
        means_of[3] += a[e] * x_hat[e];
        means_of[4] += a[e] * h;
      }
      if constexpr (has_u) {
        const auto& of_u = with_u.at(chunk);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const R k = g[e] * of_u[e];
          means_of[5] += k;
          means_of[6] += k * x_hat[e];
        }
      }
    });
    mean(means_of, thread, t, turn);
    turn ^= 1;
    const Projection<R> of_h{r, means_of[0], means_of[1]}, of_v{r, means_of[2], means_of[3]};
    const Curvature<R> curvature(of_v, of_h, means_of[4]);
    sweep(chunk, t.chunks, load, [&] {
      R r_pv[kElements], for_g[kElements], out[kElements];
      const auto& w = of_weight.at(chunk);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        r_pv[e] = of_v(a[e], x_hat[e]);
        for_g[e] = r_pv[e] * w[e];
        out[e] = curvature(r_pv[e], g[e] * w[e], x_hat[e]);
      }
      sum_for_weight.add(place, chunk, is_first, [&](int e) { return g[e] * r_pv[e]; });
      if constexpr (has_u) {
        const Projection<R> of_k{r, means_of[5], means_of[6]};
        const auto& of_u = with_u.at(chunk);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          for_g[e] += x_hat[e] * of_u[e];
          out[e] += of_k(g[e] * of_u[e], x_hat[e]);
        }
      }
      if (for_grad != nullptr) {
        const auto& of_t = with_t.at(chunk);
#pragma unroll
        for (int e = 0; e < kElements; ++e) for_g[e] += of_t[e];
        place.store(for_g, for_grad + start_of_row(t, row), chunk);
      }
      if (for_x != nullptr) place.store(out, for_x + start_of_row(t, row), chunk);
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
    column_sums(const R* partials, int count, int n, bool vectors, void* first, void* second,
                Dtype dtype) {
  constexpr int lanes = kLanes<R>, columns = kColumnThreads * lanes;
  __shared__ R of_rows[kRowThreads][columns];
  const int column = int(blockIdx.x) * columns + int(threadIdx.x) * lanes;
  const std::int64_t first_row = std::int64_t(blockIdx.y) * count + threadIdx.y;
  R total[lanes] = {};
  const auto add_rows = [&](auto load) {
    const R* from = partials + first_row * n + column;
#pragma unroll 8
    for (int row = int(threadIdx.y); row < count; row += kRowThreads) {
      R values[lanes];
      load(from, values);
#pragma unroll
      for (int l = 0; l < lanes; ++l) total[l] += values[l];
      from += std::int64_t(kRowThreads) * n;
    }
  };
  if (!vectors) {
    add_rows([&](const R* from, R(&values)[lanes]) {
#pragma unroll
      for (int l = 0; l < lanes; ++l) values[l] = column + l < n ? from[l] : R(0);
    });
  } else if (column < n) {
    add_rows([](const R* from, R(&values)[lanes]) { load_vector(from, values); });
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
  return tiling_of(a.length, kElements, kLanes<T>, aligned, kThreads<T>);
}

// Of the kernels of a function, by what kind of rows they are for.
template <class Kernel>
Kernel kernel_for(const RowTiling& t, Kernel any, Kernel of_warp, Kernel of_block) {
  if (!t.vectors || t.chunks > 1) return any;
  return t.threads == kWarp ? of_warp : of_block;
}

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
  const int count = int(grid(t, a.rows, true)) * t.together;
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
  const RowTiling t = tiling_of(a.length, kElements, 1, false);
  return walkers(row_groups(t, a.rows)) * t.together * a.length;
}

Error layer_norm_forward(const LayerNorm& a, const void* x, const void* weight, const void* bias,
                         double eps, void* y, void* mean, void* rstd, Stream stream) {
  if (a.rows == 0) return nullptr;
  if (const Error error = check_rows(a)) return error;
  return with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const RowTiling t = tiling<T>(a, {x, weight, bias, y});
    const auto kernel =
        kernel_for(t, forward<T, kAnyRow>, forward<T, kVectorsOfWarp>, forward<T, kVectorsOfBlock>);
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
    const auto for_x_alone =
        kernel_for(t, backward<T, true, kAnyRow>, backward<T, false, kVectorsOfWarp>,
                   backward<T, false, kVectorsOfBlock>);
    const auto with_sums =
        kernel_for(t, backward<T, true, kAnyRow>, backward<T, true, kVectorsOfWarp>,
                   backward<T, true, kVectorsOfBlock>);
    const auto kernel = walks ? with_sums : for_x_alone;
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
    const auto with_u = kernel_for(tiles, double_backward<T, true, kAnyRow>,
                                   double_backward<T, true, kVectorsOfWarp>,
                                   double_backward<T, true, kVectorsOfBlock>);
    const auto without = kernel_for(tiles, double_backward<T, false, kAnyRow>,
                                    double_backward<T, false, kVectorsOfWarp>,
                                    double_backward<T, false, kVectorsOfBlock>);
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
