"""AutoAttack's four attacks through pyautoattack, one at a time."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pyautoattack import AutoAttack

# The standard version in its order. The quick one leaves out what changes a figure rarely.
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
QUICK = ("apgd-ce", "apgd-t")
ATTACKS = (*STANDARD, "apgd-dlr")

# What an attack's loss takes from the sorted logits.
_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}


def check_classes(name: str, classes: int) -> None:
    """Raise a ValueError if the attack's loss needs more classes than there are."""
    needed = _CLASSES.get(name, 2)
    if classes < needed:
        raise ValueError(
            f"{name} needs at least {needed} classes, for the difference-of-logits-ratio loss, but "
            f"the model has {classes}: choose among pgd, apgd-ce, fab-t and square"
            if name in _CLASSES
            else f"{name} needs at least 2 classes, but the model has {classes}"
        )


def attack(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int
) -> Tensor:
    """One of AutoAttack's attacks with the settings of its standard version, L∞.

    100 iterations and one restart of APGD and FAB, 9 target classes (fewer if there are fewer),
    5,000 queries of Square. Torch's global generators are as before afterwards.

    Args:
        name: one of ``ATTACKS``.
        model: pixels in [0, 1] to logits, in eval mode, its parameters not requiring grad (FAB
            would fill their ``grad``).
        images: (B, C, H, W), in [0, 1]; the attacks compute in float32.
        labels: (B,).
        eps: radius, in units of the pixels.
        seed: of the attack's own random numbers, anew for each batch.

    Returns:
        Images in the ball; the attacked ones where no adversarial one was found.

    Raises:
        ModuleNotFoundError: pyautoattack is not installed.

    Source: Croce and Hein, https://arxiv.org/abs/2003.01690;
    https://github.com/fra31/auto-attack.
    """
    from pyautoattack import AutoAttack

    def predict(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels.to(images.dtype)).float()
        return logits

    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        with torch.no_grad():
            classes = predict(images[:1]).shape[1]
        check_classes(name, classes)
        ensemble = AutoAttack(
            predict, norm="Linf", eps=eps, seed=seed, device=images.device, version="standard"
        )
        ensemble.apgd.logger = ensemble.apgd_targeted.logger = _silent()
        ensemble.apgd_targeted.n_target_classes = min(9, classes - 1)
        ensemble.fab.n_target_classes = min(9, classes - 1)
        with torch.no_grad():
            found: Tensor = _perturb(name, ensemble, images, labels)
    # FAB and APGD end within a rounding of the ball.
    lower, upper = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    return found.to(images.dtype).clamp(lower, upper)


def _perturb(name: str, ensemble: AutoAttack, images: Tensor, labels: Tensor) -> Any:
    if name in ("apgd-ce", "apgd-dlr"):
        ensemble.apgd.loss = name.removeprefix("apgd-")
        return ensemble.apgd.perturb(images, labels)
    if name == "apgd-t":
        return ensemble.apgd_targeted.perturb(images, labels)
    if name == "fab-t":
        ensemble.fab.targeted = True
        return ensemble.fab.perturb(images, labels)
    return ensemble.square.perturb(images, labels)


@functools.cache
def _silent() -> logging.Logger:
    # It remarks on gradients of zero by a document that a user has not got: masking.py does.
    logger = logging.Logger("gn_kernels.autoattack")
    logger.addHandler(logging.NullHandler())
    return logger
