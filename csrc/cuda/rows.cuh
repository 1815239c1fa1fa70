// What kernels over rows share: a thread's elements of a row, and sums over a row.
#pragma once

#include "memory.cuh"

namespace gn_kernels::cuda {

// Memory of T or, if it is wide, of Wide<T>; null where there is none.
struct Parameter {
  const void* data;
  bool is_wide;
};

// A tiling as kernels for one kind of rows see it: that what is always so is a constant spares them
// all other code.
template <bool one_chunk_of_vectors>
__device__ __forceinline__ RowTiling in_vectors(RowTiling t) {
  if (one_chunk_of_vectors) t.chunks = 1, t.vectors = true;
  return t;
}

template <bool one_warp>
__device__ __forceinline__ RowTiling in_a_warp(RowTiling t) {
  if (one_warp) t.chunks = 1, t.threads = kWarp;
  return t;
}

// The elements of a row that one thread holds: `elements` of each tensor, in every chunk.
template <class T, int elements>
class Place {
 public:
  using R = Wide<T>;
  static constexpr int lanes = kLanes<T>, vectors = elements / lanes;

  __device__ Place(const RowTiling& tiling, int thread) : t(tiling), thread(thread) {}

  // f(element, column) for what there is of `chunk`.
  template <class F>
  __device__ __forceinline__ void for_each(int chunk, F f) const {
    if (is_vector()) {
      for_each_vector(chunk, [&](int first, int column) {
#pragma unroll
        for (int l = 0; l < lanes; ++l) f(first + l, column + l);
      });
    } else {
      for_each_element(chunk, f);
    }
  }

  // What a row has in `chunk`; `otherwise` beyond its end.
  template <class U>
  __device__ __forceinline__ void load(const U* row, int chunk, R (&to)[elements],
                                       R otherwise = 0) const {
    fill(to, otherwise);
    if (is_vector()) {
      for_each_vector(chunk, [&](int first, int column) {
#pragma unroll
        for (int l = 0; l < lanes; l += kLanes<U>) load_vector(row + column + l, to + first + l);
      });
    } else {
      for_each_element(chunk, [&](int e, int column) { to[e] = widen(row[column]); });
    }
  }

  // The same of row `row` of a tensor; `otherwise` everywhere if that is null.
  template <class U>
  __device__ __forceinline__ void load_if_there(const U* tensor, std::int64_t row, int chunk,
                                                R (&to)[elements], R otherwise = 0) const {
    if (tensor == nullptr) return fill(to, otherwise);
    load(tensor + start_of_row(t, row), chunk, to, otherwise);
  }

  __device__ __forceinline__ void load(const Parameter& parameter, int chunk, R (&to)[elements],
                                       R otherwise) const {
    if constexpr (sizeof(T) == 2) {
      if (!parameter.is_wide) {
        return load_if_there(static_cast<const T*>(parameter.data), 0, chunk, to, otherwise);
      }
    }
    load_if_there(static_cast<const R*>(parameter.data), 0, chunk, to, otherwise);
  }

  template <class U>
  __device__ __forceinline__ void store(const R (&from)[elements], U* row, int chunk) const {
    if (is_vector()) {
      for_each_vector(chunk, [&](int first, int column) {
#pragma unroll
        for (int l = 0; l < lanes; l += kLanes<U>) store_vector(from + first + l, row + column + l);
      });
    } else {
      for_each_element(chunk, [&](int e, int column) { narrow(from[e], row[column]); });
    }
  }

 private:
  // f(element, column) of the first of each vector.
  template <class F>
  __device__ __forceinline__ void for_each_vector(int chunk, F f) const {
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int column = column_of_vector(t, chunk, thread, v, elements, lanes);
      if (column < t.n) f(v * lanes, column);
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each_element(int chunk, F f) const {
#pragma unroll
    for (int e = 0; e < elements; ++e) {
      const int column = column_of_element(t, chunk, thread, e, elements);
      if (column < t.n) f(e, column);
    }
  }

  static __device__ __forceinline__ void fill(R (&to)[elements], R value) {
#pragma unroll
    for (int e = 0; e < elements; ++e) to[e] = value;
  }

  __device__ __forceinline__ bool is_vector() const { return vectors > 0 && t.vectors; }

  const RowTiling& t;
  const int thread;
};

// f(row) for each row of the threads that are at a place along y.
template <class F>
__device__ __forceinline__ void for_each_row(const RowTiling& t, std::int64_t rows, F f) {
  for (std::int64_t row = first_row(t, blockIdx.x, threadIdx.y); row < rows;
       row += rows_of_grid(t, gridDim.x)) {
    f(row);
  }
}

// Goes over the chunks of a row, from the end that is loaded to the other: a row of one chunk is
// loaded once, however often this is called. load() loads `chunk`, use() has it.
template <class Load, class Use>
__device__ __forceinline__ void sweep(int& chunk, int chunks, Load load, Use use) {
  const int last = chunk == 0 ? chunks - 1 : 0, step = chunk == 0 ? 1 : -1;
  for (;;) {
    use();
    if (chunk == last) break;
    chunk += step;
    load();
  }
}

struct Add {
  template <class R>
  __device__ __forceinline__ R operator()(R a, R b) const {
    return a + b;
  }
};

struct Greater {  // NaN if either is
  template <class R>
  __device__ __forceinline__ R operator()(R a, R b) const {
    return a > b || a != a ? a : b;
  }
};

// Replaces each value by what `join` makes of all threads of the row, in an order that depends on
// their number alone. Every thread gets the same bits.
template <class Join, class R, int count>
__device__ __forceinline__ void reduce(R (&values)[count], int thread, int threads, Join join) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      values[k] = join(values[k], __shfl_xor_sync(0xffffffffu, values[k], distance));
    }
  }
  if (threads == kWarp) return;  // then other rows may be at another place
  __shared__ R of_warps[count][kMaxRowThreads / kWarp];
  if (thread % kWarp == 0) {
#pragma unroll
    for (int k = 0; k < count; ++k) of_warps[k][thread / kWarp] = values[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) {
    values[k] = of_warps[k][0];
    for (int warp = 1; warp < threads / kWarp; ++warp) {
      values[k] = join(values[k], of_warps[k][warp]);
    }
  }
  __syncthreads();  // of_warps is free again
}

template <class R, int count>
__device__ __forceinline__ void sum(R (&values)[count], int thread, int threads) {
  reduce(values, thread, threads, Add());
}

inline dim3 block_of(const RowTiling& t) { return dim3(unsigned(t.threads), unsigned(t.together)); }

}  // namespace gn_kernels::cuda
