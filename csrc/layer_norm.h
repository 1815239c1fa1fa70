// Layer normalisation at one element, given the means over its row, for host and device.
//
// The formulas and their names are those of gn_kernels/layer_norm/formula.py: m is a mean over the
// row, x_hat = (x - m(x)) r, h = grad weight, P(a) = a - m(a) - x_hat m(a x_hat).
#pragma once

#include "activations.h"

namespace gn_kernels::layer_norm {

// 1 / sqrt(x), within 1 ulp. Without branches on a GPU, whose instruction is 2 ulp off in fp32 and
// has 20 bits in fp64: a step of Newton's or Halley's mends that. What it makes of 0 and infinity
// stays; in fp64 it takes subnormal numbers for 0.
#if defined(__CUDA_ARCH__)
GN_INLINE float reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float s = x * y, e = fmaf(-y, fmaf(x, y, -s), fmaf(-y, s, 1.0f));  // 1 - x y^2
  const float root = fmaf(0.5f * y, e, y);
  return root == root ? root : y;
}

GN_INLINE double reciprocal_root(double x) {
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  const double s = x * y, e = fma(-y, fma(x, y, -s), fma(-y, s, 1.0));
  const double root = fma(e * y, fma(e, 0.375, 0.5), y);
  return root == root ? root : y;
}
#else
template <class T>
GN_INLINE T reciprocal_root(T x) {
  return 1 / std::sqrt(x);
}
#endif

// r P(a)
template <class T>
struct Projection {
  T r, mean, mean_x;  // m(a), m(a x_hat)
  template <class V>  // T, or a vector of it
  GN_INLINE V operator()(V a, V x_hat) const {
    return r * (a - mean - x_hat * mean_x);
  }
};

// What x gets in the double backward pass from the cotangent v of its gradient.
template <class T>
struct Curvature {
  Projection<T> v, h;
  T along;  // m(v P(h)) - m(v x_hat) m(h x_hat)

  GN_INLINE Curvature(Projection<T> v, Projection<T> h, T mean_vh)
      : v(v), h(h), along(mean_vh - v.mean * h.mean - 2 * (v.mean_x * h.mean_x)) {}

  template <class V>
  GN_INLINE V operator()(V r_pv, V h_value, V x_hat) const {
    return -v.r * (h.mean_x * r_pv + v.r * (v.mean_x * (h_value - h.mean) + along * x_hat));
  }
};

}  // namespace gn_kernels::layer_norm
