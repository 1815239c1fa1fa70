"""What a training step of each method costs: time, FLOP and memory, swapped and not."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.counting import Counter
from gn_kernels.reproduce.matrix import METHODS, Run
from gn_kernels.robustness import Stage
from gn_kernels.training import METHODS as LOSSES
from gn_kernels.training import Settings, load, loop
from gn_kernels.training.model import build, prepare

# The reference's way of attacking, which the paper's cost claim is measured against.
REFERENCE = "pgd-3, reference"
_STEPS: dict[str, dict[str, Any]] = {
    **METHODS,
    REFERENCE: {**METHODS["pgd-3"], "pgd_gradients": "reference"},
}
KERNELS = {True: "gn_kernels", False: "PyTorch"}


def measure(
    run: Run, rounds: int, folder: Path, observer: Callable[[Stage], None]
) -> dict[str, Any]:
    """Time and count a step of every method on a run's model, with and without the swap.

    A step is the method's losses, the backward pass, clipping and AdamW, on one batch in memory
    with the penalty at full strength. The steps take turns in one process, and each turn begins
    with another, so that what slows the machine down meets all of them. FLOP and bytes are counted
    (:class:`gn_kernels.counting.Counter`): what is alive when the last backward pass begins
    (saved), and at most (peak), beyond weights, optimiser and batch.

    Args:
        run: whose model, data and recipe are taken.
        rounds: timed repetitions, after one that is not.
        folder: unused; jobs have one.
        observer: told of each round.

    Returns:
        ``steps``: a row for each method and kind of kernel; plain values.
    """
    data = load(run.settings)
    batch = data.train.batch(torch.arange(run.settings.batch_size))
    steps: dict[tuple[str, bool], Callable[[], None]] = {}
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    with loop.reproducible(run.settings):
        for swapped in KERNELS:
            for method, changes in _STEPS.items():
                settings = dataclasses.replace(run.settings, **changes, swap=swapped)
                torch.manual_seed(settings.seed)
                model = build(settings, data)
                prepare(model, settings)
                loop.set_mode(model, settings)
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
                step = functools.partial(_step, model, optimizer, settings, *batch)
                key = (method, swapped)
                steps[key], rows[key] = step, _count(model, settings, *batch)
        seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
        order = list(steps)
        for turn in range(-1, rounds):
            for key in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.perf_counter()
                steps[key]()
                if turn >= 0:  # the first finds the caches cold and the optimiser without a state
                    seconds[key].append(time.perf_counter() - start)
            observer(Stage("timing", turn + 2, rounds + 1))
    return {
        "batch_size": run.settings.batch_size,
        "rounds": rounds,
        "steps": [
            {
                "method": method,
                "kernels": KERNELS[swapped],
                "median_ms": 1e3 * statistics.median(seconds[method, swapped]),
                "least_ms": 1e3 * min(seconds[method, swapped]),
                "most_ms": 1e3 * max(seconds[method, swapped]),
                **rows[method, swapped],
            }
            for method, swapped in steps
        ],
    }


def _losses(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> Tensor:
    losses = LOSSES[settings.method](model, images, labels, settings.epochs, settings)
    return losses.total


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    images: Tensor,
    labels: Tensor,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    _losses(model, settings, images, labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()


def _count(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> dict[str, int]:
    with Counter() as counter:
        total = _losses(model, settings, images, labels)
        saved = counter.live
        total.backward()
    model.zero_grad(set_to_none=True)
    return {"flop": counter.flop, "saved_bytes": saved, "peak_bytes": counter.peak}
