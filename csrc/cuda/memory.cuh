// Loads and stores of the four element types, and their conversions to the type of the arithmetic.
#pragma once

#include <cstdint>
#include <tuple>

#include "../cpu/numbers.h"
#include "indices.h"
#include "kernels.h"

namespace gn_kernels::cuda {

template <class T>
struct Element {  // of float and double
  using wide = T;
  using precision = Single;
};
template <>
struct Element<double> {
  using wide = double;
  using precision = Double;
};
template <>
struct Element<bfloat16> {
  using wide = float;
  using precision = Fast;
};
template <>
struct Element<float16> {
  using wide = float;
  using precision = Fast;
};

template <class T>
using Wide = typename Element<T>::wide;
template <class T>
using Precision = typename Element<T>::precision;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

GN_INLINE float widen(float x) { return x; }
GN_INLINE double widen(double x) { return x; }
GN_INLINE void narrow(float x, float& out) { out = x; }
GN_INLINE void narrow(double x, double& out) { out = x; }

// Two numbers in a word.
GN_INLINE std::uint32_t pair(float low, float high, const bfloat16*) {
#if defined(__CUDA_ARCH__)
  std::uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  bfloat16 halves[2];
  narrow(low, halves[0]);
  narrow(high, halves[1]);
  return halves[0].bits | std::uint32_t(halves[1].bits) << 16;
#endif
}

GN_INLINE std::uint32_t pair(float low, float high, const float16*) {
#if defined(__CUDA_ARCH__)
  std::uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  float16 halves[2];
  narrow(low, halves[0]);
  narrow(high, halves[1]);
  return halves[0].bits | std::uint32_t(halves[1].bits) << 16;
#endif
}

// The elements in one 32-bit word of memory; of a double, in two.
GN_INLINE void unpack(const std::uint32_t* word, const float*, float* wide) {
  *wide = bit_cast<float>(*word);
}
GN_INLINE void unpack(const std::uint32_t* word, const double*, double* wide) {
  *wide = bit_cast<double>(word[0] | std::uint64_t(word[1]) << 32);
}
GN_INLINE void unpack(const std::uint32_t* word, const bfloat16*, float* wide) {
  wide[0] = bit_cast<float>(*word << 16);
  wide[1] = bit_cast<float>(*word & 0xffff0000);
}
GN_INLINE void unpack(const std::uint32_t* word, const float16*, float* wide) {
  wide[0] = widen(float16{std::uint16_t(*word)});
  wide[1] = widen(float16{std::uint16_t(*word >> 16)});
}

GN_INLINE void pack(const float* wide, const float*, std::uint32_t* word) {
  *word = bit_cast<std::uint32_t>(*wide);
}
GN_INLINE void pack(const double* wide, const double*, std::uint32_t* word) {
  const auto bits = bit_cast<std::uint64_t>(*wide);
  word[0] = std::uint32_t(bits);
  word[1] = std::uint32_t(bits >> 32);
}
template <class H>
GN_INLINE void pack(const float* wide, const H* type, std::uint32_t* word) {
  *word = pair(wide[0], wide[1], type);
}

template <class T>
__device__ __forceinline__ void unpack_vector(uint4 vector, const T* type, Wide<T>* wide) {
  const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  constexpr int step = sizeof(T) == 8 ? 2 : 1, elements = sizeof(T) == 2 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < 4 / step; ++k) unpack(words + k * step, type, wide + k * elements);
}

// One vector at an aligned address. By these functions, since the compiler may split what is read
// or written through a pointer to uint4.
template <class T>
__device__ __forceinline__ void load_vector(const T* from, Wide<T>* wide) {
  unpack_vector(__ldg(reinterpret_cast<const uint4*>(from)), from, wide);
}

template <class T>
__device__ __forceinline__ void store_vector(const Wide<T>* wide, T* to) {
  std::uint32_t words[4];
  constexpr int step = sizeof(T) == 8 ? 2 : 1, elements = sizeof(T) == 2 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < 4 / step; ++k) pack(wide + k * elements, to, words + k * step);
  __stwb(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0;  // null is
}

// Calls f(element), an object of the type that a dtype names.
template <class F>
Error with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::Float16: return f(float16{});
    case Dtype::BFloat16: return f(bfloat16{});
    case Dtype::Float32: return f(float{});
    case Dtype::Float64: return f(double{});
  }
  return "no such dtype";
}

// Puts a kernel into the stream.
template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Stream stream,
             const Arguments&... arguments) {
  std::tuple<Parameters...> values(arguments...);
  const cudaError_t error = std::apply(
      [&](Parameters&... value) {
        void* pointers[] = {static_cast<void*>(&value)...};
        return cudaLaunchKernel(kernel, grid, block, pointers, 0,
                                static_cast<cudaStream_t>(stream));
      },
      values);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gn_kernels::cuda
