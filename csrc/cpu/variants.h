// The variants of the kernels that were compiled, one for each instruction set.
#pragma once

#include "kernels.h"

namespace gn_kernels {

// ROW(name, whether it runs on this processor), the fastest first; the last one always runs.
#define GN_KERNELS_VARIANTS(ROW) \
  GN_KERNELS_AVX512(ROW)         \
  GN_KERNELS_AVX2(ROW)           \
  ROW(baseline, true)

#if defined(GN_KERNELS_HAVE_AVX512)
#define GN_KERNELS_AVX512(ROW)                                                           \
  ROW(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#else
#define GN_KERNELS_AVX512(ROW)
#endif

#if defined(GN_KERNELS_HAVE_AVX2)  // F16C, which old compilers cannot ask for, is as old as FMA
#define GN_KERNELS_AVX2(ROW) \
  ROW(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define GN_KERNELS_AVX2(ROW)
#endif

#define ROW(isa, runs_here) extern const Kernels isa;
GN_KERNELS_VARIANTS(ROW)
#undef ROW

}  // namespace gn_kernels
