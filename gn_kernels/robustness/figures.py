"""Pictures of images and of their input gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gn_kernels.robustness.attacks import _attacked
from gn_kernels.robustness.differentiate import input_gradients


def symmetric_scale(gradient: Tensor) -> Tensor:
    """½ + ½·g/q, clamped to [0, 1]; q is the 99% quantile of the image's |g|. Zero becomes ½."""
    quantile = gradient.abs().flatten(1).quantile(0.99, dim=1).clamp(min=torch.finfo().tiny)
    return (0.5 + 0.5 * gradient / quantile.view(-1, *[1] * (gradient.ndim - 1))).clamp(0, 1)


def gradient_figure(
    path: Path,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    title: str,
) -> None:
    """Draw images above their input gradients, each scaled by :func:`symmetric_scale`.

    Args:
        path: of the PNG.
        model: pixels in [0, 1] to logits.
        images: (N, 1 or 3, H, W) in [0, 1]; about ten are legible.
        labels: (N,).
        classes: names of the classes.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    with _attacked(model):
        gradients, _, logits = input_gradients(model, images, labels)
    predicted = logits.argmax(-1).tolist()
    norms = gradients.abs().flatten(1).sum(1).tolist()
    scaled = symmetric_scale(gradients).permute(0, 2, 3, 1).cpu().numpy()
    shown = images.permute(0, 2, 3, 1).cpu().numpy()
    grey = images.shape[1] == 1

    count = len(labels)
    figure = Figure(figsize=(max(1.25 * count, 6) + 0.9, 3.7), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(2, count, squeeze=False)
    for column in range(count):
        label, guess = classes[int(labels[column])], classes[predicted[column]]
        image, gradient = axes[:, column]
        image.imshow(shown[column], cmap="gray" if grey else None, vmin=0, vmax=1)
        right = label == guess
        image.set_title(
            label if right else f"{label}, taken\nfor {guess}",
            fontsize=10,
            color="black" if right else "firebrick",
        )
        drawn = gradient.imshow(scaled[column], cmap="RdBu_r" if grey else None, vmin=0, vmax=1)
        gradient.set_xlabel(f"‖∇‖₁ = {norms[column]:.3g}", fontsize=10)
        for axis in (image, gradient):
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0, 0].set_ylabel("test image", fontsize=10)
    axes[1, 0].set_ylabel("input gradient", fontsize=10)
    if grey:
        bar = figure.colorbar(drawn, ax=axes[1, :], ticks=[0, 0.5, 1], fraction=0.02, pad=0.01)
        bar.ax.set_yticklabels(["−q", "0", "+q"])
    figure.supxlabel(
        "Gradient of the cross-entropy with respect to the pixels, each scaled by the 99% "
        "quantile q of its magnitude.",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
