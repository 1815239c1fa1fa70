// The softmax of attention at one score, given the sums over its row, for host and device.
//
// The formulas and their names are those of gn_kernels/attention/formula.py: S = scale Q K^T +
// bias, P = softmax(S), and T the cotangent of S in the backward pass.
#pragma once

#include "activations.h"

namespace gn_kernels::softmax {

// P, from the logarithm of the row's sum of exp(S): +inf where the row is masked entirely.
template <class P, class T = typename P::real>
GN_INLINE T probability(T score, T log_sum) {
  return exp_negative<P>(score - log_sum);
}

// dS, with delta = sum(P dP).
template <class T>
GN_INLINE T backward(T p, T dp, T delta) {
  return p * (dp - delta);
}

// The cotangents of dP, which is G, and of S, which is aS, from T and U = dO aV^T.
template <class T>
struct DoubleBackward {
  T tau, delta, rho;  // sum(P T), sum(P dP), sum(P (T dP + U)) - 2 tau delta

  GN_INLINE T for_dp(T p, T t) const { return p * (t - tau); }
  GN_INLINE T for_s(T p, T dp, T t, T u) const {
    return p * (t * (dp - delta) - tau * dp + u - rho);
  }
};

}  // namespace gn_kernels::softmax
