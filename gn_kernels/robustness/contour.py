"""How much contour an image has at each pixel: the teacher of edge training, and its measure."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

# x/(x² + y²) on the 3×3 neighbourhood; its transpose is the other direction's.
_SOBEL = ((-0.5, 0.0, 0.5), (-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5))


def discrete_gaussian(scale: float) -> Tensor:
    r"""The Gaussian of the integers, h[n] ∝ e⁻ˢ Iₙ(s) for |n| ≤ ⌈3s⌉, normalised to sum 1.

    Iₙ is the modified Bessel function; unlike a sampled Gaussian, its convolutions form a
    semigroup. e⁻ˢ Iₙ(s) is the n-th Fourier coefficient of exp(s·(cos θ − 1)), which the
    trapezoidal rule (an FFT) gives to one rounding of h[0].

    Args:
        scale: s, the variance in squared pixels, above 0.

    Returns:
        (2⌈3s⌉ + 1,), float64.

    Raises:
        ValueError: ``scale`` is not above 0.

    Source: Lindeberg, Scale-space for discrete signals, https://doi.org/10.1109/34.49051.
    """
    if not scale > 0:
        raise ValueError(f"scale must be above 0, but got {scale}")
    radius = math.ceil(3 * scale)
    angles = torch.arange(8 * radius + 64, dtype=torch.float64) * (2 * math.pi)
    bessel = torch.fft.rfft(torch.exp(scale * (torch.cos(angles / len(angles)) - 1))).real
    half = bessel[: radius + 1]
    kernel = torch.cat([half[1:].flip(0), half])
    return kernel / kernel.sum()


@torch.no_grad()
def contour_energy(images: Tensor, scale: float = 1.0) -> Tensor:
    r"""Smooth, take the slope in both directions, smooth its length again.

    .. math:: E = h * \sqrt{\sum_c (S_x * h * x_c)^2 + (S_y * h * x_c)^2}

    h is :func:`discrete_gaussian` in both directions, S the kernel x/(x² + y²) on 3×3 pixels and
    its transpose; before each convolution the borders are reflected. At least 0, and 0 where the
    image is flat. Computed in float32 at least, also under autocast; never part of a graph.

    Args:
        images: (B, C, H, W), floating point, both sides longer than ⌈3s⌉.
        scale: s, the variance of each smoothing, in squared pixels.

    Returns:
        (B, 1, H, W), in the units of ``images`` per pixel, in their dtype.

    Raises:
        ValueError: the images have another number of dimensions, or are too small.

    Source: Rodríguez-Muñoz, Wang, Torralba, ECCV 2024, https://arxiv.org/abs/2409.20139.
    """
    smoothing = discrete_gaussian(scale)
    radius = len(smoothing) // 2
    if images.dim() != 4 or min(images.shape[-2:]) <= radius:
        raise ValueError(
            f"images must have shape (B, C, H, W) with H and W above {radius} at scale {scale:g}, "
            f"but got {tuple(images.shape)}"
        )
    x = images.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    smoothing, sobel = smoothing.to(x), torch.tensor(_SOBEL).to(x)
    # Meta tensors, with which costs are counted, know no autocast.
    with contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        x = _blurred(x, smoothing)
        dx, dy = _filtered(x, sobel), _filtered(x, sobel.T)
        energy = (dx.square() + dy.square()).sum(1, keepdim=True).sqrt()
        return _blurred(energy, smoothing).to(images.dtype)


def _blurred(x: Tensor, kernel: Tensor) -> Tensor:
    return _filtered(_filtered(x, kernel[None, :]), kernel[:, None])


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Cross-correlation of each channel by itself, of the same size; borders reflected."""
    rows, columns = (side // 2 for side in kernel.shape)
    padded = pad(x, (columns, columns, rows, rows), mode="reflect")
    channels = x.shape[1]
    return conv2d(padded, kernel.expand(channels, 1, *kernel.shape), groups=channels)
