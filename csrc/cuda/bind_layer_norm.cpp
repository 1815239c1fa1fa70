// Implements the `native` overloads of the ops that gn_kernels/layer_norm/op.py defines, on the
// CUDA key.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "torch.h"

namespace gn_kernels::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// One call on x, with its other tensors checked.
class Rows : public Call {
 public:
  Rows(const Tensor& x, std::int64_t row_length,
       std::initializer_list<const MaybeTensor*> parameters)
      : Call(x), shape{dtype_of(x), wide_dtype(x), 0, row_length} {
    STD_TORCH_CHECK(x.is_contiguous() && row_length > 0 && x.numel() % row_length == 0,
                    "gn_kernels: x must be contiguous, in rows of row_length");
    shape.rows = x.numel() / row_length;
    for (const MaybeTensor* one : parameters) {
      if (!*one) continue;
      check_device(**one);
      shape.parameter_dtype = dtype_of(**one);
      STD_TORCH_CHECK(
          (*one)->is_contiguous() && (*one)->numel() == row_length &&
              (shape.parameter_dtype == shape.dtype || shape.parameter_dtype == wide_dtype(x)),
          "gn_kernels: a parameter must be contiguous, one number a column");
    }
  }

  void check_like_x(const Tensor& x, const Tensor& other) const {
    check_device(other);
    STD_TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.numel() == x.numel() &&
                        other.is_contiguous(),
                    "gn_kernels: grad and v must be contiguous, of x's dtype and shape");
  }

  void check_statistics(const Tensor& mean, const Tensor& rstd) const {
    for (const Tensor* one : {&mean, &rstd}) {
      check_device(*one);
      STD_TORCH_CHECK(
          dtype_of(*one) == wide() && one->numel() == shape.rows && one->is_contiguous(),
          "gn_kernels: mean and rstd must be as layer_norm_forward gives them");
    }
  }

  Tensor new_wide(const Tensor& x, std::int64_t n) const {
    const std::int64_t stride = 1;
    return new_tensor(x, code_of(wide()), 1, &n, &stride);
  }

  LayerNorm shape;

 private:
  static Dtype wide_dtype(const Tensor& x) {
    return dtype_of(x) == Dtype::Float64 ? Dtype::Float64 : Dtype::Float32;
  }
  Dtype wide() const { return shape.dtype == Dtype::Float64 ? Dtype::Float64 : Dtype::Float32; }
};

const void* memory(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

void* memory_where(bool asked, const Tensor& x) { return asked ? x.data_ptr() : nullptr; }

Tensor like_where(bool asked, const MaybeTensor& x, const Tensor& otherwise) {
  STD_TORCH_CHECK(!asked || x, "gn_kernels: output_mask asks for the gradient of an absent tensor");
  return asked ? new_like(*x) : new_of_size_0(otherwise);
}

Three forward(const Tensor& x, std::int64_t row_length, const MaybeTensor& weight,
              const MaybeTensor& bias, double eps) {
  const Rows rows(x, row_length, {&weight, &bias});
  const Tensor y = new_like(x);
  const Tensor mean = rows.new_wide(x, rows.shape.rows), rstd = rows.new_wide(x, rows.shape.rows);
  check(layer_norm_forward(rows.shape, x.data_ptr(), memory(weight), memory(bias), eps,
                           y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), rows.stream));
  return {y, mean, rstd};
}

Three backward(const Tensor& grad, const Tensor& x, std::int64_t row_length,
               const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
               const Tensor& rstd, const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "gn_kernels: output_mask must have 3 entries");
  const Rows rows(x, row_length, {&weight, &bias});
  rows.check_like_x(x, grad);
  rows.check_statistics(mean, rstd);
  const bool asked_weight = output_mask[1], asked_bias = output_mask[2];
  const Tensor for_x = like_where(output_mask[0], x, x);
  const Tensor for_weight = like_where(asked_weight, weight, x);
  const Tensor for_bias = like_where(asked_bias, bias, x);
  const int sums = asked_weight + asked_bias;
  const Tensor partials =
      sums == 0 ? new_of_size_0(x) : rows.new_wide(x, sums * layer_norm_partials(rows.shape));
  check(layer_norm_backward(
      rows.shape, grad.data_ptr(), x.data_ptr(), memory(weight), mean.data_ptr(), rstd.data_ptr(),
      memory_where(output_mask[0], for_x), memory_where(asked_weight, for_weight),
      memory_where(asked_bias, for_bias), memory_where(sums != 0, partials), rows.stream));
  return {for_x, for_weight, for_bias};
}

Three double_backward(const MaybeTensor& v, const MaybeTensor& u, const MaybeTensor& t,
                      const Tensor& grad, const Tensor& x, std::int64_t row_length,
                      const MaybeTensor& weight, const Tensor& mean, const Tensor& rstd,
                      const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "gn_kernels: output_mask must have 3 entries");
  const Rows rows(x, row_length, {&u, &t, &weight});
  rows.check_like_x(x, grad);
  if (v) rows.check_like_x(x, *v);
  rows.check_statistics(mean, rstd);
  const bool asked_weight = output_mask[2];
  const Tensor for_grad = like_where(output_mask[0], grad, x);
  const Tensor for_x = like_where(output_mask[1], x, x);
  const Tensor for_weight = like_where(asked_weight, weight, x);
  const Tensor partials =
      asked_weight ? rows.new_wide(x, layer_norm_partials(rows.shape)) : new_of_size_0(x);
  check(layer_norm_double_backward(
      rows.shape, memory(v), memory(u), memory(t), grad.data_ptr(), x.data_ptr(), memory(weight),
      mean.data_ptr(), rstd.data_ptr(), memory_where(output_mask[0], for_grad),
      memory_where(output_mask[1], for_x), memory_where(asked_weight, for_weight),
      memory_where(asked_weight, partials), rows.stream));
  return {for_grad, for_x, for_weight};
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CUDA, m) {
  m.impl("layer_norm_forward.native", TORCH_BOX(&forward));
  m.impl("layer_norm_backward.native", TORCH_BOX(&backward));
  m.impl("layer_norm_double_backward.native", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace gn_kernels::cuda
