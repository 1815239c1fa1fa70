// What the bindings of all devices ask of torch's tensors, through LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#include "types.h"

namespace gn_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Kind kind_of(const std::string& name) {
#define ROW(Activation, text) \
  if (name == text) return Kind::Activation;
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  STD_TORCH_CHECK(false, "gn_kernels: no activation is named '", name, "'");
}

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return Dtype::Float16;
    case ScalarType::BFloat16: return Dtype::BFloat16;
    case ScalarType::Float: return Dtype::Float32;
    case ScalarType::Double: return Dtype::Float64;
    default: STD_TORCH_CHECK(false, "gn_kernels: x must be float16, bfloat16, float32 or float64");
  }
}

inline std::int64_t size_of(Dtype dtype) {
  return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2;
}

// The kernels loop over x's memory from its first element to its last.
inline void check_dense(const Tensor& x) {
  std::int64_t last = 0;
  for (std::int64_t k = 0; k < x.dim(); ++k) last += (x.size(k) - 1) * x.stride(k);
  STD_TORCH_CHECK(x.numel() == 0 || last + 1 == x.numel(), "gn_kernels: x must be dense");
}

inline void check_like(const Tensor& x, const Tensor& other) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto other_sizes = other.sizes(), other_strides = other.strides();
  bool same = other.scalar_type() == x.scalar_type() && other_sizes.size() == sizes.size();
  for (std::size_t k = 0; same && k < sizes.size(); ++k) {
    same = other_sizes[k] == sizes[k] && (sizes[k] <= 1 || other_strides[k] == strides[k]);
  }
  STD_TORCH_CHECK(same, "gn_kernels: all tensors must have x's dtype, shape and strides");
}

// torch's number for a dtype.
inline std::int32_t code_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::Float16: return aoti_torch_dtype_float16();
    case Dtype::BFloat16: return aoti_torch_dtype_bfloat16();
    case Dtype::Float32: return aoti_torch_dtype_float32();
    default: return aoti_torch_dtype_float64();
  }
}

// On x's device. The shim's own function: torch::stable::empty_like finds its operator by name at
// every call, which takes longer than a small tensor's arithmetic.
inline Tensor new_tensor(const Tensor& x, std::int32_t dtype, std::int64_t dim,
                         const std::int64_t* sizes, const std::int64_t* strides) {
  std::int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &out));
  return Tensor(out);
}

inline Tensor new_like(const Tensor& x) {
  return new_tensor(x, code_of(dtype_of(x)), x.dim(), x.sizes().data(), x.strides().data());
}

inline Tensor new_of_size_0(const Tensor& x) {
  const std::int64_t size = 0, stride = 1;
  return new_tensor(x, code_of(dtype_of(x)), 1, &size, &stride);
}

}  // namespace gn_kernels
