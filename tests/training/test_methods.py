"""The methods against closed forms, loops over samples, and each other."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gn_kernels.robustness import contour_energy, pgd
from gn_kernels.training import METHODS, InputError, Settings, recipe
from gn_kernels.training.normalise import Normalise

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def _network(dtype=torch.float64):
    torch.manual_seed(1)
    model = nn.Sequential(
        Normalise(MEAN, STD),
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(6, 6, 3, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    model(torch.zeros(1, 3, 8, 8))
    return model.to(dtype)


def _batch(dtype=torch.float64, count=5):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=dtype)
    return images, torch.arange(count) % 4


def _weight_gradients(model, losses):
    return torch.autograd.grad(losses.total, list(model.parameters()))


def _run(method, *, model=None, images=None, targets=None, epoch=5.0, scale=1.0, **settings):
    model = _network() if model is None else model
    given = _batch()
    images, targets = (
        (given[0] if images is None else images),
        (given[1] if targets is None else targets),
    )
    torch.manual_seed(3)
    losses = METHODS[method](model, images, targets, epoch, Settings(**settings), scale)
    return losses, _weight_gradients(model, losses)


def _assert_same_bits(left, right):
    assert torch.equal(left[0].total, right[0].total)
    assert all(torch.equal(a, b) for a, b in zip(left[1], right[1], strict=True))


PLAIN = {"label_smoothing": 0.0}


@pytest.mark.parametrize(
    "neutral",
    [
        {"channel_weights": (1.0, 1.0, 1.0)},
        {"threshold": 0.0},
        {"random_start_255": 0.0},
        {"channel_weights": (1.0, 1.0, 1.0), "threshold": 0.0, "random_start_255": 0.0},
    ],
)
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_neutral_options_reproduce_plain_gradnorm_bit_for_bit(neutral, norm):
    _assert_same_bits(_run("gradnorm", norm=norm, **neutral), _run("gradnorm", norm=norm))


@pytest.mark.parametrize(
    "option", [{"channel_weights": (1.0, 2.0, 1.0)}, {"threshold": 1e-3}, {"random_start_255": 8.0}]
)
def test_the_options_are_no_dead_letters(option):
    assert not torch.equal(_run("gradnorm", **option)[0].total, _run("gradnorm")[0].total)


def test_a_linear_models_penalty_is_eps_times_the_l1_norm_of_its_weight():
    # One logit against a constant: the loss of its margin w·x is -w·x where nothing saturates.
    # Here the loss itself is taken linear, so that the closed form has no factor.
    weight = torch.randn(3 * 8 * 8, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-1e3 * weight, 0 * weight]))
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.long)
    # Margins so negative that the softmax is 1: CE = 1000 w·x exactly to rounding.
    images = images * (weight.sign().reshape(3, 8, 8) * 0.5 + 0.5)
    losses, _ = _run("gradnorm", model=model, images=images, targets=labels, eps_255=4.0, **PLAIN)
    expected = 4 / 255 * 1e3 * weight.abs().sum()
    torch.testing.assert_close(losses.penalty, expected, rtol=1e-12, atol=0)


def _per_sample(model, images, labels, norm, weights, threshold, eps):
    terms = []
    for image, label in zip(images, labels, strict=True):
        image = image[None].clone().requires_grad_()
        loss = F.cross_entropy(model(image), label[None])
        (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
        weighted = gradient * torch.tensor(weights).reshape(3, 1, 1).to(gradient)
        size = {
            "l1": lambda g: g.abs().sum(),
            "l2": lambda g: g.square().sum().sqrt(),
            "linf": lambda g: g.abs().max(),
        }[norm](weighted)
        terms.append((eps * size - threshold).clamp_min(0))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("differentiate", ["double-backprop", "finite-differences"])
def test_gradnorm_equals_a_loop_over_samples(norm, differentiate):
    model, (images, labels) = _network(), _batch()
    weights, eps = (1.0, 2.0, 0.5), 4 / 255
    threshold = {"l1": 0.02, "l2": 0.003, "linf": 0.0005}[norm]
    losses, gradients = _run(
        "gradnorm",
        norm=norm,
        channel_weights=weights,
        threshold=threshold,
        eps_255=4.0,
        differentiate=differentiate,
        difference_255=0.25,
        **PLAIN,
    )
    penalty = _per_sample(model, images, labels, norm, weights, threshold, eps)
    assert 0 < penalty < _per_sample(model, images, labels, norm, weights, 0.0, eps)
    entropy = F.cross_entropy(model(images), labels)
    expected = torch.autograd.grad(0.8 * entropy + 1.2 * penalty, list(model.parameters()))
    # Central differences of step h: the error is of order h².
    tolerance = 1e-12 if differentiate == "double-backprop" else 1e-5
    torch.testing.assert_close(losses.penalty, penalty.detach(), rtol=tolerance, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_finite_differences_converge_with_the_square_of_the_step():
    _, exact = _run("gradnorm", norm="l2")
    errors = []
    for step in (8.0, 4.0, 2.0):
        options = {"differentiate": "finite-differences", "difference_255": step}
        _, gradients = _run("gradnorm", norm="l2", **options)
        errors.append(sum((a - b).square().sum() for a, b in zip(gradients, exact, strict=True)))
    ratios = [float((a / b) ** 0.5) for a, b in itertools.pairwise(errors)]
    assert all(3.8 < ratio < 4.2 for ratio in ratios)


def test_sigma_takes_the_gradient_of_the_normalised_image():
    model, (images, labels) = _network(), _batch()
    losses, gradients = _run("gradnorm", sigma=0.225, eps_255=4.0, **PLAIN)
    std, mean = torch.tensor(STD).reshape(3, 1, 1), torch.tensor(MEAN).reshape(3, 1, 1)
    normalised = ((images - mean) / std).requires_grad_()
    entropy = F.cross_entropy(model[1:](normalised), labels)
    (gradient,) = torch.autograd.grad(entropy, normalised, create_graph=True)
    penalty = 4 / 255 / 0.225 * gradient.abs().sum()  # of the mean, times B, over B
    # The buffers were made in float32.
    torch.testing.assert_close(losses.penalty, penalty.detach(), rtol=1e-6, atol=0)
    total = 0.8 * entropy + 1.2 * penalty
    for a, b in zip(gradients, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradscalers_factor_is_divided_out(method):
    options = {} if method != "adversarial" else {"pgd_warmup_epochs": 2.0}
    plain, scaled = _run(method, **options), _run(method, scale=2.0**16, **options)
    # A power of two is exact.
    _assert_same_bits(plain, scaled)


class _HalfWithTinyGradients(nn.Module):
    """Its input gradients are near 1e-8, below half of float16's smallest number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 192, generator=torch.Generator().manual_seed(4)))

    def forward(self, x):
        return 1e-4 * F.linear(1e-3 * x.flatten(1).half(), self.weight.half()).float()


def test_the_factor_keeps_small_float16_gradients():
    model, (images, labels) = _HalfWithTinyGradients(), _batch(torch.float32)
    given = {"model": model, "images": images, "targets": labels, **PLAIN}
    lost, kept = (_run("gradnorm", scale=scale, **given)[0].penalty for scale in (1.0, 2.0**16))
    # By hand: every logit is 1e-7 w·x, so the softmax is 1/4 throughout.
    residual = torch.full((5, 4), 0.25) - F.one_hot(labels, 4)
    exact = 16 / 255 * 1e-7 * (residual @ model.weight.detach()).abs().sum(1).mean()
    torch.testing.assert_close(kept, exact, rtol=1e-2, atol=0)
    assert abs(lost - exact) > 0.2 * exact


@pytest.mark.parametrize("method", METHODS)
def test_soft_targets_of_one_class_are_that_class(method):
    labels = _batch()[1]
    hard = _run(method, **PLAIN)
    # Smoothing is the mixing's own business: here it must not be applied.
    soft = _run(method, targets=F.one_hot(labels, 4).double(), label_smoothing=0.3)
    torch.testing.assert_close(hard[0].total, soft[0].total, rtol=1e-12, atol=0)


def _seen(model):
    points = []
    model.register_forward_pre_hook(lambda module, inputs: points.append(inputs[0].detach()))
    return points


class TestAdversarial:
    def test_the_images_are_those_of_robustness_pgd(self):
        model, (images, labels) = _network(torch.float32), _batch(torch.float32)
        seen = _seen(model)
        options = {"attack_eps_255": 8.0, **PLAIN}
        _run("adversarial", model=model, images=images, targets=labels, **options)
        torch.manual_seed(3)
        expected = pgd(model, images, labels, 8 / 255, steps=3, step_size=16 / 3 / 255, keep="last")
        torch.testing.assert_close(seen[3], expected, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("gradients", ["lean", "reference"])
    def test_points_are_inside_the_ball_and_the_cube_and_worse(self, steps, gradients):
        model, (images, labels) = _network(), _batch()
        seen = _seen(model)
        _run("adversarial", model=model, eps_255=8.0, pgd_steps=steps, pgd_gradients=gradients)
        assert len(seen) == steps + 1 + (gradients == "reference")
        attacked = seen[-1]
        assert (attacked - images).abs().max() <= 8 / 255 + 1e-15
        assert attacked.min() >= 0
        assert attacked.max() <= 1
        clean = F.cross_entropy(model(images), labels)
        assert F.cross_entropy(model(attacked), labels) > clean

    def test_lean_and_reference_attack_with_the_same_images(self):
        lean, reference = _run("adversarial"), _run("adversarial", pgd_gradients="reference")
        torch.testing.assert_close(lean[0].total, reference[0].total, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("gradients", ["lean", "reference"])
    def test_parameters_keep_their_grad_and_modules_their_mode(self, gradients):
        model = _network().train()
        model[2].eval()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        images, labels = _batch()
        METHODS["adversarial"](model, images, labels, 1.0, Settings(pgd_gradients=gradients))
        assert all((parameter.grad == 7).all() for parameter in model.parameters())
        assert model[1].training
        assert not model[2].training

    def test_the_step_grows_from_nothing_in_whole_epochs(self):
        seen = {}
        for epoch in (0.0, 0.9, 1.0, 2.5, 5.0, 50.0):
            model = _network()
            points = _seen(model)
            _run("adversarial", model=model, epoch=epoch, pgd_steps=1, pgd_warmup_epochs=5.0)
            seen[epoch] = (points[1] - points[0]).abs().max().item()
        assert seen[0.0] == seen[0.9] == 0
        assert 0 < seen[1.0] < seen[2.5] < seen[5.0] == seen[50.0]

    def test_an_adversarial_start_is_adversarial_trainings_image(self):
        losses, _ = _run("gradnorm", adversarial_start=True, eps_255=8.0)
        other, _ = _run("adversarial", eps_255=8.0)
        torch.testing.assert_close(losses.cross_entropy, other.cross_entropy, rtol=0, atol=0)


class TestEdge:
    def test_the_error_does_not_change_when_the_gradient_is_scaled(self):
        # Logits times two at half the temperature: the same draws, twice the gradient.
        class Twice(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return 2 * self.inner(x)

        one, _ = _run("edge", edge_temperature=0.5)
        two, _ = _run("edge", model=Twice(_network()), edge_temperature=1.0)
        torch.testing.assert_close(one.penalty, two.penalty, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("variant", ["logit", "saliency", "loss"])
    def test_equals_the_formula(self, variant):
        model, (images, labels) = _network(), _batch()
        losses, gradients = _run("edge", edge_variant=variant, epoch=4.7, **PLAIN)
        std, mean = torch.tensor(STD).reshape(3, 1, 1), torch.tensor(MEAN).reshape(3, 1, 1)
        x = ((images - mean) / std).requires_grad_()
        logits = model[1:](x)
        entropy = F.cross_entropy(logits, labels)
        torch.manual_seed(3)
        gumbel = -(-torch.rand(logits.shape, dtype=logits.dtype).log()).log()
        classes = (2 * logits + gumbel).argmax(1, keepdim=True)
        objective = entropy if variant == "loss" else logits.gather(1, classes).sum()
        (gradient,) = torch.autograd.grad(objective, x, create_graph=True)
        energy = contour_energy(x.detach()).expand_as(gradient)
        if variant == "saliency":
            gradient, energy = gradient.abs().max(1).values, energy[:, 0]
        gradient = gradient / gradient.square().mean().sqrt()
        energy = energy / energy.square().mean().sqrt()
        error = (gradient - energy).square().mean()
        torch.testing.assert_close(losses.penalty, error.detach(), rtol=1e-5, atol=0)
        # 1 + 0.09 for each of four whole epochs.
        expected = torch.autograd.grad(entropy + 1.36 * error, list(model.parameters()))
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

    def test_classes_are_drawn_as_the_tempered_softmax_says(self):
        logits = torch.tensor([0.1, -0.7, 1.2, 0.4]).expand(200_000, 4).contiguous()
        # What is returned of a sample is the logit of its class.
        drawn = recipe._edge_objective(logits, logits.sum(), Settings(edge_temperature=0.8))
        shares = torch.stack([(drawn == logit).float().mean() for logit in logits[0]])
        # Five standard deviations of a share of 200,000 draws are below 0.0056.
        torch.testing.assert_close(shares, (logits[0] / 0.8).softmax(0), rtol=0, atol=0.0056)

    def test_smooth_takes_relaxed_samples_of_the_logits(self):
        model, (images, labels) = _network(), _batch()
        losses, gradients = _run("edge", edge_variant="smooth", edge_temperature=0.7, epoch=0.0)
        x = images.clone().requires_grad_()
        logits = model(x)
        torch.manual_seed(3)
        gumbel = -(-torch.rand(5, 4, dtype=torch.float64).log()).log()
        sample = ((logits + gumbel) / 0.7).softmax(1)
        (gradient,) = torch.autograd.grad((sample * logits).sum(), x, create_graph=True)
        gradient = gradient * torch.tensor(STD).reshape(3, 1, 1)
        energy = contour_energy(model[0](images))
        error = gradient / gradient.square().mean().sqrt() - energy / energy.square().mean().sqrt()
        error = error.square().mean()
        torch.testing.assert_close(losses.penalty, error.detach(), rtol=1e-5, atol=0)
        total = F.cross_entropy(logits, labels, label_smoothing=0.1) + error
        expected = torch.autograd.grad(total, list(model.parameters()))
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

    def test_a_few_steps_raise_the_likeness_of_gradient_and_contour(self):
        torch.manual_seed(0)
        model = _network(torch.float32)
        images, labels = _batch(torch.float32, 8)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        errors = []
        for _ in range(60):
            losses = METHODS["edge"](model, images, labels, 0.0, Settings(edge_variant="loss"))
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            errors.append(losses.penalty.item())
        assert errors[-1] < 0.6 * errors[0]

    def test_flat_images_and_dead_networks_give_no_nan(self):
        model = _network()
        nn.init.zeros_(model[-1].weight)
        losses, gradients = _run("edge", model=model, images=torch.full((5, 3, 8, 8), 0.5).double())
        assert torch.isfinite(losses.total)
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


# Training FLOP over those of natural training: PAPER's counts, within 5 %.
RATIOS = [
    ("gradnorm", {}, 2.05),
    ("adversarial", {"pgd_gradients": "reference"}, 4.34),
    ("adversarial", {}, 3.05),
]


class _Untracked(contextlib.nullcontext):
    """In place of the counter's tracker of modules, which does not know torch.autograd.grad."""

    parents = ("Global",)


def _architecture(name):
    if name == "resnet":
        model = timm.create_model("resnet18", num_classes=10)
    else:
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=3, num_classes=10
        )
        for block in model.blocks:
            block.attn.fused_attn = False
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_flop_ratios(name):
    model = _architecture(name).to("meta")
    images = torch.empty(4, 3, 64, 64, device="meta")
    labels = torch.empty(4, device="meta", dtype=torch.long)

    def flop(method, **options):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Untracked()
        with counter:
            losses = METHODS[method](model, images, labels, 9.0, Settings(**options))
            losses.total.backward()
        return counter.get_total_flops()

    natural = flop("natural")
    for method, options, ratio in RATIOS:
        assert flop(method, **options) / natural == pytest.approx(ratio, rel=0.05), method


def test_channel_weights_of_another_number_of_channels_are_refused():
    with pytest.raises(InputError, match="channel_weights must be 3 numbers"):
        _run("gradnorm", channel_weights=(1.0, 2.0))


def test_frozen_statistics_keep_the_samples_apart():
    # What the batch-times-B shortcut needs: one sample's gradient does not see the others.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten())
    model.append(nn.Linear(144, 4)).double()
    with torch.no_grad():
        model(_batch()[0])
    before = copy.deepcopy(model[1].state_dict())
    images, labels = _batch()
    model.eval()
    together, _ = _run("gradnorm", model=model, **PLAIN)
    alone = [
        _run("gradnorm", model=model, images=images[i : i + 1], targets=labels[i : i + 1], **PLAIN)
        for i in range(5)
    ]
    mean = torch.stack([losses.penalty for losses, _ in alone]).mean()
    torch.testing.assert_close(together.penalty, mean, rtol=1e-12, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())
