"""``gn-kernels analyse``."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_kernels.cli.common import (
    OnDevice,
    Trained,
    add_measuring_options,
    load_trained,
    on,
    one_of_each_class,
    positive,
    sentences,
    show,
    stages,
    write_json,
)
from gn_kernels.training.settings import InputError

if TYPE_CHECKING:
    from gn_kernels.cli import Commands
    from gn_kernels.robustness.analyses import Result

# A picture only: there is nothing to sum up.
_IMAGES = "images"


def add_to(commands: Commands) -> None:
    analyse = commands.add_parser(
        "analyse",
        help="analyse the loss around test images, of one model or several",
        description="The paper's analyses of a trained model: how large its input gradients are, "
        "how linear and how curved its loss is, what happens on the way to an adversarial image, "
        "the smallest radius that breaks each image, which frequencies it needs, and whether its "
        "gradients lie on edges. Writes analysis.json and a figure for each; with --compare all "
        "models in one. After an interruption the same command continues.",
    )
    analyse.set_defaults(command=_analyse)
    analyse.add_argument("checkpoint", metavar="CHECKPOINT", help="file, or a run's folder")
    analyse.add_argument(
        "--compare", nargs="+", default=[], metavar="OTHER", help="more checkpoints, same data"
    )
    analyse.add_argument(
        "--what",
        metavar="LIST",
        help="separated by commas: gradients, linearity, curvature, interpolation, curve, "
        "frequency, edges, images (all)",
    )
    analyse.add_argument(
        "--output", metavar="DIR", help="where to write (analysis, beside the checkpoint)"
    )
    analyse.add_argument(
        "--eps-255", type=float, metavar="EPS", help="radius, in 1/255 (that of the training)"
    )
    analyse.add_argument(
        "--power-iterations", type=positive, metavar="N", default=20, help="of curvature (20)"
    )
    analyse.add_argument(
        "--curve-steps", type=positive, metavar="N", default=100, help="of PGD in curve (100)"
    )
    analyse.add_argument("--seed", type=int, metavar="SEED", default=0, help="of the analyses (0)")
    add_measuring_options(analyse, images=500, batch_size=100)


def _analyse(options: dict[str, Any]) -> int:
    __import__("matplotlib")  # what is missing is told before the work, not after it
    from gn_kernels.robustness.analyses import ANALYSES, Options, analyse
    from gn_kernels.robustness.figures import analysis_figure, gradient_figure
    from gn_kernels.training.loop import reproducible

    paths = [Path(options.pop("checkpoint")), *map(Path, options.pop("compare"))]
    what, limit = options.pop("what"), options.pop("images")
    batch_size, weights = options.pop("batch_size"), options.pop("weights")
    output, eps_255, seed = options.pop("output"), options.pop("eps_255"), options.pop("seed")
    power_iterations, curve_steps = options.pop("power_iterations"), options.pop("curve_steps")
    names = what.split(",") if what else [*ANALYSES, _IMAGES]
    unknown = [name for name in names if name not in (*ANALYSES, _IMAGES)]
    if unknown:
        raise InputError(
            f"--what must be among {', '.join((*ANALYSES, _IMAGES))}, but got {unknown[0]!r}"
        )
    models = [load_trained(path, weights, **options) for path in paths]
    first = models[0]
    for model in models[1:]:
        if model.dataset.summary() != first.dataset.summary():
            raise InputError(
                f"{model.path} was trained on other data than {first.path}: compare models of the "
                "same"
            )
    with sentences():
        chosen = Options(
            first.settings.attack_radius_255 if eps_255 is None else eps_255,
            power_iterations,
            curve_steps,
            seed,
        )
    folder = Path(output) if output else first.path.parent / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    images = OnDevice(first.dataset.test, first.settings.device, limit)
    measured = [name for name in names if name != _IMAGES]

    results: dict[str, dict[str, Result]] = {}
    partials: list[Path] = []
    for label, model in zip(_labels(models), models, strict=True):
        partials.append(folder / f"{len(partials)}.partial")
        results[label] = {}
        if not measured:
            continue
        print(f"{label}: {model.path}, {model.weights} weights, {len(images):,} test images")
        with stages(partials[-1]) as observer, reproducible(first.settings), sentences():
            results[label] = analyse(
                model.model,
                images,
                measured,
                chosen,
                batch_size=batch_size,
                progress_file=partials[-1],
                observer=observer,
            )
    report = folder / "analysis.json"
    write_json(
        report,
        {
            "command": "analyse",
            "what": names,
            "options": dataclasses.asdict(chosen),
            "images": len(images),
            "batch_size": batch_size,
            "models": [
                {"label": label, **model.origin(), **_plain(results[label])}
                for label, model in zip(results, models, strict=True)
            ],
        },
    )
    written = [report]
    for name in names:
        written.append(folder / f"{name}.png")
        if name == _IMAGES:
            indices = one_of_each_class(first.dataset, 8)
            pixels, labels = on(first.settings.device, first.dataset.test.batch(indices))
            by_label = {label: m.model for label, m in zip(results, models, strict=True)}
            gradient_figure(written[-1], by_label, pixels, labels, first.dataset.classes)
        else:
            found = {label: by_name[name] for label, by_name in results.items()}
            analysis_figure(written[-1], name, found, chosen)
    for partial in partials:
        partial.unlink(missing_ok=True)
    if measured:
        rows = [row for name in measured for row in _rows(name, results)]
        show("analyses", rows, columns=("figure", *results))
    print(f"Written: {', '.join(map(str, written))}")
    return 0


def _labels(models: list[Trained]) -> list[str]:
    """The method, with as much more as tells them apart."""
    candidates = (
        [m.settings.method for m in models],
        [f"{m.settings.method}, {m.settings.activation or m.settings.model}" for m in models],
        [m.path.parent.name for m in models],
        [str(m.path) for m in models],
    )
    for labels in candidates:
        if len(set(labels)) == len(models):
            return labels
    raise InputError(f"{Counter(candidates[-1]).most_common(1)[0][0]} is named twice")


def _plain(results: dict[str, Result]) -> dict[str, Any]:
    """Summaries, and the figures of each image to 6 digits; what is not finite becomes null."""
    return {
        "summaries": {name: result.summary for name, result in results.items()},
        "per_image": {
            name: {
                column: [_digits(value) for value in values.tolist()]
                for column, values in result.columns.items()
                if values.dim() == 1
            }
            for name, result in results.items()
        },
    }


def _digits(value: float) -> float | None:
    if isinstance(value, (bool, int)):
        return int(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


# What the table says of each analysis: a name, and where in the summary it stands.
_FIGURES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "gradients": (
        ("mean L1 norm of the gradient", ("mean_l1",)),
        ("… of robust images", ("mean_l1_robust",)),
        ("… of vulnerable images", ("mean_l1_vulnerable",)),
        ("asymmetry over images (Gini)", ("sample_asymmetry",)),
        ("asymmetry over channels", ("channel_asymmetry",)),
    ),
    "linearity": (("mean squared error of linearity", ("mean",)),),
    "curvature": (
        ("mean curvature", ("curvature", "mean")),
        ("median curvature", ("curvature", "median")),
        ("mean largest eigenvalue", ("eigenvalue", "mean")),
    ),
    "interpolation": (),
    "curve": (("median of the smallest eps, 1/255", ("median_eps_255",)),),
    "frequency": (),
    "edges": (("mean correlation with edges", ("mean",)),),
}


def _rows(name: str, results: dict[str, dict[str, Result]]) -> list[tuple[str, ...]]:
    rows = []
    for text, place in _FIGURES[name]:
        cells = [text]
        for by_name in results.values():
            value: Any = by_name[name].summary
            for key in place:
                value = value[key]
            cells.append("none" if value is None else f"{value:.3g}")
        rows.append(tuple(cells))
    return rows
