"""The models that are trained: from timm or transformers by name, or small ones described here."""

from __future__ import annotations

import ast
import functools
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gn_kernels.swap import SwapReport, swap
from gn_kernels.training.data import Dataset
from gn_kernels.training.normalise import Normalise
from gn_kernels.training.settings import InputError, Settings

# What of a file of somebody else's weights holds them, the averaged ones first.
_SECTIONS = ("state_dict_ema", "model_ema", "state_dict", "model")


class Classifier(nn.Sequential):
    """Pixels in [0, 1] to logits: the normalisation, then the network.

    Attributes:
        converted: paths of the activations that were converted, with what they were before.
    """

    def __init__(self, normalise: Normalise, name: str, network: nn.Module) -> None:
        super().__init__()
        self.add_module("normalise", normalise)
        self.add_module(name, network)
        self.converted: dict[str, str] = {}


class Logits(nn.Module):
    """A model of transformers, whose output is a structure, as a function to logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits


def build(settings: Settings, data: Dataset) -> nn.Module:
    """A model with PyTorch's own operations, freshly initialised from torch's global generator.

    Pixels in [0, 1] to logits. ``settings.model`` is ``vit`` or ``resnet``, small ones of which
    ``embed_dim``, ``depth`` and so on say how large; ``preactresnet18``, the paper's for CIFAR-10;
    a name of timm; or ``transformers:`` and a type of transformers (``vit``), a folder with a
    config.json, or a name on the Hub.

    Raises:
        InputError: there is no such model, its weights can't be had or don't fit, it has no
            activation to convert, or its BatchNorm would let the samples of a batch interact.
    """
    mean, std = data.mean, data.std
    name = "network"
    if settings.model == "vit":
        # The small ViT's name from when it was the only one: checkpoints know it.
        name, network = "transformer", _small_vit(settings, data)
    elif settings.model == "resnet":
        name, network = "resnet", _small_resnet(settings, data)
    elif settings.model == "preactresnet18":
        network = _preactresnet18(data)
    elif settings.model.startswith("transformers:"):
        network = _from_transformers(settings, data)
    else:
        network = _from_timm(settings, data)
        own = getattr(network, "pretrained_cfg", {})
        if settings.pretrained and len(mean) == len(own.get("mean", ())):
            mean, std = own["mean"], own["std"]
    model = Classifier(Normalise(mean, std), name, network)
    if settings.activation is not None and settings.model not in ("vit", "resnet"):
        model.converted = convert_activations(network, settings.activation)
    if settings.weights is not None:
        load_file(network, Path(settings.weights), len(data.classes))
    _check_samples_are_apart(model, settings)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    return model if on_meta else model.to(settings.device)


def convert_activations(model: nn.Module, kind: str) -> dict[str, str]:
    """Give each activation of ``model`` a module of its own of another kind, in place.

    ReLU and its relatives, GELU in all forms, SiLU, Softplus, Mish, ELU, at any depth and also
    where one module is shared by several sites; gates and what a ``forward`` calls as a function
    stay as they are.

    Args:
        model: of torch.nn, timm or transformers.
        kind: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"quick_gelu"``, ``"softplus"``.

    Returns:
        The paths that were converted, with the class that was there.

    Raises:
        InputError: there is no activation to convert, or ``kind`` is unknown.
    """
    layers, from_classes = _activation_layers(), _activation_classes()
    if kind not in layers:
        raise InputError(f"activation must be one of {', '.join(layers)}, but got {kind!r}")
    sites = [
        (parent, child, f"{path}.{child}" if path else child, module)
        for path, parent in model.named_modules()
        for child, module in parent._modules.items()
        if isinstance(module, from_classes)
    ]
    if not sites:
        raise InputError(
            f"{type(model).__name__} has no activation module to convert to {kind}: its forward "
            "calls them as functions, or it has none"
        )
    for parent, child, _, module in sites:
        setattr(parent, child, layers[kind]().train(module.training))
    return {path: type(module).__name__ for _, _, path, module in sites}


def load_file(network: nn.Module, path: Path, classes: int) -> None:
    """Put the weights in a file into a network; runs no code that the file may hold.

    A checkpoint of ``gn-kernels train`` (the averaged weights, if it has them), or a state
    dictionary as timm and others write it, in PyTorch's format or safetensors. A classifier of
    another number of classes is left as it was initialised, and the log says so.

    Raises:
        InputError: it can't be read, or does not fit the network.
    """
    tensors = _without_prefixes(_read_tensors(path))
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        tensors = convert(tensors, network)
    ours = network.state_dict()
    for name in [name for name in tensors if name in ours]:
        theirs, here = tensors[name].shape, ours[name].shape
        if theirs != here and len(here) and here[0] == classes and theirs[1:] == here[1:]:
            logging.getLogger("gn_kernels").warning(
                "%s of %s is for %d classes and is not used: the data has %d",
                name,
                path,
                theirs[0],
                classes,
            )
            tensors[name] = ours[name]
        elif theirs != here:
            raise InputError(
                f"the weights in {path} do not fit the model: {name} has shape {tuple(theirs)} "
                f"there and {tuple(here)} here"
            )
    missing, unexpected = network.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not part of it"
        raise InputError(f"the weights in {path} do not fit the model: {what}")


def use_math_attention(model: nn.Module) -> None:
    """Set attention to matrix products and softmax, in place; of timm and of transformers.

    What plain PyTorch has to offer here: its fused attention has one derivative only.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            vars(module)["fused_attn"] = False
        choose: Any = getattr(module, "set_attn_implementation", None)
        if choose is not None:
            choose("eager")


def swap_activations(model: nn.Module) -> None:
    """Swap in the activations of gn_kernels, in place, and nothing else."""
    for module in list(model.modules()):
        if isinstance(module, _activation_classes()):
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


def _small_vit(settings: Settings, data: Dataset) -> nn.Module:
    """Mean pooling: at this size it learns in fewer steps than a class token."""
    from timm.models.vision_transformer import VisionTransformer

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
        drop_path_rate=settings.drop_path,
        act_layer=_activation_layers()[settings.activation or "gelu"],
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


def _preactresnet18(data: Dataset) -> nn.Module:
    """timm's ResNetV2 of basic blocks with a stem for small images: one 3×3 convolution.

    Source: He et al., https://arxiv.org/abs/1603.05027.
    """
    from timm.layers.create_conv2d import create_conv2d
    from timm.layers.norm_act import BatchNormAct2d
    from timm.models.resnetv2 import ResNetV2

    network = ResNetV2(
        layers=[2, 2, 2, 2],
        channels=(64, 128, 256, 512),
        num_classes=len(data.classes),
        in_chans=len(data.mean),
        stem_chs=64,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        act_layer=functools.partial(nn.ReLU, inplace=False),
    )
    stem = nn.Conv2d(len(data.mean), 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.stem = nn.Sequential(stem)
    return network


def _from_timm(settings: Settings, data: Dataset) -> nn.Module:
    import timm

    options: dict[str, Any] = {
        "num_classes": len(data.classes),
        "in_chans": len(data.mean),
        **({"drop_path_rate": settings.drop_path} if settings.drop_path else {}),
        **_model_options(settings),
    }
    if not timm.is_model(settings.model):
        near = timm.list_models(f"*{settings.model}*")[:3]
        hint = f"; it has {', '.join(near)}" if near else ""
        raise InputError(f"timm has no model {settings.model!r}{hint}")
    # Elsewhere the size follows from the image.
    cfg = timm.get_pretrained_cfg(settings.model)
    if cfg is not None and cfg.fixed_input_size:
        options.setdefault("img_size", settings.image_size)
    pretrained = settings.pretrained and settings.weights is None
    return _made(
        settings, lambda: timm.create_model(settings.model, pretrained=pretrained, **options)
    )


def _from_transformers(settings: Settings, data: Dataset) -> nn.Module:
    import transformers
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = settings.model.removeprefix("transformers:")
    options = {
        "num_labels": len(data.classes),
        "image_size": settings.image_size,
        "num_channels": len(data.mean),
        **_model_options(settings),
    }

    def make() -> Any:
        with _quiet(transformers):
            if settings.pretrained and settings.weights is None:
                return AutoModelForImageClassification.from_pretrained(
                    name, ignore_mismatched_sizes=True, **options
                )
            if name in CONFIG_MAPPING:
                config = AutoConfig.for_model(name, **options)
            else:
                config = AutoConfig.from_pretrained(name, **options)
            return AutoModelForImageClassification.from_config(config)

    return Logits(_made(settings, make))


def _made(settings: Settings, make: Callable[[], Any]) -> nn.Module:
    """What the library makes of the settings; what it says against them in one sentence."""
    try:
        model: nn.Module = make()
        return model
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            "; if you have its weights in a file, name it with --weights instead of --pretrained"
        )
        raise InputError(
            f"the model {settings.model} can't be made: {reason}"
            f"{advice if settings.pretrained else ''}"
        ) from error


class _quiet:  # noqa: N801
    """transformers' remarks and progress bars off, inside."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._logging.set_verbosity_error()

    def __exit__(self, *details: object) -> None:
        self._logging.set_verbosity(self._level)


def _model_options(settings: Settings) -> dict[str, Any]:
    """``embed_dim=12, depths=(1, 1, 2, 1)`` as keywords and literal values."""
    if settings.model_options is None:
        return {}
    try:
        call = ast.parse(f"f({settings.model_options})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("only keywords are taken")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise InputError(
            "model_options must be keywords with plain values, as embed_dim=12,depths=(1,1,2,1), "
            f"but got {settings.model_options!r}"
        ) from error


def _check_samples_are_apart(model: nn.Module, settings: Settings) -> None:
    if settings.method != "gradnorm" or settings.freeze_batchnorm or settings.eval_mode:
        return
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{path} is a BatchNorm, which lets the samples of a batch reach each other's "
                "gradients, so that the penalty would be of something else: add --freeze-batchnorm "
                "or, as the paper does, --eval-mode"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged, or holds something other than tensors and plain values, and is "
            "not loaded: it could run code"
        ) from error
    except Exception as error:
        # Each format has exceptions of its own for what is damaged.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the weights in {path} can't be read: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("tensors"), dict):
        named = content["tensors"]
        sections = {name.partition(":")[0] for name in named}
        section = "average" if "average" in sections else "model"
        content = {
            name.partition(":")[2]: tensor
            for name, tensor in named.items()
            if name.startswith(f"{section}:")
        }
    for section in _SECTIONS:
        if isinstance(content, dict) and isinstance(content.get(section), dict):
            content = content[section]
            break
    if not isinstance(content, dict) or not any(isinstance(x, Tensor) for x in content.values()):
        raise InputError(f"{path} holds no weights")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's own names: without DDP's wrapper, the normalisation, and this module's."""
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if "normalise.mean" not in named:
        return named
    return {
        name.partition(".")[2]: tensor
        for name, tensor in named.items()
        if not name.startswith("normalise.")
    }


@functools.cache
def _activation_layers() -> dict[str, Callable[[], nn.Module]]:
    from timm.layers import QuickGELU

    return {
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
        "silu": nn.SiLU,
        "quick_gelu": QuickGELU,
        "softplus": nn.Softplus,
    }


def _activation_classes() -> tuple[type[nn.Module], ...]:
    from timm.layers import activations as of_timm

    classes: list[type[nn.Module]] = [
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Softplus, nn.Hardswish),
        *(of_timm.GELU, of_timm.GELUTanh, of_timm.QuickGELU, of_timm.Swish, of_timm.Mish),
        *(of_timm.HardSwish, of_timm.HardMish),
    ]
    transformers = sys.modules.get("transformers.activations")
    if transformers is not None:
        for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"):
            classes.append(type(transformers.ACT2FN[name]))
        classes += [type(transformers.ACT2FN[name]) for name in ("quick_gelu", "silu", "mish")]
    return tuple(classes)
