"""What measurements take their images from, and what they demand of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Images(Protocol):
    """Images with their labels, read by index; ``torch.utils.data.TensorDataset`` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), pixels in [0, 1], and class indices (B,), on the model's device."""


def batches(indices: Tensor, batch_size: int) -> Iterator[Tensor]:
    """``indices`` in pieces; none for no indices."""
    return iter(indices.split(batch_size) if len(indices) else ())


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise a ValueError unless these are images in [0, 1] with a label each."""
    if not images.is_floating_point() or images.dim() != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            "images must be floating point of shape (B, C, H, W) with labels of shape (B,), but "
            f"got {images.dtype} {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    # Not `min < 0 or max > 1`: NaN must not pass.
    if not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(
            f"images must be in [0, 1], but go from {images.amin():.4g} to {images.amax():.4g}: "
            "let the model normalise its input itself"
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise a ValueError unless the model has a class for each label."""
    if labels.amin() < 0 or labels.amax() >= classes:
        raise ValueError(
            f"labels go from {labels.amin()} to {labels.amax()}, but the model has {classes} "
            "classes: it was trained on other data"
        )


def check_logits(logits: Tensor) -> None:
    """Raise a ValueError unless the logits are finite."""
    bad = int((~torch.isfinite(logits)).any(1).sum())
    if bad:
        raise ValueError(
            f"the logits of {bad} of {len(logits)} images are NaN or infinite: the model is "
            "broken, or its precision too low"
        )
