"""Which spatial frequencies a model needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    """Whether each image is classified rightly after :func:`low_pass`, at each of :func:`radii`.

    Returns:
        ``correct``: (B, radii), boolean.

    Source: https://arxiv.org/abs/2409.20139.
    """
    side = min(images.shape[-2:])
    right = []
    with torch.no_grad():
        for radius in radii(side):
            # The paper's last point, half the side, is the image itself: its corners too.
            seen = images if radius == side // 2 else low_pass(images, radius)
            right.append(model(seen).argmax(1) == labels)
    sizes = torch.full((len(images),), side)
    return {"correct": torch.stack(right, 1), "side": sizes}


def radii(side: int) -> list[int]:
    """The paper's at 224 pixels, 4, 6, …, 110, 112; at smaller sides as many as there are."""
    step = max(1, side // 112)
    return [*range(2 * step, side // 2, step), side // 2]


def low_pass(images: Tensor, radius: float) -> Tensor:
    r"""Keep the frequencies within a circle: F⁻¹(F(x)·1[√(u² + v²) ≤ r]).

    u and v are the whole periods along the two sides, of the centred discrete Fourier transform.
    The result is not clamped to [0, 1]. Of images of odd and even sides alike, real.

    Args:
        images: (B, C, H, W), floating point.
        radius: r, in periods; from √(H² + W²)/2 on, the images are returned to rounding.
    """
    rows, columns = images.shape[-2:]
    u = torch.fft.fftfreq(rows, 1 / rows, device=images.device)
    v = torch.fft.rfftfreq(columns, 1 / columns, device=images.device)
    kept = u[:, None] ** 2 + v[None, :] ** 2 <= radius**2
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(rows, columns))
    return filtered


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Accuracy at each radius."""
    side = int(columns["side"][0])
    return {"radii": radii(side), "accuracy": columns["correct"].double().mean(0).tolist()}
