"""The settings of a run: each one an option of ``gn-kernels train`` and a key of its YAML file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

METHODS = ("natural", "gradnorm", "adversarial", "edge")
DATASETS = ("digits", "fashion-mnist", "cifar10", "patches", "folder")
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "softplus")
DEVICES = ("cpu", "cuda")

# The groups of ``gn-kernels train --help``, in their order.
GROUPS = {
    "task": "what is learnt, from what",
    "model": "the network",
    "optimisation": "steps and their size",
    "augmentation": "what happens to the training images; timm's implementations",
    "gradnorm": "--method gradnorm: weight_ce·CE + weight_gradnorm·a(t)·eps·mean ‖∇CE‖",
    "adversarial": "--method adversarial, and gradnorm's --adversarial-start: PGD while training",
    "edge": "--method edge: CE + a(t)·MSE(input gradient, contour energy), both divided by their "
    "root mean square",
    "evaluation": "the attack at the end",
    "machine": "how it is computed; the weights depend on it in their last bits, if at all",
}


class InputError(ValueError):
    """What the user gave can't be used; the message is one sentence that tells why."""


def _setting(
    group: str,
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    least: float = 0.0,
    below: float = math.inf,
) -> Any:
    metadata = {"group": group, "help": help, "choices": choices, "least": least, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the weights of a run, and the figures of its report.

    Each field is an option of ``gn-kernels train`` and a key of a configuration, with the help
    given here. Lengths of the pixel space are in 1/255 (``eps_255``), since images are in [0, 1].

    Raises:
        InputError: a value is of another type, out of its range, or contradicts another.
    """

    method: str = _setting("task", "gradnorm", "what is minimised", METHODS)
    dataset: str = _setting("task", "digits", "what is trained on", DATASETS)
    data: str | None = _setting(
        "task",
        None,
        "folder of the data: class subfolders, Fashion-MNIST's four IDX files, torchvision's "
        "cifar-10-batches-py, or photographs to cut patches from",
    )
    image_size: int = _setting("task", 8, "side of the model's input, in pixels", least=1)
    crop_ratio: float = _setting(
        "task", 1.0, "share of the resized image that the centre crop keeps", least=0.01
    )
    interpolation: str = _setting(
        "task", "bilinear", "how folders' images are resized", ("bilinear", "bicubic")
    )
    test_list: str | None = _setting(
        "task", None, "file that lists the test images of a folder, one path a line"
    )
    train_images: int | None = _setting(
        "task",
        None,
        "train on this many of the training images, at random but always the same; all",
        least=1,
    )
    validate: bool = _setting(
        "task",
        False,
        "hold a tenth of the training images out and test on them: to choose these settings by",
    )
    workers: int = _setting("task", 0, "processes that read and augment images")

    model: str = _setting(
        "model",
        "vit",
        "vit or resnet: small ones that the next options describe; preactresnet18; a name of "
        "timm; or transformers:NAME",
    )
    patch_size: int = _setting("model", 2, "side of the vit's patch, in pixels", least=1)
    embed_dim: int = _setting("model", 48, "width of the vit, or of resnet's first stage", least=1)
    depth: int = _setting("model", 3, "blocks of the vit, or of each of resnet's 4 stages", least=1)
    num_heads: int = _setting("model", 3, "heads of the vit's attention", least=1)
    model_options: str | None = _setting(
        "model", None, "for other models: keywords of its constructor, as embed_dim=12,depths=(1,2)"
    )
    pretrained: bool = _setting("model", False, "start from the weights that the library finds")
    weights: str | None = _setting(
        "model", None, "start from the weights in this file (.pt, .pth, .safetensors)"
    )
    activation: str | None = _setting(
        "model", None, "convert the model's activations to this one; as they are", ACTIVATIONS
    )
    drop_path: float = _setting("model", 0.0, "rate of stochastic depth", below=1.0)
    swap: bool = _setting("model", True, "train with the fused kernels of gn_kernels")
    freeze_batchnorm: bool = _setting(
        "model", False, "BatchNorm normalises with its running statistics and keeps them"
    )
    eval_mode: bool = _setting(
        "model", False, "train in eval mode, as the paper does: BatchNorm frozen, no dropout"
    )

    epochs: int = _setting("optimisation", 40, "passes over the training images", least=1)
    batch_size: int = _setting(
        "optimisation",
        64,
        "images in a step, of all processes and accumulated parts together; an epoch's remainder "
        "is left out",
        least=1,
    )
    accumulate_steps: int = _setting(
        "optimisation",
        1,
        "parts that a step's images are taken in, to save memory; their gradients are averaged",
        least=1,
    )
    optimizer: str = _setting("optimisation", "adamw", "its name", ("adamw", "sgd"))
    momentum: float = _setting("optimisation", 0.9, "of sgd", below=1.0)
    lr: float = _setting("optimisation", 6e-3, "peak learning rate")
    lr_min: float = _setting("optimisation", 1e-5, "learning rate at the end of the cosine")
    warmup_lr: float | None = _setting(
        "optimisation", None, "learning rate at the first step; lr_min"
    )
    warmup_epochs: float = _setting("optimisation", 4.0, "epochs of linear warm-up")
    weight_decay: float = _setting("optimisation", 0.05, "on matrices only")
    clip_norm: float = _setting(
        "optimisation", 1.0, "limit of the weight gradient's L2 norm in a step; 0 for none"
    )
    ema_decay: float = _setting(
        "optimisation",
        0.0,
        "decay of the weights' moving average, which is then what is evaluated; 0 for none",
        below=1.0,
    )

    label_smoothing: float = _setting("augmentation", 0.1, "of the training loss", below=1.0)
    train_crop: str = _setting(
        "augmentation",
        "none",
        "resized: a random part of 8 to 100 %; padded: shifted by up to an eighth",
        ("none", "resized", "padded"),
    )
    flip: float = _setting("augmentation", 0.0, "probability of a horizontal flip", below=1.0001)
    colour_jitter: float = _setting("augmentation", 0.0, "of brightness, contrast, saturation")
    rand_augment: str | None = _setting(
        "augmentation", None, "RandAugment in timm's notation, as rand-m9-mstd0.5-inc1"
    )
    random_erasing: float = _setting(
        "augmentation", 0.0, "probability that a rectangle becomes noise", below=1.0001
    )
    mixup: float = _setting("augmentation", 0.0, "alpha of mixup; 0 for none")
    cutmix: float = _setting("augmentation", 0.0, "alpha of cutmix; 0 for none")

    eps_255: float = _setting("gradnorm", 16.0, "strength of the penalty, in 1/255")
    weight_ce: float = _setting("gradnorm", 0.8, "weight of the cross-entropy")
    weight_gradnorm: float = _setting("gradnorm", 1.2, "weight of the penalty")
    ramp_start: float = _setting("gradnorm", 0.0, "a(t), factor of the penalty, at the first step")
    ramp_per_epoch: float = _setting("gradnorm", 0.2, "what an epoch adds to the factor")
    ramp_max: float = _setting("gradnorm", 1.0, "limit of the factor")
    norm: str = _setting(
        "gradnorm", "l1", "of the gradient: dual to attacks in L∞, L2, L1", ("l1", "l2", "linf")
    )
    sigma: float = _setting(
        "gradnorm",
        0.0,
        "0: the gradient with respect to pixels; else that with respect to the normalised image, "
        "divided by this (the paper: 0.225)",
    )
    channel_weights: tuple[float, ...] = _setting(
        "gradnorm", (), "factor of each channel's gradient, as 1,2,1; all 1"
    )
    threshold: float = _setting(
        "gradnorm", 0.0, "what of eps times a sample's norm is free, in units of the loss"
    )
    random_start_255: float = _setting(
        "gradnorm", 0.0, "first move each pixel at random by up to this, in 1/255"
    )
    adversarial_start: bool = _setting("gradnorm", False, "first move the images by PGD")
    differentiate: str = _setting(
        "gradnorm",
        "double-backprop",
        "how the penalty is differentiated: exactly, or by finite differences of first-order "
        "gradients, which need no second derivative but lose accuracy, most in half precision",
        ("double-backprop", "finite-differences"),
    )
    difference_255: float = _setting(
        "gradnorm",
        1.0,
        "largest change of a pixel in finite differences, in 1/255",
        least=1e-6,
    )

    pgd_steps: int = _setting("adversarial", 3, "steps of PGD; 1 for FGSM", least=1)
    pgd_step_255: float | None = _setting(
        "adversarial", None, "length of a step, in 1/255; 2·radius/steps, of FGSM 1.25·radius"
    )
    pgd_warmup_epochs: float = _setting(
        "adversarial", 0.0, "whole epochs in which the length of a step grows from 0"
    )
    pgd_gradients: str = _setting(
        "adversarial",
        "lean",
        "lean: input gradients alone; reference: parameter gradients and a last forward pass as "
        "well, thrown away, as the paper's code does. The images are the same",
        ("lean", "reference"),
    )

    edge_variant: str = _setting(
        "edge",
        "logit",
        "which gradient: of a sampled class's logit, its largest magnitude over the channels, of "
        "the loss, of a relaxed sample of the logits",
        ("logit", "saliency", "loss", "smooth"),
    )
    edge_temperature: float = _setting("edge", 0.5, "of the sampling", least=1e-3)
    edge_scale: float = _setting(
        "edge",
        1.0,
        "variance of the Gaussian around the edge filter, in squared pixels",
        least=0.01,
    )
    edge_weight: float = _setting("edge", 1.0, "a(t), weight of the edge term, at the first step")
    edge_weight_per_epoch: float = _setting("edge", 0.09, "what a whole epoch adds to it")
    edge_weight_max: float = _setting("edge", 19.0, "its limit")

    attack_eps_255: float | None = _setting(
        "evaluation", None, "radius of attacks, in training too, in 1/255; eps_255"
    )
    attack_steps: int = _setting("evaluation", 20, "steps of PGD", least=1)
    restarts: int = _setting(
        "evaluation", 2, "random starts of PGD, of which the worst counts", least=1
    )

    seed: int = _setting(
        "machine", 0, "of the weights, the order of the images, augmentation, and attacks"
    )
    threads: int = _setting(
        "machine",
        1,
        "CPU threads: the last bits depend on them; a small model gains nothing from more",
        least=1,
    )
    device: str = _setting("machine", "cpu", "where the model runs", DEVICES)
    precision: str = _setting(
        "machine",
        "float32",
        "of autocast; float16 scales the loss",
        ("float32", "bfloat16", "float16"),
    )
    channels_last: bool = _setting("machine", False, "keep images with their channels innermost")
    checkpoint_activations: bool = _setting(
        "machine", False, "compute each block again in the backward passes, to save memory"
    )
    recompute: bool = _setting(
        "machine", False, "make activations again instead of saving them (gn_kernels.recompute)"
    )
    distributed: str = _setting(
        "machine",
        "none",
        "under torchrun: copies of the model, or its parameters in shards",
        ("none", "ddp", "fsdp2"),
    )
    tensorboard: bool = _setting("machine", False, "write TensorBoard events into the run's folder")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        if self.model == "vit" and self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.model == "vit" and self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}"
            )
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}"
            )
        if self.batch_size % self.accumulate_steps:
            raise InputError(
                f"batch_size {self.batch_size} must be a multiple of accumulate_steps "
                f"{self.accumulate_steps}"
            )
        if self.crop_ratio > 1:
            raise InputError(f"crop_ratio must be at most 1, but got {self.crop_ratio}")

    @property
    def attack_radius_255(self) -> float:
        """Radius of the attacks in training and evaluation, in 1/255."""
        return self.eps_255 if self.attack_eps_255 is None else self.attack_eps_255


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value in the field's own type; what YAML and JSON write differently is converted."""
    name, metadata, kind = field.name, field.metadata, str(field.type)
    if value is None and kind.endswith("| None"):
        return None
    kind = kind.removesuffix(" | None")
    if kind == "tuple[float, ...]":
        if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
            raise InputError(f"{name} must be a list of numbers, but got {value!r}")
        value = tuple(map(float, value))
    elif kind == "float" and _is_number(value):
        value = float(value)
    elif type(value).__name__ != kind:
        article = "an" if kind == "int" else "a"
        raise InputError(f"{name} must be {article} {kind}, but got {value!r}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise InputError(
            f"{name} must be one of {', '.join(metadata['choices'])}, but got {value!r}"
        )
    for number in value if isinstance(value, tuple) else [value]:
        if not isinstance(number, (int, float)):
            break
        if not (math.isfinite(number) and number >= metadata["least"]):
            finite = "finite and " if isinstance(number, float) else ""
            raise InputError(
                f"{name} must be {finite}at least {metadata['least']:g}, but got {number}"
            )
        if number >= metadata["below"]:
            raise InputError(f"{name} must be below {metadata['below']:g}, but got {number}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# What other data sets than the digits need to be trained in reasonable time.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {"image_size": 28, "patch_size": 4, "epochs": 3, "warmup_epochs": 0.5},
    "cifar10": {"image_size": 32, "patch_size": 4},
    "patches": {"image_size": 32, "patch_size": 4},
    "folder": {"image_size": 32, "patch_size": 4},
}
