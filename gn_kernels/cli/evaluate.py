"""``gn-kernels evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_kernels.backend import info
from gn_kernels.cli.common import check_device, evaluation_rows, measure, show, write_json

if TYPE_CHECKING:
    from gn_kernels.cli import Commands


def add_to(commands: Commands) -> None:
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


def _evaluate(options: dict[str, Any]) -> int:
    from gn_kernels.training import checkpoint, data, loop
    from gn_kernels.training.model import build, prepare

    path, target = Path(options.pop("checkpoint")), options.pop("json")
    path = path / loop.CHECKPOINT if path.is_dir() else path
    state = checkpoint.load(path)
    attack_seed = options.pop("seed", None)
    settings = loop.settings_of(state, **options)
    check_device(settings.device)
    dataset = data.load(settings)
    model = build(settings, dataset)
    prepare(model, settings)
    loop.load_weights(model, dataset, state)
    seed = settings.seed if attack_seed is None else attack_seed
    evaluation = measure(model, dataset, settings, seed)
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
    show(f"{path}, step {state['step']:,}", evaluation_rows(evaluation))
    if target is not None:
        write_json(Path(target), figures)
        print(f"Written: {target}")
    return 0
