"""How large input gradients are, and how unevenly they are spread over images and channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses.common import Columns, Options, mean_of
from gn_kernels.robustness.attacks import pgd
from gn_kernels.robustness.differentiate import input_gradients

_PGD_STEPS = 10

# log₁₀|g| of the histograms of pixels, in steps of ¼; what is outside counts at the ends.
PIXEL_BINS = torch.arange(-12, 4.25, 0.25)


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, generator: torch.Generator
) -> Columns:
    r"""The gradient of the cross-entropy and of the label's logit, and who stands PGD-10.

    .. math:: g_i = \nabla_{x_i} CE_i, \qquad l_i = \lVert g_i \rVert_1, \qquad
        l_{i,c} = \lVert g_{i,c} \rVert_1, \qquad \lVert \nabla_{x_i} z_{y_i} \rVert_1

    x are pixels in [0, 1], normalised inside the model. An image is robust if it is classified
    rightly at the worst of 10 steps of PGD of length ε/2, from a random start.

    Returns:
        ``l1``, ``l2``, ``logit_l1``: (B,); ``channel_l1``: (B, C); ``pixels``: (B, C, bins), how
        many |g| are in each bin of ``PIXEL_BINS``; ``correct``, ``robust``: (B,), boolean.

    Source: https://arxiv.org/abs/2409.20139, table 1 and figures 6 and 7.
    """
    gradients, _, logits = input_gradients(model, images, labels)
    of_logit, _, _ = input_gradients(
        model, images, labels, lambda logits, y: logits.gather(1, y[:, None]).squeeze(1)
    )
    eps = options.eps_255 / 255
    attacked = pgd(
        model, images, labels, eps, steps=_PGD_STEPS, step_size=eps / 2, generator=generator
    )
    with torch.no_grad():
        robust = model(attacked).argmax(1) == labels
    correct = logits.argmax(1) == labels
    sizes = gradients.abs().flatten(2)
    return {
        "l1": sizes.sum((1, 2)),
        "l2": sizes.square().sum((1, 2)).sqrt(),
        "logit_l1": of_logit.abs().flatten(1).sum(1),
        "channel_l1": sizes.sum(2),
        "pixels": _histograms(sizes),
        "correct": correct,
        "robust": correct & robust,
    }


def _histograms(sizes: Tensor) -> Tensor:
    edges = PIXEL_BINS.to(sizes)
    logarithms = sizes.clamp(min=torch.finfo(sizes.dtype).tiny).log10()
    positions = torch.bucketize(logarithms.contiguous(), edges[1:-1], right=True)
    counts = positions.new_zeros((*sizes.shape[:2], len(edges) - 1))
    return counts.scatter_add_(2, positions, torch.ones_like(positions))


def summarise(columns: Columns, options: Options) -> dict[str, Any]:
    r"""Means of the norms, also where images are robust or not, and two measures of asymmetry.

    Sample asymmetry is the Gini coefficient of the images' L1 norms, half the mean absolute
    difference of two of them over their mean: 0 if all are alike, near 1 if one has everything.
    Channel asymmetry is (max share − 1/C)/(1 − 1/C) of the channels' shares of the sum of L1
    norms: 0 if all are alike, 1 if one has everything; 0 for a single channel.
    """
    l1, robust, correct = columns["l1"], columns["robust"], columns["correct"]
    shares = columns["channel_l1"].sum(0) / columns["channel_l1"].sum()
    channels = len(shares)
    uneven = (
        (shares.max() - 1 / channels) / (1 - 1 / channels) if channels > 1 else shares.new_zeros(())
    )
    return {
        "mean_l1": mean_of(l1),
        "mean_l1_robust": mean_of(l1[robust]),
        "mean_l1_vulnerable": mean_of(l1[~robust]),
        "mean_l1_correct": mean_of(l1[correct]),
        "mean_l1_wrong": mean_of(l1[~correct]),
        "mean_l2": mean_of(columns["l2"]),
        "mean_logit_l1": mean_of(columns["logit_l1"]),
        "median_l1": l1.median().item(),
        "sample_asymmetry": gini(l1),
        "channel_shares": shares.tolist(),
        "channel_asymmetry": uneven.item(),
        "clean_accuracy": mean_of(correct),
        "pgd_accuracy": mean_of(robust),
        "pgd_steps": _PGD_STEPS,
        "pixel_log10_edges": PIXEL_BINS.tolist(),
        "pixel_counts": columns["pixels"].sum(0).tolist(),
    }


def gini(values: Tensor) -> float:
    r"""Σᵢ (2i − n − 1)·v₍ᵢ₎ / (n·Σv), v sorted from the smallest; 0 for nothing but zeros."""
    ordered = values.double().sort().values
    count, total = len(ordered), ordered.sum().item()
    ranks = 2 * torch.arange(1, count + 1, dtype=torch.float64, device=values.device) - count - 1
    return (ranks @ ordered).item() / (count * total) if total > 0 else 0.0
