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

// The logarithm of a sum of exponentials.
template <class P, class T = typename P::real>
GN_INLINE T log_of_sum(T sum) {
  constexpr auto ln_2 = T(0.693147180559945309417);
  if constexpr (P::is_fast) return ln_2 * fast_log2(sum);
  return std::log(sum);
}

// dS, of dP less its mean delta = sum(P dP).
template <class T>
GN_INLINE T backward(T p, T dp) {
  return p * dp;
}

// The cotangents of dP, which is G, and of S, which is aS, from T and U = dO aV^T: of T and dP less
// their means tau = sum(P T) and delta, and with rho = sum(P (T dP + U)) - tau delta.
template <class T>
GN_INLINE T for_dp(T p, T t) {
  return p * t;
}

template <class T>
GN_INLINE T for_s(T p, T dp, T t, T u, T rho) {
  return p * (t * dp + (u - rho));
}

}  // namespace gn_kernels::softmax
