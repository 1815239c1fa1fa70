"""What nvcc compiles of csrc/cuda for sm_90, executed: LayerNorm and softmax, over rows.

Against autograd in float64. Every byte of a result is written once, every tensor is read as often
as its rows have to be passed over, and nothing else is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import cuda_launches
from benchmarks.cuda_launches import Launch, LayerNorm, RowTiling, SoftmaxRows
from benchmarks.generated_code import cuda_row_kernel
from tests.layer_norm import plain
from tests.layer_norm.test_accuracy import HALF, ROUNDINGS
from tests.ptx.machine import Kernel, Memory, run
from tests.ptx.test_cuda_ptx import compile_cuda
from tests.ptx.test_triton_ptx import DTYPES, raw, tensor_of
from tests.triton.test_activation_triton import ULP, ulp

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

Kernels = dict[tuple[str, str, tuple[int, ...]], Kernel]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Kernels]:
    sources = ("layer_norm.cu", "softmax.cu")
    folders = [tmp_path_factory.mktemp("ptx") for _ in sources]
    with ThreadPoolExecutor() as pool:  # nvcc takes ten seconds for each
        files = pool.map(compile_cuda, sources, folders)
    return {
        source: {cuda_row_kernel(name): kernel for name, kernel in kernels.items()}
        for source, kernels in zip(sources, files, strict=True)
    }


@pytest.fixture(scope="module")
def layer_norm(compiled) -> Kernels:
    return compiled["layer_norm.cu"]


@pytest.fixture(scope="module")
def softmax(compiled) -> Kernels:
    return compiled["softmax.cu"]


class Tensors:
    """Tensors by name in a machine's memory, ``shift`` elements from where vectors are aligned."""

    def __init__(self, given: dict[str, Tensor | None], shift: int = 0) -> None:
        self.memory, self.shift = Memory(), shift
        self.at = {
            name: self.memory.put(raw(one), misaligned_by=shift * one.itemsize)
            for name, one in given.items()
            if one is not None
        }
        self.dtypes: dict[str, torch.dtype] = {}

    def reserve(self, name: str, count: int, dtype: torch.dtype) -> None:
        self.dtypes[name] = dtype
        self.at[name] = self.memory.reserve(
            count * dtype.itemsize, misaligned_by=self.shift * dtype.itemsize
        )

    def of(self, *names: str) -> dict[str, int]:
        return {name: self.at[name] for name in names if name in self.at}

    def run(self, kernels: Kernels, launch: Launch) -> None:
        arguments = [bytes(one) for one in launch.arguments]
        run(kernels[launch.kernel], self.memory, arguments, launch.grid, launch.block)

    def result(self, name: str, length: int = 0, pitch: int = 0) -> Tensor:
        """What every byte was written of once; of rows in a distance, what belongs to them."""
        writes, dtype = self.memory.writes(self.at[name]), self.dtypes[name]
        value = tensor_of(self.memory, self.at[name], dtype)
        if length:
            value = value.view(-1, pitch)[:, :length]
            writes = writes.reshape(-1, pitch * dtype.itemsize)
            assert (writes[:, length * dtype.itemsize :] <= 1).all(), name
            writes = writes[:, : length * dtype.itemsize]
        assert (writes == 1).all(), name
        return value

    def reads(self, name: str, row_length: int, itemsize: int) -> np.ndarray:
        """How often each element was read, in rows; all bytes of it alike."""
        bytes_of = self.memory.reads(self.at[name]).reshape(-1, row_length, itemsize)
        assert (bytes_of == bytes_of[..., :1]).all(), name
        return bytes_of[..., 0]


def passes(t: RowTiling, elements: int, sweeps: int) -> np.ndarray:
    """How often each column is read: once a sweep, but where one ends the next one begins."""
    chunk = np.arange(t.n) // (t.threads * elements)
    count = np.full(t.n, sweeps)
    count[chunk == t.chunks - 1] -= sweeps // 2
    count[chunk == 0] -= (sweeps - 1) // 2
    return count


def elements_of(dtype: str, part: int) -> int:
    """That a thread of the softmax holds: of whole warps, and of rows that share one."""
    return (4 if dtype == "float64" else 8) * (2 if part else 1)


def tiling(launch: Launch) -> RowTiling:
    (found,) = (one for one in launch.arguments if isinstance(one, RowTiling))
    return found


# -- LayerNorm -----------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A case of LayerNorm."""

    dtype: str
    rows: int
    length: int
    wide_parameters: bool = True
    shift: int = 0
    grid: int = 0
    without: str = ""  # which of weight, bias, v, u, t


def check_layer_norm(kernels: Kernels, rows: Rows) -> None:
    kind = DTYPES[rows.dtype]
    wide = torch.float64 if kind == torch.float64 else torch.float32
    of_parameters = wide if rows.wide_parameters else kind
    case = plain.make(
        (rows.rows, rows.length),
        dtype=kind,
        parameter_dtype=of_parameters,
        weight="weight" not in rows.without,
        bias="bias" not in rows.without,
        cotangents="".join(one for one in "vut" if one not in rows.without.split()),
    )
    inputs = ("x", "weight", "bias", "grad", "v", "u", "t")
    tensors = Tensors({name: getattr(case, name) for name in inputs}, rows.shift)
    names = {torch.float32: "float32", torch.float64: "float64"} | {DTYPES[rows.dtype]: rows.dtype}
    call = LayerNorm(rows.dtype, names[of_parameters], rows.rows, rows.length, processors=1)
    size, elements = rows.rows * rows.length, cuda_launches.LAYER_NORM_ELEMENTS
    results: dict[str, Tensor] = {}

    def execute(order: str, read: Sequence[str], written: dict[str, str], sums: dict[str, str]):
        for name in written.values():
            tensors.reserve(name, size, kind)
        for name in sums.values():
            tensors.reserve(name, rows.length, of_parameters)
        if sums:
            walkers = rows.rows + cuda_launches.ROWS_OF_WARPS - 1  # at most
            tensors.reserve("partials", len(sums) * walkers * rows.length, wide)
        every = (*read, *written.values(), *sums.values(), "mean", "rstd")
        at = tensors.of(*every, "partials") if sums else tensors.of(*every)
        before = {one: tensors.memory.reads(tensors.at[one]).copy() for one in read if one in at}
        launches = call.launches(order, at, case.eps, rows.grid)
        first = launches[0]
        t = tiling(first)
        for launch in launches:
            tensors.run(kernels, launch)
        for name, place in written.items():
            results[name] = tensors.result(place).view(case.x.shape)
        for name, place in sums.items():
            results[name] = tensors.result(place)
        if sums:  # each walker leaves its sum once, or in chunks adds to it at every row
            used = len(sums) * first.grid[0] * t.together
            times = tensors.memory.writes(tensors.at["partials"]).reshape(
                -1, rows.length * wide.itemsize
            )
            assert (times[used:] == 0).all()
            turns = -(-rows.rows // (first.grid[0] * t.together))
            assert (times[:used] == 1).all() if t.chunks == 1 else times[:used].max() <= turns
        expected = passes(t, elements, 3 if order == "forward" else 2)
        for name in {"x", "grad", "v"} & at.keys() & before.keys():
            reads = (
                tensors.reads(name, rows.length, kind.itemsize)
                - before[name].reshape(-1, rows.length, kind.itemsize)[..., 0]
            )
            if order == "forward":  # every thread looks at a row's first number
                reads[:, 0] -= t.threads
            assert (reads == expected).all(), (order, name)

    for name in ("mean", "rstd"):
        tensors.reserve(name, rows.rows, wide)
    execute("forward", ("x", "weight", "bias"), {"y": "y"}, {})
    for name in ("mean", "rstd"):
        tensors.result(name)
    has = {"dweight": case.weight, "dbias": case.bias, "for weight": case.weight}
    sums = {"dweight": "for_weight", "dbias": "for_bias"}
    execute(
        "backward",
        ("grad", "x", "weight"),
        {"dx": "for_x"},
        {name: place for name, place in sums.items() if has[name] is not None},
    )
    execute(
        "double_backward",
        ("v", "u", "t", "grad", "x", "weight"),
        {"for grad": "for_grad", "for x": "for_x"},
        {"for weight": "for_weight"} if case.weight is not None else {},
    )
    expected, scales = plain.derived(case), plain.scales(case)
    assert results.keys() == expected.keys()
    unit = 2.0**-52 if kind == torch.float64 else 2.0**-24  # the oracle rounds to float64 too
    for name, value in results.items():
        bound = ROUNDINGS[name] * unit * scales[name]
        if value.dtype in HALF:
            bound = bound + ULP * ulp(expected[name], value.dtype)
        error = (value.double() - expected[name]).abs()
        assert (error <= bound).all(), (name, (error / bound).max())


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "rows",
    [
        Rows("bfloat16", 13, 768, grid=2),
        Rows("float16", 5, 197, wide_parameters=False, grid=1),
        Rows("bfloat16", 9, 49, shift=1, without="bias t"),
        Rows("float16", 9, 192, grid=2),
        Rows("float32", 3, 4104, grid=2),
        Rows("float64", 3, 48, without="u"),
        *(
            slow(Rows(dtype, rows, length, wide, shift, grid, without))
            for dtype in DTYPES
            for rows, length, wide, shift, grid, without in (
                (7, 1, True, 0, 1, ""),
                (13, 49, True, 0, 2, ""),
                (13, 197, False, 0, 0, "v"),
                (5, 768, True, 0, 0, "weight bias u t"),
                (13, 768, False, 0, 2, ""),
                (5, 768, True, 1, 0, "u t"),
                (3, 4104, True, 0, 2, ""),
                (3, 4109, False, 0, 1, "u"),
                (2, 8200, True, 1, 0, ""),
            )
        ),
    ],
    ids=str,
)
def test_layer_norm(rows, layer_norm):
    check_layer_norm(layer_norm, rows)


def test_what_nobody_asks_for_is_not_written(layer_norm):
    case = plain.make((5, 768), dtype=torch.bfloat16, parameter_dtype=torch.float32)
    tensors = Tensors({"x": case.x, "grad": case.grad, "weight": case.weight})
    for name in ("mean", "rstd"):
        tensors.reserve(name, 5, torch.float32)
    tensors.reserve("y", case.x.numel(), torch.bfloat16)
    call = LayerNorm("bfloat16", "float32", 5, 768, processors=1)
    tensors.run(layer_norm, *call.launches("forward", tensors.at, case.eps))
    tensors.reserve("for_x", case.x.numel(), torch.bfloat16)
    tensors.run(layer_norm, *call.launches("backward", tensors.at))
    truth = plain.derived(case._replace(bias=None, u=None, t=None))["dx"]
    error = (tensors.result("for_x").view_as(truth).double() - truth).abs()
    assert (error <= ulp(truth, torch.bfloat16)).all()


def test_rows_beyond_two_to_the_31_elements(layer_norm):
    length, base = 768, 3 << 20  # row number; its first element is number 2.4 · 10⁹
    case = plain.make((2, length), dtype=torch.bfloat16, parameter_dtype=torch.float32)
    memory, start = Memory(), base * length * 2
    at = {
        "x": memory.put(raw(case.x), first=start),
        "weight": memory.put(raw(case.weight)),
        "bias": memory.put(raw(case.bias)),
        "y": memory.reserve(2 * 2 * length, first=start),
        "mean": memory.reserve(8, first=4 * base),
        "rstd": memory.reserve(8, first=4 * base),
    }
    (launch,) = LayerNorm("bfloat16", "float32", base + 2, length, 1).launches("forward", at)
    arguments = [bytes(one) for one in launch.arguments]
    kernel = layer_norm[launch.kernel]
    run(kernel, memory, arguments, (base + 2,), launch.block, blocks=[base, base + 1])
    y = tensor_of(memory, at["y"], torch.bfloat16).view(2, length)
    truth = plain.derived(case)["y"]
    assert (memory.writes(at["y"]) == 1).all()
    assert (memory.writes(at["rstd"]) == 1).all()
    assert ((y.double() - truth).abs() <= 2 * ulp(truth, torch.bfloat16)).all()


# -- Softmax -------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """A case of softmax."""

    dtype: str
    length: int
    bias: str = ""  # full, keys, queries, masked
    shift: int = 0
    grid: int = 0
    without: str = ""  # inputs and results, of backward and double_backward
    padded: bool = True  # rows, as native_cuda.py has them
    padded_bias: bool = True
    scale: float = 0.25


BATCH, HEADS, QUERIES, PERIOD = 4, 2, 3, 2
SOFTMAX_NAMES = {"P": "probabilities", "dS": "ds", "G": "g", "aS": "as"}


def bias_of(kind: str, length: int, generator: torch.Generator) -> Tensor | None:
    shape = {
        "": None,
        "full": (PERIOD, HEADS, QUERIES, length),
        "masked": (PERIOD, HEADS, QUERIES, length),
        "keys": (PERIOD, 1, 1, length),
        "queries": (1, 1, QUERIES, 1),
    }[kind]
    if shape is None:
        return None
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "masked":  # a third of the scores, and a row
        values.view(-1)[::3] = -torch.inf
        values[0, 0, 0] = -torch.inf
    return values


def in_rows(one: Tensor, pitch: int) -> Tensor:
    """A view of memory whose rows begin ``pitch`` elements after each other, NaN between them."""
    *rows, length = one.shape
    memory = one.new_full((*rows, pitch), torch.nan)
    return memory[..., :length].copy_(one)


def memory_of(one: Tensor | None) -> Tensor | None:
    return one if one is None or one._base is None else one._base


def softmax_truth(given: dict[str, Tensor | None], scale: float) -> dict[str, Tensor]:
    """By autograd in float64; what is absent is 0, and rows without a score too."""

    def number(name: str, factor: float = 1.0) -> Tensor:
        one = given[name]
        zero = torch.zeros(BATCH, HEADS, QUERIES, given["products"].shape[-1]).double()
        if one is None:
            return zero
        return zero + factor * one.double().repeat(zero.shape[0] // one.shape[0], 1, 1, 1)

    s = (number("products", scale) + number("bias")).requires_grad_()
    t = number("t_products", scale) + number("t_bias").nan_to_num(neginf=0.0)
    dp = number("dp").requires_grad_()
    p = torch.softmax(s, -1)
    (ds,) = torch.autograd.grad(p, s, dp, create_graph=True)
    g, for_s = torch.autograd.grad([ds, p], [dp, s], [t, number("u")])
    results = {"P": p, "dS": ds, "G": g, "aS": for_s}
    results = {name: one.detach().nan_to_num() for name, one in results.items()}
    log_sums = torch.logsumexp(s, -1).detach()
    return results | {"log_sums": torch.where(log_sums == -torch.inf, torch.inf, log_sums)}


def check_softmax(kernels: Kernels, scores: Scores) -> None:
    kind, length = DTYPES[scores.dtype], scores.length
    wide = torch.float64 if kind == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH, HEADS, QUERIES, length)
    absent = scores.without.split()
    padded = SoftmaxRows(scores.dtype, shape).padded().pitch
    pitch = padded if scores.padded else length
    given: dict[str, Tensor | None] = {
        name: in_rows(torch.randn(shape, generator=generator).double().mul(2).to(kind), pitch)
        for name in ("products", "dp", "t_products", "u")
    }
    for name in ("bias", "t_bias"):
        one = bias_of(scores.bias if name == "bias" else scores.bias.replace("masked", "full"),
                      length, generator)  # fmt: skip
        if one is not None:
            has_rows = scores.padded_bias and one.shape[-1] > 1
            one = in_rows(one.to(kind), padded if has_rows else one.shape[-1])
        given[name] = one
    given |= dict.fromkeys(set(absent) & given.keys())
    bias = given["bias"]
    strides = (0, 0, 0, 0)
    if bias is not None:
        strides = tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    tensors = Tensors({name: memory_of(one) for name, one in given.items()}, scores.shift)
    tensors.reserve("log_sums", BATCH * HEADS * QUERIES, wide)
    period = 1 if bias is None else bias.shape[0]
    call = SoftmaxRows(scores.dtype, shape, scores.scale, period, pitch)
    expected = softmax_truth(given, scores.scale)
    unit_wide = 2.0**-53 if kind == torch.float64 else 2.0**-24
    many = 60 + 2 * length**0.5
    roundings = {"P": many, "dS": 2 * many, "G": 2 * many, "aS": 8 * many}

    def check(name: str, value: Tensor) -> None:
        truth = expected[name]
        error = (value.view_as(truth).double() - truth).abs()
        # A row of one score has no gradient: what is left is roundings of its terms.
        largest = truth.abs().max() if length > 1 else 100.0
        bound = roundings[name] * unit_wide * largest
        bound = bound + (ULP * ulp(truth, kind) if kind in HALF else unit_wide * truth.abs())
        assert (error <= bound).all(), (name, (error / bound).max())

    def execute(order: str, read: Sequence[str], written: Sequence[str], sweeps: int) -> None:
        written = [SOFTMAX_NAMES[name] for name in written if name not in absent]
        for name in written:
            tensors.reserve(name, BATCH * HEADS * QUERIES * pitch, kind)
        at = tensors.of(*read, *written, "bias", "t_bias", "log_sums")
        names = {*read, "bias", "t_bias"} & at.keys()
        if order != "double_backward":
            names -= {"t_bias"}
        before = {one: tensors.reads(one, 1, kind.itemsize).copy() for one in names}
        launch = call.launch(order, at, strides, scores.grid)
        tensors.run(kernels, launch)
        t, (part,) = tiling(launch), launch.kernel[2]
        count = np.broadcast_to(passes(t, elements_of(scores.dtype, part), sweeps), shape).copy()
        if part:  # places of a block that are left over read its last row
            count[-1, -1, -1] += -BATCH * HEADS * QUERIES % t.together
        for name in names:
            one = given[name]
            width = memory_of(one).shape[-1]
            times = tensors.reads(name, width, kind.itemsize) - before[name].reshape(-1, width)
            # Between rows, a vector reads what it needs not.
            assert (times[:, one.shape[-1] :] <= times.max()).all(), (order, name)
            expected_times = count
            if name not in read:  # for every score that it is added to
                expected_times = count.reshape(-1, one.shape[0], *shape[1:]).sum(0)
                alone = tuple(axis for axis in range(1, 4) if one.shape[axis] == 1)
                expected_times = expected_times.sum(alone, keepdims=True)
            found = times[:, : one.shape[-1]].reshape(one.shape)
            assert (found == expected_times).all(), (order, name)
        for name in ("P", "dS", "G", "aS"):
            if SOFTMAX_NAMES[name] in written:
                check(name, tensors.result(SOFTMAX_NAMES[name], length, pitch))

    execute("forward", ("products",), ("P",), 3)
    log_sums = tensors.result("log_sums").view(shape[:3]).double()
    truth = expected["log_sums"]
    assert (log_sums.isinf() == truth.isinf()).all()
    error = (log_sums - truth).abs().nan_to_num()
    assert (error <= 40 * unit_wide * (3 + np.log(length))).all()
    execute("backward", ("products", "dp"), ("P", "dS"), 1 if "dS" in absent else 2)
    execute("double_backward", ("products", "dp", "t_products", "u"), ("P", "G", "dS", "aS"), 2)


@pytest.mark.parametrize(
    "scores",
    [
        Scores("bfloat16", 197, scale=1.0),
        Scores("bfloat16", 49, "full", scale=1.0),
        Scores("float16", 64, "masked", without="G"),
        Scores("float32", 2060, "keys", grid=3),
        Scores("float32", 197, "full", padded_bias=False),
        Scores("float64", 50, "full", shift=1, without="t_products u dS"),
        Scores("bfloat16", 49, "full", grid=2, padded=False),
        *(
            slow(Scores(dtype, length, bias, shift, grid, without, padded, padded_bias))
            for dtype in DTYPES
            for length, bias, shift, grid, without, padded, padded_bias in (
                (1, "", 0, 0, "", True, True),
                (7, "full", 0, 0, "", True, True),
                (49, "masked", 0, 0, "P dp", True, True),
                (49, "keys", 0, 0, "", True, False),
                (49, "masked", 0, 2, "P dp", False, False),
                (64, "full", 0, 0, "t_bias", True, True),
                (64, "keys", 1, 0, "", True, True),
                (100, "full", 0, 0, "u", True, False),
                (197, "full", 0, 5, "u", False, False),
                (197, "queries", 0, 0, "aS", True, True),
                (200, "full", 0, 0, "G dS", True, True),
                (257, "masked", 0, 0, "t_products", True, True),
                (577, "full", 0, 4, "dp", True, True),
                (768, "keys", 0, 0, "t_products", True, True),
                (768, "", 1, 7, "", True, True),
                (2050, "masked", 0, 3, "", False, False),
                (4101, "full", 0, 0, "", True, True),
            )
        ),
    ],
    ids=str,
)
def test_softmax(scores, softmax):
    check_softmax(softmax, scores)


def test_scores_beyond_two_to_the_31_elements(softmax):
    length, pitch, base, rows = 197, 200, 3 << 22, 11  # the first of 2.5 · 10⁹ elements
    shape = (1, 1, base + rows, length)
    given = in_rows(torch.randn(rows, length).to(torch.bfloat16), pitch)
    memory, start = Memory(), base * pitch * 2
    at = {
        "products": memory.put(raw(memory_of(given)), first=start),
        "probabilities": memory.reserve(2 * rows * pitch, first=start),
        "log_sums": memory.reserve(4 * rows, first=4 * base),
    }
    launch = SoftmaxRows("bfloat16", shape, pitch=pitch).launch("forward", at)
    (groups, _), (_, together) = launch.grid, launch.block
    blocks = [base // together, groups - 1]  # the last one is not full
    assert blocks[1] == blocks[0] + 1
    arguments = [bytes(one) for one in launch.arguments]
    kernel = softmax[launch.kernel]
    run(kernel, memory, arguments, (groups,), launch.block, blocks=blocks)
    p = tensor_of(memory, at["probabilities"], torch.bfloat16).view(rows, pitch)[:, :length]
    truth = torch.softmax(given.double(), -1)
    assert (memory.writes(at["probabilities"]) == 1).all()
    assert (memory.writes(at["log_sums"]) == 1).all()
    assert ((p.double() - truth).abs() <= 2 * ulp(truth, torch.bfloat16)).all()


def test_every_kernel_over_rows_is_there(layer_norm, softmax):
    dtypes, orders = cuda_launches.SIZES, ("forward", "backward", "double_backward")
    parts = (0, 4, 8, 16, 32)
    assert softmax.keys() == {
        (order, dtype, (part,)) for order in orders for dtype in dtypes for part in parts
    }
    kinds = (0, 1, 2)
    assert layer_norm.keys() == {
        *(("forward", dtype, (k,)) for dtype in dtypes for k in kinds),
        *(("backward", dtype, (has_sums, k)) for dtype in dtypes for k in kinds
          for has_sums in (0, 1) if has_sums or k > 0),
        *(("double_backward", dtype, (has_u, k)) for dtype in dtypes for k in kinds
          for has_u in (0, 1)),
        *(("column_sums", wide, ()) for wide in ("float32", "float64")),
    }  # fmt: skip
