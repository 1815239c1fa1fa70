"""What happens on the way to an adversarial image, and as far again beyond it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options
from gn_kernels.robustness.analyses.curvature import curvature
from gn_kernels.robustness.attacks import pgd
from gn_kernels.robustness.differentiate import input_gradients

POSITIONS = torch.linspace(0, 2, 16, dtype=torch.float64)
_PGD_STEPS, _POWER_ITERATIONS = 5, 2


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    r"""Loss, gradient norm and curvature along the line through an image and its PGD-5 point.

    .. math:: x(t) = x + t \, (x_a - x), \qquad t \in \{0, \tfrac{2}{15}, \dots, 2\}

    x_a is the worst of 5 steps of PGD of length ε/2. Beyond t = 1 the line may leave [0, 1]. The
    curvature is :func:`curvature` with 2 power iterations that start at the gradient.

    Returns:
        ``loss``, ``l1``, ``curvature``, ``correct``: (B, 16).

    Raises:
        NotDifferentiableError: the model is not twice differentiable.

    Source: https://arxiv.org/abs/2409.20139.
    """
    eps = options.eps_255 / 255
    adversarial = pgd(
        model, images, labels, eps, steps=_PGD_STEPS, step_size=eps / 2, generator=generator
    )
    found: dict[str, list[Tensor]] = {"loss": [], "l1": [], "curvature": [], "correct": []}
    for t in POSITIONS.tolist():
        points = images + t * (adversarial - images)
        gradients, losses, logits = input_gradients(model, points, labels)
        figures = curvature(model, points, labels, gradients, _POWER_ITERATIONS)
        found["loss"].append(losses)
        found["l1"].append(figures["l1"])
        found["curvature"].append(figures["curvature"])
        found["correct"].append(logits.argmax(1) == labels)
    return {name: torch.stack(values, 1) for name, values in found.items()}


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Means over the images at each position."""
    return {
        "positions": POSITIONS.tolist(),
        "eps_255": (POSITIONS * options.eps_255).tolist(),
        "pgd_steps": _PGD_STEPS,
        **{f"mean_{name}": values.double().mean(0).tolist() for name, values in columns.items()},
    }
