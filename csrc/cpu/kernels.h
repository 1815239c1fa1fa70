// The loops over memory, compiled once for every instruction set. No torch here.
#pragma once

#include <cstdint>

#include "../types.h"

namespace gn_kernels {

// Memory of `n` elements of `dtype` each; outputs overlap nothing else.
struct Kernels {
  // y = f(x)
  void (*forward)(Kind, Dtype, const void* x, void* y, std::int64_t n);
  // grad_x = grad f'(x)
  void (*backward)(Kind, Dtype, const void* grad, const void* x, void* grad_x, std::int64_t n);
  // grad_grad = v f'(x) and grad_x = v grad f''(x); a null grad_grad is not computed
  void (*double_backward)(Kind, Dtype, const void* v, const void* grad, const void* x,
                          void* grad_grad, void* grad_x, std::int64_t n);
};

// Elements are handled in blocks of this many; a range that starts and ends at a multiple of it
// gives the same bits as the whole.
constexpr std::int64_t kBlock = 256;

}  // namespace gn_kernels
