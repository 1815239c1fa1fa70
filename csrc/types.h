// What kernels are called with, on the CPU and on a GPU.
#pragma once

#include "activations.h"

namespace gn_kernels {

enum class Kind {
#define ROW(Activation, name) Activation,
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
};

enum class Dtype { Float16, BFloat16, Float32, Float64 };

}  // namespace gn_kernels
