"""The moving average of the weights, which is evaluated in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def start(model: nn.Module) -> dict[str, Tensor]:
    """The average before the first step: a copy of the weights and buffers, sharded alike."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def update(average: dict[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    r"""Move the average towards the weights, in place.

    .. math::
        m \leftarrow d \, m + (1 - d) \, w, \qquad d = \min(decay, (1 + t)/(10 + t))

    With t small the average would else be of the initial weights for 1/(1 − decay) steps. Integer
    buffers are copied.

    Args:
        average: of :func:`start`.
        model: after the step.
        step: t, steps done before this one.
        decay: per step, in [0, 1).

    Source: the decay's start is that of TensorFlow's ExponentialMovingAverage,
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for name, now in model.state_dict().items():
        if now.is_floating_point():
            average[name].lerp_(now.detach(), 1 - decay)
        else:
            average[name].copy_(now)
