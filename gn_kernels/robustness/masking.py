"""Signs that attacks fail because the gradient is useless, not because the model is robust."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gn_kernels.robustness.attacks import fgsm, pgd
from gn_kernels.robustness.differentiate import input_gradients, margin

# PGD with these may go anywhere; half the range makes every image the same grey.
_LARGE_EPS, _LARGE_STEPS = 0.5, 40

# Shares of images that are noise rather than a sign: of gradients that vanish in float32, of
# images that survive the large attack, of those that one step breaks and many don't, and (the
# threshold of AutoAttack's own check) of those that only a black-box attack breaks.
_VANISHING, _SURVIVING, _ONE_STEP, BLACK_BOX = 0.01, 0.01, 0.02, 0.002

# Far above what the order of a sum does to a gradient, far below what noise on purpose does.
_RANDOM = 1e-2


def masking_warnings(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    attack_steps: int,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Try what a model with honest gradients passes.

    The same gradient twice must agree; it must not vanish; many steps must break what one step
    breaks; and PGD with ε = ½ must break everything.

    Args:
        model: pixels in [0, 1] to logits, in eval mode.
        images: (B, C, H, W), in [0, 1]; some hundred are plenty.
        labels: (B,).
        eps: radius at which one step is compared with many, in units of the pixels.
        attack_steps: how many those are.
        generator: of the random starts.

    Returns:
        A sentence for each sign of masked gradients; none is the good case.

    Raises:
        NotDifferentiableError: there is no gradient at all.

    Source: Athalye, Carlini, Wagner, https://arxiv.org/abs/1802.00420; Carlini et al.,
    https://arxiv.org/abs/1902.06705.
    """
    count, warnings = len(labels), []

    first, _, logits = input_gradients(model, images, labels)
    second, _, again = input_gradients(model, images, labels)
    scale = first.norm() + torch.finfo(first.dtype).tiny
    if (first - second).norm() > _RANDOM * scale or (
        logits - again
    ).norm() > _RANDOM * again.norm():
        warnings.append(
            "gradients are random: the same images gave two different ones, so that an attack "
            "needs the mean over many (expectation over transformation)"
        )

    vanishing = int((first.flatten(1).abs().amax(1) == 0).sum())
    if vanishing > _VANISHING * count:
        of_margin, _, _ = input_gradients(model, images, labels, margin)
        also = int((of_margin.flatten(1).abs().amax(1) == 0).sum())
        warnings.append(
            f"gradients vanish: that of the cross-entropy is 0 at {vanishing} of {count} images, "
            f"and that of the logits' margin at {also}; PGD and apgd-ce can't move an image where "
            "it is, apgd-t and square can"
        )

    def standing(attacked: Tensor) -> int:
        with torch.no_grad():
            return int((model(attacked).argmax(1) == labels).sum())

    if eps > 0:
        one = standing(fgsm(model, images, labels, eps))
        step_size = 2.5 * eps / attack_steps
        many = standing(
            pgd(
                model,
                images,
                labels,
                eps,
                steps=attack_steps,
                step_size=step_size,
                random_start=False,
            )
        )
        if many - one > _ONE_STEP * count:
            warnings.append(
                f"one step beats many: FGSM leaves {one} of {count} images standing, PGD with "
                f"{attack_steps} steps {many}"
            )

    attacked = pgd(
        model,
        images,
        labels,
        _LARGE_EPS,
        steps=_LARGE_STEPS,
        step_size=2.5 * _LARGE_EPS / _LARGE_STEPS,
        generator=generator,
    )
    surviving = standing(attacked)
    if surviving > _SURVIVING * count:
        warnings.append(
            f"a large attack fails: PGD with eps {_LARGE_EPS:g}, which can make every image grey, "
            f"leaves {surviving} of {count} images standing"
        )
    return warnings
