// What the CUDA bindings ask of torch: the device, its current stream, and errors as exceptions.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace gn_kernels::cuda {

// torch's CUDA half has the function, and is not linked with: this library serves CPU builds too.
inline Stream current_stream(std::int32_t device) {
  using Get = AOTITorchError (*)(std::int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(
        library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "gn_kernels: torch was built without CUDA");
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// For the time of one call on x: x's device is the current one, and `stream` is its current stream.
class Call {
 public:
  explicit Call(const torch::stable::Tensor& x)
      : device(x.get_device_index()), guard(device), stream(current_stream(device)) {}

  void check_device(const torch::stable::Tensor& other) const {
    STD_TORCH_CHECK(other.is_cuda() && other.get_device_index() == device,
                    "gn_kernels: all tensors must be on the same GPU");
  }

 private:
  const std::int32_t device;
  const torch::stable::accelerator::DeviceGuard guard;

 public:
  const Stream stream;
};

inline void check(Error error) {
  if (error == nullptr) return;
  const bool no_code = std::strstr(error, "no kernel image") != nullptr;
  STD_TORCH_CHECK(
      false, "gn_kernels: CUDA: ", error,
      no_code ? "; set TORCH_CUDA_ARCH_LIST to this GPU's compute capability and "
                "install gn_kernels again (it was built for " GN_KERNELS_CUDA_ARCHITECTURES ")"
              : "");
}

}  // namespace gn_kernels::cuda
