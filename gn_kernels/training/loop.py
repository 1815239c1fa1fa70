"""The training loop: repeatable bit for bit, and resumable at any step."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gn_kernels import backend
from gn_kernels.swap import swap
from gn_kernels.training import checkpoint
from gn_kernels.training.data import Dataset
from gn_kernels.training.model import build, prepare, swap_activations, use_math_attention
from gn_kernels.training.recipe import METHODS, InputError, Losses, Settings, learning_rate
from gn_kernels.version import __version__

CHECKPOINT = "checkpoint.pt"


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the training after ``step`` steps; they are in the checkpoint."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class Progress(NamedTuple):
    """What an observer learns after each step. ``step`` counts from 1."""

    step: int
    total_steps: int
    epoch: float
    step_ms: float
    images_per_second: float
    loss: float
    penalty: float


class Timing(NamedTuple):
    """Milliseconds of repeated steps: the median, the 20th and 80th percentile, the mean."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    mean_ms: float
    steps: int


class Training:
    """A run: model, optimiser, the step it has reached, and a record of all steps.

    Everything else follows from these: the order of the images from the seed and the epoch, the
    learning rate and the ramp from the step. Torch's global generator belongs to the run while it
    lasts (it is put back afterwards) and is in the checkpoint.

    Args:
        settings: of the run.
        data: what :func:`gn_kernels.training.data.load` returned for them.

    Attributes:
        model: pixels in [0, 1] to logits.
        swapped: what was swapped, None with ``settings.swap`` off.
        record: (steps, 3), float64: cross-entropy, penalty, milliseconds of each step.
    """

    def __init__(self, settings: Settings, data: Dataset) -> None:
        self.settings, self.data = settings, data
        with reproducible(settings):
            torch.manual_seed(settings.seed)
            self.model = build(settings, data)
            self._generator_state = _generator_state(settings.device)
        self.swapped = prepare(self.model, settings)
        self.optimizer = _optimizer(self.model, settings)
        self.steps_per_epoch = len(data.train) // settings.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.step = 0
        self.record = torch.zeros(self.total_steps, 3, dtype=torch.float64)

    def run(
        self,
        path: Path | None = None,
        observer: Callable[[Progress], None] = lambda progress: None,
        save_every_steps: int | None = None,
    ) -> None:
        """Train from where the run is to its end.

        Args:
            path: where checkpoints go: after each epoch or ``save_every_steps``, at the end, and
                at SIGINT or SIGTERM. None for no checkpoints.
            observer: called after each step.
            save_every_steps: steps between checkpoints.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the finished step is in the checkpoint.
            InputError: the loss is no longer finite. The last checkpoint stays as it is.
        """
        interval = save_every_steps or self.steps_per_epoch
        self.model.train()
        with reproducible(self.settings), _deferred_signals() as pending:
            _set_generator_state(self._generator_state, self.settings.device)
            while self.step < self.total_steps:
                observer(self._advance())
                stop = bool(pending)
                if stop or self.step % interval == 0 or self.step == self.total_steps:
                    self._generator_state = _generator_state(self.settings.device)
                    if path is not None:
                        checkpoint.save(path, self.state())
                if stop:
                    raise Interrupted(pending[0], self.step)

    def _advance(self) -> Progress:
        epoch = self.step / self.steps_per_epoch
        start = time.perf_counter()
        losses = update(self.model, self.optimizer, *self._batch(self.step), epoch, self.settings)
        cross_entropy, penalty = losses.cross_entropy.item(), losses.penalty.item()
        if self.settings.device == "cuda":
            torch.cuda.synchronize()  # the losses are there before the weights are
        step_ms = 1e3 * (time.perf_counter() - start)
        if not (math.isfinite(cross_entropy) and math.isfinite(penalty)):
            raise InputError(
                f"the loss is not finite at step {self.step + 1}: try a smaller --lr or --eps-255"
            )
        self.record[self.step] = torch.tensor([cross_entropy, penalty, step_ms])
        self.step += 1
        return Progress(
            self.step,
            self.total_steps,
            self.step / self.steps_per_epoch,
            step_ms,
            1e3 * self.settings.batch_size / step_ms,
            cross_entropy,
            penalty,
        )

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        size = self.settings.batch_size
        order = _order(len(self.data.train), self.settings.seed, epoch)
        images, labels = self.data.train.batch(order[position * size : (position + 1) * size])
        return images.to(self.settings.device), labels.to(self.settings.device)

    def state(self) -> dict[str, Any]:
        """The whole run, as :func:`gn_kernels.training.checkpoint.save` takes it."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "dataset": self.data.summary(),
            "versions": versions(),
            "swapped": str(self.swapped) if self.swapped else None,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": self._generator_state,
            "record": self.record,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where a checkpoint was taken. The continuation is the same bit for bit.

        (On the same machine and with the same versions.)

        Raises:
            InputError: it is of other settings, another data set or another model.
        """
        ours = dataclasses.asdict(self.settings)
        theirs = state["settings"]
        for name in ours:
            if name not in ("data", "device") and ours[name] != theirs.get(name):
                raise InputError(
                    f"the checkpoint was trained with {name} {theirs.get(name)!r}, not "
                    f"{ours[name]!r}"
                )
        load_weights(self.model, self.data, state)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.record.copy_(state["record"])
            self.step = int(state["step"])
            self._generator_state = {name: x.cpu() for name, x in state["generators"].items()}
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"the checkpoint can't be continued: {error}") from error

    def history(self) -> list[dict[str, float]]:
        """Means over each finished epoch, for the report."""
        epochs = self.step // self.steps_per_epoch
        done = self.record[: epochs * self.steps_per_epoch]
        return [
            {"epoch": index + 1, "cross_entropy": row[0], "penalty": row[1], "step_ms": row[2]}
            for index, row in enumerate(
                done.reshape(epochs, self.steps_per_epoch, 3).mean(1).tolist()
            )
        ]

    def timing(self) -> Timing:
        """Of all steps so far, with the loading of their batch."""
        return _timing(self.record[: self.step, 2])


def load_weights(model: nn.Module, data: Dataset, state: dict[str, Any]) -> None:
    """Put a checkpoint's weights into ``model``.

    Raises:
        InputError: they are of another data set or another model.
    """
    ours, theirs = data.summary(), state.get("dataset", {})
    differing = [name for name in ours if name != "name" and ours[name] != theirs.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"the checkpoint was trained on data with {name} {theirs.get(name)}, but these have "
            f"{ours[name]}"
        )
    try:
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError) as error:
        raise InputError("the checkpoint's weights do not fit the model it names") from error


def settings_of(state: dict[str, Any], **changes: Any) -> Settings:
    """The settings in a checkpoint, with some of them changed.

    Raises:
        InputError: they are of another version of gn_kernels.
    """
    try:
        return Settings(**{**state["settings"], **changes})
    except (KeyError, TypeError) as error:
        raise InputError(f"the checkpoint is of another version of gn_kernels: {error}") from error


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: float,
    settings: Settings,
) -> Losses:
    """One step of the settings' method: losses, weight gradients, clipping, AdamW."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, settings)
    losses = METHODS[settings.method](model, images, labels, epoch, settings)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()
    return losses


def _activations_only(model: nn.Module) -> None:
    use_math_attention(model)
    swap_activations(model)


# What a training step is timed with. The last one is plain PyTorch.
_VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "gn_kernels.swap": swap,
    "gn_kernels' activations, math attention": _activations_only,
    "PyTorch's operations, math attention": use_math_attention,
}


class StepComparison(NamedTuple):
    """The same training step with and without gn_kernels.

    Attributes:
        timings: for each variant.
        loss_difference: largest relative difference between the variants' first total loss, a
            check that they compute the same.
    """

    timings: dict[str, Timing]
    loss_difference: float

    def speedup(self, variant: str) -> float:
        """Median time of plain PyTorch over that of the variant."""
        plain = list(self.timings.values())[-1]
        return plain.median_ms / self.timings[variant].median_ms


def compare_steps(training: Training, steps: int = 40, warmup_steps: int = 5) -> StepComparison:
    """Time a step with gn_kernels swapped in and without, without touching the run.

    All variants start from copies of the run's weights and optimiser, take the same batches with
    the penalty at full strength, and take turns: what slows the machine down meets all of them.
    """
    settings = training.settings
    last = (training.total_steps - 1) / training.steps_per_epoch
    variants = []
    with reproducible(settings):
        for change in _VARIANTS.values():
            model = build(settings, training.data)
            model.load_state_dict(training.model.state_dict())
            change(model)
            optimizer = _optimizer(model, settings)
            # Deep: AdamW would otherwise share the state's tensors with the run and write to them.
            optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
            variants.append((model.train(), optimizer))
        times = torch.zeros(warmup_steps + steps, len(variants), dtype=torch.float64)
        first = []
        for step in range(len(times)):
            batch = training._batch(step % training.total_steps)
            for turn in range(len(variants)):
                # Each is the first in turn: the first one finds the caches cold.
                which = (step + turn) % len(variants)
                model, optimizer = variants[which]
                start = time.perf_counter()
                losses = update(model, optimizer, *batch, last, settings)
                total = losses.total.item()
                if settings.device == "cuda":
                    torch.cuda.synchronize()
                times[step, which] = 1e3 * (time.perf_counter() - start)
                if step == 0:
                    first.append(total)
    return StepComparison(
        dict(zip(_VARIANTS, map(_timing, times[warmup_steps:].unbind(1)), strict=True)),
        (max(first) - min(first)) / abs(first[-1]),
    )


def versions() -> dict[str, str]:
    """What a run's bits depend on, for reports and checkpoints."""
    import sklearn
    import timm

    return {
        "gn_kernels": __version__,
        "torch": str(torch.__version__),  # a subclass of str, which weights_only refuses
        "timm": str(timm.__version__),
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
    }


def backend_in_use(device: str) -> str:
    """The backend that float32 activations run on."""
    return backend.select(device, torch.float32, backend.requested())


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    # torch's CPU generator looks at the lower 32 bits of its seed only.
    generator = torch.Generator().manual_seed((1_000_003 * (seed + 1) + epoch) % 2**32)
    return torch.randperm(count, generator=generator)


def _timing(milliseconds: Tensor) -> Timing:
    if len(milliseconds) == 0:
        return Timing(math.nan, math.nan, math.nan, math.nan, 0)
    points = torch.tensor([0.5, 0.2, 0.8], dtype=milliseconds.dtype)
    median, p20, p80 = milliseconds.quantile(points).tolist()
    return Timing(median, p20, p80, milliseconds.mean().item(), len(milliseconds))


@contextlib.contextmanager
def reproducible(settings: Settings) -> Iterator[None]:
    """The settings' number of threads, and torch's generators on loan; afterwards as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        cuda = [torch.cuda.current_device()] if settings.device == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        torch.set_num_threads(threads)


def _generator_state(device: str) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_generator_state(state: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"])
    if device == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def _deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM for the end of the step; a second one acts at once."""
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending  # only the main thread may handle signals
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {signum: signal.getsignal(signum) for signum in signals}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def defer(signum: int, frame: object) -> None:
        pending.append(signum)
        restore()

    for signum in signals:
        signal.signal(signum, defer)
    try:
        yield pending
    finally:
        restore()
