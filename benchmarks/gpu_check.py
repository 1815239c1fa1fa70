"""Everything that needs a GPU, in one command and a few minutes: right, fast, and a report.

    python -m benchmarks.gpu_check [--minutes 8] [--section timings] [--output FOLDER]

Sections, the most important first; each runs in a process of its own, so that what it breaks, a
CUDA context included, costs no other section its result:

* values: every family, order, dtype and backend against float64;
* penalty: weight gradients of a small ViT's penalty against float64, beside eager PyTorch's;
* modes: another stream, a second device, CUDA graphs, layouts;
* timings: every order beside eager PyTorch, torch.compile and a copy of the same bytes. CUDA
  events around single calls, each after a write that fills the L2 cache;
* steps: a gradient-norm step of timm's ViT-B and Swin-B, eager and swapped, and its peak memory;
* large: a tensor of more than 2^31 elements;
* sanitizer: the values again under compute-sanitizer, where it is installed.

Writes gpu_check.json and gpu_check.md after every section. Exits with 1 where a check failed, with
0 otherwise; what was left out is named with the reason. ``--device cpu`` runs the same code on the
CPU, without what only CUDA has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import gn_kernels
from benchmarks import accuracy, common, operations, step_cost
from benchmarks.common import Row
from benchmarks.operations import Cotangents, Operation, Shape, through_autograd
from gn_kernels import backend
from gn_kernels.activation import ACTIVATIONS
from gn_kernels.swap import swap

ROOT = Path(__file__).parents[1]


class SkippedError(Exception):
    """Why something can't run here."""


class Cuda:
    """What only a GPU has."""

    name = "cuda"

    def describe(self) -> Row:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "l2_mb": self.l2_bytes() / 1e6,
            "cuda": torch.version.cuda or torch.version.hip,
        }

    def l2_bytes(self) -> int:
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated())

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        """A stream that waits for the current one, and is waited for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """A CUDA graph of ``run``: its results, and what replays it."""
        with self.other_stream():
            for _ in range(3):  # compiles and allocates
                run()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return results, graph.replay

    def hold(self) -> None:
        """Keep the GPU busy for a millisecond, so that a call's kernels wait for nobody's Python"""
        torch.cuda._sleep(2_000_000)

    def timer(self) -> tuple[Callable[[], None], Callable[[], Callable[[], float]]]:
        """``start()``, and ``stop()``, which gives a function for the milliseconds between."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def stop() -> Callable[[], float]:
            after.record()

            def elapsed() -> float:
                after.synchronize()
                return float(before.elapsed_time(after))

            return elapsed

        return before.record, stop


class Cpu(Cuda):
    """The same on a CPU; what it has not is skipped."""

    name = "cpu"

    def describe(self) -> Row:
        return {"gpu": "none: --device cpu"}

    def l2_bytes(self) -> int:
        return 1 << 20

    def device_count(self) -> int:
        return 1

    def free_bytes(self) -> int:
        raise SkippedError("needs CUDA: the memory of a GPU")

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def hold(self) -> None:
        pass

    def other_stream(self) -> AbstractContextManager[None]:
        raise SkippedError("needs CUDA: streams")

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        raise SkippedError("needs CUDA: graphs")

    def timer(self) -> tuple[Callable[[], None], Callable[[], Callable[[], float]]]:
        begun = 0.0

        def start() -> None:
            nonlocal begun
            begun = time.perf_counter()

        def stop() -> Callable[[], float]:
            elapsed = (time.perf_counter() - begun) * 1e3
            return lambda: elapsed

        return start, stop


class Sizes(NamedTuple):
    """How much is run: on a GPU what a ViT-B has, elsewhere what is enough to run the code."""

    values: Shape
    windows: Shape
    timings: Shape
    timed_windows: Shape
    rounds: int
    models: tuple[str, ...]
    options: dict[str, Any]
    batch: int
    large: int  # elements


GPU_SIZES = Sizes(
    values=Shape(2, 197, 384, 6),
    windows=Shape(4, 196, 128, 4, 49),
    timings=Shape(64, 197, 768, 12),
    timed_windows=Shape(64, 196, 512, 16, 49),
    rounds=30,
    models=("vit_base_patch16_224", "swin_base_patch4_window7_224"),
    options={},
    batch=64,
    large=2**31 + 1029,
)
CPU_SIZES = Sizes(
    values=Shape(1, 7, 32, 2),
    windows=Shape(1, 8, 32, 2, 4),
    timings=Shape(1, 7, 32, 2),
    timed_windows=Shape(1, 8, 32, 2, 4),
    rounds=3,
    models=("vit_tiny_patch16_224",),
    options={"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    batch=2,
    large=5000,
)


class Context(NamedTuple):
    """What sections share."""

    gpu: Cuda
    sizes: Sizes
    deadline: float  # of time.monotonic()
    compile: bool = True

    @property
    def device(self) -> str:
        return self.gpu.name


OK, FAILED, SKIPPED = "ok", "failed", "skipped"


def attempt(context: Context, about: Row, check: Callable[[], Row]) -> Row:
    """A row: the check's figures, or why there are none. ``failed`` in them fails it."""
    if time.monotonic() > context.deadline:
        return about | {"status": SKIPPED, "detail": "out of time"}
    try:
        figures = check()
        context.gpu.synchronize()  # what went wrong on the device is this row's
    except SkippedError as reason:
        return about | {"status": SKIPPED, "detail": str(reason)}
    except torch.cuda.OutOfMemoryError as error:
        context.gpu.empty_cache()
        return about | {"status": SKIPPED, "detail": common.one_line(error)}
    except Exception as error:  # whatever goes wrong is the result
        return about | {"status": FAILED, "detail": common.one_line(error)}
    wrong = figures.pop("failed", "")
    return about | {"status": FAILED if wrong else OK, "detail": wrong} | figures


def case_names() -> list[str]:
    return [*operations.NAMES, "attention with bias"]


def make(context: Context, name: str, dtype: torch.dtype, device: str | None = None) -> Operation:
    """An operation at the sizes of the values."""
    windows = name == "attention with bias"
    shape = context.sizes.windows if windows else context.sizes.values
    base = "attention" if windows else name
    return operations.make_operation(base, shape, dtype, device or context.device)


def serving(context: Context, dtype: torch.dtype) -> list[str]:
    """The backends that serve tensors of a type here."""
    return [which for which in backend.BACKENDS if not refusal(context, dtype, which)]


def refusal(context: Context, dtype: torch.dtype, which: str) -> str:
    """Why a backend does not serve them; empty where it does."""
    if which == "triton" and context.device == "cpu":
        return "needs CUDA: Triton's interpreter is no kernel"
    here = backend.choose(context.device, dtype, backend.installed(), requested=which)
    return "" if here.backend else here.refusals[0][1]


# -- Sections ------------------------------------------------------------------------------------


def values(context: Context) -> Iterator[Row]:
    """Errors of every order; attention in float64 has no Triton kernel and says so."""
    for name, dtype in itertools.product(case_names(), common.DTYPES.values()):
        operation = make(context, name, dtype)
        cotangents = operations.make_cotangents(operation)
        expected = operations.expected_results(operation, cotangents)
        for which in serving(context, operation.inputs[0].dtype):
            for order in operations.ORDERS[:3]:
                about = {
                    "check": name,
                    "dtype": operations.dtype_name(dtype),
                    "backend": which,
                    "order": order,
                }

                check = partial(_value, operation, cotangents, expected[order], which, order)
                yield attempt(context, about, check)


def _value(
    operation: Operation,
    cotangents: Cotangents,
    exact: Sequence[Tensor | None],
    which: str,
    order: str,
) -> Row:
    with gn_kernels.use_backend(which):
        try:
            actual = through_autograd(operation.ours, operation, cotangents)[order]()
        except RuntimeError as error:
            if "was asked for by name" in str(error):  # the family has no such kernel
                raise SkippedError(str(error)) from None
            raise
    tolerance = operations.TOLERANCE[operation.inputs[0].dtype]
    wrong = operations.mistake(actual, exact, tolerance)
    return {"failed": wrong, **accuracy.errors(actual, exact, (0.0,) * len(actual))}


def penalty(context: Context) -> Iterator[Row]:
    """‖error‖/‖exact‖ of the weight gradient; at most 1.5 times eager's, or 1e-5."""
    stock = accuracy.small_vit()
    step_cost.use_math_attention(stock)
    generator = torch.Generator().manual_seed(1)
    count = 4 if context.device == "cpu" else 16
    images = torch.rand(count, 3, 32, 32, generator=generator).to(context.device)
    labels = torch.randint(10, (count,), generator=generator).to(context.device)

    def gradient(model: nn.Module, dtype: torch.dtype) -> Tensor:
        return accuracy.penalty_gradient(model, images.to(dtype), labels, "l1")

    def moved(dtype: torch.dtype) -> nn.Module:
        model = accuracy.small_vit()
        step_cost.use_math_attention(model)
        model.load_state_dict(stock.state_dict())
        return model.to(context.device, dtype)

    for dtype in (torch.float32, torch.bfloat16):
        # The rounded weights and images are the problem; how it is computed is the question.
        exact_model = moved(dtype).double()
        exact = accuracy.penalty_gradient(exact_model, images.to(dtype).double(), labels, "l1")

        def error(model: nn.Module, dtype: torch.dtype = dtype, exact: Tensor = exact) -> float:
            return float((gradient(model, dtype) - exact).norm() / exact.norm())

        eager = error(moved(dtype))
        for which in backend.BACKENDS:
            about = {
                "check": "penalty's weight gradient",
                "dtype": operations.dtype_name(dtype),
                "backend": which,
            }

            def check(
                which: str = which,
                dtype: torch.dtype = dtype,
                eager: float = eager,
                error: Callable[..., float] = error,
            ) -> Row:
                reason = refusal(context, dtype, which)
                if reason:
                    raise SkippedError(reason)
                model = moved(dtype)
                step_cost.use_fused_attention(model)
                swap(model)
                with gn_kernels.use_backend(which):
                    ours = error(model)
                bound = max(1.5 * eager, 1e-5)
                wrong = "" if ours <= bound else f"{ours:.1e}, more than {bound:.1e}"
                return {"failed": wrong, "relative": ours, "eager_relative": eager}

            yield attempt(context, about, check)


def modes(context: Context) -> Iterator[Row]:
    """The same bits on another stream, on a second device, and from a graph; layouts."""
    for name in ("gelu", "layer_norm", "attention"):
        operation = make(context, name, torch.bfloat16)
        for which in serving(context, operation.inputs[0].dtype):
            if which == "reference":
                continue
            for mode, check in (
                ("another stream", _stream),
                ("a second device", _second_device),
                ("a CUDA graph", _graph),
                ("transposed and shifted memory", _layouts),
            ):
                about = {"check": f"{name}, {mode}", "dtype": "bfloat16", "backend": which}

                def in_backend(
                    check: Callable[[Context, str], Row] = check,
                    name: str = name,
                    which: str = which,
                ) -> Row:
                    with gn_kernels.use_backend(which):
                        return check(context, name)

                yield attempt(context, about, in_backend)


def _cycle(operation: Operation) -> Callable[[], list[Tensor]]:
    cotangents = operations.make_cotangents(operation)
    runs = through_autograd(operation.ours, operation, cotangents)
    return lambda: [
        one.detach() for order in operations.ORDERS[:3] for one in runs[order]() if one is not None
    ]


def _same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    pairs = list(zip(actual, expected, strict=True))
    different = sum(not torch.equal(a.cpu(), e.cpu()) for a, e in pairs)
    return {"failed": f"{different} of {len(pairs)} results differ" if different else ""}


def _stream(context: Context, name: str) -> Row:
    operation = make(context, name, torch.bfloat16)
    expected = _cycle(operation)()
    with context.gpu.other_stream():
        actual = _cycle(operation)()
    context.gpu.synchronize()
    return _same(actual, expected)


def _second_device(context: Context, name: str) -> Row:
    if context.gpu.device_count() < 2:
        raise SkippedError("needs a second GPU")
    expected = _cycle(make(context, name, torch.bfloat16))()
    actual = _cycle(make(context, name, torch.bfloat16, f"{context.device}:1"))()
    return _same(actual, expected)


def _graph(context: Context, name: str) -> Row:
    operation = make(context, name, torch.bfloat16)
    cotangents = operations.make_cotangents(operation)

    def run() -> list[Tensor]:
        # From the forward pass on, so that the graph holds every kernel.
        runs = through_autograd(operation.ours, operation, cotangents)
        return [
            one.detach()
            for order in operations.ORDERS[:3]
            for one in runs[order]()
            if one is not None
        ]

    results, replay = context.gpu.capture(run)
    with torch.no_grad():
        for one in operation.inputs:
            one.mul_(0.5)
    replay()
    context.gpu.synchronize()
    replayed = [one.clone() for one in results]
    return _same(replayed, run())


def _layouts(context: Context, name: str) -> Row:
    operation = make(context, name, torch.bfloat16)
    x = operation.inputs[0].detach()
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    shifted.copy_(x)
    spread = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = [one.double() for one in _cycle(operation)()]
    for other in (shifted, spread):
        inputs = (other.requires_grad_(), *operation.inputs[1:])
        actual = _cycle(operation._replace(inputs=inputs))()
        wrong = operations.mistake(actual, expected, operations.TOLERANCE[torch.bfloat16])
        if wrong:
            return {"failed": wrong}
    return {}


def timings(context: Context) -> Iterator[Row]:
    """Median milliseconds of a call, and the same ÷ a copy's and eager PyTorch's."""
    flush = torch.empty(4 * context.gpu.l2_bytes(), dtype=torch.uint8, device=context.device)
    for name in ("gelu", "layer_norm", "attention", "attention with bias", "silu", "gelu_tanh"):
        windows = name == "attention with bias"
        shape = context.sizes.timed_windows if windows else context.sizes.timings
        about = {"check": name, "dtype": "bfloat16"}
        if time.monotonic() > context.deadline:
            yield about | {"status": SKIPPED, "detail": "out of time"}
            continue
        operation = operations.make_operation(
            "attention" if windows else name, shape, torch.bfloat16, context.device
        )
        cotangents = operations.make_cotangents(operation)
        # The copy and eager first: the others are put beside them.
        chosen = [operations.COPY, operations.EAGER, operations.OURS, operations.KERNELS_ALONE]
        chosen += [operations.INDUCTOR] if context.compile else []
        try:
            expected = operations.expected_results(operation, cotangents)
            providers, absent = operations.make_providers(operation, cotangents, chosen)
        except Exception as error:  # whatever goes wrong is the result
            yield about | {"status": FAILED, "detail": common.one_line(error)}
            continue
        moved = operations.moved_bytes(operation, cotangents)
        for provider, reason in absent.items():
            row = about | {"provider": provider, "detail": reason}
            yield row | {"status": FAILED if provider == operations.OURS else SKIPPED}
        for order in operations.ORDERS[:3]:
            medians: dict[str, float] = {}
            for provider in sorted(providers, key=chosen.index):
                row = about | {"order": order, "provider": provider}

                check = partial(
                    *(_timing, context, providers[provider][order], flush),
                    None if provider == operations.COPY else expected[order],
                    moved[order],
                    medians,
                    provider,
                )
                yield attempt(context, row, check)


def _timing(
    context: Context,
    run: Callable[[], Any],
    flush: Tensor,
    expected: Sequence[Tensor | None] | None,
    moved: int,
    medians: dict[str, float],
    provider: str,
) -> Row:
    if expected is not None:
        wrong = operations.mistake(run(), expected, operations.TOLERANCE[torch.bfloat16])
        if wrong:  # what is wrong has no speed
            return {"failed": wrong}
    samples = [_milliseconds(context, run, flush) for _ in range(context.sizes.rounds + 2)]
    taken = common.summary(samples[2:])
    medians[provider] = taken.median
    figures: Row = {
        "median_ms": taken.median,
        "p20_ms": taken.low,
        "p80_ms": taken.high,
        "tb_per_s": moved / taken.median / 1e9,
    }
    for peer in (operations.COPY, operations.EAGER):
        if peer in medians:
            figures[f"over_{peer}"] = taken.median / medians[peer]
    return figures


def _milliseconds(context: Context, run: Callable[[], object], flush: Tensor) -> float:
    start, stop = context.gpu.timer()
    flush.zero_()
    context.gpu.hold()
    start()
    run()
    return stop()()


def steps(context: Context) -> Iterator[Row]:
    """A step of a whole model: milliseconds, natural steps, peak memory."""
    chosen = ("natural", "natural, gn_kernels", "gradient-norm, eager", "gradient-norm, gn_kernels")
    chosen += ("gradient-norm, gn_kernels, recompute",)
    for name in context.sizes.models:
        medians: dict[str, float] = {}
        for method in step_cost.METHODS:
            if method.name not in chosen:
                continue
            about = {"check": name, "provider": method.name, "dtype": "bfloat16"}
            about |= {"batch": context.sizes.batch}

            def check(
                name: str = name,
                method: step_cost.Method = method,
                medians: dict[str, float] = medians,
            ) -> Row:
                torch.manual_seed(0)
                model = timm.create_model(name, **context.sizes.options)
                model = model.to(context.device, torch.bfloat16).train()
                pixels = context.sizes.options.get("img_size", 224)
                shape = (context.sizes.batch, 3, pixels, pixels)
                images = torch.rand(shape, device=context.device).to(torch.bfloat16)
                labels = torch.randint(1000, shape[:1], device=context.device)
                method.prepare(model)

                def step() -> None:
                    model.zero_grad()
                    method.loss(model, images, labels).backward()

                step()
                context.gpu.synchronize()
                context.gpu.empty_cache()
                context.gpu.reset_peak()
                samples = []
                for _ in range(max(3, context.sizes.rounds // 6)):
                    start, stop = context.gpu.timer()
                    start()
                    step()
                    samples.append(stop()())
                taken = common.summary(samples)
                medians[method.name] = taken.median
                finite = all(
                    bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None
                )
                figures: Row = {
                    "failed": "" if finite else "a weight gradient is not finite",
                    "median_ms": taken.median,
                    "p20_ms": taken.low,
                    "p80_ms": taken.high,
                    "peak_gb": context.gpu.peak_bytes() / 1e9,
                }
                if step_cost.BASELINE in medians:
                    figures["over_natural"] = taken.median / medians[step_cost.BASELINE]
                return figures

            yield attempt(context, about, check)
            context.gpu.empty_cache()


def large(context: Context) -> Iterator[Row]:
    """The first, middle and last elements of a tensor with 64-bit offsets."""
    count = context.sizes.large
    for which in serving(context, torch.bfloat16):
        if which == "reference":
            continue
        about = {"check": f"gelu of {count:,} elements", "dtype": "bfloat16", "backend": which}

        def check(which: str = which) -> Row:
            needed = 5 * 2 * count
            if count >= 2**31 and context.gpu.free_bytes() < needed:
                raise SkippedError(f"needs {needed / 1e9:.0f} GB of free memory")
            generator = torch.Generator(context.device).manual_seed(0)
            x = torch.empty(count, dtype=torch.bfloat16, device=context.device)
            x.uniform_(-8, 8, generator=generator)
            with gn_kernels.use_backend(which):
                y = torch.ops.gn_kernels.activation_forward(x, "gelu")
                wrong = _wrong_piece(x, y, ACTIVATIONS["gelu"].value)
                del y
                grad = torch.ones_like(x)
                out = torch.ops.gn_kernels.activation_backward(grad, x, "gelu")
                wrong = wrong or _wrong_piece(x, out, ACTIVATIONS["gelu"].first)
            return {"failed": wrong}

        yield attempt(context, about, check)
        context.gpu.empty_cache()


def _wrong_piece(x: Tensor, y: Tensor, function: Callable[[Tensor], Tensor]) -> str:
    for start in dict.fromkeys((0, max(0, min(2**31, x.numel()) - 2048), x.numel() - 4096)):
        piece = slice(max(0, start), max(0, start) + 4096)
        exact = function(x[piece].double())
        error = (y[piece].double() - exact).abs().max()
        if not float(error) <= 2.0**-5:  # an ulp of bf16 below 8
            return f"element {start} and following: off by {float(error):.1e}"
    return ""


def sanitizer(context: Context) -> Iterator[Row]:
    """compute-sanitizer over the values of small tensors, in a process of its own."""

    def check() -> Row:
        if context.device != "cuda":
            raise SkippedError("needs CUDA")
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            raise SkippedError("compute-sanitizer is not on the PATH (it is in the CUDA toolkit)")
        left = max(30, int(context.deadline - time.monotonic()))
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(tool, "--tool", "memcheck", "--error-exitcode", "9"),
                *(sys.executable, "-m", "benchmarks.gpu_check", "--section", "values"),
                *("--in-process", "--small", "--output", folder, "--minutes", str(left / 60)),
            ]
            environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            try:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True,
                    timeout=left,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise SkippedError(f"took longer than the {left} s that were left") from None
        if done.returncode == 9:
            lines = [line for line in done.stdout.splitlines() if "=========" in line]
            return {"failed": " ".join(lines[:4])[:400]}
        return {"failed": "" if done.returncode == 0 else f"exit status {done.returncode}"}

    yield attempt(context, {"check": "compute-sanitizer memcheck"}, check)


SECTIONS: dict[str, Callable[[Context], Iterator[Row]]] = {
    "values": values,
    "penalty": penalty,
    "modes": modes,
    "timings": timings,
    "steps": steps,
    "large": large,
    "sanitizer": sanitizer,
}

# How much longer than its time a section may take before its process is ended.
_GRACE_S = 120.0

# -- The report ----------------------------------------------------------------------------------


class Report:
    """Rows by section; written after each, so that nothing is lost."""

    def __init__(self, folder: Path, about: Row) -> None:
        self.folder, self.about = folder, about
        self.sections: dict[str, list[Row]] = {}

    def add(self, section: str, rows: list[Row]) -> None:
        """Set the rows of a section, and write."""
        self.sections[section] = rows
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"about": self.about, "sections": self.sections}
        for name, text in (
            ("gpu_check.json", json.dumps(content, indent=1, default=str) + "\n"),
            ("gpu_check.md", self.markdown()),
        ):
            whole = self.folder / f"{name}.new"
            whole.write_text(text)
            whole.replace(self.folder / name)

    @property
    def failed(self) -> int:
        return sum(row["status"] == FAILED for rows in self.sections.values() for row in rows)

    def markdown(self) -> str:
        lines = ["# GPU check", ""]
        lines += [f"* {name}: {value}" for name, value in self.about.items()]
        for section, rows in self.sections.items():
            counts = {
                status: sum(row["status"] == status for row in rows)
                for status in (OK, FAILED, SKIPPED)
            }
            stated = ", ".join(f"{count} {status}" for status, count in counts.items())
            columns = {key: key for key in dict.fromkeys(key for row in rows for key in row)}
            lines += ["", f"## {section}: {stated}", ""]
            lines += [common.markdown(rows, columns)] if rows else []
        return "\n".join(lines) + "\n"


def run_section(name: str, context: Context, report: Report) -> None:
    """Its rows, each in the report at once, and a failed one where it broke."""
    rows: list[Row] = []
    try:
        for row in SECTIONS[name](context):
            rows.append(row)
            report.add(name, rows)
    except Exception as error:  # whatever goes wrong is the result
        rows.append({"check": name, "status": FAILED, "detail": common.one_line(error)})
    report.add(name, rows)


def run_isolated(name: str, arguments: Sequence[str], seconds: float) -> list[Row]:
    """The same from a process of its own, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", name]
        command += ["--in-process", "--minutes", f"{seconds / 60:.3f}", "--output", folder]
        problem, patience = "", seconds + _GRACE_S
        try:
            done = subprocess.run(
                [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=patience
            )
            if done.returncode not in (0, 1):
                stated = " ".join(done.stderr.split())[-300:]
                problem = f"the process ended with {done.returncode}: {stated}"
        except subprocess.TimeoutExpired:
            problem = f"still ran {patience:.0f} s after its start"
        rows: list[Row] = []
        file = Path(folder, "gpu_check.json")
        if file.exists():
            rows = json.loads(file.read_text())["sections"].get(name, [])
        if not rows and not problem:
            problem = "no result"
    if problem:
        rows.append({"check": name, "status": FAILED, "detail": problem})
    return rows


def main(argv: Sequence[str] | None = None, gpu: Cuda | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="what is left then is skipped")
    parser.add_argument("--section", choices=SECTIONS, action="append")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder, made")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile's times")
    parser.add_argument("--small", action="store_true", help="the sizes of --device cpu")
    parser.add_argument("--in-process", action="store_true", help="no process for each section")
    options = parser.parse_args(argv)
    if options.device == "cuda" and gpu is None and not torch.cuda.is_available():
        parser.error("no GPU is visible to torch; --device cpu runs what a CPU can")
    gpu = gpu or (Cuda() if options.device == "cuda" else Cpu())
    sizes = CPU_SIZES if options.small or options.device == "cpu" else GPU_SIZES
    start = time.monotonic()
    about = common.environment(common.command_line("gpu_check", argv)) | gn_kernels.info()
    report = Report(options.output, about | gpu.describe())
    chosen = options.section or list(SECTIONS)
    deadline = start + 60 * options.minutes
    passed_on = ["--device", options.device]
    passed_on += ["--no-compile"] if options.no_compile else []
    passed_on += ["--small"] if options.small else []
    for name in SECTIONS:
        if name not in chosen:
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            report.add(name, [{"check": name, "status": SKIPPED, "detail": "out of time"}])
        elif options.in_process:
            context = Context(gpu, sizes, deadline, not options.no_compile)
            run_section(name, context, report)
        else:
            report.add(name, run_isolated(name, passed_on, left))
        rows = report.sections[name]
        bad = [row for row in rows if row["status"] == FAILED]
        print(f"{name}: {len(rows)} checks, {len(bad)} failed", flush=True)
        for row in bad:
            print(f"FAILED {name}: {row}", file=sys.stderr)
    print(f"{options.output / 'gpu_check.md'}: {report.failed} failed")
    return int(report.failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
