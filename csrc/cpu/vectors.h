// Vectors as wide as the registers of the instruction set that a source is compiled for. Everything
// is local to the file that includes it, which is compiled several times.
#pragma once

#include "../activations.h"

namespace gn_kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// As aligned as one number is: rows begin anywhere.
template <class R>
struct VectorOf {
  typedef R type __attribute__((vector_size(kVectorBytes), aligned(sizeof(R)), may_alias));
};
template <class R>
using Vector = typename VectorOf<R>::type;
template <class R>
constexpr int kLanes = kVectorBytes / int(sizeof(R));

// V is a vector or a single number.
template <class V, class R>
GN_INLINE V load(const R* from) {
  return *reinterpret_cast<const V*>(from);
}

template <class V, class R>
GN_INLINE void store(R* to, V value) {
  *reinterpret_cast<V*>(to) = value;
}

}  // namespace
}  // namespace gn_kernels
