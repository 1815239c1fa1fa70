// The activation functions and their first two derivatives, for host and device.
//
// Every function is branch-free, so that a loop over it vectorises. P is the precision (Half, Fast,
// Single, Double of coefficients.h) in which the result is needed; T is P::real, or a type of
// several such numbers (cuda/pair.cuh).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define GN_INLINE __host__ __device__ __forceinline__
#else
#define GN_INLINE inline __attribute__((always_inline))
#endif

namespace gn_kernels {

using std::fabs;
using std::fma;

template <class T, class C>
GN_INLINE T horner(T, C c) {
  return c;
}

template <class T, class C, class... Rest>
GN_INLINE T horner(T x, C c, Rest... rest) {
  return c + x * horner(x, rest...);
}

// What a GPU has an instruction for, and the compiler no name that means this alone. The first two
// are off by 2 ulp on a GPU, and take numbers whose results are subnormal to be 0; the logarithm is
// off by 2^-22 between 0.5 and 2, and by as much of the result elsewhere.
#if defined(__CUDA_ARCH__)
GN_INLINE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GN_INLINE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GN_INLINE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

GN_INLINE float at_most(float x, float bound) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
}

GN_INLINE float at_least(float x, float bound) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(bound));
  return y;
}

GN_INLINE float zero_where_negative(float x) { return fmaxf(x, -0.0f); }

// x / y for finite numbers, y >= 1, within 1 ulp; 0 without its sign. The division of the language
// branches for what is rare, which keeps the compiler from weaving the arithmetic of several
// elements together.
template <class T>
GN_INLINE T divide(T x, T y) {
  const T r = fast_reciprocal(y), q = x * r;
  return fma(fma(-y, q, x), r, q);
}

GN_INLINE double divide(double x, double y) {
  double r;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(y));  // 20 bits
  const double e = fma(-y, r, 1.0);
  r = fma(e, r, r);
  const double q = x * r;
  return fma(fma(-y, q, x), r, q);
}
constexpr bool kOnGpu = true;
#else
GN_INLINE float fast_exp2(float x) { return std::exp2(x); }
GN_INLINE float fast_reciprocal(float x) { return 1 / x; }
GN_INLINE float fast_log2(float x) { return std::log2(x); }
template <class T>
GN_INLINE T divide(T x, T y) {
  return x / y;
}
constexpr bool kOnGpu = false;
#endif

// min(x, bound); NaN stays NaN.
template <class T>
GN_INLINE T at_most(T x, T bound) {
  return x > bound ? bound : x;
}

// max(x, bound); NaN stays NaN.
template <class T>
GN_INLINE T at_least(T x, T bound) {
  return x < bound ? bound : x;
}

// x, or -0 where x < 0: adding it changes no number, not even a zero.
template <class T>
GN_INLINE T zero_where_negative(T x) {
  return x < 0 ? T(-0.0) : x;
}

template <class T>
GN_INLINE T where(bool condition, T yes, T no) {
  return condition ? yes : no;
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
  // 128 ln 2: and exp(log_inf) as infinity; on a GPU as a finite number whose reciprocal is 0
  static constexpr float log_inf = kOnGpu ? 88.31f : 88.72f;
};

template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double shifter = 0x1.8p52 + 1023;
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double log_zero = 709.09;
  static constexpr double log_inf = kOnGpu ? 709.37 : 709.78;
};

template <class To, class From>
GN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class P, class X, class T>
GN_INLINE T quotient(X x, T y) {
  if constexpr (P::is_fast) return x * fast_reciprocal(y);
  return divide(T(x), y);
}

// What an argument of exp is multiplied by beforehand, in one with its other factors.
template <class P, class R = typename P::real>
constexpr R exp_unit = P::is_fast ? R(1.44269504088896340736) : R(1);

// Single, for values alone: where f is made of exp it is small, and the hardware's exp will do.
struct SingleValue : Single {};

template <class P>
using ForValue = std::conditional_t<std::is_same_v<P, Single>, SingleValue, P>;

// 2^n of n + shifter.
template <class T>
GN_INLINE T power_of_2(T shifted) {
  return bit_cast<T>(bit_cast<typename Format<T>::Bits>(shifted) << Format<T>::mantissa);
}

// exp(y / exp_unit) for -log_zero <= y <= log_inf. At the ends 0 and, but on a GPU, inf.
template <class P, class T>
GN_INLINE T exp(T y) {
  using F = Format<typename P::real>;
  constexpr auto log2_e = typename P::real(1.44269504088896340736);
  if constexpr (P::is_fast) {
    return fast_exp2(y);
  } else if constexpr (kOnGpu && std::is_same_v<P, SingleValue>) {
    const T t = y * log2_e, power = fast_exp2(t);  // y = t ln 2 + r, as t is rounded
    return fma(power, fma(t, T(-0.693147180559945309417f), y), power);
  } else {
    const T shifted = y * log2_e + F::shifter;  // y = n ln 2 + r
    const T n = shifted - F::shifter;
    const T r = (y - n * F::ln2_high) - n * F::ln2_low;
    return P::exp(r) * power_of_2(shifted);
  }
}

// exp(y) for y <= 0; 0 where it is no normal number.
template <class P, class T>
GN_INLINE T exp_negative(T y) {
  constexpr T low = -Format<T>::log_zero;
  if constexpr (!P::is_fast) y = at_least(y, low);
  return exp<P>(exp_unit<P> * y);
}

// An activation at x from its left half. For every kind f(x) - f(-x) = x, so that
//   f(x) = x + f(-x),  f'(x) = 1 - f'(-x),  f''(x) = f''(-x),
// and Activation::left(a) gives f, f', f'' at -a, a >= 0, where f and f' fall to zero and are
// computed without cancellation. At a = bound they are zero.
template <class Activation, class P, class T>
GN_INLINE Jet<T> jet(T x) {
  const T a = at_most(fabs(x), T(Activation::template bound<typename P::real>));
  const Jet<T> left = Activation::template left<P>(a);
  return {zero_where_negative(x) + left.f, where(x < 0, left.d1, 1 - left.d1), left.d2};
}

// x Phi(x), Phi the normal distribution function, phi its density:
//   f' = Phi + x phi,  f'' = (2 - x^2) phi.
struct Gelu {
  template <class T>
  static constexpr T bound = sizeof(T) == 4 ? T(13.2687) : T(37.6587);  // a^2 / 2 = log_zero

  template <class P, class T>
  GN_INLINE static Jet<T> left(T a) {
    using R = typename P::real;
    constexpr R c = R(0.398942280401432677940);  // 1 / sqrt(2 pi)
    const T s = a * a;
    const T e = exp<P>((R(-0.5) * exp_unit<P>)*s);
    T cdf = e * P::mills(a);
    if constexpr (P::has_centre) cdf = where(s < 1, R(0.5) - a * P::centre(s), cdf);
    return {-a * cdf, cdf - a * (c * e), (2 * c - c * s) * e};
  }
};

// A gate at a: unit g, dg and 2 dg + a ddg. What is a constant has the type of one.
template <class G, class D, class B>
struct GateAt {
  G g;
  D dg;
  B bend;
};
template <class G, class D, class B>
GateAt(G, D, B) -> GateAt<G, D, B>;

// x sigma(g), sigma the logistic function, g an odd function of x with derivatives dg and ddg. At
// -a, with w = sigma(-g(a)) and its derivative s = w (1 - w):
//   f = -a w,  f' = w - a dg s,  f'' = s (2 dg + a ddg - a dg^2 (1 - 2 w)).
template <class Gate>
struct Gated {
  template <class P, class T>
  GN_INLINE static Jet<T> left(T a) {
    using R = typename P::real;
    const auto [g, dg, bend] = Gate::gate(a, exp_unit<P>);
    const T e = exp<P>(g);
    const T w = quotient<P>(R(1), 1 + e);
    const T s = w - w * w, slope = a * dg;
    return {-quotient<P>(a, 1 + e), w - slope * s, s * (bend - slope * dg * (1 - 2 * w))};
  }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), by (1 + tanh(g / 2)) / 2 = sigma(g).
struct GeluTanh : Gated<GeluTanh> {
  template <class T>
  static constexpr T bound =  // g(a) = log_inf
      sizeof(T) == 4 ? T(kOnGpu ? 10.043 : 10.061) : T(kOnGpu ? 21.1555 : 21.1598);

  template <class T, class R>
  GN_INLINE static auto gate(T x, R unit) {
    constexpr R a = R(1.59576912160573071176);  // 2 sqrt(2 / pi)
    constexpr R b = a * R(0.044715);
    const T s = x * x;
    return GateAt{x * (unit * a + unit * b * s), a + 3 * b * s, 2 * a + 12 * b * s};
  }
};

// x sigma(x).
struct Silu : Gated<Silu> {
  template <class T>
  static constexpr T bound = Format<T>::log_inf;

  template <class T, class R>
  GN_INLINE static auto gate(T x, R unit) {
    return GateAt{unit * x, R(1), R(2)};
  }
};

// x sigma(1.702 x).
struct QuickGelu : Gated<QuickGelu> {
  template <class T>
  static constexpr T bound = Format<T>::log_inf / T(1.702);

  template <class T, class R>
  GN_INLINE static auto gate(T x, R unit) {
    constexpr R a = R(1.702);
    return GateAt{unit * a * x, a, 2 * a};
  }
};

// The three orders as functions of single numbers: `in` numbers are read, `out` numbers written.
template <class A, class P>
struct Forward {
  static constexpr int in = 1, out = 1;

  template <class T>
  GN_INLINE static void apply(const T (&in)[1], T (&out)[1]) {
    out[0] = jet<A, ForValue<P>>(in[0]).f;
  }
};

template <class A, class P>
struct Backward {
  static constexpr int in = 2, out = 1;

  template <class T>
  GN_INLINE static void apply(const T (&in)[2], T (&out)[1]) {
    const auto [grad, x] = in;
    out[0] = grad * jet<A, P>(x).d1;
  }
};

template <class A, class P>
struct DoubleBackward {
  static constexpr int in = 3, out = 2;

  template <class T>
  GN_INLINE static void apply(const T (&in)[3], T (&out)[2]) {
    const auto [v, grad, x] = in;
    const Jet<T> at_x = jet<A, P>(x);
    out[0] = v * at_x.d1;
    out[1] = v * grad * at_x.d2;
  }
};

template <class A, class P>
struct Curvature {  // the second output of DoubleBackward alone
  static constexpr int in = 3, out = 1;

  template <class T>
  GN_INLINE static void apply(const T (&in)[3], T (&out)[1]) {
    const auto [v, grad, x] = in;
    out[0] = v * grad * jet<A, P>(x).d2;
  }
};

}  // namespace gn_kernels
