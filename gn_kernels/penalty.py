"""Penalties on the gradient of the loss with respect to the input."""

from __future__ import annotations

import torch
from torch import Tensor

_NORMS = {"l1": 1.0, "l2": 2.0}


def gradient_norm(
    loss: Tensor, x: Tensor, norm: str = "l1", *, create_graph: bool = True
) -> Tensor:
    r"""Mean over the samples of the norm of each sample's input gradient.

    .. math:: \frac{1}{B} \sum_{i=1}^{B} \lVert \nabla_{x_i} \ell_i \rVert_p, \qquad p = 1, 2

    The paper trains with λ_CE·CE + λ_GN·a(t)·ε·gradient_norm(CE, x), x in pixels in [0, 1] and
    ε = 4/255: ε‖∇ₓℓ‖₁ is the loss that an L∞ perturbation of size ε adds, to first order, and
    ε‖∇ₓℓ‖₂ the same for an L2 perturbation. Where ``x`` is the normalised image (pixels − μ)/σ,
    ∇ₓ is σ times the pixels' gradient: scale by ε/σ then (the paper takes σ = 0.225).

    Both equalities with the per-sample sum need samples that do not interact: BatchNorm in eval
    mode, for one, or the gradient of one sample's loss reaches the others' inputs.

    Args:
        loss: the mean of the samples' losses, a scalar; its gradient is multiplied by B. Or the
            losses themselves, of shape (B,).
        x: of shape (B, …), with ``requires_grad`` set before the forward pass.
        norm: ``"l1"`` or ``"l2"``, over all of a sample's elements.
        create_graph: keep the graph of the gradient, so that the result can be differentiated
            with respect to the weights. False to measure only.

    Returns:
        A scalar in the units of loss per unit of ``x``, in float32 at least.

    Raises:
        ValueError: ``norm`` is unknown; ``x`` has no batch dimension or is empty; ``loss`` is of
            another shape.
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
    (gradient,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph, allow_unused=True)
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
    norms: Tensor = torch.linalg.vector_norm(gradient.reshape(samples, -1), _NORMS[norm], dim=1)
    return norms.mean()
