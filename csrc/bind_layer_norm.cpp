// Implements the `native` overloads of the ops that gn_kernels/layer_norm/op.py defines, on the CPU
// key, through LibTorch's stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/layer_norm.h"
#include "cpu/variants.h"

namespace gn_kernels::layer_norm {

#define ROW(isa, runs_here) extern const Kernels isa;
GN_KERNELS_VARIANTS(ROW)
#undef ROW

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::Double: return Dtype::Float64;
    default: STD_TORCH_CHECK(false, "gn_kernels: expects float16, bfloat16, float32 or float64");
  }
}

// The shim's own function: torch::stable's find their operator by name at every call, which takes
// longer than the arithmetic of a small tensor.
Tensor new_tensor(const std::vector<std::int64_t>& sizes, std::int32_t dtype) {
  std::vector<std::int64_t> strides(sizes.size(), 1);
  for (std::size_t k = sizes.size(); k-- > 1;) {
    strides[k - 1] = strides[k] * std::max<std::int64_t>(sizes[k], 1);
  }
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(std::int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), /*device_index=*/0, &out));
  return Tensor(out);
}

std::int32_t code_of_dtype(const Tensor& x) {
  std::int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

Tensor like_where(bool asked, const Tensor& x) {
  if (!asked) return new_tensor({0}, code_of_dtype(x));
  return new_tensor({x.sizes().begin(), x.sizes().end()}, code_of_dtype(x));
}

Tensor like_where(bool asked, const MaybeTensor& x, const Tensor& otherwise) {
  STD_TORCH_CHECK(!asked || x, "gn_kernels: output_mask asks for the gradient of an absent tensor");
  return like_where(asked, x ? *x : otherwise);
}

void check_like(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(
      other.scalar_type() == x.scalar_type() && other.numel() == x.numel() && other.is_contiguous(),
      "gn_kernels: grad and v must be contiguous, of x's dtype and shape");
}

void* memory(const Tensor& x) { return x.data_ptr(); }

void* memory_where(bool asked, const Tensor& x) { return asked ? x.data_ptr() : nullptr; }

// One call on x: the type that it computes in, its rows, and how these are shared among threads.
class Call {
 public:
  Call(const Tensor& x, std::int64_t row_length)
      : dtype(dtype_of(x)),
        length(row_length),
        rows(x.numel() / std::max<std::int64_t>(row_length, 1)) {
    STD_TORCH_CHECK(x.is_contiguous() && rows * length == x.numel() && length > 0,
                    "gn_kernels: x must be contiguous, in rows of row_length");
  }

  bool is_double() const { return dtype == Dtype::Float64; }
  std::size_t wide_size() const { return is_double() ? sizeof(double) : sizeof(float); }

  Tensor new_statistics() const {
    return new_tensor({rows},
                      is_double() ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

  void check_statistics(const Tensor& mean, const Tensor& rstd) const {
    for (const Tensor* one : {&mean, &rstd}) {
      const auto wide = is_double() ? ScalarType::Double : ScalarType::Float;
      STD_TORCH_CHECK(one->scalar_type() == wide && one->numel() == rows && one->is_contiguous(),
                      "gn_kernels: mean and rstd must be as layer_norm_forward gives them");
    }
  }

  // A parameter in the wide type, or a row of ones or zeros in its place.
  std::vector<char> parameter(const MaybeTensor& given, double otherwise) const {
    std::vector<char> row(std::size_t(length) * wide_size());
    if (given) {
      STD_TORCH_CHECK(given->numel() == length && given->is_contiguous() &&
                          (given->scalar_type() == ScalarType::Double) == is_double(),
                      "gn_kernels: a parameter must be contiguous, one number a column");
      kernels().widen(dtype_of(*given), given->data_ptr(), row.data(), length);
    } else if (is_double()) {
      std::fill_n(reinterpret_cast<double*>(row.data()), length, otherwise);
    } else {
      std::fill_n(reinterpret_cast<float*>(row.data()), length, float(otherwise));
    }
    return row;
  }

  // Calls f(rows, scratch, sums) for blocks of rows that cover x. `sums` are zeroed rows of the
  // block's own. Blocks depend on the shape alone: so do the bits of the result.
  template <class F>
  void for_blocks(int summed, F f) {
    const std::int64_t blocks = block_count();
    partials.assign(std::size_t(blocks * summed * length) * wide_size(), 0);
    const auto work = [&](std::int64_t begin, std::int64_t end) {
      std::vector<char> scratch(std::size_t(kScratchRows * length) * wide_size());
      for (std::int64_t k = begin; k < end; ++k) {
        const Rows block{length, rows * k / blocks, rows * (k + 1) / blocks};
        char* sums[2];
        for (int s = 0; s < 2; ++s) sums[s] = partial(std::min(s, summed - 1), k);
        f(block, static_cast<void*>(scratch.data()), sums);
      }
    };
    if (rows * length <= kGrain) {
      work(0, blocks);
    } else {
      torch::stable::parallel_for(0, blocks, 1, work);
    }
  }

  // The total over the blocks of sum `s`, rounded to the dtype of `out`.
  void add_up(int s, const Tensor& out) {
    std::vector<char> total(std::size_t(length) * wide_size());
    torch::stable::parallel_for(
        0, length, kGrain / kMaxBlocks, [&](std::int64_t begin, std::int64_t end) {
          kernels().add_up(dtype, partial(s, 0), total.data(), block_count(), length, begin, end);
        });
    kernels().narrow(dtype_of(out), total.data(), out.data_ptr(), length);
  }

  const Dtype dtype;
  const std::int64_t length, rows;

 private:
  static constexpr std::int64_t kGrain = 16384, kMaxBlocks = 64;

  // About as many blocks as rows in one: then their sums have the smallest error.
  std::int64_t block_count() const {
    const auto root = std::int64_t(std::ceil(std::sqrt(double(rows))));
    return std::clamp<std::int64_t>(root, 1, kMaxBlocks);
  }

  char* partial(int s, std::int64_t block) {
    if (s < 0) return nullptr;
    return partials.data() + std::size_t((s * block_count() + block) * length) * wide_size();
  }

  std::vector<char> partials;
};

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, std::int64_t row_length,
                                                      const MaybeTensor& weight,
                                                      const MaybeTensor& bias, double eps) {
  Call call(x, row_length);
  const auto w = call.parameter(weight, 1), b = call.parameter(bias, 0);
  const Tensor y = like_where(true, x);
  const Tensor mean = call.new_statistics(), rstd = call.new_statistics();
  const Forward arguments{memory(x),    w.data(),     b.data(), memory(y),
                          memory(mean), memory(rstd), eps};
  call.for_blocks(0, [&](Rows rows, void* scratch, char**) {
    kernels().forward(call.dtype, arguments, rows, scratch);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                       std::int64_t row_length,
                                                       const MaybeTensor& weight,
                                                       const MaybeTensor& bias, const Tensor& mean,
                                                       const Tensor& rstd,
                                                       const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "gn_kernels: output_mask must have 3 entries");
  Call call(x, row_length);
  check_like(x, grad);
  call.check_statistics(mean, rstd);
  const bool asked_x = output_mask[0], asked_weight = output_mask[1], asked_bias = output_mask[2];
  const auto w = call.parameter(weight, 1);
  const Tensor for_x = like_where(asked_x, x);
  const Tensor for_weight = like_where(asked_weight, weight, x);
  const Tensor for_bias = like_where(asked_bias, bias, x);
  const void* const inputs[] = {memory(grad), memory(x), w.data(), memory(mean), memory(rstd)};
  call.for_blocks(asked_weight + asked_bias, [&](Rows rows, void* scratch, char** sums) {
    const Backward arguments{inputs[0],
                             inputs[1],
                             inputs[2],
                             inputs[3],
                             inputs[4],
                             memory_where(asked_x, for_x),
                             asked_weight ? sums[0] : nullptr,
                             asked_bias ? sums[1] : nullptr};
    kernels().backward(call.dtype, arguments, rows, scratch);
  });
  if (asked_weight) call.add_up(0, for_weight);
  if (asked_bias) call.add_up(asked_weight, for_bias);
  return {for_x, for_weight, for_bias};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(
    const MaybeTensor& v, const MaybeTensor& u, const MaybeTensor& t, const Tensor& grad,
    const Tensor& x, std::int64_t row_length, const MaybeTensor& weight, const Tensor& mean,
    const Tensor& rstd, const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 3, "gn_kernels: output_mask must have 3 entries");
  Call call(x, row_length);
  check_like(x, grad);
  if (v) check_like(x, *v);
  call.check_statistics(mean, rstd);
  const auto w = call.parameter(weight, 1), u_row = call.parameter(u, 0),
             t_row = call.parameter(t, 0);
  const bool asked_weight = output_mask[2];
  const Tensor for_grad = like_where(output_mask[0], grad), for_x = like_where(output_mask[1], x);
  const Tensor for_weight = like_where(asked_weight, weight, x);
  DoubleBackward arguments{v ? memory(*v) : nullptr,
                           u ? u_row.data() : nullptr,
                           t_row.data(),
                           memory(grad),
                           memory(x),
                           w.data(),
                           memory(mean),
                           memory(rstd),
                           memory_where(output_mask[0], for_grad),
                           memory_where(output_mask[1], for_x),
                           nullptr};
  call.for_blocks(asked_weight, [&](Rows rows, void* scratch, char** sums) {
    DoubleBackward of_block = arguments;
    of_block.sum_for_weight = asked_weight ? sums[0] : nullptr;
    kernels().double_backward(call.dtype, of_block, rows, scratch);
  });
  if (asked_weight) call.add_up(0, for_weight);
  return {for_grad, for_x, for_weight};
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CPU, m) {
  m.impl("layer_norm_forward.native", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward.native", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_double_backward.native", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace
}  // namespace gn_kernels::layer_norm
