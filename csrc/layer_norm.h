// Layer normalisation at one element, given the means over its row, for host and device.
//
// The formulas and their names are those of gn_kernels/layer_norm/formula.py: m is a mean over the
// row, x_hat = (x - m(x)) r, h = grad weight, P(a) = a - m(a) - x_hat m(a x_hat).
#pragma once

#include "activations.h"

namespace gn_kernels::layer_norm {

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
