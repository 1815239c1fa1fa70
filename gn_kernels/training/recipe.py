"""What is trained and how: the settings, the schedules, and one function for each method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gn_kernels.penalty import gradient_norm

DATASETS = ("digits", "fashion-mnist", "folder")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu")
DEVICES = ("cpu", "cuda")


class InputError(ValueError):
    """What the user gave can't be used; the message is one sentence that tells why."""


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides the weights of a run, and the figures of its report.

    Each field is an option of ``gn-kernels train``, with the help given here. Lengths of the pixel
    space are in 1/255 (``eps_255``), since images are in [0, 1].

    Raises:
        InputError: a value is out of its range.
    """

    method: str = _setting("gradnorm", "what is minimised", ("natural", "gradnorm"))
    dataset: str = _setting("digits", "what is trained on", DATASETS)
    data: str | None = _setting(
        None, "folder of the data: class subfolders, or Fashion-MNIST's four IDX files"
    )
    image_size: int = _setting(8, "side of the model's input, in pixels")

    activation: str = _setting("gelu", "activation of the MLPs", ACTIVATIONS)
    swap: bool = _setting(True, "train with the fused kernels of gn_kernels")
    patch_size: int = _setting(2, "side of a patch, in pixels")
    embed_dim: int = _setting(48, "width of the Vision Transformer")
    depth: int = _setting(3, "number of its blocks")
    num_heads: int = _setting(3, "heads of its attention")

    epochs: int = _setting(40, "passes over the training images")
    batch_size: int = _setting(64, "images in a step; an epoch's remainder is left out")
    lr: float = _setting(6e-3, "peak learning rate of AdamW")
    lr_min: float = _setting(1e-5, "learning rate at the end of the cosine")
    warmup_epochs: float = _setting(4.0, "epochs of linear warm-up")
    weight_decay: float = _setting(0.05, "of AdamW, on matrices only")
    clip_norm: float = _setting(1.0, "limit of the weight gradient's L2 norm in a step")
    label_smoothing: float = _setting(0.1, "of the training loss")

    eps_255: float = _setting(16.0, "strength of the penalty and of the attack, in 1/255")
    weight_ce: float = _setting(0.8, "weight of the cross-entropy under gradnorm")
    weight_gradnorm: float = _setting(1.2, "weight of the penalty under gradnorm")
    ramp_start: float = _setting(0.0, "factor of the penalty at the first step")
    ramp_per_epoch: float = _setting(0.2, "what an epoch adds to the factor")
    ramp_max: float = _setting(1.0, "limit of the factor")

    attack_steps: int = _setting(20, "steps of PGD in the evaluation")
    restarts: int = _setting(2, "random starts of PGD, of which the worst counts")

    seed: int = _setting(0, "of the weights, the order of the images, and the attack")
    threads: int = _setting(
        1, "CPU threads: the last bits depend on them; a small model gains nothing from more"
    )
    device: str = _setting("cpu", "where the model runs", DEVICES)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise InputError(
                    f"{field.name} must be one of {', '.join(choices)}, but got {value!r}"
                )
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{field.name} must be finite and at least 0, but got {value}")
            least = 0 if field.name == "seed" else 1
            if type(value) is int and value < least:
                raise InputError(f"{field.name} must be at least {least}, but got {value}")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise InputError(
                f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}"
            )
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs {self.warmup_epochs} must be below epochs {self.epochs}"
            )
        if self.label_smoothing >= 1:
            raise InputError(f"label_smoothing must be below 1, but got {self.label_smoothing}")


# What other data sets than the digits need to be trained in reasonable time.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "fashion-mnist": {"image_size": 28, "patch_size": 4, "epochs": 3, "warmup_epochs": 0.5},
    "folder": {"image_size": 32, "patch_size": 4},
}


class Losses(NamedTuple):
    """What a method returns for a batch.

    Attributes:
        total: the scalar to minimise, with its graph.
        cross_entropy: the batch mean, detached.
        penalty: the method's own term before its weight and ramp, detached; 0 if it has none.
    """

    total: Tensor
    cross_entropy: Tensor
    penalty: Tensor


Method = Callable[[nn.Module, Tensor, Tensor, float, Settings], Losses]


def natural(
    model: nn.Module, images: Tensor, labels: Tensor, epoch: float, settings: Settings
) -> Losses:
    """Cross-entropy on the images as they are: the baseline."""
    loss = cross_entropy(model(images), labels, label_smoothing=settings.label_smoothing)
    return Losses(loss, loss.detach(), loss.new_zeros(()))


def gradnorm(
    model: nn.Module, images: Tensor, labels: Tensor, epoch: float, settings: Settings
) -> Losses:
    r"""Cross-entropy and the norm of its gradient with respect to the pixels.

    .. math::
        \lambda_{CE} \, CE + \lambda_{GN} \, a(t) \, \varepsilon \,
        \frac{1}{B} \sum_i \lVert \nabla_{x_i} CE_i \rVert_1

    a(t) is :func:`penalty_factor`. The samples must not interact: BatchNorm needs eval mode.

    Args:
        model: twice differentiable; normalises its input itself.
        images: (B, C, H, W), pixels in [0, 1].
        labels: (B,), class indices.
        epoch: epochs done, with their fraction.
        settings: the weights, ``eps_255`` and the ramp.

    Returns:
        The losses; ``penalty`` is ε times the mean norm, in units of the cross-entropy.

    Source: Rodríguez-Muñoz, Wang, Torralba, ECCV 2024, https://arxiv.org/abs/2409.20139.
    """
    images = images.detach().requires_grad_()
    loss = cross_entropy(model(images), labels, label_smoothing=settings.label_smoothing)
    penalty = settings.eps_255 / 255 * gradient_norm(loss, images)
    weight = settings.weight_gradnorm * penalty_factor(epoch, settings)
    return Losses(settings.weight_ce * loss + weight * penalty, loss.detach(), penalty.detach())


METHODS: dict[str, Method] = {"natural": natural, "gradnorm": gradnorm}


def penalty_factor(epoch: float, settings: Settings) -> float:
    """a(t) = min(ramp_start + ramp_per_epoch·epoch, ramp_max): the penalty enters gradually."""
    return min(settings.ramp_start + settings.ramp_per_epoch * epoch, settings.ramp_max)


def learning_rate(epoch: float, settings: Settings) -> float:
    """Linear warm-up from ``lr_min`` to ``lr``, then half a cosine back to ``lr_min``."""
    span = settings.lr - settings.lr_min
    if epoch < settings.warmup_epochs:
        return settings.lr_min + span * epoch / settings.warmup_epochs
    progress = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return settings.lr_min + span * 0.5 * (1 + math.cos(math.pi * progress))
