// Attention of one head on the CPU, compiled once for every instruction set. No torch here.
//
// The formulas and their names are those of gn_kernels/attention/formula.py. Nothing of size n m is
// stored: a block of queries meets all keys in scratch memory that stays in the cache.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gn_kernels::attention {

// (batch, heads, rows, size); the strides count elements, those of one row are side by side. All
// the pointers of this file may be null, for what is absent or not wanted.
struct Rows {
  void* data;
  std::int64_t batch, head, row;
};

// (period, heads, queries, keys); a stride is 0 where it broadcasts.
struct Scores {
  const void* data;
  std::int64_t element, head, query, key;
};

struct Problem {
  Dtype dtype;
  std::int64_t batch, heads, n, m, size, period;
  double scale;
  Rows q, k, v, grad, aq, ak, av;
  Scores bias, abias;
  void* lse;  // (batch, heads, n) of float, or double for Float64; +inf where a row is masked
  Rows out, for_grad, for_q, for_k, for_v;
};

// Each computes one head of one element of the batch. scratch holds scratch_bytes(problem), aligned
// to 64; sums is (n, m) of lse's type, to which the gradient of bias is added.
struct Kernels {
  std::int64_t (*scratch_bytes)(const Problem&);
  void (*forward)(const Problem&, std::int64_t b, std::int64_t h, void* scratch);
  void (*backward)(const Problem&, std::int64_t b, std::int64_t h, void* scratch, void* sums);
  void (*double_backward)(const Problem&, std::int64_t b, std::int64_t h, void* scratch,
                          void* sums);
};

}  // namespace gn_kernels::attention
