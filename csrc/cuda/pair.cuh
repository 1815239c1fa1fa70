// Two floats that are computed together: from sm_100 on one instruction multiplies and adds both.
#pragma once

#include <cstdint>

#include "../activations.h"

#if __CUDA_ARCH__ >= 1000
#define GN_ON_PAIR __device__ __forceinline__

namespace gn_kernels {

struct alignas(8) Pair {
  float first, second;

  Pair() = default;
  GN_ON_PAIR Pair(float x) : first(x), second(x) {}
  GN_ON_PAIR Pair(float x, float y) : first(x), second(y) {}
};

struct Truths {
  bool first, second;
};

GN_ON_PAIR std::uint64_t word_of(Pair x) {
  std::uint64_t word;
  asm("mov.b64 %0, {%1, %2};" : "=l"(word) : "f"(x.first), "f"(x.second));
  return word;
}

GN_ON_PAIR Pair pair_of(std::uint64_t word) {
  float x, y;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(x), "=f"(y) : "l"(word));
  return {x, y};
}

// None says how it rounds, so that a product and a sum may become one instruction.
#define OPERATOR(sign, instruction)                                               \
  GN_ON_PAIR Pair operator sign(Pair x, Pair y) {                                 \
    std::uint64_t z;                                                              \
    asm(instruction " %0, %1, %2;" : "=l"(z) : "l"(word_of(x)), "l"(word_of(y))); \
    return pair_of(z);                                                            \
  }
OPERATOR(+, "add.f32x2")
OPERATOR(-, "sub.f32x2")
OPERATOR(*, "mul.f32x2")
#undef OPERATOR

// With a constant. The compiler does not see that a product in assembly leaves x as it is.
GN_ON_PAIR Pair operator*(Pair x, float y) { return y == 1 ? x : x * Pair(y); }
GN_ON_PAIR Pair operator*(float x, Pair y) { return y * x; }
GN_ON_PAIR Pair operator-(Pair x) { return {-x.first, -x.second}; }

GN_ON_PAIR Pair fma(Pair x, Pair y, Pair z) {
  std::uint64_t w;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(w) : "l"(word_of(x)), "l"(word_of(y)), "l"(word_of(z)));
  return pair_of(w);
}

GN_ON_PAIR Truths operator<(Pair x, float y) { return {x.first < y, x.second < y}; }

GN_ON_PAIR Pair where(Truths condition, Pair yes, Pair no) {
  return {where(condition.first, yes.first, no.first),
          where(condition.second, yes.second, no.second)};
}

GN_ON_PAIR Pair at_most(Pair x, Pair y) {
  return {at_most(x.first, y.first), at_most(x.second, y.second)};
}

#define FUNCTION(name) \
  GN_ON_PAIR Pair name(Pair x) { return {name(x.first), name(x.second)}; }
FUNCTION(fabs)
FUNCTION(fast_exp2)
FUNCTION(fast_reciprocal)
FUNCTION(power_of_2)
FUNCTION(zero_where_negative)
#undef FUNCTION

}  // namespace gn_kernels

#undef GN_ON_PAIR
#endif

namespace gn_kernels {

template <class R>
struct Together {
  using type = R;
};
#if __CUDA_ARCH__ >= 1000
template <>
struct Together<float> {
  using type = Pair;
};
#endif

// What numbers of type R are computed as: one, or several at a time.
template <class R>
using Computed = typename Together<R>::type;

}  // namespace gn_kernels
