"""``gn-kernels train``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_kernels.backend import info
from gn_kernels.cli.common import (
    check_device,
    evaluation_rows,
    measure,
    on,
    one_of_each_class,
    positive,
    show,
    write_json,
)
from gn_kernels.training.settings import GROUPS, InputError, Settings

if TYPE_CHECKING:
    from gn_kernels.cli import Commands
    from gn_kernels.robustness import Evaluation
    from gn_kernels.training import Training
    from gn_kernels.training.loop import Progress, StepComparison, Timing

_CAPTION = (
    "Times: median [20th, 80th percentile]. The steps timed again take turns, on copies; x is the "
    "speed relative to PyTorch."
)
_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "tuple[float, ...]": "X,X,..."}
_NEEDED = ("matplotlib", "rich", "sklearn", "timm", "torchvision", "yaml")


def add_to(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        usage="gn-kernels train [OPTION ...]",
        help="train a model, measure it, and write a report",
        description="Train a small Vision Transformer on scikit-learn's digits with the "
        "gradient-norm penalty (about a minute on two CPU cores), measure its accuracy with and "
        "without attack, and time a step with and without gn_kernels. Writes checkpoint.pt, "
        "report.json and gradients.png.",
    )
    train.set_defaults(command=_train)
    train.add_argument(
        "--preset",
        metavar="NAME",
        help="start from a recipe of the paper, as gradnorm-swin-b; a name that is none lists them",
    )
    train.add_argument(
        "--config",
        metavar="FILE",
        help="settings in YAML, with the options' names; over the preset, under the command line",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the settings and what they take, from meta tensors, and stop",
    )
    train.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="of the estimate of --dry-run (1)"
    )
    train.add_argument("--output", metavar="DIR", help="where to write (runs/DATASET-METHOD-...)")
    group = train.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true", help="continue from the output folder's checkpoint"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="discard what the output folder holds"
    )
    train.add_argument(
        "--save-every-steps", type=positive, metavar="N", help="checkpoint interval (an epoch)"
    )
    groups = {name: train.add_argument_group(name, text) for name, text in GROUPS.items()}
    for field in dataclasses.fields(Settings):
        _add_option(groups[field.metadata["group"]], field)


def _add_option(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    name = "--" + field.name.replace("_", "-")
    text = field.metadata["help"].replace("%", "%%")
    kind = str(field.type).removesuffix(" | None")
    # Absent options stay absent: a checkpoint may say otherwise than the default.
    if kind == "bool":
        text += f" ({name if field.default else '--no-' + name[2:]})"
        group.add_argument(
            name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    if field.default not in (None, ()):
        text += f" ({field.default})"
    group.add_argument(
        name,
        type={"int": int, "float": float, "str": str}.get(kind, _numbers),
        default=argparse.SUPPRESS,
        help=text,
        choices=field.metadata["choices"] or None,
        metavar=None if field.metadata["choices"] else _METAVARS[kind],
    )


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _train(options: dict[str, Any]) -> int:
    for name in _NEEDED:
        __import__(name)  # what is missing is told before the training, not after it
    from gn_kernels.training import distribution

    with distribution.processes():
        return _train_here(options)


def _train_here(options: dict[str, Any]) -> int:
    # Here, not above: `info` and `--help` work without timm and the like.
    from gn_kernels.robustness import gradient_figure
    from gn_kernels.training import (
        Training,
        checkpoint,
        compare_steps,
        configuration,
        data,
        distribution,
        loop,
    )

    options = {**_layers(options), **options}
    dry_run, gpus = options.pop("dry_run"), options.pop("gpus")
    output, resume = options.pop("output"), options.pop("resume")
    overwrite, save_every_steps = options.pop("overwrite"), options.pop("save_every_steps")
    settings = configuration.combined(options)
    if dry_run:
        return _dry_run(settings, gpus)
    folder = Path(output or f"runs/{_name(settings)}")
    path = folder / loop.CHECKPOINT
    state = None
    if resume:
        state = checkpoint.load(path)
        # What was not asked for is as it was; what was asked for must agree.
        settings = loop.settings_of(state, **options)
    elif checkpoint.exists(path) and not overwrite:
        raise InputError(
            f"{folder} holds a run already: add --resume to continue it, --overwrite to discard "
            "it, or another --output"
        )
    check_device(settings.device)
    distribution.check(settings)
    dataset = data.load(settings)
    training = Training(settings, dataset)
    if state is not None:
        training.load_state(state)
        _warn_of_changes(state)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        checkpoint.discard(path)
    first = distribution.rank() == 0
    if first:
        configuration.write(folder / "config.yaml", settings)

    backend = loop.backend_in_use(settings.device) if settings.swap else "PyTorch"
    workers = f"{settings.threads} thread{'s' * (settings.threads > 1)}"
    if distribution.size() > 1:
        workers = f"{distribution.size()} processes of {workers}"
    if first:
        print(
            f"{settings.method} on {dataset.name}: {len(dataset.train):,} training and "
            f"{len(dataset.test):,} test images, "
            f"{sum(p.numel() for p in training.model.parameters()):,} parameters, "
            f"{workers}, kernels: {backend}"
        )
    with _observer(training, folder) if first else contextlib.nullcontext(_ignore) as observer:
        try:
            training.run(path, observer, save_every_steps)
        except loop.Interrupted as interruption:
            interruption.args = (
                f"{interruption}; it is saved, continue with: gn-kernels train --resume "
                f"--output {folder}",
            )
            raise
    model = training.trained()
    if not first:
        return 0
    print("Measuring ...", flush=True)
    evaluation = measure(model, dataset, settings, settings.seed)
    comparison = compare_steps(training) if distribution.size() == 1 else None

    chosen = one_of_each_class(dataset, 10)
    images, labels = on(settings.device, dataset.test.batch(chosen))
    picture = folder / "gradients.png"
    gradient_figure(picture, {settings.method: model}, images, labels, dataset.classes)
    report = folder / "report.json"
    write_json(
        report,
        {
            "command": "train",
            "settings": dataclasses.asdict(settings),
            "dataset": dataset.summary(),
            "parameters": sum(p.numel() for p in training.model.parameters()),
            "versions": loop.versions(),
            "machine": info(),
            "backend": backend,
            "swapped": str(training.swapped) if training.swapped else None,
            "evaluation": evaluation._asdict(),
            "training": {
                "steps": training.step,
                "step": training.timing()._asdict(),
                "images_per_second": 1e3 * settings.batch_size / training.timing().median_ms,
                "history": training.history(),
            },
            "processes": distribution.size(),
            "step_comparison": comparison
            and {
                "variants": {
                    variant: {**timing._asdict(), "speedup": comparison.speedup(variant)}
                    for variant, timing in comparison.timings.items()
                },
                "loss_relative_difference": comparison.loss_difference,
            },
        },
    )
    show(f"{settings.method}, {dataset.name}", _rows(evaluation, training, comparison), _CAPTION)
    print(f"Written: {path}, {report}, {picture}")
    return 0


def _layers(options: dict[str, Any]) -> dict[str, Any]:
    """What the preset and the configuration file set."""
    from gn_kernels.training import configuration

    preset, config = options.pop("preset"), options.pop("config")
    return {
        **(configuration.preset(preset) if preset is not None else {}),
        **(configuration.read(Path(config)) if config is not None else {}),
    }


def _dry_run(settings: Settings, gpus: int) -> int:
    from gn_kernels.training.estimate import estimate

    for name, value in dataclasses.asdict(settings).items():
        print(f"{name}: {value}")
    figures = estimate(settings, gpus)
    show(
        f"{settings.method}, {settings.model}",
        [
            ("training data", figures.data),
            ("parameters", f"{figures.parameters:,}"),
            ("steps", f"{figures.steps:,}"),
            (
                f"images in a pass of each of {gpus} processes",
                f"{figures.images_per_part} of {settings.batch_size}",
            ),
            ("memory of a process at its peak", f"{figures.memory_gb:.1f} GB"),
            ("FLOP of a step, all processes", f"{figures.teraflop_per_step:,.3g} TFLOP"),
            *(
                (f"hours on {gpus} {machine}", f"{hours:,.3g}")
                for machine, hours in figures.hours.items()
            ),
        ],
        figures.assumptions[0].upper() + figures.assumptions[1:] + ".",
    )
    return 0


def _name(settings: Settings) -> str:
    kernels = "" if settings.swap else "-no-swap"
    return f"{settings.dataset}-{settings.method}-{_model(settings)}{kernels}-{settings.seed}"


def _model(settings: Settings) -> str:
    if settings.model == "vit":
        return settings.activation or "gelu"
    name = settings.model.rpartition(":")[2].replace("/", "_")
    return f"{name}-{settings.activation}" if settings.activation else name


def _warn_of_changes(state: dict[str, Any]) -> None:
    from gn_kernels.training import loop

    before, now = state["versions"], loop.versions()
    changed = [
        f"{name} {before.get(name)} then, {now[name]} now"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        logging.getLogger("gn_kernels").warning(
            "the continuation may differ in its last bits: %s", "; ".join(changed)
        )


def _rows(
    evaluation: Evaluation, training: Training, comparison: StepComparison | None
) -> list[tuple[str, str]]:
    def milliseconds(timing: Timing) -> str:
        return f"{timing.median_ms:.1f} ms [{timing.p20_ms:.1f}, {timing.p80_ms:.1f}]"

    steps = training.timing()
    again = (
        [
            (
                f"same step again: {variant}",
                f"{milliseconds(timing)}, {comparison.speedup(variant):.2f}x",
            )
            for variant, timing in comparison.timings.items()
        ]
        if comparison
        else []
    )
    return [
        *evaluation_rows(evaluation),
        (
            f"training step, {training.settings.batch_size} images, {steps.steps:,} steps",
            f"{milliseconds(steps)}, mean {steps.mean_ms:.1f}",
        ),
        *again,
    ]


def _ignore(progress: Progress) -> None:
    """What the processes but the first observe with."""


@contextlib.contextmanager
def _observer(training: Training, folder: Path) -> Iterator[Callable[[Progress], None]]:
    from gn_kernels.training.events import events

    with contextlib.ExitStack() as stack:
        observers = [stack.enter_context(_progress(training))]
        if training.settings.tensorboard:
            observers.append(stack.enter_context(events(folder)))

        def observe(progress: Progress) -> None:
            for observer in observers:
                observer(progress)

        yield observe


@contextlib.contextmanager
def _progress(training: Training) -> Iterator[Callable[[Progress], None]]:
    if not sys.stdout.isatty():
        yield _lines(training.steps_per_epoch)
        return
    from rich import progress as rich

    columns = (
        rich.TextColumn("epoch {task.fields[epoch]}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[speed]}"),
        rich.TextColumn("{task.fields[losses]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task(
            "", total=training.total_steps, completed=training.step, epoch="", speed="", losses=""
        )

        def observe(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.step,
                epoch=f"{math.ceil(progress.epoch)}/{training.settings.epochs}",
                speed=f"{progress.step_ms:.0f} ms, {progress.images_per_second:,.0f} images/s",
                losses=f"loss {progress.loss:.3f}, penalty {progress.penalty:.3f}",
            )

        yield observe


def _lines(steps_per_epoch: int) -> Callable[[Progress], None]:
    def observe(progress: Progress) -> None:
        if progress.step % steps_per_epoch == 0 or progress.step == progress.total_steps:
            print(
                f"epoch {progress.epoch:.0f}: step {progress.step}/{progress.total_steps}, "
                f"{progress.step_ms:.0f} ms, {progress.images_per_second:,.0f} images/s, "
                f"loss {progress.loss:.3f}, penalty {progress.penalty:.3f}",
                flush=True,
            )

    return observe
