// Implements the `native` overloads of the ops that gn_kernels/activation/op.py defines, on the CPU
// key, through LibTorch's stable ABI: one build serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/variants.h"
#include "tensors.h"

namespace gn_kernels {
namespace {

// Those of the best variant that runs on this processor.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#define ROW(isa, runs_here) \
  if (runs_here) return isa;
    GN_KERNELS_VARIANTS(ROW)
#undef ROW
  }();
  return chosen;
}

// Calls f(begin, n) for ranges of elements that cover x, on several threads where there is work to
// share. Ranges are whole blocks: the bits of the result do not depend on the number of threads.
template <class F>
void parallel(const Tensor& x, F f) {
  constexpr std::int64_t grain = 16384;
  const std::int64_t n = x.numel();
  if (n <= grain) {
    f(0, n);
    return;
  }
  torch::stable::parallel_for(0, (n + kBlock - 1) / kBlock, grain / kBlock,
                              [&](std::int64_t begin, std::int64_t end) {
                                f(begin * kBlock, std::min(end * kBlock, n) - begin * kBlock);
                              });
}

// A tensor's memory; adding i gives the address of element i.
struct Memory {
  char* data;
  std::int64_t size;

  Memory(const Tensor& x, Dtype dtype)
      : data(static_cast<char*>(x.data_ptr())), size(size_of(dtype)) {}
  char* operator+(std::int64_t i) const { return data + i * size; }
};

Tensor activation_forward(const Tensor& x, const std::string& kind_name) {
  const Kind kind = kind_of(kind_name);
  const Dtype dtype = dtype_of(x);
  check_dense(x);
  const Tensor y = new_like(x);
  const Memory in(x, dtype), out(y, dtype);
  parallel(x, [&](std::int64_t i, std::int64_t n) {
    kernels().forward(kind, dtype, in + i, out + i, n);
  });
  return y;
}

Tensor activation_backward(const Tensor& grad, const Tensor& x, const std::string& kind_name) {
  const Kind kind = kind_of(kind_name);
  const Dtype dtype = dtype_of(x);
  check_dense(x);
  check_like(x, grad);
  const Tensor grad_x = new_like(x);
  const Memory g(grad, dtype), in(x, dtype), out(grad_x, dtype);
  parallel(x, [&](std::int64_t i, std::int64_t n) {
    kernels().backward(kind, dtype, g + i, in + i, out + i, n);
  });
  return grad_x;
}

std::tuple<Tensor, Tensor> activation_double_backward(const Tensor& v, const Tensor& grad,
                                                      const Tensor& x, const std::string& kind_name,
                                                      const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 2, "gn_kernels: output_mask must have 2 entries");
  check_like(x, grad);
  if (!output_mask[1]) {  // v f'(x) alone is a first backward
    return {output_mask[0] ? activation_backward(v, x, kind_name) : new_of_size_0(x),
            new_of_size_0(x)};
  }
  const Kind kind = kind_of(kind_name);
  const Dtype dtype = dtype_of(x);
  check_dense(x);
  check_like(x, v);
  const Tensor for_grad = output_mask[0] ? new_like(x) : new_of_size_0(x);
  const Tensor for_x = new_like(x);
  const Memory vs(v, dtype), g(grad, dtype), in(x, dtype), out0(for_grad, dtype),
      out1(for_x, dtype);
  parallel(x, [&](std::int64_t i, std::int64_t n) {
    kernels().double_backward(kind, dtype, vs + i, g + i, in + i,
                              output_mask[0] ? out0 + i : nullptr, out1 + i, n);
  });
  return {for_grad, for_x};
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CPU, m) {
  m.impl("activation_forward.native", TORCH_BOX(&activation_forward));
  m.impl("activation_backward.native", TORCH_BOX(&activation_backward));
  m.impl("activation_double_backward.native", TORCH_BOX(&activation_double_backward));
}

}  // namespace
}  // namespace gn_kernels
