"""``gn-kernels train | evaluate | info``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from gn_kernels.backend import info
from gn_kernels.training.recipe import PRESETS, InputError, Settings

if TYPE_CHECKING:
    from gn_kernels.robustness import Evaluation
    from gn_kernels.training import Dataset, Training
    from gn_kernels.training.loop import Progress, StepComparison, Timing

# Part of what an evaluation's figures depend on: the random starts are drawn batch by batch.
_EVALUATION_BATCH = 500
_CAPTION = (
    "Times: median [20th, 80th percentile]. The steps timed again take turns, on copies; x is the "
    "speed relative to PyTorch."
)
_OPTIONAL = ("matplotlib", "rich", "sklearn", "timm", "torchvision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 2 for what the user can mend, after one sentence on stderr; 130 or 143
        after SIGINT or SIGTERM.
    """
    logging.basicConfig(format="gn-kernels: %(message)s", level=logging.WARNING)
    parser = _parser()
    try:
        options = vars(parser.parse_args(arguments))
        return int(options.pop("command")(options))
    except InputError as error:
        print(f"gn-kernels: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _OPTIONAL:
            raise
        print(
            f"gn-kernels: this needs {error.name}, which is not installed: "
            "pip install 'gn_kernels[train]'",
            file=sys.stderr,
        )
    except OSError as error:
        print(f"gn-kernels: {error}", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(f"gn-kernels: interrupted{f' by {error}' if str(error) else ''}", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gn-kernels",
        description="Train Vision Transformers with a penalty on the input gradient, on fused "
        "kernels for differentiating twice.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    train = commands.add_parser(
        "train",
        help="train a model, measure it, and write a report",
        description="Train a small Vision Transformer on scikit-learn's digits with the "
        "gradient-norm penalty (about a minute on two CPU cores), measure its accuracy with and "
        "without attack, and time a step with and without gn_kernels. Writes checkpoint.pt, "
        "report.json and gradients.png.",
    )
    train.set_defaults(command=_train)
    train.add_argument("--output", metavar="DIR", help="where to write (runs/DATASET-METHOD-...)")
    group = train.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", action="store_true", help="continue from the output folder's checkpoint"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="discard what the output folder holds"
    )
    train.add_argument(
        "--save-every-steps", type=_positive, metavar="N", help="checkpoint interval (an epoch)"
    )
    recipe = train.add_argument_group("recipe")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        # Absent options stay absent: a preset or a checkpoint may say otherwise than the default.
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"]}
        if isinstance(field.default, bool):
            common["help"] += f" ({name if field.default else '--no-' + name[2:]})"
            recipe.add_argument(name, action=argparse.BooleanOptionalAction, **common)
            continue
        if field.default is not None:
            common["help"] += f" ({field.default})"
        recipe.add_argument(
            name,
            type=str if field.default is None else type(field.default),
            choices=field.metadata["choices"] or None,
            metavar=None if field.metadata["choices"] else field.name.split("_")[-1].upper(),
            **common,
        )

    evaluate = commands.add_parser(
        "evaluate",
        help="measure the model of a checkpoint again",
        description="Measure clean accuracy, accuracy under PGD, and the mean L1 norm of the input "
        "gradient. Without options the figures are those of the training's report.",
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="file, or a run's folder")
    for name, kind, text in (
        ("eps-255", float, "radius of the attack, in 1/255"),
        ("attack-steps", int, "steps of PGD"),
        ("restarts", int, "random starts of PGD, of which the worst counts"),
        ("seed", int, "of the attack"),
        ("data", str, "folder of the data, where it has moved"),
        ("device", str, "where the model runs"),
    ):
        evaluate.add_argument(
            f"--{name}",
            type=kind,
            default=argparse.SUPPRESS,
            help=text,
            metavar=name.split("-")[-1].upper(),
        )
    evaluate.add_argument("--json", metavar="FILE", help="write the figures there, - for stdout")

    show = commands.add_parser("info", help="show which kernels run here, and why others do not")
    show.set_defaults(command=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _info(options: dict[str, Any]) -> int:
    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _train(options: dict[str, Any]) -> int:
    for name in _OPTIONAL:
        __import__(name)  # what is missing is told before the training, not after it
    # Here, not above: `info` and `--help` work without timm and the like.
    from gn_kernels.robustness import gradient_figure
    from gn_kernels.training import Training, checkpoint, compare_steps, data, loop

    output, resume = options.pop("output"), options.pop("resume")
    overwrite, save_every_steps = options.pop("overwrite"), options.pop("save_every_steps")
    settings = Settings(**{**PRESETS[options.get("dataset", "digits")], **options})
    folder = Path(output or f"runs/{_name(settings)}")
    path = folder / loop.CHECKPOINT
    state = None
    if resume:
        state = checkpoint.load(path)
        # What was not asked for is as it was; what was asked for must agree.
        settings = loop.settings_of(state, **options)
    elif path.exists() and not overwrite:
        raise InputError(
            f"{folder} holds a run already: add --resume to continue it, --overwrite to discard "
            "it, or another --output"
        )
    _check_device(settings.device)
    dataset = data.load(settings)
    training = Training(settings, dataset)
    if state is not None:
        training.load_state(state)
        _warn_of_changes(state)
    folder.mkdir(parents=True, exist_ok=True)

    backend = loop.backend_in_use(settings.device) if settings.swap else "PyTorch"
    print(
        f"{settings.method} on {dataset.name}: {len(dataset.train):,} training and "
        f"{len(dataset.test):,} test images, "
        f"{sum(p.numel() for p in training.model.parameters()):,} parameters, "
        f"{settings.threads} thread{'s' * (settings.threads > 1)}, kernels: {backend}"
    )
    with _progress(training) as observer:
        try:
            training.run(path, observer, save_every_steps)
        except loop.Interrupted as interruption:
            interruption.args = (
                f"{interruption}; it is saved, continue with: gn-kernels train --resume "
                f"--output {folder}",
            )
            raise
    print("Measuring ...", flush=True)
    evaluation = _measure(training.model, dataset, settings, settings.seed)
    comparison = compare_steps(training)

    chosen = _one_of_each_class(dataset, 10)
    images, labels = _on(settings.device, dataset.test.batch(chosen))
    picture = folder / "gradients.png"
    gradient_figure(picture, training.model, images, labels, dataset.classes, _title(settings))
    report = folder / "report.json"
    _write_json(
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
            "step_comparison": {
                "variants": {
                    variant: {**timing._asdict(), "speedup": comparison.speedup(variant)}
                    for variant, timing in comparison.timings.items()
                },
                "loss_relative_difference": comparison.loss_difference,
            },
        },
    )
    _show(f"{settings.method}, {dataset.name}", _rows(evaluation, training, comparison), _CAPTION)
    print(f"Written: {path}, {report}, {picture}")
    return 0


def _evaluate(options: dict[str, Any]) -> int:
    from gn_kernels.training import checkpoint, data, loop
    from gn_kernels.training.model import build, prepare

    path, target = Path(options.pop("checkpoint")), options.pop("json")
    path = path / loop.CHECKPOINT if path.is_dir() else path
    state = checkpoint.load(path)
    attack_seed = options.pop("seed", None)
    settings = loop.settings_of(state, **options)
    _check_device(settings.device)
    dataset = data.load(settings)
    model = build(settings, dataset)
    prepare(model, settings)
    loop.load_weights(model, dataset, state)
    seed = settings.seed if attack_seed is None else attack_seed
    evaluation = _measure(model, dataset, settings, seed)
    figures = {
        "command": "evaluate",
        "checkpoint": str(path),
        "step": state["step"],
        "settings": dataclasses.asdict(settings),
        "dataset": dataset.summary(),
        "versions": loop.versions(),
        "machine": info(),
        "evaluation": evaluation._asdict(),
    }
    if target == "-":
        print(json.dumps(figures, indent=2))
        return 0
    _show(f"{path}, step {state['step']:,}", _evaluation_rows(evaluation))
    if target is not None:
        _write_json(Path(target), figures)
        print(f"Written: {target}")
    return 0


def _name(settings: Settings) -> str:
    kernels = "" if settings.swap else "-no-swap"
    return f"{settings.dataset}-{settings.method}-{settings.activation}{kernels}-{settings.seed}"


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, but got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU, and PyTorch finds none")


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


def _on(device: str, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].to(device), batch[1].to(device)


def _measure(model: torch.nn.Module, dataset: Dataset, settings: Settings, seed: int) -> Evaluation:
    from gn_kernels.robustness import evaluate
    from gn_kernels.training.loop import reproducible

    indices = torch.arange(len(dataset.test)).split(_EVALUATION_BATCH)
    with reproducible(settings):
        return evaluate(
            model,
            (_on(settings.device, dataset.test.batch(part)) for part in indices),
            eps_255=settings.eps_255,
            attack_steps=settings.attack_steps,
            restarts=settings.restarts,
            seed=seed,
        )


def _one_of_each_class(dataset: Dataset, limit: int) -> torch.Tensor:
    labels = dataset.test.all_labels()
    return torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()[:limit]])


def _title(settings: Settings) -> str:
    return f"{settings.method} training, {settings.dataset}, {settings.activation}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _evaluation_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [
        (f"clean accuracy, {evaluation.images:,} test images", f"{evaluation.clean_accuracy:.1%}"),
        (
            f"accuracy under PGD, eps {evaluation.eps_255:g}/255, {evaluation.attack_steps} steps "
            f"of {evaluation.step_255:.3g}/255, {evaluation.restarts} restarts",
            f"{evaluation.robust_accuracy:.1%}",
        ),
        ("mean L1 norm of the input gradient", f"{evaluation.gradient_norm_l1:.3g}"),
    ]


def _rows(
    evaluation: Evaluation, training: Training, comparison: StepComparison
) -> list[tuple[str, str]]:
    def milliseconds(timing: Timing) -> str:
        return f"{timing.median_ms:.1f} ms [{timing.p20_ms:.1f}, {timing.p80_ms:.1f}]"

    steps = training.timing()
    return [
        *_evaluation_rows(evaluation),
        (
            f"training step, {training.settings.batch_size} images, {steps.steps:,} steps",
            f"{milliseconds(steps)}, mean {steps.mean_ms:.1f}",
        ),
        *(
            (
                f"same step again: {variant}",
                f"{milliseconds(timing)}, {comparison.speedup(variant):.2f}x",
            )
            for variant, timing in comparison.timings.items()
        ),
    ]


def _show(title: str, rows: list[tuple[str, str]], caption: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


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


if __name__ == "__main__":
    sys.exit(main())
