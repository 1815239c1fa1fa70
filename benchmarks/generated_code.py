"""What the GPU kernels compile to, and whether it got worse.

    python -m benchmarks.generated_code [--check | --write] [--all] [--family attention]
                                        [--target sm_90] [--dtype bfloat16] [--subject gelu]

Needs no GPU: Triton brings the compilers of both vendors; the kernels in CUDA C++ are there where
nvcc is. A family lists calls of its own public functions; every kernel that they launch is caught
and compiled with the very arguments, options and specialisation of that launch, for each target.

Counted: registers, spills, shared memory, widths of the accesses to global memory, and instructions
per element by pipe, on the way that whole blocks take, a loop as often as the launch's size says.
Kernels over rows in CUDA C++ decide at run time: there the way is that of the launch's arguments.
Modelled: issue time ÷ memory time, the instructions at four a clock and multiprocessor against each
tensor once at the memory's rate: A100 for sm_80, H100 for sm_90, B200 for sm_100.

``--check`` compares with results/generated_code.csv and exits with 1 where a kernel got worse by
more than 5 %; ``--write`` makes that file again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import assembly, common, cuda_launches, sass
from benchmarks.assembly import PIPES, Instruction
from benchmarks.common import Row

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bfloat16", "float16", "float32", "float64")
BASELINE = common.RESULTS / "generated_code.csv"


class Machine(NamedTuple):
    """A GPU of the SXM form, as the vendor states it."""

    name: str
    multiprocessors: int
    clock_hz: float  # boost
    bytes_s: float

    def issue_over_memory(self, thread_instructions: float, moved: int) -> float:
        """Time to issue, a warp of 32 threads at a time, ÷ time to move the bytes."""
        warps_s = self.multiprocessors * 4 * self.clock_hz
        return thread_instructions / 32 / warps_s / (moved / self.bytes_s)


MACHINES = {
    "sm_80": Machine("A100", 108, 1.410e9, 2.039e12),
    "sm_90": Machine("H100", 132, 1.755e9, 3.35e12),
    "sm_100": Machine("B200", 148, 1.965e9, 8.0e12),
}
_AMD_PROCESSORS = 304  # of an MI300X

# Compiled by nvcc, a file at a time.
_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
CUDA = {
    "activation in CUDA C++": "activations.cu",
    "layer_norm in CUDA C++": "layer_norm.cu",
    "softmax in CUDA C++": "softmax.cu",
}
# Names of the orders, and the tensors that they read and write.
_CUDA_ORDERS = {
    "Forward": ("forward", (1, 1)),
    "Backward": ("backward", (2, 1)),
    "DoubleBackward": ("double_backward", (3, 2)),
    "Curvature": ("double_backward, of x alone", (3, 1)),
}

# Orders of the kernels over rows, with the tensors that are there.
_CUDA_LAYER_NORM = {
    "forward": ("x", "weight", "bias", "y"),
    "backward, of x alone": ("grad", "x", "weight", "for_x"),
    "backward": ("grad", "x", "weight", "for_x", "for_weight", "for_bias"),
    "double_backward, from x alone": (
        *("v", "grad", "x", "weight"),
        *("for_grad", "for_x", "for_weight"),
    ),
    "double_backward": (
        *("v", "u", "t", "grad", "x", "weight"),
        *("for_grad", "for_x", "for_weight"),
    ),
}
_CUDA_SOFTMAX = {
    "forward": ("products", "bias", "probabilities", "log_sums"),
    "backward": ("products", "bias", "log_sums", "dp", "probabilities", "ds"),
    "double_backward": (
        *("products", "bias", "log_sums", "dp", "t_products", "t_bias", "u"),
        *("probabilities", "g", "ds", "as"),
    ),
}

# The sizes of a ViT-B and of the third stage of a Swin-B, batch 64.
_BATCH, _TOKENS, _WIDTH = 64, 197, 768
_WINDOWS, _WINDOW, _WINDOW_HEADS = 256, 49, 16


class Case(NamedTuple):
    """Kernels that are compiled together, by what tells their calls from others."""

    family: str
    subject: str  # the activation; the row length; head size and bias
    dtype: str
    target: str

    def __str__(self) -> str:
        return f"{self.family} {self.subject} {self.dtype} {self.target}"


class Launch(NamedTuple):
    """A kernel with what it was launched with."""

    order: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]


class Family(NamedTuple):
    """How a family is measured.

    Attributes:
        subjects: those of the gate for each dtype, and the others of ``--all``.
        calls: of its public functions, by order, for a subject, on meta tensors.
        elements: what is divided by, from a kernel's name and its arguments by name.
        trips: how often a thread passes its main loop, from the arguments and the programs.
        path: the way through the code that is counted.
    """

    subjects: Callable[[str], tuple[list[str], list[str]]]
    calls: Callable[[str, torch.dtype], Iterator[tuple[str, Callable[[], object]]]]
    elements: Callable[[str, dict[str, Any]], int]
    trips: Callable[[dict[str, Any], int], float]
    path: Callable[[Sequence[Instruction]], list[int]]


# -- The families --------------------------------------------------------------------------------


def _activation_subjects(dtype: str) -> tuple[list[str], list[str]]:
    kernels = import_module("gn_kernels.activation.triton_kernels")
    return list(kernels.KINDS), []


def _activation_calls(kind: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    kernels = import_module("gn_kernels.activation.triton_kernels")
    # Some elements more than whole blocks hold: the kernel must have its tail.
    v, grad, x = (_meta(_BATCH * _TOKENS * 4 * _WIDTH + 5, dtype=dtype) for _ in range(3))
    yield "forward", lambda: kernels.forward(x, kind)
    yield "backward", lambda: kernels.backward(grad, x, kind)
    yield "double_backward", lambda: kernels.double_backward(v, grad, x, kind, [True, True])
    yield (
        "double_backward, of x alone",
        lambda: kernels.double_backward(v, grad, x, kind, [False, True]),
    )


def _layer_norm_subjects(dtype: str) -> tuple[list[str], list[str]]:
    return ["768"], ["1", "197", "192", "384", "1024", "1536", "8192"]


def _layer_norm_calls(
    subject: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    kernels = import_module("gn_kernels.layer_norm.triton_kernels")
    length, rows = int(subject), _BATCH * _TOKENS
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v, grad, x = _meta(3, rows, length, dtype=dtype).unbind(0)
    weight, bias, u, t = _meta(4, length, dtype=wide).unbind(0)  # as autocast gives them
    row = _meta(2, rows, dtype=wide).unbind(0)
    every, of_x = [True, True, True], [True, False, False]
    yield "forward", lambda: kernels.forward(x, length, weight, bias, 1e-6)
    yield (
        "backward, of x alone",
        lambda: kernels.backward(grad, x, length, weight, bias, *row, of_x),
    )
    yield "backward", lambda: kernels.backward(grad, x, length, weight, bias, *row, every)
    yield (
        "double_backward, from x alone",
        lambda: kernels.double_backward(v, None, None, grad, x, length, weight, *row, every),
    )
    yield (
        "double_backward",
        lambda: kernels.double_backward(v, u, t, grad, x, length, weight, *row, every),
    )


def _layer_norm_elements(kernel: str, arguments: dict[str, Any]) -> int:
    return int(arguments["partials" if kernel == "_column_sums_kernel" else "x"].numel())


def _layer_norm_trips(arguments: dict[str, Any], programs: int) -> float:
    if "COUNT" in arguments:
        return math.ceil(arguments["count"] / arguments["COUNT"])
    return arguments["rows"] / arguments["ROWS"] / programs


def _attention_subjects(dtype: str) -> tuple[list[str], list[str]]:
    if dtype == "float64":
        return [], []  # the formula's
    others = [f"{size}{bias}" for size in (16, 32, 64, 80, 128) for bias in ("", ", bias")]
    gate = {"bfloat16": ["64", "32, bias"], "float32": ["64"]}.get(dtype, [])
    return gate, [one for one in others if one not in gate]


def _attention_calls(
    subject: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    kernels = import_module("gn_kernels.attention.triton_kernels")
    size = int(subject.split(",")[0])
    biased = subject.endswith("bias")
    batch, heads, n = (
        (_WINDOWS, _WINDOW_HEADS, _WINDOW) if biased else (_BATCH, _WIDTH // size, _TOKENS)
    )
    # Views of a packed tensor, as a ViT has them.
    q, k, v = _meta(batch, n, 3, heads, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    aq, ak, av = _meta(batch, n, 3, heads, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    grad, out, *results = _meta(6, batch, n, heads, size, dtype=dtype).transpose(2, 3).unbind(0)
    lse = _meta(batch, heads, n, dtype=torch.float32)
    bias, abias, for_bias = (
        _meta(3, 1, heads, n, n, dtype=dtype).unbind(0) if biased else (None, None, None)
    )
    scale = size**-0.5
    yield "forward", lambda: kernels.forward(q, k, v, bias, scale, out, lse)
    yield (
        "backward",
        lambda: kernels.backward(grad, q, k, v, bias, out, lse, scale, *results[:3], for_bias),
    )
    yield (
        "double_backward",
        lambda: kernels.double_backward(
            *(aq, ak, av, abias, grad, q, k, v, bias, out, lse, scale, *results, for_bias)
        ),
    )


def _attention_elements(kernel: str, arguments: dict[str, Any]) -> int:
    if kernel == "_backward_delta":
        return int(arguments["grad"].numel())
    batch, heads, n, _ = arguments["of_queries"][0].shape
    return int(batch * heads * n * arguments["M"])


def _attention_trips(arguments: dict[str, Any], programs: int) -> float:
    if "for_bias" in arguments:
        return float(arguments["turns"] / arguments["shares"])
    if "for_k" in arguments:
        return math.ceil(arguments["N"] / arguments["QUERIES"])
    return math.ceil(arguments["M"] / arguments["KEYS"]) if "M" in arguments else 1


FAMILIES = {
    "activation": Family(
        _activation_subjects,
        _activation_calls,
        lambda kernel, arguments: arguments["x_ptr"].numel(),
        lambda arguments, programs: 1,
        assembly.main_path,
    ),
    "layer_norm": Family(
        _layer_norm_subjects,
        _layer_norm_calls,
        _layer_norm_elements,
        _layer_norm_trips,
        assembly.listing,
    ),
    "attention": Family(
        _attention_subjects,
        _attention_calls,
        _attention_elements,
        _attention_trips,
        assembly.listing,
    ),
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# -- Compiling -----------------------------------------------------------------------------------


def launches(case: Case) -> list[Launch]:
    """What the calls of a case launch on a GPU of its target."""
    found: list[Launch] = []
    caught: list[tuple[Any, ...]] = []
    target = TARGETS[case.target]

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        caught.append((self, args, options, grid))

    machine = MACHINES.get(case.target)
    processors = machine.multiprocessors if machine else _AMD_PROCESSORS
    layer_norm = import_module("gn_kernels.layer_norm.triton_kernels")
    walkers = layer_norm._WALKERS * processors
    with ExitStack() as stack:
        for owner, name, value in (
            (JITFunction, "run", catch),
            (torch.version, "hip", "7.0" if target.backend == "hip" else None),
            (layer_norm, "_walkers", lambda device: walkers),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        calls = FAMILIES[case.family].calls(case.subject, getattr(torch, case.dtype))
        for order, call in calls:
            call()
            found += [Launch(order, *one) for one in caught]
            caught.clear()
    return found


def compile_launch(launch: Launch, target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """The kernel, compiled as the launcher does, and the launch's arguments by name."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialisation, _ = bind(*launch.args, **launch.options)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(launch.options), arguments, specialisation, None
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__), arguments


def measure(case: Case) -> list[Row]:
    """Compile the kernels of one case and read their assembly."""
    if case.family in CUDA:
        return list(_measure_cuda(case.family, case.target))
    target, family = TARGETS[case.target], FAMILIES[case.family]
    rows = []
    for launch in launches(case):
        compiled, arguments = compile_launch(launch, target)
        if target.backend == "cuda":
            (code,) = assembly.read_cubin(compiled.asm["cubin"])
        else:
            code = assembly.read_amdgcn(compiled.asm["amdgcn"])
        programs = math.prod(launch.grid)
        name = launch.kernel.__name__
        threads = programs * compiled.metadata.num_warps * target.warp_size
        rows.append(
            {
                "compiler": f"triton {triton.__version__}",
                "family": case.family,
                "subject": case.subject,
                "order": launch.order,
                "kernel": name.strip("_"),
                "dtype": case.dtype,
                "target": case.target,
            }
            | figures(
                code._replace(shared_bytes=compiled.metadata.shared),
                family.path(code.code),
                trips=family.trips(arguments, programs),
                threads=threads,
                elements=family.elements(name, arguments),
                moved=_bytes(arguments),
                machine=MACHINES.get(case.target),
            )
        )
    return rows


def _measure_cuda(family: str, target: str) -> Iterator[Row]:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release ([\d.]+)", version.stdout)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernels.cubin")
        command = ["nvcc", "-cubin", f"-arch={target}", "-std=c++17", "-O3", "-o", file]
        subprocess.run([*command, _SOURCES / CUDA[family]], capture_output=True, check=True)
        kernels = assembly.read_cubin(file.read_bytes())
    rows = {"activations.cu": _cuda_activations}.get(CUDA[family], _cuda_rows)
    for row in rows(CUDA[family], kernels, target):
        yield {"compiler": f"nvcc {release[1] if release else 'unknown'}"} | row


def _cuda_activations(
    source: str, kernels: Sequence[assembly.Kernel], target: str
) -> Iterator[Row]:
    # Their names say what they are.
    for kernel in kernels:
        order, kind, dtype = cuda_kernel(kernel.name)
        reads, writes = _CUDA_ORDERS[order][1]
        elements = _BATCH * _TOKENS * 4 * _WIDTH
        size = getattr(torch, dtype).itemsize
        yield {
            "family": "activation",
            "subject": kind,
            "order": _CUDA_ORDERS[order][0],
            "kernel": "activation",
            "dtype": dtype,
            "target": target,
        } | figures(
            kernel,
            assembly.main_path(kernel.code),
            trips=1,  # there are as many programs as blocks
            threads=elements * size // (2 * 16),  # a thread takes two vectors
            elements=elements,
            moved=(reads + writes) * elements * size,
            machine=MACHINES[target],
        )


class CudaCall(NamedTuple):
    """A launch of a kernel over rows: so many rows of so many elements, and the bytes moved."""

    family: str
    subject: str
    order: str
    dtype: str
    launch: cuda_launches.Launch
    rows: int
    length: int
    moved: int


def cuda_calls(source: str, processors: int) -> Iterator[CudaCall]:
    """What is measured of layer_norm.cu or softmax.cu."""
    layer_norm = source == "layer_norm.cu"
    for dtype in DTYPES:
        yield from (_layer_norm_launches if layer_norm else _softmax_launches)(dtype, processors)


def _addresses(names: Sequence[str]) -> dict[str, int]:
    return {name: (place + 1) << 32 for place, name in enumerate(names)}


def _layer_norm_launches(dtype: str, processors: int) -> Iterator[CudaCall]:
    size, wide = cuda_launches.SIZES[dtype], 8 if dtype == "float64" else 4
    rows = _BATCH * _TOKENS
    call = cuda_launches.LayerNorm(
        dtype, "float64" if dtype == "float64" else "float32", rows, _WIDTH, processors
    )
    for order, names in _CUDA_LAYER_NORM.items():
        at = _addresses([*names, "mean", "rstd", "partials"])
        count = 0
        for launch in call.launches(order.split(",")[0], at):
            walks = "partials" in launch.tensors
            if launch.kernel[0] != "column_sums":
                count = launch.grid[0] * launch.block[1]
                sums = ("for_weight" in names) + ("for_bias" in names)
            partials = sums * count * _WIDTH * wide if walks else 0
            sizes = {"mean": rows * wide, "rstd": rows * wide, "partials": partials}
            sizes |= dict.fromkeys(
                ("weight", "bias", "u", "t", "for_weight", "for_bias"), _WIDTH * wide
            )
            moved = sum(sizes.get(name, rows * _WIDTH * size) for name in launch.tensors)
            handled = sums * count if launch.kernel[0] == "column_sums" else rows
            yield CudaCall("layer_norm", "768", order, dtype, launch, handled, _WIDTH, moved)


def _softmax_launches(dtype: str, processors: int) -> Iterator[CudaCall]:
    size, wide = cuda_launches.SIZES[dtype], 8 if dtype == "float64" else 4
    heads = _WIDTH // 64
    for subject, shape in {
        f"{_TOKENS}": (_BATCH, heads, _TOKENS, _TOKENS),
        f"{_WINDOW}, bias": (_WINDOWS, _WINDOW_HEADS, _WINDOW, _WINDOW),
    }.items():
        for order, names in _CUDA_SOFTMAX.items():
            biased = "bias" in subject
            at = _addresses([name for name in names if biased or "bias" not in name])
            n, length = shape[2:]
            call = cuda_launches.SoftmaxRows(dtype, shape).padded()
            launch = call.launch(order, at, (0, n * call.pitch, call.pitch, 1))
            rows = math.prod(shape[:3])
            sizes = {"log_sums": rows * wide}
            sizes |= dict.fromkeys(("bias", "t_bias"), math.prod(shape[1:]) * size)
            moved = sum(sizes.get(name, rows * length * size) for name in launch.tensors)
            yield CudaCall("softmax", subject, order, dtype, launch, rows, length, moved)


def _cuda_rows(source: str, kernels: Sequence[assembly.Kernel], target: str) -> Iterator[Row]:
    by_name = {cuda_row_kernel(kernel.name): kernel for kernel in kernels}
    for call in cuda_calls(source, MACHINES[target].multiprocessors):
        launch, kernel = call.launch, by_name[call.launch.kernel]
        bank = sass.constants(target, launch.arguments, launch.grid, launch.block)
        # The first warp of the first block, and another in place of all its others.
        x, y = launch.block
        warps = x * y // 32
        ways = [
            sass.follow(kernel.code, bank, (32 * warp % x, 32 * warp // x))
            for warp in {0, warps - 1}
        ]
        passed = ways[0].passed + ways[-1].passed * (warps - 1)
        programs = math.prod(launch.grid)
        if launch.kernel[0] != "column_sums":  # the first block has a row or a turn more
            turns = math.ceil(call.rows / y / programs)
            programs = call.rows / y / turns
        yield {
            "family": call.family,
            "subject": call.subject,
            "order": call.order,
            "kernel": launch.kernel[0],
            "dtype": call.dtype,
            "target": target,
        } | figures(
            kernel,
            passed,
            trips=1,
            threads=32 * programs,
            elements=call.rows * call.length,
            moved=call.moved,
            machine=MACHINES[target],
            accesses=ways[0].executed,
        )


def cuda_row_kernel(name: str) -> tuple[str, str, tuple[int, ...]]:
    """Function, dtype and a template's numbers of a mangled name of layer_norm.cu or softmax.cu."""
    of = re.search(
        r"\d(forward|backward|double_backward|column_sums)I(?:([fd])|NS\w+?(b?float16)E)"
        r"((?:L[bi]\d+E)*)E",
        name,
    )
    if of is None:
        raise ValueError(f"{name} is no kernel over rows")
    function, letter, half, template = of.groups()
    numbers = tuple(map(int, re.findall(r"\d+", template)))
    return function, half or {"f": "float32", "d": "float64"}[letter], numbers


def cuda_kernel(name: str) -> tuple[str, str, str]:
    """Order, kind and dtype of a mangled name of csrc/cuda/activations.cu."""
    of = re.search(r"\d+([A-Z][a-zA-Z]+)INS_\d+([A-Z][a-zA-Z]+?)ENS_\d", name)
    element = re.search(r"bfloat16|float16|EE([fd])E", name)
    if of is None or element is None:
        raise ValueError(f"{name} is no kernel of an activation")
    dtype = {"f": "float32", "d": "float64"}.get(element[1], element[0])
    return of[1], re.sub(r"(?<!^)(?=[A-Z])", "_", of[2]).lower(), dtype


def figures(
    kernel: assembly.Kernel,
    way: Sequence[int],
    trips: float,
    threads: float,
    elements: int,
    moved: int,
    machine: Machine | None,
    accesses: Sequence[int] | None = None,
) -> Row:
    """The figures of a row, of one launch with so many threads, elements and bytes."""
    accesses = way if accesses is None else accesses
    pipes = assembly.by_pipe(kernel.code, way, trips)
    total = sum(pipes.values())
    per_element = threads / elements
    ratio = machine.issue_over_memory(total * threads, moved) if machine else ""
    return {
        "registers": kernel.registers,
        "spills": kernel.spills,
        "shared_bytes": kernel.shared_bytes,
        "load_bits": _text(assembly.widths(kernel.code, accesses, "load")),
        "store_bits": _text(assembly.widths(kernel.code, accesses, "store")),
        "instructions": total * per_element,
        **{pipe: count * per_element for pipe, count in pipes.items()},
        "issue_over_memory": ratio,
    }


def _text(widths: list[int]) -> str:
    return "/".join(map(str, sorted(set(widths), reverse=True)))


def _bytes(arguments: dict[str, Any]) -> int:
    tensors = {id(one): one for one in tree_leaves(arguments) if isinstance(one, Tensor)}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def cases(everything: bool = False) -> list[Case]:
    """Those of the gate, or all."""
    found = []
    for (name, family), dtype in itertools.product(FAMILIES.items(), DTYPES):
        gate, others = family.subjects(dtype)
        for subject in [*gate, *(others if everything else ())]:
            found += [Case(name, subject, dtype, target) for target in TARGETS]
    if shutil.which("nvcc"):
        found += [Case(family, "all", "all", target) for family in CUDA for target in MACHINES]
    return found


def measurements(chosen: Sequence[Case], jobs: int) -> list[Row]:
    """The rows of the cases, in their order."""
    if jobs == 1:
        return [row for case in chosen for row in measure(case)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return [row for rows in pool.map(measure, chosen) for row in rows]


# -- The gate ------------------------------------------------------------------------------------

KEY = ("family", "subject", "order", "kernel", "dtype", "target")
TOLERANCE = 0.05

# The units with a quarter of the rate or less count by themselves as well.
_COMPARED = ("registers", "spills", "shared_bytes", "instructions", "mufu", "fp64", "memory")


def key(row: Row) -> tuple[str, ...]:
    """What names a kernel, whichever version of a compiler made it."""
    return (str(row["compiler"]).split()[0], *(str(row[column]) for column in KEY))


def worse(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What got worse by more than the tolerance, each with the kernel and the figure."""
    before = {key(row): row for row in baseline}
    cases = {(one[0], one[1], one[2], one[5], one[6]) for one in map(key, rows)}
    now = {key(row) for row in rows}
    found = [
        f"{' '.join(one)}: is in the baseline and was not compiled"
        for one in before
        if (one[0], one[1], one[2], one[5], one[6]) in cases and one not in now
    ]
    for row in rows:
        old, name = before.get(key(row)), " ".join(key(row))
        if old is None:
            found.append(f"{name}: has no baseline; --write makes one")
            continue
        compilers = (
            f" ({old['compiler']} then, {row['compiler']} now)"
            if old["compiler"] != row["compiler"]
            else ""
        )
        for figure in _COMPARED:
            then, here = float(old[figure]), float(row[figure])
            if here > then * (1 + TOLERANCE) + 1e-3 * TOLERANCE:
                found.append(f"{name}: {figure} {here:.4g}, was {then:.4g}{compilers}")
        for figure in ("load_bits", "store_bits"):
            then, here = _width_range(old[figure]), _width_range(row[figure])
            if here < then:
                found.append(f"{name}: {figure} {row[figure]}, was {old[figure]}{compilers}")
    return found


def _width_range(text: Any) -> tuple[int, int]:
    bits = [int(one) for one in str(text).split("/") if one]
    return (max(bits), min(bits)) if bits else (0, 0)


def read(file: Path = BASELINE) -> list[Row]:
    """The baseline, as text."""
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(rows: Sequence[Row], file: Path) -> None:
    """One line a kernel."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()}
            )


COLUMNS = {
    "compiler": "compiler",
    "subject": "subject",
    "order": "order",
    "kernel": "kernel",
    "dtype": "dtype",
    "target": "target",
    "registers": "registers",
    "spills": "spills",
    "shared": "shared_bytes",
    "load": "load_bits",
    "store": "store_bits",
    "instructions": "instructions",
    **{pipe: pipe for pipe in PIPES},
    "issue ÷ memory": "issue_over_memory",
}


def assumptions() -> str:
    """What the last column rests on."""
    machines = "; ".join(
        f"{target} on {m.name}: {m.multiprocessors} multiprocessors × 4 warps a clock at "
        f"{m.clock_hz / 1e9:.3f} GHz, {m.bytes_s / 1e12:.2f} TB/s"
        for target, m in MACHINES.items()
    )
    return (
        f"Issue ÷ memory is modelled, above 1 is bound by instructions: {machines}. Every tensor "
        "moves once; tensor cores are not in it."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generated_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=[*FAMILIES, *CUDA], action="append")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--subject", action="append", help="gelu, 768, '32, bias', …")
    parser.add_argument("--all", action="store_true", help="more row lengths and head sizes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    gate = parser.add_mutually_exclusive_group()
    gate.add_argument("--check", action="store_true", help="exit with 1 where a kernel got worse")
    gate.add_argument("--write", action="store_true", help="make the baseline again")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 runs kernels in Python: nothing is compiled")
    selected = (options.family, options.subject, options.dtype, options.target)
    if options.write and (any(selected) or options.all):
        parser.error("--write makes the whole baseline: it takes no selection")
    chosen = [
        case
        for case in cases(options.all)
        if all(some is None or value in some for some, value in zip(selected, case, strict=True))
    ]
    if not chosen:
        parser.error("nothing is selected")
    rows = measurements(chosen, options.jobs)
    for family in dict.fromkeys(row["family"] for row in rows):
        some = [row for row in rows if row["family"] == family]
        print(f"{family}\n\n{common.markdown(some, COLUMNS)}\n")
    print(assumptions())
    if options.csv:
        write(rows, options.csv)
    if options.write:
        write(rows, BASELINE)
    if options.check:
        found = worse(rows, read())
        for one in found:
            print(f"WORSE {one}", file=sys.stderr)
        return int(bool(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
