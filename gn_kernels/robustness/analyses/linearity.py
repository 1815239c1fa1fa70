"""How far the loss is from linear between two neighbours of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options, spread
from gn_kernels.robustness.differentiate import Loss, image_losses


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: Options,
    generator: torch.Generator,
    loss: Loss = image_losses,
) -> Columns:
    r"""The squared error of linear interpolation, at one random point for each image.

    .. math::
        a, b \sim \Pi(x + U(-\varepsilon, \varepsilon)^d), \quad t \sim U(0, 1), \quad
        e = \big(\ell((1-t)\,a + t\,b) - (1-t)\,\ell(a) - t\,\ell(b)\big)^2

    Π clamps to [0, 1]. ε is ``options.eps_255``/255.

    Returns:
        ``error``: (B,), in units of the loss squared, the differences taken in float64.

    Source: https://arxiv.org/abs/2409.20139; its code leaves a and b outside [0, 1].
    """
    eps = options.eps_255 / 255

    def neighbour() -> Tensor:
        noise = torch.rand(images.shape, generator=generator).to(images)
        return (images + eps * (2 * noise - 1)).clamp(0, 1)

    a, b = neighbour(), neighbour()
    t = torch.rand(len(images), generator=generator).to(images)
    along = t.view(-1, *[1] * (images.dim() - 1))
    with torch.no_grad():
        at_a, at_b, between = (
            loss(model(point), labels).double() for point in (a, b, (1 - along) * a + along * b)
        )
    return {"error": (between - (1 - t) * at_a - t * at_b).square()}


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Mean, standard deviation, median and mean of log₁₀."""
    return dict(spread(columns["error"]))
