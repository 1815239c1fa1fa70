"""Penalties on the gradient of the loss with respect to the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NORMS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


def gradient_norm(
    loss: Tensor,
    x: Tensor,
    norm: str = "l1",
    *,
    channel_weights: Sequence[float] | Tensor | None = None,
    threshold: float = 0.0,
    scale: float = 1.0,
    create_graph: bool = True,
) -> Tensor:
    r"""Mean over the samples of the norm of each sample's input gradient.

    .. math::
        \frac{1}{B} \sum_{i=1}^{B} \max(\lVert w \circ \nabla_{x_i} \ell_i \rVert_p - \theta, 0),
        \qquad p = 1, 2, \infty

    The paper trains with λ_CE·CE + λ_GN·a(t)·ε·gradient_norm(CE, x), x in pixels in [0, 1] and
    ε = 4/255: ε‖∇ₓℓ‖₁ is the loss that an L∞ perturbation of size ε adds, to first order; ε‖∇ₓℓ‖₂
    and ε‖∇ₓℓ‖∞ are the same for perturbations in L2 and L1. Where ``x`` is the normalised image
    (pixels − μ)/σ, ∇ₓ is σ times the pixels' gradient: scale by ε/σ then (the paper takes
    σ = 0.225).

    Both equalities with the per-sample sum need samples that do not interact: BatchNorm in eval
    mode, for one, or the gradient of one sample's loss reaches the others' inputs.

    Args:
        loss: the mean of the samples' losses, a scalar; its gradient is multiplied by B. Or the
            losses themselves, of shape (B,).
        x: of shape (B, …), with ``requires_grad`` set before the forward pass.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``, over all of a sample's elements.
        channel_weights: w, a factor for each index of x's second dimension; None for 1. The
            paper's variant has 1, 2, 1 for red, green, blue.
        threshold: θ, what of each sample's norm is free.
        scale: factor of the loss while its gradient is taken, and divided out of the gradient in
            float32: a GradScaler's ``get_scale()``, so that float16 gradients do not vanish.
        create_graph: keep the graph of the gradient, so that the result can be differentiated
            with respect to the weights. False to measure only.

    Returns:
        A scalar in the units of loss per unit of ``x``, in float32 at least.

    Raises:
        ValueError: ``norm`` is unknown; ``x`` has no batch dimension or is empty; ``loss`` is of
            another shape; ``channel_weights`` has another length than x has channels.
        RuntimeError: ``x`` does not require grad; the loss does not depend on it; or its gradient
            can't be differentiated, because some operation of the model has a first derivative
            only and dropped the graph. A penalty would then train nothing.

    Example::

        images.requires_grad_()
        loss = cross_entropy(model(images), labels)
        penalty = gradient_norm(loss, images)
        (0.8 * loss + 1.2 * 4 / 255 * penalty).backward()

    Source: Rodríguez-Muñoz, Wang, Torralba, ECCV 2024, https://arxiv.org/abs/2409.20139; the
    bound is Simon-Gabriel et al., https://arxiv.org/abs/1802.01421, equation 4.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {tuple(_NORMS)}, but got {norm!r}")
    gradient = input_gradient(loss, x, scale=scale, create_graph=create_graph)
    per_sample = sample_norms(gradient, norm, channel_weights)
    return (torch.relu(per_sample - threshold) if threshold else per_sample).mean()


def input_gradient(
    loss: Tensor, x: Tensor, *, scale: float = 1.0, create_graph: bool = True
) -> Tensor:
    r"""The gradient of each sample's loss with respect to that sample, ∇_{x_i} ℓ_i.

    Args:
        loss: the mean of the samples' losses, a scalar; its gradient is multiplied by B. Or the
            losses themselves, of shape (B,).
        x: of shape (B, …), with ``requires_grad`` set before the forward pass.
        scale: as for :func:`gradient_norm`.
        create_graph: keep the graph of the gradient.

    Returns:
        Of x's shape, in float32 at least.

    Raises:
        ValueError, RuntimeError: as :func:`gradient_norm`.
    """
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x must have shape (B, …) with elements, but got {tuple(x.shape)}")
    samples = x.shape[0]
    if loss.shape not in ((), (samples,)):
        raise ValueError(
            f"loss must be a scalar or of shape ({samples},), but got {tuple(loss.shape)}"
        )
    if not x.requires_grad:
        raise RuntimeError(
            "x must require grad before the forward pass: call x.requires_grad_() first"
        )
    if not loss.requires_grad:
        raise RuntimeError("loss must have a graph, but it was computed without one")
    total = loss.sum() if scale == 1 else loss.sum() * scale
    (gradient,) = torch.autograd.grad(total, x, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise RuntimeError("loss must depend on x, but its graph does not reach x")
    if create_graph and not gradient.requires_grad:
        raise RuntimeError(
            "the gradient of loss with respect to x can't be differentiated: an operation of the "
            "model has no second derivative and dropped the graph; gn_kernels.swap(model) "
            "replaces those it knows"
        )
    if loss.dim() == 0:
        gradient = gradient * samples
    if gradient.dtype in (torch.float16, torch.bfloat16):
        gradient = gradient.float()
    return gradient if scale == 1 else gradient / scale


def sample_norms(
    gradient: Tensor, norm: str = "l1", channel_weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """‖w ∘ gradient_i‖ for each sample, as :func:`gradient_norm` averages them: (B,)."""
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {tuple(_NORMS)}, but got {norm!r}")
    if channel_weights is not None:
        weights = torch.as_tensor(channel_weights).to(gradient)
        if gradient.dim() < 2 or weights.shape != gradient.shape[1:2]:
            raise ValueError(
                f"channel_weights must be one number for each channel of x, whose shape is "
                f"{tuple(gradient.shape)}, but got {len(weights)}"
            )
        gradient = gradient * weights.reshape(-1, *[1] * (gradient.dim() - 2))
    norms: Tensor = torch.linalg.vector_norm(
        gradient.reshape(len(gradient), -1), _NORMS[norm], dim=1
    )
    return norms


def finite_difference_norm(
    losses: Callable[[Tensor], Tensor],
    x: Tensor,
    norm: str = "l1",
    *,
    step: float,
    channel_weights: Sequence[float] | Tensor | None = None,
    threshold: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""The penalty of :func:`gradient_norm` without a second derivative.

    .. math::
        \lVert w \circ \nabla_x \ell \rVert = \langle d, \nabla_x \ell \rangle
        \approx \frac{\ell(x + h d) - \ell(x - h d)}{2h}

    d is the direction in which the dual norm is reached, held constant: w ∘ sign(∇) for L1,
    w² ∘ ∇/‖w ∘ ∇‖ for L2, w·sign(∇) at the largest element of w ∘ ∇ for L∞. h is such that no
    element moves by more than ``step``. Its derivative with respect to the weights is that of
    gradient_norm up to O(h²) and up to the rounding of ℓ divided by h.

    The weight gradient of a GELU network of three layers was off by 2e-5 (relative, L2) in float32
    at step 1/255, where double backprop is off by 2e-7; in bfloat16, which rounds the losses most,
    by 14 % (L1) and 32 % (L2) at step 1/255 and by 2 % at 16/255, where double backprop is off by
    2 % and 0.4 % (``tests/test_penalty.py`` holds bounds for these).

    Args:
        losses: from images like ``x`` to the losses of the samples, (B,).
        x: of shape (B, …); needs no gradient.
        step: largest change of an element of ``x``.
        norm: as for :func:`gradient_norm`.
        channel_weights: likewise.
        threshold: likewise.
        scale: likewise.

    Returns:
        The penalty, and the losses at ``x``, (B,), both with a graph to the weights.

    Raises:
        ValueError: ``step`` is not above 0, or as :func:`gradient_norm`.

    Source: Finlay & Oberman, https://arxiv.org/abs/1905.11468 (one-sided, L2); central
    differences make the error of second order.
    """
    if not step > 0:
        raise ValueError(f"step must be above 0, but got {step}")
    x = x.detach().requires_grad_()
    at_x = losses(x)
    (gradient,) = torch.autograd.grad(at_x.sum() * scale, x, retain_graph=True)
    direction = _dual_direction(gradient.detach(), norm, channel_weights)
    largest = direction.flatten(1).abs().amax(1).clamp_min(torch.finfo(direction.dtype).tiny)
    h = (step / largest).reshape(-1, *[1] * (x.dim() - 1))
    with torch.no_grad():
        above, below = x + h * direction, x - h * direction
    per_sample = (losses(above) - losses(below)) / (2 * h.flatten())
    return torch.relu(per_sample - threshold).mean(), at_x


def _dual_direction(
    gradient: Tensor, norm: str, channel_weights: Sequence[float] | Tensor | None
) -> Tensor:
    """The d with ⟨d, gradient⟩ = ‖w ∘ gradient‖, for each sample."""
    shape = (-1, *[1] * (gradient.dim() - 1))
    norms = sample_norms(gradient, norm, channel_weights).reshape(shape)
    weights = torch.ones((), device=gradient.device, dtype=gradient.dtype)
    if channel_weights is not None:
        weights = torch.as_tensor(channel_weights).to(gradient)
        weights = weights.reshape(-1, *[1] * (gradient.dim() - 2))
    if norm == "l1":
        return weights * gradient.sign()
    if norm == "l2":
        return weights**2 * gradient / norms.clamp_min(torch.finfo(gradient.dtype).tiny)
    largest = (weights * gradient).flatten(1).abs().argmax(1, keepdim=True)
    direction = (weights * gradient.sign()).flatten(1)
    chosen = torch.zeros_like(direction).scatter(1, largest, direction.gather(1, largest))
    return chosen.reshape(gradient.shape)
