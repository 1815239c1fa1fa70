// Implements the `native` overloads of the ops that gn_kernels/activation/op.py defines, on the
// CUDA key.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "torch.h"

namespace gn_kernels::cuda {
namespace {

Tensor forward(const Tensor& x, const std::string& kind) {
  const Call call(x);
  check_dense(x);
  const Tensor y = new_like(x);
  check(activation_forward(kind_of(kind), dtype_of(x), x.data_ptr(), y.data_ptr(), x.numel(),
                           call.stream));
  return y;
}

Tensor backward(const Tensor& grad, const Tensor& x, const std::string& kind) {
  const Call call(x);
  call.check_device(grad);
  check_dense(x);
  check_like(x, grad);
  const Tensor grad_x = new_like(x);
  check(activation_backward(kind_of(kind), dtype_of(x), grad.data_ptr(), x.data_ptr(),
                            grad_x.data_ptr(), x.numel(), call.stream));
  return grad_x;
}

std::tuple<Tensor, Tensor> double_backward(const Tensor& v, const Tensor& grad, const Tensor& x,
                                           const std::string& kind,
                                           const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, "gn_kernels: output_mask must have 2 entries");
  check_like(x, grad);
  if (!output_mask[1]) {  // v f'(x) alone is a first backward
    return {output_mask[0] ? backward(v, x, kind) : new_of_size_0(x), new_of_size_0(x)};
  }
  const Call call(x);
  call.check_device(v);
  call.check_device(grad);
  check_dense(x);
  check_like(x, v);
  const Tensor for_grad = output_mask[0] ? new_like(x) : new_of_size_0(x);
  const Tensor for_x = new_like(x);
  check(activation_double_backward(kind_of(kind), dtype_of(x), v.data_ptr(), grad.data_ptr(),
                                   x.data_ptr(), output_mask[0] ? for_grad.data_ptr() : nullptr,
                                   for_x.data_ptr(), x.numel(), call.stream));
  return {for_grad, for_x};
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CUDA, m) {
  m.impl("activation_forward.native", TORCH_BOX(&forward));
  m.impl("activation_backward.native", TORCH_BOX(&backward));
  m.impl("activation_double_backward.native", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace gn_kernels::cuda
