// The loops of layer normalisation, compiled once for every instruction set. No torch here.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gn_kernels::layer_norm {

// `Dtype` is that of x and of what has x's shape: y, grad, v, for_x, for_grad. Everything else is
// "wide": float, or double for double. A parameter is never null; ones or zeros stand for absent.
// A null result is not computed. Sums are added to what lies there.

struct Forward {
  const void *x, *weight, *bias;
  void *y, *mean, *rstd;
  double eps;
};

struct Backward {
  const void *grad, *x, *weight, *mean, *rstd;
  void* for_x;
  void *sum_for_weight, *sum_for_bias;
};

struct DoubleBackward {
  const void *v, *u, *t, *grad, *x, *weight, *mean, *rstd;  // null: v or u is absent
  void *for_grad, *for_x;
  void* sum_for_weight;
};

// Rows [begin, end) of `length` numbers each.
struct Rows {
  std::int64_t length, begin, end;
};

// Wide rows of scratch memory that each call needs.
constexpr int kScratchRows = 5;

struct Kernels {
  void (*forward)(Dtype, Forward, Rows, void* scratch);
  void (*backward)(Dtype, Backward, Rows, void* scratch);
  void (*double_backward)(Dtype, DoubleBackward, Rows, void* scratch);
  // between a dtype and the wide type that belongs to it or, for parameters, to x
  void (*widen)(Dtype, const void* in, void* wide, std::int64_t n);
  void (*narrow)(Dtype, const void* wide, void* out, std::int64_t n);
  // sums[i] = the sum over k of partials[k * n + i], in order, for i in [begin, end)
  void (*add_up)(Dtype, const void* partials, void* sums, std::int64_t count, std::int64_t n,
                 std::int64_t begin, std::int64_t end);
};

}  // namespace gn_kernels::layer_norm
