"""``gn-kernels evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_kernels.cli.common import (
    OnDevice,
    add_measuring_options,
    evaluation_rows,
    load_trained,
    sentences,
    show,
    stages,
    write_json,
)

if TYPE_CHECKING:
    from gn_kernels.cli import Commands

# RobustBench's names of how ImageNet's images are cut, as the settings say it.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "Res256Crop224": {"image_size": 224, "crop_ratio": 224 / 256, "interpolation": "bilinear"},
    "BicubicRes256Crop224": {
        "image_size": 224,
        "crop_ratio": 224 / 256,
        "interpolation": "bicubic",
    },
}


def add_to(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the model of a checkpoint again",
        description="Measure clean accuracy, accuracy in the worst case over attacks and radii, "
        "and the mean L1 norm of the input gradient, and warn of masked gradients. Without options "
        "the figures are those of the training's report.",
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="file, or a run's folder")
    evaluate.add_argument(
        "--attack",
        default="pgd",
        metavar="LIST",
        help="separated by commas: pgd, autoattack (standard), autoattack-quick (its first two), "
        "or single ones: apgd-ce, apgd-t, fab-t, square, apgd-dlr (pgd)",
    )
    evaluate.add_argument(
        "--eps-255", type=_radii, metavar="LIST", help="radii of the attacks, in 1/255, as 1,2,4"
    )
    for name, kind, text in (
        ("attack-steps", int, "steps of PGD"),
        ("restarts", int, "random starts of PGD, of which the worst counts"),
    ):
        evaluate.add_argument(
            f"--{name}",
            type=kind,
            default=argparse.SUPPRESS,
            help=text,
            metavar=name.split("-")[-1].upper(),
        )
    evaluate.add_argument("--seed", type=int, metavar="SEED", help="of the attack")
    add_measuring_options(evaluate, images=None, batch_size=500)
    evaluate.add_argument(
        "--preprocessing",
        choices=tuple(PREPROCESSING),
        help="cut a folder's images as RobustBench does ImageNet's",
    )
    evaluate.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures there, - for stdout; after an interruption the same command "
        "continues from FILE.partial",
    )


def _radii(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _evaluate(options: dict[str, Any]) -> int:
    from gn_kernels.robustness import evaluate
    from gn_kernels.training.loop import reproducible

    path, target, eps_255 = (
        Path(options.pop("checkpoint")),
        options.pop("json"),
        options.pop("eps_255"),
    )
    attacks, seed, limit = (
        options.pop("attack").split(","),
        options.pop("seed"),
        options.pop("images"),
    )
    batch_size, weights = options.pop("batch_size"), options.pop("weights")
    preprocessing = options.pop("preprocessing")
    trained = load_trained(path, weights, **options, **PREPROCESSING.get(preprocessing, {}))
    settings = trained.settings
    partial = None if target in (None, "-") else Path(f"{target}.partial")
    with stages(partial) as observer, reproducible(settings), sentences():
        evaluation = evaluate(
            trained.model,
            OnDevice(trained.dataset.test, settings.device, limit),
            eps_255=eps_255 or settings.attack_radius_255,
            attacks=attacks,
            attack_steps=settings.attack_steps,
            restarts=settings.restarts,
            seed=settings.seed if seed is None else seed,
            batch_size=batch_size,
            progress_file=partial,
            observer=observer,
        )
    figures = {
        "command": "evaluate",
        **trained.origin(),
        "preprocessing": preprocessing,
        "evaluation": evaluation._asdict(),
    }
    rows = evaluation_rows(evaluation)
    if target == "-":
        print(json.dumps(figures, indent=2))
        return 0
    show(f"{trained.path}, step {trained.state['step']:,}", rows)
    if target is not None:
        write_json(Path(target), figures)
        Path(f"{target}.partial").unlink(missing_ok=True)
        print(f"Written: {target}")
    return 0
