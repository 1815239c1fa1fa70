"""Accuracy on images as they are and under attack, and the size of their input gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gn_kernels.penalty import gradient_norm
from gn_kernels.robustness.attacks import _attacked, pgd


class Evaluation(NamedTuple):
    """Figures of a model on ``images`` images.

    Attributes:
        clean_accuracy: share that is classified rightly.
        robust_accuracy: share that is classified rightly both clean and under PGD.
        gradient_norm_l1: mean L1 norm of the cross-entropy's gradient at the clean images, per
            unit of pixels in [0, 1].
    """

    images: int
    clean_accuracy: float
    robust_accuracy: float
    gradient_norm_l1: float
    eps_255: float
    attack_steps: int
    step_255: float
    restarts: int
    seed: int
    seconds: float


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    eps_255: float,
    attack_steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
    observer: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Measure accuracy, accuracy under PGD in the L∞ ball, and the mean gradient norm.

    The step of PGD is 2.5·ε/steps: it can cross the ball, and still settle. The same batches and
    seed give the same figures.

    Args:
        model: pixels in [0, 1] to logits. Left as it was.
        batches: images and labels, on the model's device.
        eps_255: radius of the ball, in 1/255.
        attack_steps: of PGD.
        restarts: random starts, of which the worst counts for each image.
        seed: of the random starts.
        observer: called after each batch with the number of images done.

    Raises:
        ValueError: no batch, or a value that :func:`pgd` refuses.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    eps, step_255 = eps_255 / 255, 2.5 * eps_255 / attack_steps
    images_done, right, robust, norm = 0, 0, 0, 0.0
    for images, labels in batches:
        adversarial = pgd(
            model,
            images,
            labels,
            eps,
            steps=attack_steps,
            step_size=step_255 / 255,
            restarts=restarts,
            generator=generator,
        )
        with _attacked(model), torch.enable_grad():
            clean = images.detach().requires_grad_()
            logits = model(clean)
            mean = gradient_norm(
                cross_entropy(logits, labels, reduction="none"), clean, create_graph=False
            )
            with torch.no_grad():
                correct = logits.argmax(-1) == labels
                stands = correct & (model(adversarial).argmax(-1) == labels)
        images_done += len(labels)
        right += int(correct.sum())
        robust += int(stands.sum())
        norm += mean.item() * len(labels)
        observer(images_done)
    if images_done == 0:
        raise ValueError("batches must hold at least one batch of images")
    return Evaluation(
        images_done,
        right / images_done,
        robust / images_done,
        norm / images_done,
        eps_255,
        attack_steps,
        step_255,
        restarts,
        seed,
        time.perf_counter() - start,
    )
