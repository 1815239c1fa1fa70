"""Derivatives of each image's loss with respect to its own pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

# Each image's loss from the logits (B, classes) and the labels (B,).
Loss = Callable[[Tensor, Tensor], Tensor]


class NotDifferentiableError(ValueError):
    """The model's loss has no first, or no second, derivative with respect to the pixels."""


def image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (B,): the loss of all measurements if none else is named."""
    return cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − max over the other classes, (B,): above 0 where the label is what the model says."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)


def input_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss = image_losses,
    *,
    create_graph: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """∇ₓᵢ ℓᵢ for each image; the images must not interact (eval mode).

    Args:
        model: pixels to logits.
        images: (B, …), floating point.
        labels: (B,), class indices.
        loss: logits and labels to (B,).
        create_graph: keep the gradient's graph, to differentiate it again.

    Returns:
        The gradients, of the images' shape; the losses (B,); the logits. With their graph if
        ``create_graph``, else without.

    Raises:
        NotDifferentiableError: the loss has no gradient at the pixels, or ``create_graph`` asks
            for a second one that is not there.
    """
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        logits = model(pixels)
        losses = loss(logits, labels)
        gradients = _gradient(losses.sum(), pixels, create_graph)
        if gradients is None:
            raise NotDifferentiableError(
                "the model is not differentiable: no gradient of its logits reaches the pixels "
                "(rounding, a detach, or no_grad on the way)"
            )
        if create_graph and not gradients.requires_grad:
            raise NotDifferentiableError(_SECOND)
    if not create_graph:
        losses, logits = losses.detach(), logits.detach()
    return gradients, losses, logits


def hessian_vector_products(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = image_losses
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """v ↦ ∇²ₓᵢ ℓᵢ · vᵢ for each image, and the gradients ∇ₓᵢ ℓᵢ.

    The product is the gradient of ⟨∇ₓℓ, v⟩; the graph of ∇ₓℓ is kept and used by each call.

    Args:
        model: pixels to logits, twice differentiable.
        images: (B, …), floating point.
        labels: (B,), class indices.
        loss: logits and labels to (B,).

    Returns:
        The product, of tensors of the images' shape, without a graph; the gradients, detached.

    Raises:
        NotDifferentiableError: the model is not twice differentiable. A piecewise linear one
            (ReLU) is, where it is smooth; its curvature is the loss's own.
    """
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        losses = loss(model(pixels), labels)
        gradients = _gradient(losses.sum(), pixels, create_graph=True)
    if gradients is None or not gradients.requires_grad:
        raise NotDifferentiableError(_SECOND)

    def product(vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            result = _gradient((gradients * vectors).sum(), pixels, False, retain_graph=True)
        if result is None:  # a second derivative of 0 would look the same, but is a graph's
            raise NotDifferentiableError(_SECOND)
        return result

    return product, gradients.detach()


_SECOND = (
    "the model is not twice differentiable: an operation has a first derivative only, or the loss "
    "is linear in the pixels; gn_kernels.swap(model) replaces operations that it knows, timm's "
    "fused attention among them"
)

_FIRST_ORDER = ("is not implemented", "double backward", "differentiate twice")


def _gradient(
    value: Tensor, pixels: Tensor, create_graph: bool, retain_graph: bool | None = None
) -> Tensor | None:
    if not value.requires_grad:
        return None
    try:
        (gradient,) = torch.autograd.grad(
            value, pixels, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
    except RuntimeError as error:
        # PyTorch's own wording, for operations with a first derivative only.
        if any(words in str(error) for words in _FIRST_ORDER):
            raise NotDifferentiableError(_SECOND) from error
        raise
    return gradient
