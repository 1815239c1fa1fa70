"""How sharply the loss bends around an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from gn_kernels.robustness.analyses.common import Columns, Options, spread
from gn_kernels.robustness.differentiate import Loss, hessian_vector_products, image_losses

# Against divisions by 0, as in the paper's code.
_TINY = 1e-6


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    """:func:`curvature` from a random direction, with ``options.power_iterations``."""
    start = torch.randn(images.shape, generator=generator).to(images)
    return curvature(model, images, labels, start, options.power_iterations)


def curvature(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    iterations: int,
    loss: Loss = image_losses,
) -> Columns:
    r"""The Hessian's largest eigenvalue by power iteration, over the length of the gradient.

    .. math::
        u \leftarrow \frac{H u}{\lVert H u \rVert_2 + 10^{-6}}, \qquad \lambda = u^T H u, \qquad
        C = \frac{|\lambda|}{\lVert \nabla_x \ell \rVert_2 + 10^{-6}}

    H is the Hessian of each image's loss with respect to its pixels, used through products with
    vectors alone; one more of them than there are iterations. Memory: the graph of the gradient.

    Args:
        model: pixels in [0, 1] to logits, twice differentiable, in eval mode.
        images: (B, C, H, W).
        labels: (B,).
        start: of the images' shape; u before the first iteration, up to its length.
        iterations: of the power iteration; 0 gives λ along ``start``.
        loss: logits and labels to (B,).

    Returns:
        ``curvature`` C, ``eigenvalue`` |λ|, ``l2`` and ``l1`` of the gradient: (B,).

    Raises:
        NotDifferentiableError: the model is not twice differentiable.

    Source: https://arxiv.org/abs/2409.20139, after Moosavi-Dezfooli et al.,
    https://arxiv.org/abs/1811.09716, and Srinivas et al., https://arxiv.org/abs/2206.07144.
    """
    product, gradients = hessian_vector_products(model, images, labels, loss)

    def length(vectors: Tensor) -> Tensor:
        found: Tensor = vector_norm(vectors.flatten(1), dim=1)
        return found

    def unit(vectors: Tensor) -> Tensor:
        return vectors / (length(vectors) + _TINY).view(-1, *[1] * (vectors.dim() - 1))

    u = start / length(start).clamp(min=torch.finfo(start.dtype).tiny).view(
        -1, *[1] * (start.dim() - 1)
    )
    for _ in range(iterations):
        u = unit(product(u))
    eigenvalues = (u * product(u)).flatten(1).sum(1).abs()
    l2 = length(gradients)
    return {
        "curvature": eigenvalues / (l2 + _TINY),
        "eigenvalue": eigenvalues,
        "l2": l2,
        "l1": gradients.abs().flatten(1).sum(1),
    }


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    """Mean, standard deviation, median and mean of log₁₀ of each."""
    return {name: spread(values) for name, values in columns.items()}
