"""White-box attacks in the L∞ ball around images in [0, 1]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    steps: int,
    step_size: float | Tensor,
    restarts: int = 1,
    random_start: bool = True,
    keep: str = "worst",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Projected gradient ascent on the cross-entropy, the worst point of each image.

    .. math::
        x_0 = \Pi(x + u), \; u \sim U(-\varepsilon, \varepsilon)^d, \qquad
        x_{t+1} = \Pi(x_t + \alpha \, \mathrm{sign} \, \nabla_x \ell(x_t, y))

    Π projects on {‖x′ − x‖∞ ≤ ε} ∩ [0, 1]ᵈ. Returned is, for each image by itself, the point of
    the highest loss among all x₁ … x_steps of all restarts, or with ``keep="last"`` simply
    x_steps, which costs one forward pass less: what training wants. The model is in eval mode
    meanwhile, and only input gradients are computed.

    Args:
        model: pixels in [0, 1] to logits; normalises its input itself.
        images: (B, …), floating point, in [0, 1].
        labels: (B,), class indices, or (B, classes), probabilities, as mixup gives them.
        eps: ε, in units of the pixels; a tensor of shape (B, 1, …) for one of each image.
        steps: gradient steps, at least 1.
        step_size: α, in units of the pixels, likewise.
        restarts: how often to start anew, at least 1.
        random_start: start at a random point of the ball, or at the image itself.
        keep: ``"worst"`` or ``"last"``; the last point goes with one restart only.
        generator: of the random starts, on the CPU, whatever the images' device.

    Returns:
        Adversarial images, detached.

    Raises:
        ValueError: ``steps`` or ``restarts`` is below 1, ``eps`` negative, or ``keep`` unknown or
            at odds with ``restarts``.

    Source: Madry et al., https://arxiv.org/abs/1706.06083.
    """
    if steps < 1 or restarts < 1 or torch.as_tensor(eps).lt(0).any():
        raise ValueError(
            "steps and restarts must be at least 1 and eps at least 0, but got "
            f"{steps}, {restarts} and {eps}"
        )
    if keep not in ("worst", "last") or (keep == "last" and restarts > 1):
        raise ValueError(
            "keep must be 'worst', or 'last' with a single restart, but got "
            f"{keep!r} with {restarts} restarts"
        )
    images = images.detach()
    lower, upper = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    worst = images.clone()
    highest = images.new_full((len(images),), -torch.inf)
    with _attacked(model), torch.enable_grad():
        for _ in range(restarts):
            point = images.detach()
            if random_start:
                noise = torch.rand(images.shape, generator=generator).to(images)
                point = (point + eps * (2 * noise - 1)).clamp(lower, upper)
            for step in range(steps):
                point.requires_grad_()
                losses = cross_entropy(model(point), labels, reduction="none")
                if step > 0 and keep == "worst":
                    _keep_higher(worst, highest, point, losses)
                (gradient,) = torch.autograd.grad(losses.sum(), point)
                point = (point.detach() + step_size * gradient.sign()).clamp(lower, upper)
            if keep == "last":
                return point
            with torch.no_grad():
                losses = cross_entropy(model(point), labels, reduction="none")
            _keep_higher(worst, highest, point, losses)
    return worst


def _keep_higher(worst: Tensor, highest: Tensor, point: Tensor, losses: Tensor) -> None:
    losses = losses.detach().to(highest)
    better = losses > highest
    highest[better] = losses[better]
    worst[better] = point.detach()[better]


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The fast gradient sign method: one step of PGD of length ``eps`` from the image itself.

    Source: Goodfellow et al., https://arxiv.org/abs/1412.6572.
    """
    return pgd(model, images, labels, eps, steps=1, step_size=eps, random_start=False, keep="last")


@contextlib.contextmanager
def _attacked(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients; puts every module and parameter back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in required:
            parameter.requires_grad_()
