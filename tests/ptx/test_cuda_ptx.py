"""What nvcc compiles of csrc/cuda, executed: the kernels of the activations."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.generated_code import cuda_kernel
from tests.ptx.machine import Kernel, Memory, parse, run
from tests.ptx.test_triton_ptx import DTYPES, KINDS, raw, tensor_of
from tests.triton.test_activation_triton import ABSOLUTE, EXP2, FP32, ULP, oracle, ulp

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
THREADS = 128
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

# What each order reads, and for what it writes gradients or values: (factor, derivative).
ORDERS = {
    "Forward": (("x",), (("1", 0),)),
    "Backward": (("grad", "x"), (("grad", 1),)),
    "DoubleBackward": (("v", "grad", "x"), (("v", 1), ("v·grad", 2))),
    "Curvature": (("v", "grad", "x"), (("v·grad", 2),)),
}


def compile_cuda(source: str, folder: Path, target: str = "sm_90") -> dict[str, Kernel]:
    """The kernels of a file, by their mangled names."""
    file = folder / "kernels.ptx"
    command = ["nvcc", "-ptx", f"-arch={target}", "-std=c++17", "-O3", "-o", file, SOURCES / source]
    subprocess.run(command, check=True, capture_output=True)
    return parse(file.read_text())


@pytest.fixture(scope="module", params=["sm_90", "sm_100"])  # the second computes in pairs
def kernels(request, tmp_path_factory) -> dict[tuple[str, str, str], Kernel]:
    """By order, kind and dtype."""
    found = compile_cuda("activations.cu", tmp_path_factory.mktemp("ptx"), request.param)
    return {cuda_kernel(name): kernel for name, kernel in found.items()}


def execute(
    kernel: Kernel,
    order: str,
    dtype: torch.dtype,
    n: int,
    shift: int = 0,
    grid: int = 0,
    errors: Mapping[str, float] | None = None,
    x_range: tuple[float, float] = (-10, 10),
):
    """Inputs, outputs and the traffic of one launch, from addresses ``shift`` bytes off."""
    generator = torch.Generator().manual_seed(n)
    x = torch.empty(n).uniform_(*x_range, generator=generator).to(dtype)
    grad, v = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    given = {"x": x, "grad": grad, "v": v}
    reads, writes = ORDERS[order]
    memory = Memory()
    sources = [memory.put(raw(given[name]), misaligned_by=shift) for name in reads]
    results = [memory.reserve(n * dtype.itemsize, misaligned_by=shift) for _ in writes]
    size = THREADS * 2 * (16 // dtype.itemsize)
    blocks = -(-n // size)
    arguments = [
        struct.pack(f"<{len(sources + results)}Q", *sources, *results),
        n,
        struct.pack("<2q", blocks, 0 if shift else n // size),
    ]
    traffic = run(kernel, memory, arguments, (grid or blocks,), THREADS, errors=errors)
    for address in results:
        assert (memory.writes(address) == 1).all()
    for address in sources:
        assert (memory.reads(address) == 1).all()
    assert traffic[:2] == (
        len(reads) * n * dtype.itemsize,
        len(writes) * n * dtype.itemsize,
    )
    return given, [tensor_of(memory, address, dtype) for address in results]


def check(kernel: Kernel, order: str, kind: str, dtype: torch.dtype, n: int, **options):
    given, outputs = execute(kernel, order, dtype, n, **options)
    grad, v = given["grad"].double(), given["v"].double()
    factors = {"1": torch.ones_like(v), "grad": grad, "v": v, "v·grad": v * grad}
    derivatives = oracle(kind, given["x"])
    for value, (factor, derivative) in zip(outputs, ORDERS[order][1], strict=True):
        scale = factors[factor]
        truth = scale * derivatives[derivative]
        if dtype in (torch.float16, torch.bfloat16):
            bound = ULP * ulp(truth, dtype) + ABSOLUTE * scale.abs() * (derivative > 0)
        elif dtype == torch.float32:  # and the rounding of each product with a cotangent
            bound = FP32[kind][derivative] * scale.abs() + 2.0**-23 * truth.abs()
        else:
            bound = 8 * 2.0**-53 * (1 + given["x"].abs().double()) * scale.abs()
        assert ((value.double() - truth).abs() <= bound).all(), (order, kind, derivative)


def test_there_is_a_kernel_for_everything(kernels):
    assert kernels.keys() == {(o, k, d) for o in ORDERS for k in KINDS for d in DTYPES}


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != "bfloat16")],
)
def test_values_tails_and_bytes(dtype, kernels):
    size = THREADS * 2 * (16 // DTYPES[dtype].itemsize)
    for (order, kind, of), kernel in kernels.items():
        if of == dtype:
            for n in (7, 2 * size + 17):
                check(kernel, order, kind, DTYPES[dtype], n)


def test_fp32_values_keep_their_relative_accuracy_far_out(kernels):
    # f is x times an exp there, and exp2 alone, of a rounded argument, would be off by up to 2e-6.
    kernel = kernels["Forward", "silu", "float32"]
    given, (y,) = execute(kernel, "Forward", torch.float32, 3000, x_range=(-45, -25))
    truth = oracle("silu", given["x"])[0]
    assert ((y.double() / truth - 1).abs() <= 5e-7).all()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_with_the_errors_of_the_hardware(dtype, sign, kernels):
    size = THREADS * 2 * (16 // DTYPES[dtype].itemsize)
    errors = {"ex2": sign * EXP2, "rcp": sign * EXP2}
    for (order, kind, of), kernel in kernels.items():
        if of == dtype:
            check(kernel, order, kind, DTYPES[dtype], 5 * size, errors=errors)


def test_memory_that_is_not_aligned_and_more_blocks_than_programs(kernels):
    kernel = kernels["DoubleBackward", "gelu", "bfloat16"]
    check(kernel, "DoubleBackward", "gelu", torch.bfloat16, 3000, shift=2)
    check(kernel, "DoubleBackward", "gelu", torch.bfloat16, 9 * 2048 + 5, grid=2)
