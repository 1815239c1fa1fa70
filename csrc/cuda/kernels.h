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

// Contiguous tensors of `rows` times `length` elements, at least one. Parameters have `length`
// elements of parameter_dtype: x's, or the wide type, which is double for double and float
// otherwise. Statistics have one wide number a row. Inputs that may be null: weight, bias, v, u, t;
// results that are null are not computed.
struct LayerNorm {
  Dtype dtype, parameter_dtype;
  std::int64_t rows, length;
};

// Wide numbers of memory that each of the sums for_weight and for_bias needs on the current device.
std::int64_t layer_norm_partials(const LayerNorm&);

Error layer_norm_forward(const LayerNorm&, const void* x, const void* weight, const void* bias,
                         double eps, void* y, void* mean, void* rstd, Stream);
Error layer_norm_backward(const LayerNorm&, const void* grad, const void* x, const void* weight,
                          const void* mean, const void* rstd, void* for_x, void* for_weight,
                          void* for_bias, void* partials, Stream);
Error layer_norm_double_backward(const LayerNorm&, const void* v, const void* u, const void* t,
                                 const void* grad, const void* x, const void* weight,
                                 const void* mean, const void* rstd, void* for_grad, void* for_x,
                                 void* for_weight, void* partials, Stream);

// Scores of attention, (batch, heads, n, length): `rows` rows in all, which begin `pitch` elements
// after each other. What lies between a row's end and the next multiple of 16 bytes may hold
// anything, and may be written. Rows at multiples of 16 bytes take much less time than others.
struct Softmax {
  Dtype dtype;
  std::int64_t rows, length, pitch, n, heads, period;
  double scale;
};

// (period, heads, n, length) of the scores' dtype, or null; element b of the batch meets b %
// period, and a stride is 0 where it broadcasts. Of rows at multiples of 16 bytes the next multiple
// after the end can be read, whatever is there.
struct SoftmaxBias {
  const void* data = nullptr;
  std::int64_t element = 0, head = 0, query = 0, key = 0;
  bool vectors = false;  // set by the kernels' launch
};

// Of S = scale products + bias: P, and the logarithm of each row's sum of exp(S), a wide number.
Error softmax_forward(const Softmax&, const void* products, const SoftmaxBias& bias,
                      void* probabilities, void* log_sums, Stream);
// P and dS, from dP, null for 0; those that are null are not computed.
Error softmax_backward(const Softmax&, const void* products, const SoftmaxBias& bias,
                       const void* log_sums, const void* dp, void* probabilities, void* ds, Stream);
// P, G, dS and aS, from dP, T = scale t_products + t_bias and U; any of the last three may be null,
// which stands for 0, and of the results those that are null are not computed.
Error softmax_double_backward(const Softmax&, const void* products, const SoftmaxBias& bias,
                              const void* log_sums, const void* dp, const void* t_products,
                              const SoftmaxBias& t_bias, const void* u, void* probabilities,
                              void* g, void* ds, void* as, Stream);

}  // namespace gn_kernels::cuda
