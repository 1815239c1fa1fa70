"""Whether input gradients lie on the edges of the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options, mean_of
from gn_kernels.robustness.contour import contour_energy
from gn_kernels.robustness.differentiate import input_gradients

_FAINTEST = 1e-3


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    r"""The correlation of contour and gradient over the pixels of each image.

    .. math:: r_i = \mathrm{corr}_p \Big(\log \max(E_p(x_i), 10^{-3}), \;
        \log \sum_c |\nabla_{x_i} CE_i|_{c,p}\Big)

    E is :func:`gn_kernels.robustness.contour.contour_energy`, corr Pearson's correlation.

    Returns:
        ``correlation``: (B,), float64; NaN where either side is the same at all pixels, as for a
        flat image.

    Raises:
        ValueError: the images are smaller than the contour's filters, 4 pixels.

    Source: https://arxiv.org/abs/2409.20139.
    """
    gradients, _, _ = input_gradients(model, images, labels)
    energy = contour_energy(images).double().flatten(1).clamp(min=_FAINTEST).log()
    size = gradients.abs().double().sum(1).flatten(1)
    return {"correlation": correlation(energy, size.clamp(min=torch.finfo(size.dtype).tiny).log())}


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each row: (B, N), (B, N) to (B,)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Mean, standard deviation and extremes over the images that have a correlation."""
    found = columns["correlation"]
    defined = found[torch.isfinite(found)].double()
    return {
        "mean": mean_of(defined),
        "std": defined.std().item() if len(defined) > 1 else None,
        "min": defined.min().item() if len(defined) else None,
        "max": defined.max().item() if len(defined) else None,
        "left_out": len(found) - len(defined),
    }
