// The 16-bit types in memory and their conversions, rounded to nearest even, for host and device.
// For sources that are compiled once for every instruction set: everything is local to the file
// that includes it.
#pragma once

#include <cstdint>

#include "../activations.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace gn_kernels {
namespace {

struct bfloat16 {
  static constexpr bool has_instructions = false;
  std::uint16_t bits;
};

struct float16 {
  static constexpr bool has_instructions = true;  // F16C, where that is
  std::uint16_t bits;
};

GN_INLINE float widen(bfloat16 h) { return bit_cast<float>(std::uint32_t(h.bits) << 16); }

#if defined(__CUDA_ARCH__)
GN_INLINE void narrow(float x, bfloat16& h) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
}
#else
GN_INLINE void narrow(float x, bfloat16& h) {
  const auto bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  h.bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}
#endif

#if defined(__CUDA_ARCH__)
GN_INLINE float widen(float16 h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
}

GN_INLINE void narrow(float x, float16& h) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
}
#elif defined(__F16C__)
GN_INLINE float widen(float16 h) { return _cvtsh_ss(h.bits); }

GN_INLINE void narrow(float x, float16& h) { h.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
GN_INLINE float widen(float16 h) {
  // 2^112 moves the exponent of a half to that of a float, subnormals included.
  const std::uint32_t magnitude = h.bits & 0x7fff;
  const float finite = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const std::uint32_t bits =
      magnitude < 0x7c00 ? bit_cast<std::uint32_t>(finite) : magnitude << 13 | 0x7f800000;
  return bit_cast<float>(bits | std::uint32_t(h.bits & 0x8000) << 16);
}

GN_INLINE void narrow(float x, float16& h) {
  const auto bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7fffffff;
  const std::uint32_t normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Adding 0.5 leaves the subnormal half in the last bits, rounded to even by the addition.
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  std::uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  h.bits = std::uint16_t(half | (bits >> 16 & 0x8000));
}
#endif

// n numbers. Compilers don't find F16C's 8 at a time by themselves.
template <class T>
GN_INLINE void widen(const T* in, float* out, std::int64_t n) {
  std::int64_t done = 0;
#if defined(__F16C__)
  if constexpr (T::has_instructions) {
    done = n - n % 8;
    for (std::int64_t i = 0; i < done; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (std::int64_t i = done; i < n; ++i) out[i] = widen(in[i]);
}

template <class T>
GN_INLINE void narrow(const float* in, T* out, std::int64_t n) {
  std::int64_t done = 0;
#if defined(__F16C__)
  if constexpr (T::has_instructions) {
    done = n - n % 8;
    for (std::int64_t i = 0; i < done; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    }
  }
#endif
  for (std::int64_t i = done; i < n; ++i) narrow(in[i], out[i]);
}

}  // namespace
}  // namespace gn_kernels
