"""What is minimised and at which rate: one function for each method, and the schedules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gn_kernels.penalty import finite_difference_norm, gradient_norm, input_gradient
from gn_kernels.robustness.contour import contour_energy
from gn_kernels.training import distribution
from gn_kernels.training.normalise import Normalise
from gn_kernels.training.settings import (
    ACTIVATIONS,
    DATASETS,
    DEFAULTS,
    DEVICES,
    InputError,
    Settings,
)

__all__ = [
    "ACTIVATIONS",
    "DATASETS",
    "DEFAULTS",
    "DEVICES",
    "METHODS",
    "InputError",
    "Losses",
    "Method",
    "Settings",
    "adversarial",
    "edge",
    "gradnorm",
    "learning_rate",
    "natural",
    "penalty_factor",
]


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


class Method(Protocol):
    """One of :data:`METHODS`.

    Args:
        model: pixels in [0, 1] to logits; normalises its input itself.
        images: (B, C, H, W), pixels in [0, 1].
        targets: class indices (B,), to which label smoothing is applied; or probabilities (B, K),
            as mixup makes them, which are taken as they are.
        epoch: epochs done, with their fraction.
        settings: of the run.
        scale: of a GradScaler. The gradients inside the method are taken of scale·loss and
            unscaled at once; the returned losses are not scaled.
    """

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        targets: Tensor,
        epoch: float,
        settings: Settings,
        scale: float = 1.0,
    ) -> Losses: ...


def natural(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epoch: float,
    settings: Settings,
    scale: float = 1.0,
) -> Losses:
    """Cross-entropy on the images as they are: the baseline. Arguments: :class:`Method`."""
    loss = cross_entropy(model(images), targets, label_smoothing=_smoothing(targets, settings))
    return Losses(loss, loss.detach(), loss.new_zeros(()))


def gradnorm(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epoch: float,
    settings: Settings,
    scale: float = 1.0,
) -> Losses:
    r"""Cross-entropy and the norm of its gradient with respect to the pixels.

    .. math::
        \lambda_{CE} \, CE + \lambda_{GN} \, a(t) \, \frac{1}{B} \sum_i
        \max(\varepsilon \lVert w \circ \nabla_{x_i} CE_i \rVert - \theta, 0)

    a(t) is :func:`penalty_factor`; the norm is L1 unless ``norm`` says otherwise, w is
    ``channel_weights``, θ is ``threshold``. With ``sigma`` s above 0 the gradient is that with
    respect to the normalised image, over s: w is multiplied by σ_c/s, σ_c being the model's own
    standard deviations. The samples must not interact: BatchNorm must be frozen.

    With ``random_start_255`` or ``adversarial_start`` both terms are taken at moved images:
    x + U(−r, r) clamped to [0, 1], or the images that :func:`adversarial` trains on.

    With ``differentiate`` "finite-differences" the penalty is that of
    :func:`gn_kernels.penalty.finite_difference_norm`, whose accuracy is stated there.

    Arguments: :class:`Method`; model must be twice differentiable.

    Returns:
        The losses; ``penalty`` is the mean under the weight λ_GN·a(t), in units of the
        cross-entropy.

    Source: Rodríguez-Muñoz, Wang, Torralba, ECCV 2024, https://arxiv.org/abs/2409.20139.
    """
    if settings.random_start_255 > 0:
        radius = settings.random_start_255 / 255
        images = (images + radius * (2 * distribution.rand_like(images) - 1)).clamp(0, 1)
    if settings.adversarial_start:
        images = _attacked_images(model, images, targets, epoch, settings, scale)
    eps = settings.eps_255 / 255
    smoothing = _smoothing(targets, settings)
    weights = _channel_weights(model, images, settings)
    # max(ε‖·‖ − θ, 0) = ε·max(‖·‖ − θ/ε, 0)
    threshold = settings.threshold / eps if eps else 0.0
    if settings.differentiate == "finite-differences":

        def losses(points: Tensor) -> Tensor:
            return cross_entropy(
                model(points), targets, reduction="none", label_smoothing=smoothing
            )

        norm, each = finite_difference_norm(
            losses,
            images,
            settings.norm,
            step=settings.difference_255 / 255,
            channel_weights=weights,
            threshold=threshold,
            scale=scale,
        )
        loss = each.mean()
    else:
        images = images.detach().requires_grad_()
        loss = cross_entropy(model(images), targets, label_smoothing=smoothing)
        norm = gradient_norm(
            loss,
            images,
            settings.norm,
            channel_weights=weights,
            threshold=threshold,
            scale=scale,
        )
    penalty = eps * norm
    weight = settings.weight_gradnorm * penalty_factor(epoch, settings)
    return Losses(settings.weight_ce * loss + weight * penalty, loss.detach(), penalty.detach())


def adversarial(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epoch: float,
    settings: Settings,
    scale: float = 1.0,
) -> Losses:
    r"""Cross-entropy on attacked images alone.

    .. math::
        x_0 = \Pi(x + u), \; u \sim U(-r, r)^d, \qquad
        x_{t+1} = \Pi(x_t + \alpha \, \mathrm{sign} \, \nabla_x CE(x_t, y)), \qquad
        L = CE(x_k, y)

    r is ``attack_eps_255`` (or ``eps_255``), k is ``pgd_steps``, Π projects on
    {‖x′ − x‖∞ ≤ r} ∩ [0, 1]ᵈ, and α is ``pgd_step_255``, 2r/k unless it is given, or 1.25·r for a
    single step (FGSM from a random start), times min(⌊epoch⌋, n)/n with ``pgd_warmup_epochs`` n.
    The model is in eval mode while it is attacked.

    Arguments: :class:`Method`.

    Source: Madry et al., https://arxiv.org/abs/1706.06083; the step's warm-up and length as in
    https://arxiv.org/abs/2409.20139; the single step: Wong et al.,
    https://arxiv.org/abs/2001.03994.
    """
    attacked = _attacked_images(model, images, targets, epoch, settings, scale)
    return natural(model, attacked, targets, epoch, settings)


def edge(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epoch: float,
    settings: Settings,
    scale: float = 1.0,
) -> Losses:
    r"""Cross-entropy, and input gradients that look like the contours of the image.

    .. math::
        CE + a(t) \, MSE\left(\frac{G}{\mathrm{rms}(G)}, \frac{E}{\mathrm{rms}(E)}\right)

    E is :func:`gn_kernels.robustness.contour_energy` of the normalised images, the same for every
    channel; rms is over the whole batch, so that only the shape of G counts;
    a = min(edge_weight + edge_weight_per_epoch·⌊epoch⌋, edge_weight_max). G is a gradient with
    respect to the normalised images, by ``edge_variant``:

    * logit: of Σᵢ zᵢ[cᵢ], the class cᵢ drawn with the logits zᵢ/T, T = ``edge_temperature``;
    * saliency: the largest magnitude of that over the channels, one channel;
    * loss: of the mean cross-entropy;
    * smooth: of Σᵢ ⟨rᵢ, zᵢ⟩, rᵢ a relaxed one-hot sample of the logits zᵢ at temperature T, which
      is differentiated as well.

    E is positive, so the signed variants make gradients positive too. No norm is penalised.

    Arguments: :class:`Method`; model must be twice differentiable.

    Returns:
        The losses; ``penalty`` is the mean squared error.

    Source: Rodríguez-Muñoz, Wang, Torralba, ECCV 2024, section 5.3,
    https://arxiv.org/abs/2409.20139. Relaxed samples: Maddison et al.,
    https://arxiv.org/abs/1611.00712.
    """
    images = images.detach().requires_grad_()
    logits = model(images)
    loss = cross_entropy(logits, targets, label_smoothing=_smoothing(targets, settings))
    mean, std = _normalisation(model, images)
    gradient = std * input_gradient(_edge_objective(logits, loss, settings), images, scale=scale)
    energy = contour_energy((images.detach() - mean) / std, settings.edge_scale).to(gradient)
    if settings.edge_variant == "saliency":
        gradient = gradient.abs().amax(1, keepdim=True)
    error = (_over_rms(gradient) - _over_rms(energy)).square().mean()
    weight = settings.edge_weight + settings.edge_weight_per_epoch * math.floor(epoch)
    total = loss + min(weight, settings.edge_weight_max) * error
    return Losses(total, loss.detach(), error.detach())


METHODS: dict[str, Method] = {
    "natural": natural,
    "gradnorm": gradnorm,
    "adversarial": adversarial,
    "edge": edge,
}


def penalty_factor(epoch: float, settings: Settings) -> float:
    """a(t) = min(ramp_start + ramp_per_epoch·epoch, ramp_max): the penalty enters gradually."""
    return min(settings.ramp_start + settings.ramp_per_epoch * epoch, settings.ramp_max)


def learning_rate(epoch: float, settings: Settings) -> float:
    """Linear warm-up from ``warmup_lr`` to ``lr``, then half a cosine down to ``lr_min``."""
    if epoch < settings.warmup_epochs:
        start = settings.lr_min if settings.warmup_lr is None else settings.warmup_lr
        return start + (settings.lr - start) * epoch / settings.warmup_epochs
    span = settings.lr - settings.lr_min
    progress = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return settings.lr_min + span * 0.5 * (1 + math.cos(math.pi * progress))


def _smoothing(targets: Tensor, settings: Settings) -> float:
    # Mixed targets have been smoothed before they were mixed.
    return 0.0 if targets.is_floating_point() else settings.label_smoothing


def _attacked_images(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    epoch: float,
    settings: Settings,
    scale: float,
) -> Tensor:
    """The last point of PGD, detached. No parameter's ``grad`` is touched."""
    # The attack's forward passes are none that DDP has to know of: only input gradients are taken.
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    smoothing = _smoothing(targets, settings)
    radius, steps = settings.attack_radius_255 / 255, settings.pgd_steps
    length = radius * (1.25 if steps == 1 else 2 / steps)
    if settings.pgd_step_255 is not None:
        length = settings.pgd_step_255 / 255
    if settings.pgd_warmup_epochs > 0:
        length *= min(math.floor(epoch) / settings.pgd_warmup_epochs, 1.0)
    images = images.detach()
    lower, upper = (images - radius).clamp(0, 1), (images + radius).clamp(0, 1)
    point = torch.clamp(images + radius * (2 * distribution.rand_like(images) - 1), lower, upper)
    reference = settings.pgd_gradients == "reference"
    parameters = [p for p in inner.parameters() if p.requires_grad] if reference else []
    with _in_eval_mode(inner), torch.enable_grad():
        for _ in range(steps):
            point.requires_grad_()
            loss = cross_entropy(inner(point), targets, label_smoothing=smoothing)
            gradient = torch.autograd.grad(loss * scale, [point, *parameters], allow_unused=True)[0]
            assert gradient is not None
            point = (point.detach() + length * gradient.sign()).clamp(lower, upper)
        if reference:
            with torch.no_grad():
                inner(point)
    return point


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _edge_objective(logits: Tensor, loss: Tensor, settings: Settings) -> Tensor:
    """What edge training differentiates with respect to the images, one number a sample."""
    if settings.edge_variant == "loss":
        return loss
    # Probabilities in float32: under autocast the logits are not.
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    # Gumbel noise: argmax(zᵢ + noise) is distributed as softmax(zᵢ).
    uniform = distribution.rand_like(logits.detach()).clamp_min(torch.finfo(logits.dtype).tiny)
    noise = -(-uniform.log()).log()
    if settings.edge_variant == "smooth":
        sample = ((logits + noise) / settings.edge_temperature).softmax(1)
        return (sample * logits).sum(1)
    classes = (logits.detach() / settings.edge_temperature + noise).argmax(1)
    return logits.gather(1, classes[:, None])[:, 0]


def _over_rms(x: Tensor) -> Tensor:
    # A batch without any contour, or without any gradient, stays 0 instead of becoming NaN.
    return x / distribution.mean(x.square()).clamp_min(torch.finfo(x.dtype).tiny).sqrt()


def _normalisation(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that the model normalises with; 0 and 1 if it does not."""
    for module in model.modules():
        if isinstance(module, Normalise):
            return module.mean.to(images), module.std.to(images)
    return images.new_zeros(()), images.new_ones(())


def _channel_weights(model: nn.Module, images: Tensor, settings: Settings) -> Tensor | None:
    weights = None
    if settings.channel_weights:
        weights = images.new_tensor(settings.channel_weights)
        if len(weights) != images.shape[1]:
            raise InputError(
                f"channel_weights must be {images.shape[1]} numbers, one for each channel of the "
                f"images, but got {len(weights)}"
            )
    if settings.sigma > 0:
        std = _normalisation(model, images)[1].flatten().expand(images.shape[1])
        weights = std / settings.sigma * (1 if weights is None else weights)
    return weights
