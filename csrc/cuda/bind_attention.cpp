// Implements the softmax ops that gn_kernels/attention/native_cuda.py defines, on the CUDA key.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../tensors.h"
#include "indices.h"
#include "torch.h"

namespace gn_kernels::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Of scores (batch, heads, n, m): the other tensors are like them. They are contiguous, or begin
// each row at the next multiple of 16 bytes; then what lies between two rows belongs to nobody.
class ScoreTensors : public Call {
 public:
  ScoreTensors(const Tensor& products, const MaybeTensor& bias, double scale,
               const Tensor& log_sums)
      : Call(products), products(products) {
    STD_TORCH_CHECK(products.dim() == 4, "gn_kernels: products must be (batch, heads, N, M)");
    const std::int64_t m = products.size(3);
    STD_TORCH_CHECK(m > 0, "gn_kernels: a row of scores must not be empty");
    const Dtype dtype = dtype_of(products);
    const std::int64_t lanes = kVectorBytes / size_of(dtype);
    const std::int64_t pitch = products.is_contiguous() ? m : (m + lanes - 1) / lanes * lanes;
    shape = {dtype,
             products.numel() / m,
             m,
             pitch,
             products.size(2),
             products.size(1),
             bias ? bias->size(0) : 1,
             scale};
    check_rows(products);
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
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == products.scalar_type(),
                    "gn_kernels: all scores must have 4 dimensions and one dtype");
    check_rows(*x);
    return x->data_ptr();
  }

  Softmax shape;

 private:
  void check_rows(const Tensor& x) const {
    bool fits = true;
    std::int64_t stride = 1;
    for (std::int64_t k = 3; k >= 0; --k) {
      fits = fits && x.size(k) == products.size(k) && (x.size(k) == 1 || x.stride(k) == stride);
      stride *= k == 3 ? shape.pitch : x.size(k);
    }
    STD_TORCH_CHECK(fits,
                    "gn_kernels: all scores must be of one shape, contiguous or with each row at "
                    "the next multiple of 16 bytes");
  }

  const Tensor& products;
};

void forward(const Tensor& products, const MaybeTensor& bias, double scale,
             const Tensor& probabilities, const Tensor& log_sums) {
  const ScoreTensors scores(products, bias, scale, log_sums);
  check(softmax_forward(scores.shape, products.data_ptr(), scores.bias(bias),
                        scores.memory(probabilities), log_sums.data_ptr(), scores.stream));
}

void backward(const Tensor& products, const MaybeTensor& bias, double scale, const Tensor& log_sums,
              const MaybeTensor& dp, const MaybeTensor& probabilities, const MaybeTensor& ds) {
  const ScoreTensors scores(products, bias, scale, log_sums);
  check(softmax_backward(scores.shape, products.data_ptr(), scores.bias(bias), log_sums.data_ptr(),
                         scores.memory(dp), scores.memory(probabilities), scores.memory(ds),
                         scores.stream));
}

void double_backward(const Tensor& products, const MaybeTensor& bias, double scale,
                     const Tensor& log_sums, const MaybeTensor& dp, const MaybeTensor& t_products,
                     const MaybeTensor& t_bias, const MaybeTensor& u,
                     const MaybeTensor& probabilities, const MaybeTensor& g, const MaybeTensor& ds,
                     const MaybeTensor& as) {
  const ScoreTensors scores(products, bias, scale, log_sums);
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
