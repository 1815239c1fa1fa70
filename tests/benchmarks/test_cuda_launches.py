"""The launches that the gate and the tests of PTX assume, against those of csrc/cuda itself."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.cuda_launches import SIZES, Launch, LayerNorm, SoftmaxRows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

# CUDA's language for a C++ compiler; a launch prints what it got.
HEADER = """
#define cudaLaunchKernel run_on_host
#include "tests/native/cuda_on_host.h"
#undef cudaLaunchKernel
template <class... P, std::size_t... I>
void print(dim3 grid, dim3 block, void** arguments, std::index_sequence<I...>) {
  std::printf("%u %u %u %u", grid.x, grid.y, block.x, block.y);
  const auto bytes = [](const void* at, std::size_t size) {
    const auto* byte = static_cast<const unsigned char*>(at);
    std::printf(" ");
    for (std::size_t k = 0; k < size; ++k) std::printf("%02x", byte[k]);
  };
  (bytes(arguments[I], sizeof(P)), ...);
  std::printf("\\n");
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*)(P...), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  print<P...>(grid, block, arguments, std::index_sequence_for<P...>());
  return cudaSuccess;
}
"""
PROCESSORS = 3  # of cuda_on_host.h


def launched(folder: Path, source: str, calls: list[str]) -> list[list[str]]:
    """What the calls print: a line a launch."""
    program = folder / "launches.cpp"
    body = "\n".join(calls)
    program.write_text(
        f'{HEADER}\n#include "csrc/cuda/{source}"\n'
        "using namespace gn_kernels;\nusing namespace gn_kernels::cuda;\n"
        "template <class T = void> T* at(std::uint64_t a) { return reinterpret_cast<T*>(a); }\n"
        f"int main() {{\n{body}\n}}\n"
    )
    command = ["c++", "-std=c++17", "-O0", "-w", f"-I{ROOT}", "-o", folder / "launches", program]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([folder / "launches"], check=True, capture_output=True, text=True)
    return [line.split() for line in done.stdout.splitlines()]


def fields(value):
    if isinstance(value, ctypes.Structure):
        return tuple(fields(getattr(value, name)) for name, *_ in value._fields_)
    return tuple(value) if isinstance(value, ctypes.Array) else getattr(value, "value", value)


def check(launches: list[Launch], printed: list[list[str]]) -> None:
    assert len(launches) == len(printed)
    for launch, line in zip(launches, printed, strict=True):
        assert [*launch.grid, *launch.block] == [int(one) for one in line[:4]]
        arguments = [bytes.fromhex(one) for one in line[4:]]
        for ours, theirs in zip(launch.arguments, arguments, strict=True):
            assert ctypes.sizeof(ours) == len(theirs)
            assert fields(ours) == fields(type(ours).from_buffer_copy(theirs)), launch.kernel


NAMES = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "Float32", "float64": "Float64"}
EVERY = (
    *("x", "weight", "bias", "y", "mean", "rstd", "grad", "for_x", "for_weight", "for_bias"),
    *("partials", "v", "u", "t", "for_grad"),
)


def test_layer_norm(tmp_path):
    expected, calls = [], []
    for dtype, size in SIZES.items():
        wide = "float64" if dtype == "float64" else "float32"
        for length, rows, shift, absent, parameters in (
            (768, 12608, 0, (), wide),
            (768, 50, 8, ("u", "t"), dtype),
            (49, 7, 0, ("weight", "for_weight", "u"), wide),
            (4104, 100, 0, ("v", "for_bias"), dtype),
            (9001, 3, 0, ("bias",), wide),
            (128, 40000 * 4, 0, (), wide),
        ):
            at = {name: (k + 1 << 24) + shift * size for k, name in enumerate(EVERY)}
            at = {name: address for name, address in at.items() if name not in absent}
            call = LayerNorm(dtype, parameters, rows, length, PROCESSORS)
            p = {name: f"at({at.get(name, 0)})" for name in EVERY}
            shape = f"{{Dtype::{NAMES[dtype]}, Dtype::{NAMES[parameters]}, {rows}, {length}}}"
            calls += [
                f"layer_norm_forward({shape}, {p['x']}, {p['weight']}, {p['bias']}, 1e-6, {p['y']},"
                f" {p['mean']}, {p['rstd']}, nullptr);",
                f"layer_norm_backward({shape}, {p['grad']}, {p['x']}, {p['weight']}, {p['mean']},"
                f" {p['rstd']}, {p['for_x']}, {p['for_weight']}, {p['for_bias']}, {p['partials']},"
                " nullptr);",
                f"layer_norm_double_backward({shape}, {p['v']}, {p['u']}, {p['t']}, {p['grad']},"
                f" {p['x']}, {p['weight']}, {p['mean']}, {p['rstd']}, {p['for_grad']},"
                f" {p['for_x']}, {p['for_weight']}, {p['partials']}, nullptr);",
            ]
            of = {order: dict(at) for order in ("forward", "backward", "double_backward")}
            for name in ("for_weight", "for_bias"):
                of["forward"].pop(name, None)
            of["double_backward"].pop("for_bias", None)
            for order, tensors in of.items():
                expected += call.launches(order, tensors)
    check(expected, launched(tmp_path, "layer_norm.cu", calls))


def test_softmax(tmp_path):
    names = (
        *("products", "bias", "probabilities", "log_sums", "dp", "ds", "t_products", "t_bias"),
        *("u", "g", "as"),
    )
    expected, calls = [], []
    for dtype, size in SIZES.items():
        for shape, pitch, strides, shift, absent in (
            ((64, 12, 197, 197), 200, (0, 0, 0, 0), 0, ("bias", "t_bias")),
            ((64, 12, 197, 197), 0, (0, 0, 0, 0), 0, ("bias", "t_bias")),
            ((256, 16, 49, 49), 56, (0, 2744, 56, 1), 0, ()),
            ((256, 16, 49, 49), 56, (0, 2401, 49, 1), 0, ()),
            ((256, 16, 49, 49), 56, (0, 0, 0, 1), 0, ()),
            ((256, 16, 49, 49), 49, (0, 2744, 56, 1), 0, ()),
            ((4, 2, 3, 64), 0, (384, 192, 64, 1), 0, ("g", "u")),
            ((4, 2, 3, 64), 0, (0, 0, 0, 1), 0, ("g", "u")),
            ((4, 2, 3, 64), 72, (384, 192, 64, 1), 1, ("t_bias",)),
            ((4, 2, 3, 256), 0, (768, 0, 256, 1), 0, ("dp",)),
            ((4, 2, 3, 257), 264, (792, 0, 264, 1), 0, ("dp",)),
            ((1, 1, 3, 7), 8, (0, 0, 8, 1), 0, ()),
            ((2, 40000, 3, 100), 104, (0, 312, 104, 1), 0, ()),
            ((2, 40000, 3, 100), 0, (0, 0, 0, 1), 0, ()),
            ((4, 2, 3, 4104), 0, (0, 0, 1, 0), 0, ("probabilities", "as")),
        ):
            at = {name: (k + 1 << 24) + shift * size for k, name in enumerate(names)}
            at = {name: address for name, address in at.items() if name not in absent}
            batch, heads, n, length = shape
            call = SoftmaxRows(dtype, shape, 0.25, 2, pitch)
            p = {name: f"at({at.get(name, 0)})" for name in names}
            bias, t_bias = (
                f"SoftmaxBias{{{p[name]}, {', '.join(map(str, strides))}}}" if name in at
                else "SoftmaxBias{}"
                for name in ("bias", "t_bias")
            )  # fmt: skip
            a = (
                f"Softmax{{Dtype::{NAMES[dtype]}, {batch * heads * n}, {length},"
                f" {pitch or length}, {n}, {heads}, 2, 0.25}}"
            )
            calls += [
                f"softmax_forward({a}, {p['products']}, {bias}, {p['probabilities']},"
                f" {p['log_sums']}, nullptr);",
                f"softmax_backward({a}, {p['products']}, {bias}, {p['log_sums']}, {p['dp']},"
                f" {p['probabilities']}, {p['ds']}, nullptr);",
                f"softmax_double_backward({a}, {p['products']}, {bias}, {p['log_sums']}, {p['dp']},"
                f" {p['t_products']}, {t_bias}, {p['u']}, {p['probabilities']}, {p['g']},"
                f" {p['ds']}, {p['as']}, nullptr);",
            ]
            for order in ("forward", "backward", "double_backward"):
                expected.append(call.launch(order, at, strides))
    check(expected, launched(tmp_path, "softmax.cu", calls))
