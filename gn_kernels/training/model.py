"""The model that is trained: a small one of timm behind its normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from gn_kernels.swap import SwapReport, swap
from gn_kernels.training.data import Dataset
from gn_kernels.training.normalise import Normalise
from gn_kernels.training.settings import InputError, Settings


def build(settings: Settings, data: Dataset) -> nn.Module:
    """A model with PyTorch's own operations, freshly initialised from torch's global generator.

    Pixels in [0, 1] to logits.
    """
    model = nn.Sequential()
    model.add_module("normalise", Normalise(data.mean, data.std))
    if settings.model == "resnet":
        model.add_module("resnet", _small_resnet(settings, data))
    else:
        model.add_module("transformer", _small_vit(settings, data))
    return model.to(settings.device)


def _small_vit(settings: Settings, data: Dataset) -> nn.Module:
    """With mean pooling: at this size it learns in fewer steps than with a class token."""
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    layers: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
        "silu": nn.SiLU,
        "quick_gelu": QuickGELU,
        "softplus": nn.Softplus,
    }
    return VisionTransformer(
        img_size=settings.image_size,
        patch_size=settings.patch_size,
        in_chans=len(data.mean),
        num_classes=len(data.classes),
        embed_dim=settings.embed_dim,
        depth=settings.depth,
        num_heads=settings.num_heads,
        class_token=False,
        global_pool="avg",
        act_layer=layers[settings.activation or "gelu"],
    )


# A ResNet without normalisation scales its weights by a gain that timm has for these.
_RESNET_ACTIVATIONS = ("relu", "gelu", "silu", "softplus")


def _small_resnet(settings: Settings, data: Dataset) -> nn.Module:
    """timm's nf_resnet26 with fewer channels: no BatchNorm, so samples do not interact.

    A stem of one convolution, four stages of ``depth`` blocks of three, in which the channels
    double from ``embed_dim`` and the side halves: 12·depth + 2 layers.

    Source: Brock et al., https://arxiv.org/abs/2101.08692.
    """
    import timm

    activation = settings.activation or "relu"
    if activation not in _RESNET_ACTIVATIONS:
        raise InputError(
            f"model resnet takes the activations {', '.join(_RESNET_ACTIVATIONS)}, not "
            f"{activation}, for which timm has no gain"
        )
    width = settings.embed_dim
    resnet: nn.Module = timm.create_model(
        "nf_resnet26",
        in_chans=len(data.mean),
        num_classes=len(data.classes),
        act_layer=activation,
        depths=(settings.depth,) * 4,
        channels=(width, 2 * width, 4 * width, 8 * width),
        stem_type="3x3",
        stem_chs=width // 2,
    )
    return resnet


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
