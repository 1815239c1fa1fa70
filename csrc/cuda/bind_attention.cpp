// Implements the softmax ops that gn_kernels/attention/native_cuda.py defines, on the CUDA key.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../tensors.h"
#include "torch.h"

namespace gn_kernels::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Of scores (batch, heads, n, m): the other tensors are like them.
class Scores : public Call {
 public:
  Scores(const Tensor& products, const MaybeTensor& bias, double scale, const Tensor& log_sums)
      : Call(products), products(products) {
    STD_TORCH_CHECK(products.dim() == 4 && products.is_contiguous(),
                    "gn_kernels: products must be (batch, heads, N, M) and contiguous");
    const std::int64_t m = products.size(3);
    STD_TORCH_CHECK(m > 0, "gn_kernels: a row of scores must not be empty");
    shape = {dtype_of(products), products.numel() / m,     m,    products.size(2),
             products.size(1),   bias ? bias->size(0) : 1, scale};
    check_device(log_sums);
    STD_TORCH_CHECK(log_sums.is_contiguous() && log_sums.numel() == shape.rows,
                    "gn_kernels: log_sums must be contiguous, one number a row");
  }

  SoftmaxBias bias(const MaybeTensor& x) const {
    if (!x) return {};
    check_device(*x);
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == products.scalar_type(),
                    "gn_kernels: bias must have 4 dimensions and the dtype of the scores");
    const auto stride = [&](std::int64_t k) { return x->size(k) == 1 ? 0 : x->stride(k); };
    return {x->data_ptr(), stride(0), stride(1), stride(2), stride(3)};
  }

  void* memory(const MaybeTensor& x) const {
    if (!x) return nullptr;
    check_device(*x);
    STD_TORCH_CHECK(x->is_contiguous() && x->numel() == products.numel() &&
                        x->scalar_type() == products.scalar_type(),
                    "gn_kernels: all scores must be contiguous, of one dtype and shape");
    return x->data_ptr();
  }

  Softmax shape;

 private:
  const Tensor& products;
};

void forward(const Tensor& products, const MaybeTensor& bias, double scale,
             const Tensor& probabilities, const Tensor& log_sums) {
  const Scores scores(products, bias, scale, log_sums);
  check(softmax_forward(scores.shape, products.data_ptr(), scores.bias(bias),
                        scores.memory(probabilities), log_sums.data_ptr(), scores.stream));
}

void backward(const Tensor& products, const MaybeTensor& bias, double scale, const Tensor& log_sums,
              const MaybeTensor& dp, const MaybeTensor& probabilities, const MaybeTensor& ds) {
  const Scores scores(products, bias, scale, log_sums);
  check(softmax_backward(scores.shape, products.data_ptr(), scores.bias(bias), log_sums.data_ptr(),
                         scores.memory(dp), scores.memory(probabilities), scores.memory(ds),
                         scores.stream));
}

void double_backward(const Tensor& products, const MaybeTensor& bias, double scale,
                     const Tensor& log_sums, const MaybeTensor& dp, const MaybeTensor& t_products,
                     const MaybeTensor& t_bias, const MaybeTensor& u,
                     const MaybeTensor& probabilities, const MaybeTensor& g, const MaybeTensor& ds,
                     const MaybeTensor& as) {
  const Scores scores(products, bias, scale, log_sums);
  check(softmax_double_backward(scores.shape, products.data_ptr(), scores.bias(bias),
                                log_sums.data_ptr(), scores.memory(dp), scores.memory(t_products),
                                scores.bias(t_bias), scores.memory(u), scores.memory(probabilities),
                                scores.memory(g), scores.memory(ds), scores.memory(as),
                                scores.stream));
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CUDA, m) {
  m.impl("softmax_forward.native", TORCH_BOX(&forward));
  m.impl("softmax_backward.native", TORCH_BOX(&backward));
  m.impl("softmax_double_backward.native", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace gn_kernels::cuda
