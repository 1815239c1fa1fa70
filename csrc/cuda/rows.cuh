// What kernels over rows share: a thread's elements of a row, and sums over a row.
#pragma once

#include <type_traits>

#include "memory.cuh"

namespace gn_kernels::cuda {

// Memory of T or, if it is wide, of Wide<T>; null where there is none.
struct Parameter {
  const void* data;
  bool is_wide;
};

// A tiling as kernels for one kind of rows see it: that what is always so is a constant spares them
// all other code.
enum RowKind { kAnyRow, kVectorsOfWarp, kVectorsOfBlock };  // rows of one chunk, read in vectors

template <int kind>
__device__ __forceinline__ RowTiling of_kind(RowTiling t) {
  if (kind != kAnyRow) t.chunks = 1, t.vectors = true;
  if (kind == kVectorsOfWarp) t.threads = kWarp, t.together = kRowsOfWarps;
  if (kind == kVectorsOfBlock) t.together = 1;
  return t;
}

// x, of which the compiler knows nothing: what is computed from it stays where it is, and is not
// kept in registers from one turn of a loop to the next.
template <class N>
__device__ __forceinline__ N forgotten(N x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<N, float>) {
    asm volatile("" : "+f"(x));
  } else if constexpr (std::is_same_v<N, double>) {
    asm volatile("" : "+d"(x));
  } else if constexpr (sizeof(N) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

// One vector at an aligned address; 0 if it is not there.
template <class T>
__device__ __forceinline__ void load_vector(const T* from, bool is_there, Wide<T>* wide) {
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  unpack_vector(is_there ? __ldg(reinterpret_cast<const uint4*>(from)) : nothing, from, wide);
}

// By pairs of doubles: of words the compiler would choose each, and only then make doubles of them.
__device__ __forceinline__ void load_vector(const double* from, bool is_there, double* wide) {
  const double2 nothing = make_double2(0, 0);
  const double2 vector = is_there ? __ldg(reinterpret_cast<const double2*>(from)) : nothing;
  wide[0] = vector.x;
  wide[1] = vector.y;
}

__device__ __forceinline__ void store_vector(const double* wide, double* to) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(wide[0], wide[1]));
}

// The elements of a row that one thread holds: `elements` of each tensor, in every chunk.
template <class T, int elements>
class Place {
 public:
  using R = Wide<T>;
  static constexpr int lanes = kLanes<T>, vectors = elements / lanes;

  __device__ Place(const RowTiling& tiling, int thread)
      : t(tiling),
        thread(thread),
        first_column(column_of_vector(tiling, 0, thread, 0, elements, lanes)) {}

  // f(element, column) for what there is of `chunk`.
  template <class F>
  __device__ __forceinline__ void for_each(int chunk, F f) const {
    for_each_piece(chunk, 0, [&](auto width, int e, int column, bool is_there) {
      if (!is_there) return;
#pragma unroll
      for (int l = 0; l < width.value; ++l) f(e + l, column + l);
    });
  }

  // Adds to `total` f(element) of what there is of `chunk`.
  template <class F>
  __device__ __forceinline__ void add_up(int chunk, R& total, F f) const {
    for_each_piece(chunk, 0, [&](auto width, int e, int, bool is_there) {
      R part = f(e);
#pragma unroll
      for (int l = 1; l < width.value; ++l) part += f(e + l);
      total = is_there ? total + part : total;
    });
  }

  // What a row has in `chunk`; 0 beyond its end.
  template <class U>
  __device__ __forceinline__ void load(const U* row, int chunk, R (&to)[elements]) const {
    for_each_piece(chunk, row, [&](auto width, int e, const U* from, bool is_there) {
      if constexpr (width.value == 1) {
        if (e == 0) fill(to, R(0));
        if (is_there) to[e] = widen(*from);
      } else {
#pragma unroll
        for (int l = 0; l < width.value; l += kLanes<U>)
          load_vector(from + l, is_there, to + e + l);
      }
    });
  }

  // The same of row `row` of a tensor; 0 everywhere if that is null.
  template <class U>
  __device__ __forceinline__ void load_if_there(const U* tensor, std::int64_t row, int chunk,
                                                R (&to)[elements]) const {
    if (tensor == nullptr) return fill(to, R(0));
    load(tensor + start_of_row(t, row), chunk, to);
  }

  // `otherwise` everywhere if it is null. That is forgotten: else it is there before the branch.
  __device__ __forceinline__ void load(const Parameter& parameter, int chunk, R (&to)[elements],
                                       R otherwise) const {
    if (parameter.data == nullptr) return fill(to, forgotten(otherwise));
    if constexpr (sizeof(T) == 2) {
      if (!parameter.is_wide) return load(static_cast<const T*>(parameter.data), chunk, to);
    }
    load(static_cast<const R*>(parameter.data), chunk, to);
  }

  template <class U>
  __device__ __forceinline__ void store(const R (&from)[elements], U* row, int chunk) const {
    for_each_piece(chunk, row, [&](auto width, int e, U* to, bool is_there) {
      if (!is_there) return;
      if constexpr (width.value == 1) {
        narrow(from[e], *to);
      } else {
#pragma unroll
        for (int l = 0; l < width.value; l += kLanes<U>) store_vector(from + e + l, to + l);
      }
    });
  }

 private:
  // f(width, element, row + column, is_there) of each vector, or each element if there are none:
  // where it begins, and whether that is in the row. `row` is a pointer or 0.
  template <class Row, class F>
  __device__ __forceinline__ void for_each_piece(int chunk, Row row, F f) const {
    if (vectors > 0 && t.vectors) {
      for_each_piece(chunk, row, f, std::integral_constant<int, vectors == 0 ? 1 : lanes>());
    } else {
      for_each_piece(chunk, row, f, std::integral_constant<int, 1>());
    }
  }

  template <class Row, class F, int width>
  __device__ __forceinline__ void for_each_piece(int chunk, Row row, F f,
                                                 std::integral_constant<int, width> of) const {
    if constexpr (width == 1) {
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const int column = column_of_element(t, chunk, thread, e, elements);
        f(of, e, row + column, column < t.n);
      }
    } else {
      const int first = chunk * t.threads * elements + first_column;
      auto begin = row + first;
      if constexpr (std::is_pointer_v<Row>) begin = forgotten(begin);  // one for all
#pragma unroll
      for (int e = 0; e < elements; e += width) {
        const int offset = start_of_vector(0, e / width, kWarp, width);
        f(of, e, begin + offset, offset < t.n - first);
      }
    }
  }

  static __device__ __forceinline__ void fill(R (&to)[elements], R value) {
#pragma unroll
    for (int e = 0; e < elements; ++e) to[e] = value;
  }

  const RowTiling& t;
  const int thread;
  const int first_column;  // of vectors, in chunk 0: computed here, once, for all that follows
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
    if constexpr (kOnGpu && sizeof(R) == 4) return at_least(a, b);
    return a > b || a != a ? a : b;
  }
};

// Replaces each value by what `join` makes of `threads` neighbours in a warp, all of which get the
// same bits.
template <class Join, class R, int count>
__device__ __forceinline__ void reduce_in_warp(R (&values)[count], int threads, Join join) {
#pragma unroll
  for (int distance = threads / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      values[k] = join(values[k], __shfl_xor_sync(0xffffffffu, values[k], distance));
    }
  }
}

// Replaces each value by what `join` makes of all threads of the row, in an order that depends on
// their number alone. Every thread gets the same bits.
template <class Join, class R, int count>
__device__ __forceinline__ void reduce(R (&values)[count], int thread, int threads, Join join) {
  reduce_in_warp(values, kWarp, join);
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

// Of several sums, each step over the warp hands over half of what is left: of two values a lane
// gives one away and keeps the other. So 7 sums take 11 exchanges, not 35. Here is how many lanes
// end with the same value.
template <int count>
constexpr int kLanesOfValue = count > 4   ? 4
                              : count > 2 ? 8
                              : count > 1 ? 16
                                          : 32;

// The sum over the warp of the lane's value, of number lane / kLanesOfValue where there is one.
template <class R, int count>
__device__ __forceinline__ R sum_in_warp(R (&values)[count], unsigned lane) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int half = distance / kLanesOfValue<count>;  // 0 if one value is left
#pragma unroll
    for (int k = 0; k < (half > 0 ? half : 1); ++k) {
      R given = values[k];
      if (half > 0 && k + half < count) {
        const bool is_upper = lane & unsigned(distance);
        given = is_upper ? values[k] : values[k + half];
        values[k] = is_upper ? values[k + half] : values[k];
      }
      values[k] += __shfl_xor_sync(0xffffffffu, given, distance);
    }
  }
  return values[0];
}

// Replaces each value by its mean over the row, in an order that depends on the number of its
// threads alone. Every thread gets the same bits. Calls that follow each other have different
// `turn`s, 0 or 1: a barrier each is enough, as who waits in one has read what the last one left.
template <class R, int count>
__device__ __forceinline__ void mean(R (&values)[count], int thread, const RowTiling& t, int turn) {
  constexpr unsigned all = 0xffffffffu, same = kLanesOfValue<count>, slots = kWarp / same;
  const unsigned lane = unsigned(thread) % kWarp, warp = unsigned(thread) / kWarp;
  R value = sum_in_warp(values, lane);
  if (t.together == 1) {  // several warps share it
    __shared__ R of_warps[2][kMaxRowThreads / kWarp][slots];
    of_warps[turn][warp][lane / same] = value;  // lanes that have the same write the same
    __syncthreads();
    const int warps = int(unsigned(t.threads) / kWarp);
    const auto of_warp = [&](int other) {
      return other < warps ? of_warps[turn][other][lane / same] : R(0);
    };
    value = of_warp(int(lane % 4));
    for (int first = 4; first < warps; first += 4) value += of_warp(first + int(lane % 4));
    value += __shfl_xor_sync(all, value, 1);
    value += __shfl_xor_sync(all, value, 2);
  }
  value = divide(value, R(t.n));
#pragma unroll
  for (int k = 0; k < count; ++k) {
    values[k] = count == 1 ? value : __shfl_sync(all, value, int(k * same));
  }
}

inline dim3 block_of(const RowTiling& t) { return dim3(unsigned(t.threads), unsigned(t.together)); }

}  // namespace gn_kernels::cuda
