"""What several commands share: devices, measuring, tables, JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from gn_kernels.backend import info
from gn_kernels.training.settings import InputError, Settings

if TYPE_CHECKING:
    from gn_kernels.robustness import Evaluation, Stage
    from gn_kernels.training import Dataset
    from gn_kernels.training.data import Split


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, but got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU, and PyTorch finds none")


def on(device: str, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].to(device), batch[1].to(device)


class OnDevice:
    """A part of a data set as measurements take it: by index, on the model's device.

    Args:
        split: of a data set.
        device: of the model.
        limit: keep this many of the images, chosen at random but always the same: a folder's come
            sorted by class.
    """

    def __init__(self, split: Split, device: str, limit: int | None = None) -> None:
        self.split, self.device = split, device
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        self.indices = order[:limit].sort().values

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return on(self.device, self.split.batch(self.indices[indices]))


def measure(model: torch.nn.Module, dataset: Dataset, settings: Settings, seed: int) -> Evaluation:
    """What every training ends with."""
    from gn_kernels.robustness import evaluate
    from gn_kernels.training.loop import reproducible

    with reproducible(settings), sentences():
        return evaluate(
            model,
            OnDevice(dataset.test, settings.device),
            eps_255=settings.attack_radius_255,
            attack_steps=settings.attack_steps,
            restarts=settings.restarts,
            seed=seed,
        )


class Trained(NamedTuple):
    """The model of a checkpoint, ready to be measured."""

    path: Path
    state: dict[str, Any]
    settings: Settings
    dataset: Dataset
    model: torch.nn.Module
    weights: str

    def origin(self) -> dict[str, Any]:
        """What a report says of it."""
        from gn_kernels.training import loop

        return {
            "checkpoint": str(self.path),
            "step": self.state["step"],
            "weights": self.weights,
            "settings": dataclasses.asdict(self.settings),
            "dataset": self.dataset.summary(),
            "versions": loop.versions(),
            "machine": info(),
        }


def load_trained(path: Path, weights: str | None, **changes: Any) -> Trained:
    """Build the model of a checkpoint and load its weights.

    Args:
        path: the file, or a run's folder.
        weights: ``"raw"`` or ``"ema"``; None for the averaged ones where there are any.
        changes: settings that differ from the training's.

    Raises:
        InputError: there is no such checkpoint, weights, or data.
    """
    from gn_kernels.training import checkpoint, data, loop
    from gn_kernels.training.model import build, prepare

    # A checkpoint of several processes is a folder itself.
    path = path / loop.CHECKPOINT if (path / loop.CHECKPOINT).exists() else path
    state = checkpoint.load(path)
    settings = loop.settings_of(state, **changes)
    check_device(settings.device)
    dataset = data.load(settings)
    model = build(settings, dataset)
    prepare(model, settings)
    average = bool(checkpoint.sizes(state, "average"))
    if weights == "ema" and not average:
        raise InputError(f"{path} holds no averaged weights: it was trained with ema_decay 0")
    weights = weights or ("ema" if average else "raw")
    loop.load_weights(model, dataset, state, averaged=weights == "ema")
    return Trained(path, state, settings, dataset, model.eval(), weights)


def add_measuring_options(
    parser: argparse.ArgumentParser, images: int | None, batch_size: int
) -> None:
    """Options of the commands that measure a checkpoint's model."""
    parser.add_argument(
        "--images",
        type=positive,
        metavar="N",
        default=images,
        help=f"measure N of the test images only ({images or 'all'})",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        default=batch_size,
        help=f"images at a time ({batch_size})",
    )
    parser.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="the weights themselves or their moving average (the latter, where there is one)",
    )
    for name, text in (
        ("data", "folder of the data, where it has moved"),
        ("device", "where the model runs"),
    ):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, metavar=name.upper())


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """What a measurement can't take is the user's to mend: one sentence, and exit status 2."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


@contextlib.contextmanager
def stages(partial: Path | None = None) -> Iterator[Callable[[Stage], None]]:
    """Progress bars in a terminal, elsewhere a line for each stage; an interruption is explained.

    On stderr: stdout may be the figures' own.

    Args:
        partial: the file from which a second call goes on.
    """
    try:
        if not sys.stderr.isatty():
            yield _line
            return
        from rich import progress as rich
        from rich.console import Console

        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[note]}"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def observe(stage: Stage) -> None:
                if stage.name not in tasks:
                    tasks[stage.name] = bars.add_task(stage.name, total=stage.total, note="")
                bars.update(tasks[stage.name], completed=stage.done, note=stage.note)

            yield observe
    except KeyboardInterrupt as error:
        if partial is not None and partial.exists():
            error.args = (f"the user; what is done is in {partial}, the same command continues",)
        raise


def _line(stage: Stage) -> None:
    if stage.done == stage.total:
        note = f", {stage.note}" if stage.note else ""
        print(f"{stage.name}: {stage.total:,} images{note}", file=sys.stderr, flush=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Lines of a table, and a warning in the log for each sign of masked gradients."""
    for warning in evaluation.warnings:
        logging.getLogger("gn_kernels").warning("the gradients may be masked: %s", warning)
    rows = [
        (f"clean accuracy, {evaluation.images:,} test images", f"{evaluation.clean_accuracy:.1%}")
    ]
    for radius in evaluation.sweep:
        for position, (attack, accuracy) in enumerate(radius["after"].items()):
            where = f"eps {radius['eps_255']:g}/255"
            if attack == "pgd":
                step = 2.5 * radius["eps_255"] / evaluation.attack_steps
                how = (
                    f"PGD, {where}, {evaluation.attack_steps} steps of {step:.3g}/255, "
                    f"{evaluation.restarts} restarts"
                )
            else:
                how = f"{attack}, {where}"
            rows.append((f"{'and' if position else 'accuracy under'} {how}", f"{accuracy:.1%}"))
    rows.append(("mean L1 norm of the input gradient", f"{evaluation.gradient_norm_l1:.3g}"))
    return rows


def one_of_each_class(dataset: Dataset, limit: int) -> torch.Tensor:
    """Indices of test images, of the first ``limit`` classes."""
    labels = dataset.test.all_labels()
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:limit]])


def show(
    title: str,
    rows: Sequence[tuple[str, ...]],
    caption: str | None = None,
    columns: Sequence[str] = ("figure", "value"),
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
