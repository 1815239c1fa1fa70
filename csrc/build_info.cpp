// The module gn_kernels._build_info: what was built, and what of it runs here. No kernels.
#include <pybind11/pybind11.h>

#include "cpu/variants.h"

#if defined(GN_KERNELS_HAVE_TORCH)
#include <torch/headeronly/version.h>
#else
#define TORCH_VERSION "none"
#endif

#if !defined(GN_KERNELS_CUDA)
#define GN_KERNELS_CUDA ""
#define GN_KERNELS_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the C++ part of gn_kernels was built from, and what of it runs here.";
  py::list kinds, variants;
  const char* chosen = nullptr;
#define ROW(Activation, name) kinds.append(name);
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
#define ROW(isa, runs_here) \
  variants.append(#isa);    \
  if (chosen == nullptr && (runs_here)) chosen = #isa;
  GN_KERNELS_VARIANTS(ROW)
#undef ROW
  m.attr("kinds") = py::tuple(kinds);
  m.attr("variants") = py::tuple(variants);
  m.attr("variant") = chosen;
  m.attr("compiler") = GN_KERNELS_COMPILER;
  m.attr("flags") = GN_KERNELS_FLAGS;
  m.attr("torch_headers") = TORCH_VERSION;
  m.attr("cuda") = GN_KERNELS_CUDA;
  m.attr("cuda_architectures") = GN_KERNELS_CUDA_ARCHITECTURES;
  py::dict lines;
  lines["instructions"] = chosen;
  lines["of"] = py::str("/").attr("join")(variants);
  lines["built by"] = GN_KERNELS_COMPILER;
  lines["with"] = GN_KERNELS_FLAGS;
  lines["for torch headers"] = TORCH_VERSION;
  lines["CUDA"] = GN_KERNELS_CUDA;
  lines["CUDA architectures"] = GN_KERNELS_CUDA_ARCHITECTURES;
  m.def("describe", [lines] { return lines; }, "The same as a dict of strings.");
}
