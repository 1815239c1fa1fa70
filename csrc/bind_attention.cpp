// Implements the `native` overloads of the ops that gn_kernels/attention/op.py defines. They fill
// tensors that are given, so that the layout of results is settled in one place, there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "cpu/attention.h"
#include "cpu/variants.h"

namespace gn_kernels::attention {

#define ROW(isa, runs_here) extern const Kernels isa;
GN_KERNELS_VARIANTS(ROW)
#undef ROW

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#define ROW(isa, runs_here) \
  if (runs_here) return isa;
    GN_KERNELS_VARIANTS(ROW)
#undef ROW
  }();
  return chosen;
}

Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::Double: return Dtype::Float64;
    default: STD_TORCH_CHECK(false, "gn_kernels: q must be float16, bfloat16, float32 or float64");
  }
}

Rows rows_of(const MaybeTensor& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 4 && (x->size(3) == 1 || x->stride(3) == 1),
                  "gn_kernels: a tensor of rows must have 4 dimensions, the last one contiguous");
  return {x->data_ptr(), x->stride(0), x->stride(1), x->stride(2)};
}

Scores scores_of(const MaybeTensor& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 4, "gn_kernels: bias must have 4 dimensions");
  const auto stride = [&](std::int64_t k) { return x->size(k) == 1 ? 0 : x->stride(k); };
  return {x->data_ptr(), stride(0), stride(1), stride(2), stride(3)};
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
                   double scale, const Tensor& lse) {
  Problem p{};
  p.dtype = dtype_of(q);
  p.q = rows_of(q);
  p.k = rows_of(k);
  p.v = rows_of(v);
  p.bias = scores_of(bias);
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.n = q.size(2);
  p.size = q.size(3);
  p.m = k.size(2);
  p.period = bias ? bias->size(0) : 1;
  p.scale = scale;
  STD_TORCH_CHECK(lse.is_contiguous(), "gn_kernels: lse must be contiguous");
  p.lse = lse.data_ptr();
  return p;
}

// Calls f(task, scratch) for all tasks. A thread keeps its scratch memory for all that it is given.
template <class F>
void parallel(const Problem& p, std::int64_t tasks, F f) {
  const std::int64_t bytes = kernels().scratch_bytes(p);
  torch::stable::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
    const std::unique_ptr<char[]> memory(new char[bytes + 64]);
    char* aligned = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64);
    for (std::int64_t task = begin; task < end; ++task) f(task, aligned);
  });
}

// One task for each head; where the gradient of bias is wanted, one for each head of bias and share
// of what meets it: sums is (shares, period, heads or 1, n, m), and the only writer of a share adds
// in a fixed order.
template <class F>
void over_heads(const Problem& p, const MaybeTensor& sums, F f) {
  if (!sums) {
    return parallel(p, p.batch * p.heads, [&](std::int64_t task, void* scratch) {
      f(p, task / p.heads, task % p.heads, scratch, nullptr);
    });
  }
  STD_TORCH_CHECK(sums->is_contiguous() && sums->dim() == 5, "gn_kernels: sums must be contiguous");
  const std::int64_t shares = sums->size(0), bias_heads = sums->size(2);
  const std::int64_t heads = p.heads / bias_heads, turns = p.batch / p.period * heads;
  const std::int64_t bytes = p.n * p.m * (p.dtype == Dtype::Float64 ? 8 : 4);
  parallel(p, shares * p.period * bias_heads, [&](std::int64_t task, void* scratch) {
    const std::int64_t bias_head = task % bias_heads, element = task / bias_heads % p.period;
    char* sum = static_cast<char*>(sums->data_ptr()) + task * bytes;
    for (std::int64_t turn = task / bias_heads / p.period; turn < turns; turn += shares) {
      f(p, turn / heads * p.period + element, bias_head + turn % heads, scratch, sum);
    }
  });
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& bias,
             double scale, const Tensor& out, const Tensor& lse) {
  Problem p = problem_of(q, k, v, bias, scale, lse);
  p.out = rows_of(out);
  parallel(p, p.batch * p.heads, [&](std::int64_t task, void* scratch) {
    kernels().forward(p, task / p.heads, task % p.heads, scratch);
  });
}

void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
              const MaybeTensor& bias, const Tensor&, const Tensor& lse, double scale,
              const MaybeTensor& for_q, const MaybeTensor& for_k, const MaybeTensor& for_v,
              const MaybeTensor& sums) {
  Problem p = problem_of(q, k, v, bias, scale, lse);
  p.grad = rows_of(grad);
  p.for_q = rows_of(for_q);
  p.for_k = rows_of(for_k);
  p.for_v = rows_of(for_v);
  over_heads(p, sums, kernels().backward);
}

void double_backward(const MaybeTensor& aq, const MaybeTensor& ak, const MaybeTensor& av,
                     const MaybeTensor& abias, const Tensor& grad, const Tensor& q, const Tensor& k,
                     const Tensor& v, const MaybeTensor& bias, const Tensor&, const Tensor& lse,
                     double scale, const MaybeTensor& for_grad, const MaybeTensor& for_q,
                     const MaybeTensor& for_k, const MaybeTensor& for_v, const MaybeTensor& sums) {
  Problem p = problem_of(q, k, v, bias, scale, lse);
  p.grad = rows_of(grad);
  p.aq = rows_of(aq);
  p.ak = rows_of(ak);
  p.av = rows_of(av);
  p.abias = scores_of(abias);
  p.for_grad = rows_of(for_grad);
  p.for_q = rows_of(for_q);
  p.for_k = rows_of(for_k);
  p.for_v = rows_of(for_v);
  over_heads(p, sums, kernels().double_backward);
}

STABLE_TORCH_LIBRARY_IMPL(gn_kernels, CPU, m) {
  m.impl("attention_forward.native", TORCH_BOX(&forward));
  m.impl("attention_backward.native", TORCH_BOX(&backward));
  m.impl("attention_double_backward.native", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace gn_kernels::attention
