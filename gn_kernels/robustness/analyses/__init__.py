"""The paper's analyses of a trained model: each one measures images by batch, then summarises.

A module of this folder is an analysis: ``measure`` gives figures of each image, ``summarise`` what
a report says of them; pictures are in :mod:`gn_kernels.robustness.figures`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses import (
    curvature,
    curve,
    edges,
    frequency,
    gradients,
    interpolation,
    linearity,
)
from gn_kernels.robustness.analyses.common import Columns, Options
from gn_kernels.robustness.attacks import _attacked
from gn_kernels.robustness.images import (
    Images,
    batches,
    check_images,
    check_labels,
    check_logits,
)
from gn_kernels.robustness.resume import Progress, Stage, digest, generator
from gn_kernels.version import __version__

__all__ = ["ANALYSES", "Analysis", "Columns", "Options", "Result", "analyse"]


class Analysis(NamedTuple):
    """One analysis: what it measures on a batch, and how that is summed up for a report."""

    measure: Callable[[nn.Module, Tensor, Tensor, Options, torch.Generator], Columns]
    summarise: Callable[[Columns, Options], dict[str, Any]]


ANALYSES: dict[str, Analysis] = {
    "gradients": Analysis(gradients.measure, gradients.summarise),
    "linearity": Analysis(linearity.measure, linearity.summarise),
    "curvature": Analysis(curvature.measure, curvature.summarise),
    "interpolation": Analysis(interpolation.measure, interpolation.summarise),
    "curve": Analysis(curve.measure, curve.summarise),
    "frequency": Analysis(frequency.measure, frequency.summarise),
    "edges": Analysis(edges.measure, edges.summarise),
}


class Result(NamedTuple):
    """``columns``: figures of each image, on the CPU; ``summary``: plain values for a report."""

    columns: Columns
    summary: dict[str, Any]


def analyse(
    model: nn.Module,
    images: Images,
    what: Sequence[str],
    options: Options,
    *,
    batch_size: int = 100,
    progress_file: Path | None = None,
    observer: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, Result]:
    """Run analyses on a model. The same images, weights, options and batch size give the same.

    Args:
        model: pixels in [0, 1] to logits. Left as it was; in eval mode meanwhile.
        images: on the model's device.
        what: names of ``ANALYSES``.
        options: of the analyses.
        batch_size: images at a time.
        progress_file: holds what is done; a second call goes on there. The caller deletes it
            once the results stand elsewhere.
        observer: called after each batch.

    Raises:
        ValueError: no images, an unknown analysis; images outside [0, 1]; labels that the model
            has no class for; logits that are NaN; a ``progress_file`` of something else.
        NotDifferentiableError: the model has no first, or no second, derivative that an analysis
            needs.
    """
    unknown = [name for name in what if name not in ANALYSES]
    if unknown or not what:
        raise ValueError(
            f"analyses must be among {', '.join(ANALYSES)}, but got {', '.join(unknown) or 'none'}"
        )
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            f"there must be an image at least and batch_size at least 1, but got {len(images)} "
            f"and {batch_size}"
        )
    with _attacked(model):
        ends = images[torch.tensor([0, len(images) - 1])]
        identity = {
            "model": digest(model.state_dict().items()),
            "data": digest(zip(("images", "labels"), ends, strict=True)),
            "images": len(images),
            "batch_size": batch_size,
            **dataclasses.asdict(options),
            "gn_kernels": __version__,
            "torch": str(torch.__version__),
        }
        progress = Progress(progress_file, identity)
        results = {}
        for name in what:
            found = _columns(name, model, images, options, batch_size, progress, observer)
            results[name] = Result(found, ANALYSES[name].summarise(found, options))
    return results


def _columns(
    name: str,
    model: nn.Module,
    images: Images,
    options: Options,
    batch_size: int,
    progress: Progress,
    observer: Callable[[Stage], None],
) -> Columns:
    parts: list[Columns] = progress.content.setdefault(name, [])
    done = sum(len(next(iter(part.values()))) for part in parts)
    for indices in batches(torch.arange(done, len(images)), batch_size):
        pixels, labels = images[indices]
        check_images(pixels, labels)
        with torch.no_grad():
            logits = model(pixels)
        check_logits(logits)
        check_labels(labels, logits.shape[1])
        columns = ANALYSES[name].measure(
            model, pixels, labels, options, generator(options.seed, len(parts))
        )
        parts.append({key: value.cpu() for key, value in columns.items()})
        progress.save()
        done += len(indices)
        observer(Stage(name, done, len(images)))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
