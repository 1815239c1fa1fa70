"""The model that is trained: a small Vision Transformer of timm behind its normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gn_kernels.swap import SwapReport, swap
from gn_kernels.training.data import Dataset
from gn_kernels.training.recipe import Settings


class Normalise(nn.Module):
    """(x − mean)/std for each channel, so that attacks and penalties see pixels in [0, 1].

    Args:
        mean, std: one number for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def build(settings: Settings, data: Dataset) -> nn.Module:
    """A model with PyTorch's own operations, freshly initialised from torch's global generator.

    Pixels in [0, 1] to logits. Mean pooling: at this size it learns in fewer steps than a class
    token.
    """
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    layers: dict[str, Callable[[], nn.Module]] = {
        "gelu": nn.GELU,
        "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
        "silu": nn.SiLU,
        "quick_gelu": QuickGELU,
    }
    transformer = VisionTransformer(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        in_chans=len(data.mean),
        num_classes=len(data.classes),
        embed_dim=settings.embed_dim,
        depth=settings.depth,
        num_heads=settings.num_heads,
        class_token=False,
        global_pool="avg",
        act_layer=layers[settings.activation],
    )
    model = nn.Sequential()
    model.add_module("normalise", Normalise(data.mean, data.std))
    model.add_module("transformer", transformer)
    return model.to(settings.device)


def use_math_attention(model: nn.Module) -> None:
    """Set timm's attention to matrix products and softmax, in place.

    What plain PyTorch has to offer here: its fused attention has one derivative only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False


def swap_activations(model: nn.Module) -> None:
    """Swap in the activations of gn_kernels, in place, and nothing else."""
    for module in list(model.modules()):
        if isinstance(module, _activations()):
            swap(module)


def prepare(model: nn.Module, settings: Settings) -> SwapReport | None:
    """Make the model of :func:`build` twice differentiable, in place, as the settings say.

    Returns:
        What was swapped; None with ``settings.swap`` off.
    """
    if settings.swap:
        return swap(model)
    use_math_attention(model)
    return None


def _activations() -> tuple[type[nn.Module], ...]:
    from timm.layers import QuickGELU

    return nn.GELU, nn.SiLU, QuickGELU
