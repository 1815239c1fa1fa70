"""What Triton compiles for sm_90, executed: values, every tail, and the bytes that it moves.

The interpreter of the other tests runs the source; this runs what a GPU's assembler gets, with its
fused multiply-adds, its rounding to bf16, its approximations, its vectors and its barriers.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.layer_norm import plain
from tests.layer_norm.test_accuracy import HALF, ROUNDINGS
from tests.ptx.machine import Kernel, Memory, bf16_bits, parse, run
from tests.triton.test_activation_triton import ABSOLUTE, EXP2, FP32, RSQRT, ULP, oracle, ulp

ROOT = Path(__file__).parents[2]
BLOCK = 1024
KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu")
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Tensors that an order reads and writes.
ORDERS = {
    "forward": (1, 1),
    "backward": (2, 1),
    "double_backward": (3, 2),
    "double_backward, of x alone": (3, 1),
}


@functools.cache
def compiled(*arguments: str) -> list[dict]:
    # In a process of its own: in this one, kernels are interpreted.
    command = [sys.executable, "-m", "tests.ptx.triton_ptx", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def code_of(row: dict) -> Kernel:
    (kernel,) = parse(row["ptx"]).values()
    return kernel


def raw(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as NumPy has it; bf16 as its bits."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return bf16_bits(tensor.float().numpy())


def tensor_of(memory: Memory, address: int, dtype: torch.dtype) -> torch.Tensor:
    data = torch.from_numpy(memory.get(address, np.uint8).copy())
    return data.view(dtype)


def run_activation(row: dict, tensors: dict[str, torch.Tensor], errors: dict[str, float]):
    """One order, of those inputs: outputs by name, and the traffic."""
    memory, n = Memory(), tensors["x_ptr"].numel()
    whole, rest = divmod(n, BLOCK)
    nbytes = n * tensors["x_ptr"].element_size()
    addresses = {
        name: memory.put(raw(tensors[name])) if name in tensors else memory.reserve(nbytes)
        for name, value in row["parameters"]
        if value is None
    }
    numbers = {"whole": whole, "rest": rest}
    arguments = [addresses.get(name, numbers.get(name)) for name, _ in row["parameters"]]
    grid = (whole + (rest > 0),)
    traffic = run(code_of(row), memory, [*arguments, 0, 0], grid, row["threads"], errors=errors)
    outputs = {}
    for name, address in addresses.items():
        if name not in tensors:
            assert (memory.writes(address) == 1).all(), name
            outputs[name] = tensor_of(memory, address, tensors["x_ptr"].dtype)
    return outputs, traffic


def check_activation(row: dict, dtype: torch.dtype, n: int, errors: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.empty(n).uniform_(-10, 10, generator=generator).to(dtype)
    grad, v = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    tensors = {"x_ptr": x, "grad_ptr": grad, "v_ptr": v}
    outputs, traffic = run_activation(row, tensors, errors)
    reads, writes = ORDERS[row["order"]]
    size = x.element_size()
    assert traffic[:2] == (reads * n * size, writes * n * size)
    f, f1, f2 = oracle(row["subject"], x)
    grad, v = grad.double(), v.double()
    expected = {
        "y_ptr": (f, torch.ones_like(f), 0),
        "out_ptr": (grad * f1, grad, 1),
        "for_grad_ptr": (v * f1, v, 1),
        "for_x_ptr": (v * grad * f2, v * grad, 2),
    }
    for name, value in outputs.items():
        truth, scale, order = expected[name]
        error = (value.double() - truth).abs()
        if dtype in (torch.float16, torch.bfloat16):
            bound = ULP * ulp(truth, dtype) + ABSOLUTE * scale.abs() * (name != "y_ptr")
        elif dtype == torch.float32:  # and the rounding of each product with a cotangent
            bound = FP32[row["subject"]][order] * scale.abs() + 2.0**-23 * truth.abs()
        else:
            bound = 8 * 2.0**-53 * (1 + x.abs().double()) * scale.abs()
        assert (error <= bound).all(), (row["subject"], row["order"], name)


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "float32",
        pytest.param("float16", marks=pytest.mark.slow),
        pytest.param("float64", marks=pytest.mark.slow),
    ],
)
def test_activations(dtype):
    rows = compiled("activation", dtype)
    assert [(row["subject"], row["order"]) for row in rows] == [
        (kind, order) for kind in KINDS for order in ORDERS
    ]
    for row in rows:
        for n in (7, BLOCK, 2 * BLOCK + 17):
            check_activation(row, DTYPES[dtype], n, {})


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_with_the_errors_of_the_hardware(dtype, sign):
    for row in compiled("activation", dtype):
        check_activation(row, DTYPES[dtype], 5 * BLOCK, {"ex2": sign * EXP2, "rsqrt": sign * RSQRT})


def test_a_block_beyond_two_to_the_31_elements():
    row = next(r for r in compiled("activation", "bfloat16") if r["order"] == "backward")
    block = 2**21 + 3  # starts at element 2³¹ + 3072
    memory = Memory()
    x, grad = torch.randn(2, BLOCK + 5).to(torch.bfloat16)
    start = 2 * BLOCK * block
    inputs = {name: memory.put(raw(t), first=start) for name, t in (("x", x), ("grad", grad))}
    out = memory.reserve(2 * (BLOCK + 5), first=start)
    arguments = [inputs["grad"], inputs["x"], out, block + 1, 5, 0, 0]
    run(code_of(row), memory, arguments, (block + 2,), 128, blocks=[block, block + 1])
    assert (memory.writes(out) == 1).all()
    truth = grad.double() * oracle("gelu", x)[1]
    error = (tensor_of(memory, out, torch.bfloat16).double() - truth).abs()
    assert (error <= ULP * ulp(truth, torch.bfloat16) + ABSOLUTE * grad.double().abs()).all()


# -- LayerNorm -----------------------------------------------------------------------------------


def run_layer_norm(rows: list[dict], case, dtype: torch.dtype):
    """All orders in sequence: the results by :mod:`plain`'s names, and how often bytes moved."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    memory = Memory()
    count, length = case.x.shape
    row_bytes, wide_size = length * case.x.element_size(), wide.itemsize
    known = {
        "x": case.x, "weight": case.weight, "bias": case.bias, "grad": case.grad,
        "v": case.v, "u": case.u, "t": case.t,
    }  # fmt: skip
    at = {name: memory.put(raw(value)) for name, value in known.items()}
    results, traffic = {}, {}
    for row in rows:
        order, kernel = row["order"], row["kernel"]
        programs = row["grid"][0]
        if kernel != "_column_sums_kernel":
            sums = {"forward": 0, "backward": 2, "double_backward": 1}[order]
            if order == "forward":
                at["mean"], at["rstd"] = (memory.reserve(count * wide_size) for _ in range(2))
                at["y"] = memory.reserve(count * row_bytes)
            else:
                at["partials"] = memory.reserve(sums * programs * length * wide_size)
                at["for_weight"] = at["partials"]
                at["for_bias"] = at["partials"] + (sums - 1) * programs * length * wide_size
                at["for_x"], at["for_grad"] = (memory.reserve(count * row_bytes) for _ in range(2))
            sizes = (programs, sums)
        else:
            at["first"], at["second"] = (memory.reserve(length * wide_size) for _ in range(2))
            if sizes[1] == 1:
                at["second"] = at["first"]
        arguments = [at[name] if value is None else value for name, value in row["parameters"]]
        before = {name: memory.reads(at[name]).copy() for name in ("x", "grad", "v")}
        run(
            code_of(row), memory, [*arguments, 0, 0], tuple(row["grid"]), row["threads"],
            dynamic_shared=row["shared"],
        )  # fmt: skip
        if kernel != "_column_sums_kernel":
            traffic[order] = {
                name: memory.reads(at[name]) - count for name, count in before.items()
            } | {name: memory.writes(at[name]) for name in ("y", "for_x", "for_grad") if name in at}

        def result(name: str, kind: torch.dtype) -> torch.Tensor:
            assert (memory.writes(at[name]) > 0).all(), name
            return tensor_of(memory, at[name], kind)

        if kernel == "_column_sums_kernel":
            names = {"backward": ("dweight", "dbias"), "double_backward": ("for weight",)}[order]
            for name, place in zip(names, ("first", "second"), strict=False):
                results[name] = result(place, wide)
        else:
            for name, place in {
                "forward": {"y": "y"},
                "backward": {"dx": "for_x"},
                "double_backward": {"for grad": "for_grad", "for x": "for_x"},
            }[order].items():
                results[name] = result(place, dtype).view(count, length)
    return results, traffic


@pytest.mark.parametrize(
    ("dtype", "rows", "length"),
    [
        ("bfloat16", 13, 48),
        pytest.param("float16", 70, 197, marks=pytest.mark.slow),
        ("float32", 5, 768),
        pytest.param("float64", 13, 48, marks=pytest.mark.slow),
        pytest.param("bfloat16", 5, 1000, marks=pytest.mark.slow),
    ],
)
def test_layer_norm(dtype, rows, length):
    kind = DTYPES[dtype]
    wide = torch.float64 if kind == torch.float64 else torch.float32
    case = plain.make((rows, length), dtype=kind, parameter_dtype=wide)
    results, traffic = run_layer_norm(
        compiled("layer_norm", dtype, str(rows), str(length)), case, kind
    )
    expected, scales = plain.derived(case), plain.scales(case)
    assert results.keys() == expected.keys()
    unit = 2.0**-53 if kind == torch.float64 else 2.0**-24
    for name, value in results.items():
        bound = ROUNDINGS[name] * unit * scales[name]
        if value.dtype in HALF:
            bound += ULP * ulp(expected[name], kind)
        assert ((value.double() - expected[name]).abs() <= bound).all(), name

    # Each tensor of x's size moves once; the forward pass looks at a row's first number again.
    for order, counts in traffic.items():
        reads = {"forward": ["x"], "backward": ["x", "grad"], "double_backward": ["x", "grad", "v"]}
        for name in reads[order]:
            once = counts[name].reshape(rows, -1)
            assert (once[:, kind.itemsize :] == 1).all(), (order, name)
            assert (once[:, 0] >= 1).all()
            assert order == "forward" or (once == 1).all(), (order, name)
        for name in {"forward": ["y"], "backward": ["for_x"]}.get(order, ["for_x", "for_grad"]):
            assert (counts[name] == 1).all(), (order, name)
