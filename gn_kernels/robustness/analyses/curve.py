"""For each image the smallest radius at which an attack succeeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options
from gn_kernels.robustness.attacks import pgd

_FIRST_255, _DOUBLINGS, _BISECTIONS = 1.0, 5, 10
LARGEST_255 = _FIRST_255 * 2**_DOUBLINGS
_RADII_255 = (0, 0.5, *range(1, int(LARGEST_255) + 1))


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    r"""The smallest ε at which PGD breaks each image, by exponential search and bisection.

    ε = 1/255 is doubled up to 5 times until the attack succeeds, and the interval between the last
    failure and the first success is then halved 10 times: what is returned is a radius at which
    the attack did succeed, at most 16/255/2¹⁰ above one at which it failed. PGD takes
    ``options.curve_steps`` steps of length ε/4 from a random start.

    Returns:
        ``smallest_eps_255``: (B,), float64; 0 where the image is classified wrongly as it is, ∞
        where 32/255 is not enough.

    Source: https://arxiv.org/abs/2409.20139.
    """
    with torch.no_grad():
        correct = model(images).argmax(1) == labels
    low = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    high = torch.where(correct, torch.inf, 0.0).to(low)

    def attack(chosen: Tensor, radii_255: Tensor) -> None:
        """Try ``radii_255`` on the chosen images, and note what comes of it."""
        eps = (radii_255 / 255).to(images.dtype).view(-1, *[1] * (images.dim() - 1))
        attacked = pgd(
            model,
            images[chosen],
            labels[chosen],
            eps,
            steps=options.curve_steps,
            step_size=eps / 4,
            generator=generator,
        )
        with torch.no_grad():
            broken = model(attacked).argmax(1) != labels[chosen]
        high[chosen[broken]] = radii_255[broken]
        low[chosen[~broken]] = radii_255[~broken]

    for doubling in range(_DOUBLINGS + 1):
        chosen = torch.isinf(high).nonzero().flatten()
        if len(chosen):
            attack(chosen, torch.full_like(low[chosen], _FIRST_255 * 2**doubling))
    chosen = ((high > 0) & torch.isfinite(high)).nonzero().flatten()
    for _ in range(_BISECTIONS if len(chosen) else 0):
        attack(chosen, (low[chosen] + high[chosen]) / 2)
    return {"smallest_eps_255": high}


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Share of the images whose smallest ε is above each radius, and the median."""
    smallest = columns["smallest_eps_255"].double()
    median = smallest.median().item()
    return {
        "eps_255": list(_RADII_255),
        "accuracy": [(smallest > radius).double().mean().item() for radius in _RADII_255],
        "median_eps_255": median if median < torch.inf else None,
        "unbroken": torch.isinf(smallest).double().mean().item(),
        "attack_steps": options.curve_steps,
    }
