"""The training loop: repeatable bit for bit, and resumable at any step.

All random numbers of a step come from generators that are seeded anew with the run's seed and the
number of the step. So a run's state is its weights, their average, the optimiser's and the
scaler's state, and the number of steps done.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import platform
import random
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gn_kernels import backend
from gn_kernels.saving import recompute
from gn_kernels.swap import swap
from gn_kernels.training import average, checkpoint, distribution
from gn_kernels.training.augment import Reader, mixer
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

    Everything else follows from these: the order of the images from the seed and the epoch, random
    numbers, the learning rate and the ramp from the step. Torch's generators belong to the run
    while it lasts, and are put back afterwards. Under ``torchrun`` each process has one, inside
    :func:`gn_kernels.training.distribution.processes`.

    Args:
        settings: of the run.
        data: what :func:`gn_kernels.training.data.load` returned for them.

    Attributes:
        model: pixels in [0, 1] to logits.
        swapped: what was swapped, None with ``settings.swap`` off.
        average: the moving average of weights and buffers by name; empty without ``ema_decay``.
        record: (steps, 3), float64: cross-entropy, penalty, milliseconds of each step.

    Raises:
        InputError: the batch can't be divided, or the processes have different settings or data.
    """

    def __init__(self, settings: Settings, data: Dataset) -> None:
        self.settings, self.data = settings, data
        parts = distribution.size() * settings.accumulate_steps
        if settings.batch_size % parts:
            raise InputError(
                f"batch_size {settings.batch_size} must be a multiple of the {parts} parts it is "
                f"divided into ({distribution.size()} processes, {settings.accumulate_steps} "
                "accumulated steps)"
            )
        distribution.check_agreement(_common(settings, data))
        # FSDP2 takes a model to the GPU shard by shard: it may be larger than one.
        sharded = settings.distributed == "fsdp2"
        with reproducible(settings):
            torch.manual_seed(settings.seed)
            self.model = build(
                dataclasses.replace(settings, device="cpu") if sharded else settings, data
            )
        self.swapped = prepare(self.model, settings)
        lay_out(self.model, settings)
        self._wrapped = distribution.wrap(self.model, settings)
        self.optimizer = _optimizer(self.model, settings)
        self._scaler = _scaler(settings)
        self.average = average.start(self.model) if settings.ema_decay > 0 else {}
        self.steps_per_epoch = len(data.train) // settings.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        share = distribution.share(settings.batch_size // settings.accumulate_steps)
        plan = functools.partial(_plan, settings, len(data.train), share)
        self._read = Reader(data, settings, plan, self.total_steps * settings.accumulate_steps)
        self._mix = mixer(settings, len(data.classes))
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
            Interrupted: SIGINT or SIGTERM came to one of the processes; the finished step is in
                the checkpoint.
            PeerLostError: another process ended. The last checkpoint stays as it is.
            InputError: the loss is no longer finite, or a checkpoint can't be written. The last
                checkpoint stays as it is.
        """
        interval = save_every_steps or self.steps_per_epoch
        set_mode(self.model, self.settings)
        with reproducible(self.settings), _deferred_signals() as pending:
            while self.step < self.total_steps:
                with distribution.lost_peers_named(self.step + 1):
                    observer(self._advance())
                    # A signal may reach one process only, or each in another step.
                    stop = max(
                        int(x) for (x,) in distribution.gathered(pending[0] if pending else 0)
                    )
                    due = self.step % interval == 0 or self.step == self.total_steps
                    if path is not None and (stop or due):
                        checkpoint.save(path, self.state())
                if stop:
                    raise Interrupted(stop, self.step)

    def _advance(self) -> Progress:
        epoch = self.step / self.steps_per_epoch
        start = time.perf_counter()
        seed_generators(self.settings, self.step)
        parts = self._parts(self.step)
        try:
            losses = update(
                self._wrapped, self.optimizer, parts, epoch, self.settings, self._scaler
            )
        except FloatingPointError as error:
            raise InputError(
                f"{error} at step {self.step + 1}: try a smaller --lr or --eps-255"
            ) from error
        if self.average:
            average.update(self.average, self.model, self.step, self.settings.ema_decay)
        cross_entropy, penalty = losses.cross_entropy.item(), losses.penalty.item()
        if distribution.size() > 1:
            everywhere = zip(*distribution.gathered(cross_entropy, penalty), strict=True)
            cross_entropy, penalty = (sum(each) / len(each) for each in everywhere)
        if self.settings.device == "cuda":
            torch.cuda.synchronize()  # the losses are there before the weights are
        step_ms = 1e3 * (time.perf_counter() - start)
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

    def _parts(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This process's share of a step's images and targets, in the parts to accumulate."""
        settings = self.settings
        parts = []
        for part in range(settings.accumulate_steps):
            images, labels = self._read(step * settings.accumulate_steps + part)
            images, labels = images.to(settings.device), labels.to(settings.device)
            if settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            parts.append(self._mix(images, labels))
        return parts

    def state(self) -> dict[str, Any]:
        """The whole run, as :func:`gn_kernels.training.checkpoint.save` takes it."""
        optimizer = {
            f"optimizer:{name}:{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return {
            "settings": dataclasses.asdict(self.settings),
            "dataset": self.data.summary(),
            "versions": versions(),
            "swapped": str(self.swapped) if self.swapped else None,
            "step": self.step,
            "scaler": self._scaler.state_dict(),
            "tensors": {
                **{f"model:{name}": x.detach() for name, x in self.model.state_dict().items()},
                **{f"average:{name}": x for name, x in self.average.items()},
                **optimizer,
                "record:": self.record,
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where a checkpoint was taken. The continuation is the same bit for bit.

        (On the same machine, with the same versions and number of processes.)

        Raises:
            InputError: it is of other settings, another data set or another model.
        """
        ours, theirs = (dataclasses.asdict(x) for x in (self.settings, settings_of(state)))
        for name in ours:
            if name not in _FREE and ours[name] != theirs[name]:
                raise InputError(
                    f"the checkpoint was trained with {name} {theirs[name]!r}, not {ours[name]!r}"
                )
        old = state.get("format") == checkpoint.FORMAT_1
        if old and self.settings.distributed != "none":
            raise InputError(
                "the checkpoint is in the format of one process, which several can't continue: "
                "continue it without torchrun up to its next checkpoint, which is in the new one"
            )
        load_weights(self.model, self.data, state, averaged=False)
        try:
            if old:
                self.optimizer.load_state_dict(state["optimizer"])
            else:
                self._load_optimizer(state)
                self._scaler.load_state_dict(state["scaler"])
            checkpoint.fill(state, "average", self.average)
            checkpoint.fill(state, "record", {"": self.record})
            self.step = int(state["step"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"the checkpoint can't be continued: {error}") from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        tensors = {}
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for both in checkpoint.sizes(state, "optimizer"):
            name, _, key = both.rpartition(":")
            parameter = parameters[name].detach()
            tensors[both] = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
            self.optimizer.state[parameters[name]][key] = tensors[both]
        checkpoint.fill(state, "optimizer", tensors)

    def trained(self) -> nn.Module:
        """The model as it is to be used: with the averaged weights if there are any, and whole.

        All processes of a run must call it.
        """
        if not self.average and self.settings.distributed != "fsdp2":
            return self.model
        tensors = self.average or self.model.state_dict()
        weights = {name: distribution.whole(tensor) for name, tensor in tensors.items()}
        with reproducible(self.settings):
            model = build(self.settings, self.data)
        prepare(model, self.settings)
        model.load_state_dict(weights)
        return model

    def history(self) -> list[dict[str, float]]:
        """Means over each finished epoch, for the report; of steps with finite losses."""
        epochs = self.step // self.steps_per_epoch
        done = self.record[: epochs * self.steps_per_epoch]
        done = torch.where(done.isfinite(), done, math.nan)
        return [
            {"epoch": index + 1, "cross_entropy": row[0], "penalty": row[1], "step_ms": row[2]}
            for index, row in enumerate(
                done.reshape(epochs, self.steps_per_epoch, 3).nanmean(1).tolist()
            )
        ]

    def timing(self) -> Timing:
        """Of all steps so far, with the loading of their batch."""
        return _timing(self.record[: self.step, 2])


def load_weights(
    model: nn.Module, data: Dataset, state: dict[str, Any], averaged: bool = True
) -> None:
    """Put a checkpoint's weights into ``model``, or with ``averaged`` their average if it has one.

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
    section = "average" if averaged and checkpoint.sizes(state, "average") else "model"
    checkpoint.fill(state, section, model.state_dict())


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
    parts: Sequence[tuple[Tensor, Tensor]],
    epoch: float,
    settings: Settings,
    scaler: torch.amp.GradScaler,
) -> Losses:
    """One step of the settings' method: losses, weight gradients, clipping, the optimiser.

    Args:
        model: the model, or what :func:`gn_kernels.training.distribution.wrap` made of it.
        optimizer: of its parameters.
        parts: images and targets. The gradients of the parts are averaged, all of the same size.
        epoch: epochs done, with their fraction.
        settings: of the run.
        scaler: of the loss, where float16 needs it.

    Returns:
        The losses, averages over the parts.

    Raises:
        FloatingPointError: the loss or its gradient is not finite. Nothing was changed.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, settings)
    optimizer.zero_grad(set_to_none=True)
    each = []
    for part, (images, targets) in enumerate(parts):
        with distribution.averaging(model, last=part == len(parts) - 1):
            with _arithmetic(settings):
                losses = METHODS[settings.method](
                    model, images, targets, epoch, settings, scaler.get_scale()
                )
            scaler.scale(losses.total / len(parts)).backward()
        each.append(Losses(*(loss.detach() for loss in losses)))
    distribution.end_of_backward(model)
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The scaler leaves out a step whose scaled gradients overflowed, and tries less.
    finite = scaler.is_enabled() and scaler.get_scale() >= 1
    finite = finite or bool(distribution.whole(norm).isfinite())
    if not finite or not all(bool(losses.cross_entropy.isfinite()) for losses in each):
        raise FloatingPointError("the loss or its gradient is not finite")
    if settings.clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
    scaler.step(optimizer)
    scaler.update()
    if distribution.size() > 1:
        # Statistics of each process's own images, where BatchNorm is not frozen.
        distribution.average_(_statistics(model))
    if len(each) == 1:
        return each[0]
    return Losses(*(torch.stack(loss).mean() for loss in zip(*each, strict=True)))


@contextlib.contextmanager
def _arithmetic(settings: Settings) -> Iterator[None]:
    """What the method's forward pass and inner gradient are computed in, and what is kept."""
    precision = getattr(torch, settings.precision)
    with contextlib.ExitStack() as stack:
        if precision is not torch.float32:
            stack.enter_context(torch.autocast(settings.device, precision))
        if settings.recompute:
            stack.enter_context(recompute())
        yield


def set_mode(model: nn.Module, settings: Settings) -> None:
    """Train mode, with BatchNorm frozen, or eval mode, as the settings say."""
    model.train(not settings.eval_mode)
    if settings.freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def lay_out(model: nn.Module, settings: Settings) -> None:
    """Channels innermost, and blocks that are computed again in the backward passes, if asked."""
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    if not settings.checkpoint_activations:
        return
    for module in model.modules():
        timm: Any = getattr(module, "set_grad_checkpointing", None)
        transformers: Any = getattr(module, "gradient_checkpointing_enable", None)
        # Reentrant checkpointing, which timm does not use, refuses torch.autograd.grad.
        if timm:
            timm()
            return
        if transformers:
            transformers({"use_reentrant": False})
            return
    raise InputError(
        f"--checkpoint-activations needs a model of timm or transformers that offers it, which "
        f"{settings.model} does not"
    )


def _statistics(model: nn.Module) -> list[Tensor]:
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


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


# What a comparison of steps may take, more or less.
_COMPARISON_S = 60


def compare_steps(training: Training, steps: int = 40, warmup_steps: int = 5) -> StepComparison:
    """Time a step with gn_kernels swapped in and without, without touching the run.

    All variants start from copies of the run's weights and optimiser, take the same batches with
    the penalty at full strength, and take turns: what slows the machine down meets all of them.
    Where the run's own steps were slow, fewer are timed, at least 3 after 1: about a minute in all.
    """
    settings = training.settings
    if training.step:
        turn_s = len(_VARIANTS) * training.timing().median_ms / 1e3
        affordable = int(_COMPARISON_S / turn_s)
        steps = min(steps, max(3, affordable))
        warmup_steps = min(warmup_steps, max(1, affordable // 8))
    last = (training.total_steps - 1) / training.steps_per_epoch
    variants = []
    with reproducible(settings):
        for change in _VARIANTS.values():
            model = build(settings, training.data)
            model.load_state_dict(training.model.state_dict())
            change(model)
            lay_out(model, settings)
            set_mode(model, settings)
            optimizer = _optimizer(model, settings)
            # Deep: AdamW would otherwise share the state's tensors with the run and write to them.
            optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
            variants.append((model, optimizer))
        times = torch.zeros(warmup_steps + steps, len(variants), dtype=torch.float64)
        first = []
        for step in range(len(times)):
            seed_generators(settings, step)
            batch = training._parts(step % training.total_steps)
            for turn in range(len(variants)):
                # Each is the first in turn: the first one finds the caches cold.
                which = (step + turn) % len(variants)
                model, optimizer = variants[which]
                start = time.perf_counter()
                losses = update(model, optimizer, batch, last, settings, _scaler(settings))
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


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _scaler(settings: Settings) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(settings.device, enabled=settings.precision == "float16")


def _common(settings: Settings, data: Dataset) -> dict[str, Any]:
    """What the processes of a run must agree on; paths may differ from machine to machine."""
    values = dataclasses.asdict(settings)
    for name in ("data", "test_list", "weights"):
        del values[name]
    labels = zlib.crc32(data.train.all_labels().numpy().tobytes())
    return {**values, **versions(), **data.summary(), "the training labels' checksum": labels}


# Settings that may change when a run is continued: the weights do not depend on them, or, on the
# number of processes, in their last bits.
_FREE = (
    *("data", "device", "distributed", "workers", "tensorboard"),
    *("recompute", "checkpoint_activations"),
)


def seed_generators(settings: Settings, step: int) -> None:
    """Torch's, NumPy's and Python's global generators at the start of a step."""
    seed = zlib.crc32(f"{settings.seed} {step}".encode())
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which leaves a note for every GPU even where there is none.
    torch.default_generator.manual_seed(seed)
    if settings.device == "cuda":
        torch.cuda.manual_seed(seed)


def _plan(
    settings: Settings, images: int, share: slice | Tensor, number: int
) -> tuple[Tensor, int]:
    """The images of a part of a step, and their epoch; parts are numbered through all steps.

    A process of several takes its ``share`` of each part.
    """
    size = settings.batch_size // settings.accumulate_steps
    steps_per_epoch = images // settings.batch_size
    epoch, position = divmod(number, steps_per_epoch * settings.accumulate_steps)
    order = _order(images, settings.seed, epoch)
    return order[position * size : (position + 1) * size][share], epoch


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
    """The settings' number of threads, and all generators on loan; afterwards as before."""
    threads = torch.get_num_threads()
    python, numpy = random.getstate(), np.random.get_state()
    torch.set_num_threads(settings.threads)
    try:
        cuda = [torch.cuda.current_device()] if settings.device == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(python)
        np.random.set_state(numpy)


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
