// The CUDA kernels as functions: raw pointers and a stream, no header of torch or CUDA, so that
// they can be called without Python and without torch.
//
// A call returns when its kernels are in the stream, on the device that is current; it allocates
// nothing, waits for nothing and can be captured into a CUDA graph. It returns null, or what went
// wrong at launch, in CUDA's words.
#pragma once

#include <cstdint>

#include "../types.h"

namespace gn_kernels::cuda {

using Stream = void*;  // a cudaStream_t
using Error = const char*;

// Memory of `n` elements of `dtype` each, at any address; outputs overlap nothing else.

// y = f(x)
Error activation_forward(Kind, Dtype, const void* x, void* y, std::int64_t n, Stream);
// grad_x = grad f'(x)
Error activation_backward(Kind, Dtype, const void* grad, const void* x, void* grad_x,
                          std::int64_t n, Stream);
// grad_grad = v f'(x) and grad_x = v grad f''(x); a null grad_grad is not computed
Error activation_double_backward(Kind, Dtype, const void* v, const void* grad, const void* x,
                                 void* grad_grad, void* grad_x, std::int64_t n, Stream);

}  // namespace gn_kernels::cuda
