// Loads and stores of the four element types, and their conversions to the type of the arithmetic.
#pragma once

#include <cstdint>

#include "indices.h"
#include "kernels.h"

namespace gn_kernels::cuda {

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

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

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) {
  return __uint_as_float(std::uint32_t(x.bits) << 16);
}
__device__ __forceinline__ float widen(float16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, bfloat16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}
__device__ __forceinline__ void narrow(float x, float16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
}

// The elements in one 32-bit word of memory; of a double, in two.
__device__ __forceinline__ void unpack(const std::uint32_t* word, const float*, float* wide) {
  *wide = __uint_as_float(*word);
}
__device__ __forceinline__ void unpack(const std::uint32_t* word, const double*, double* wide) {
  *wide = __hiloint2double(int(word[1]), int(word[0]));
}
__device__ __forceinline__ void unpack(const std::uint32_t* word, const bfloat16*, float* wide) {
  wide[0] = __uint_as_float(*word << 16);
  wide[1] = __uint_as_float(*word & 0xffff0000);
}
__device__ __forceinline__ void unpack(const std::uint32_t* word, const float16*, float* wide) {
  wide[0] = widen(float16{std::uint16_t(*word)});
  wide[1] = widen(float16{std::uint16_t(*word >> 16)});
}

__device__ __forceinline__ void pack(const float* wide, const float*, std::uint32_t* word) {
  *word = __float_as_uint(*wide);
}
__device__ __forceinline__ void pack(const double* wide, const double*, std::uint32_t* word) {
  word[0] = std::uint32_t(__double2loint(*wide));
  word[1] = std::uint32_t(__double2hiint(*wide));
}
__device__ __forceinline__ void pack(const float* wide, const bfloat16*, std::uint32_t* word) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*word) : "f"(wide[1]), "f"(wide[0]));
}
__device__ __forceinline__ void pack(const float* wide, const float16*, std::uint32_t* word) {
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*word) : "f"(wide[1]), "f"(wide[0]));
}

// One vector at an aligned address.
template <class T>
__device__ __forceinline__ void load_vector(const T* from, Wide<T>* wide) {
  const uint4 vector = *reinterpret_cast<const uint4*>(from);
  const std::uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  constexpr int step = sizeof(T) == 8 ? 2 : 1, elements = sizeof(T) == 2 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < 4 / step; ++k) unpack(words + k * step, from, wide + k * elements);
}

template <class T>
__device__ __forceinline__ void store_vector(const Wide<T>* wide, T* to) {
  std::uint32_t words[4];
  constexpr int step = sizeof(T) == 8 ? 2 : 1, elements = sizeof(T) == 2 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < 4 / step; ++k) pack(wide + k * elements, to, words + k * step);
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
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

inline Error launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace gn_kernels::cuda
