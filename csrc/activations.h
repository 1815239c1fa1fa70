// The activation functions and their first two derivatives, for host and device.
//
// Every function is branch-free, so that a loop over it vectorises. P is the precision (Half,
// Single, Double of coefficients.h) in which the result is needed.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GN_INLINE __host__ __device__ __forceinline__
#else
#define GN_INLINE inline __attribute__((always_inline))
#endif

namespace gn_kernels {

template <class T>
GN_INLINE T horner(T, T c) {
  return c;
}

template <class T, class... Rest>
GN_INLINE T horner(T x, T c, Rest... rest) {
  return c + x * horner(x, rest...);
}

}  // namespace gn_kernels

#include "coefficients.h"

namespace gn_kernels {

// Every kind: its struct here and its name in Python.
#define GN_KERNELS_ACTIVATIONS(ROW) \
  ROW(Gelu, "gelu")                 \
  ROW(GeluTanh, "gelu_tanh")        \
  ROW(Silu, "silu")                 \
  ROW(QuickGelu, "quick_gelu")

// An activation at one point: f(x), f'(x), f''(x). What the caller leaves unread is not computed.
template <class T>
struct Jet {
  T f, d1, d2;
};

// Numbers that belong to an IEEE format.
template <class T>
struct Format;

template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float shifter = 0x1.8p23f + 127;  // + y: the integer next to y in the last bits,
                                                     // the exponent's bias added to it
  static constexpr float ln2_high = 0x1.63p-1f;      // of few bits: n * ln2_high is exact
  static constexpr float ln2_low = -0x1.bd0106p-13f;
  static constexpr float log_zero = 88.03f;  // 127 ln 2: exp(-log_zero) comes out as 0,
  static constexpr float log_inf = 88.72f;   // 128 ln 2: and exp(log_inf) as infinity
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double shifter = 0x1.8p52 + 1023;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double log_zero = 709.09;
  static constexpr double log_inf = 709.78;
};

template <class To, class From>
GN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// exp(y) for -log_zero <= y <= log_inf: 2^n exp(r), y = n ln 2 + r. At the ends 2^n is 0 and inf.
template <class P, class T = typename P::real>
GN_INLINE T exp(T y) {
  using F = Format<T>;
  const T shifted = y * T(1.44269504088896340736) + F::shifter;
  const T n = shifted - F::shifter;
  const T r = (y - n * F::ln2_high) - n * F::ln2_low;
  const T power = bit_cast<T>(bit_cast<typename F::Bits>(shifted) << F::mantissa);
  return P::exp(r) * power;
}

// exp(y) for y <= 0; 0 where it is no normal number.
template <class P, class T = typename P::real>
GN_INLINE T exp_negative(T y) {
  constexpr T low = -Format<T>::log_zero;
  return exp<P>(y < low ? low : y);
}

// An activation at x from its left half. For every kind f(x) - f(-x) = x, so that
//   f(x) = x + f(-x),  f'(x) = 1 - f'(-x),  f''(x) = f''(-x),
// and Activation::left(a) gives f, f', f'' at -a, a >= 0, where f and f' fall to zero and are
// computed without cancellation. At a = bound they are zero.
template <class Activation, class P, class T = typename P::real>
GN_INLINE Jet<T> jet(T x) {
  constexpr T bound = Activation::template bound<T>;
  const T magnitude = std::fabs(x);
  const T a = magnitude > bound ? bound : magnitude;  // NaN stays NaN
  const Jet<T> left = Activation::template left<P>(a);
  return {(x < 0 ? T(-0.0) : x) + left.f, x < 0 ? left.d1 : 1 - left.d1, left.d2};
}

// x Phi(x), Phi the normal distribution function, phi its density:
//   f' = Phi + x phi,  f'' = (2 - x^2) phi.
struct Gelu {
  template <class T>
  static constexpr T bound = sizeof(T) == 4 ? T(13.2687) : T(37.6587);  // a^2 / 2 = log_zero

  template <class P, class T = typename P::real>
  GN_INLINE static Jet<T> left(T a) {
    constexpr T c = T(0.398942280401432677940);  // 1 / sqrt(2 pi)
    const T s = a * a;
    const T e = exp<P>(T(-0.5) * s);
    T cdf = e * P::mills(a);
    if constexpr (P::has_centre) cdf = s < 1 ? T(0.5) - a * P::centre(s) : cdf;
    return {-a * cdf, cdf - a * (c * e), (2 * c - c * s) * e};
  }
};

// x sigma(g), sigma the logistic function, g an odd function of x with derivatives dg and ddg. At
// -a, with w = sigma(-g(a)):
//   f = -a w,
//   f' = w (1 - a dg (1 - w)),
//   f'' = w (1 - w) (2 dg + a ddg - a dg^2 (1 - 2 w)).
template <class Gate>
struct Gated {
  template <class P, class T = typename P::real>
  GN_INLINE static Jet<T> left(T a) {
    const auto [g, dg, ddg] = Gate::gate(a);
    const T e = exp<P>(g);
    const T w = 1 / (1 + e);
    const T slope = a * dg;
    return {
        -a / (1 + e),
        w * (1 - slope * (1 - w)),
        w * (1 - w) * (2 * dg + a * ddg - slope * dg * (1 - 2 * w)),
    };
  }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), by (1 + tanh(g / 2)) / 2 = sigma(g).
struct GeluTanh : Gated<GeluTanh> {
  template <class T>
  static constexpr T bound = sizeof(T) == 4 ? T(10.061) : T(21.1598);  // g(a) = log_inf

  template <class T>
  GN_INLINE static Jet<T> gate(T x) {
    constexpr T a = T(1.59576912160573071176);  // 2 sqrt(2 / pi)
    constexpr T b = a * T(0.044715);
    const T s = x * x;
    return {x * (a + b * s), a + 3 * b * s, 6 * b * x};
  }
};

// x sigma(x).
struct Silu : Gated<Silu> {
  template <class T>
  static constexpr T bound = Format<T>::log_inf;

  template <class T>
  GN_INLINE static Jet<T> gate(T x) {
    return {x, T(1), T(0)};
  }
};

// x sigma(1.702 x).
struct QuickGelu : Gated<QuickGelu> {
  template <class T>
  static constexpr T bound = Format<T>::log_inf / T(1.702);

  template <class T>
  GN_INLINE static Jet<T> gate(T x) {
    constexpr T a = T(1.702);
    return {a * x, a, T(0)};
  }
};

}  // namespace gn_kernels
