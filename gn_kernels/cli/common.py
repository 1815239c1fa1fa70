"""What several commands share: devices, measuring, tables, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gn_kernels.training.recipe import InputError, Settings

if TYPE_CHECKING:
    from gn_kernels.robustness import Evaluation
    from gn_kernels.training import Dataset

# Part of what an evaluation's figures depend on: the random starts are drawn batch by batch.
_EVALUATION_BATCH = 500


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


def measure(model: torch.nn.Module, dataset: Dataset, settings: Settings, seed: int) -> Evaluation:
    from gn_kernels.robustness import evaluate
    from gn_kernels.training.loop import reproducible

    indices = torch.arange(len(dataset.test)).split(_EVALUATION_BATCH)
    with reproducible(settings):
        return evaluate(
            model,
            (on(settings.device, dataset.test.batch(part)) for part in indices),
            eps_255=settings.eps_255,
            attack_steps=settings.attack_steps,
            restarts=settings.restarts,
            seed=seed,
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def evaluation_rows(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [
        (f"clean accuracy, {evaluation.images:,} test images", f"{evaluation.clean_accuracy:.1%}"),
        (
            f"accuracy under PGD, eps {evaluation.eps_255:g}/255, {evaluation.attack_steps} steps "
            f"of {evaluation.step_255:.3g}/255, {evaluation.restarts} restarts",
            f"{evaluation.robust_accuracy:.1%}",
        ),
        ("mean L1 norm of the input gradient", f"{evaluation.gradient_norm_l1:.3g}"),
    ]


def show(title: str, rows: list[tuple[str, str]], caption: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption)
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
