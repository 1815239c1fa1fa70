"""Methods and schedules against closed forms."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from gn_kernels.training import METHODS, InputError, Settings, recipe


@pytest.mark.parametrize("weights", [{}, {"weight_ce": 0.4, "weight_gradnorm": 1.6}])
def test_gradnorm_of_a_linear_model_is_eps_times_the_l1_norm_of_the_gradient(weights):
    # Two classes, logits (w·x, 0): the gradient of ln(1 + exp(-w·x)) is -σ(-w·x)·w by hand.
    settings = Settings(label_smoothing=0.0, eps_255=8.0, **weights)
    torch.manual_seed(0)
    images, weight = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.randn(4).double()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([weight, torch.zeros(4)]))
    labels = torch.zeros(5, dtype=torch.long)

    losses = METHODS["gradnorm"](model, images, labels, 2.0, settings)

    margin = images.flatten(1) @ weight
    entropy = torch.log1p(torch.exp(-margin)).mean()
    penalty = 8 / 255 * (torch.sigmoid(-margin) * weight.abs().sum()).mean()
    torch.testing.assert_close(losses.cross_entropy, entropy)
    torch.testing.assert_close(losses.penalty, penalty)
    # At the end of epoch 2 the ramp is at 0.4.
    ce, gradnorm = weights.values() or (0.8, 1.2)
    torch.testing.assert_close(losses.total.detach(), ce * entropy + gradnorm * 0.4 * penalty)


def _linear_and_its_inputs():
    """Logits (w·x, 0), 192 pixels at ½, and what the model is given, as it comes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    with torch.no_grad():
        model[1].weight[1] = 0
    points = []
    model.register_forward_pre_hook(lambda module, inputs: points.append(inputs[0].detach()))
    return model, torch.full((2, 3, 8, 8), 0.5), points


@pytest.mark.parametrize(
    ("options", "radius", "length"),
    [
        ({"pgd_steps": 1}, 8.0, 10.0),
        ({"pgd_steps": 4}, 8.0, 4.0),
        ({"pgd_steps": 3, "attack_eps_255": 6.0}, 6.0, 4.0),
        ({"pgd_steps": 3, "pgd_step_255": 1.0}, 8.0, 1.0),
    ],
)
def test_the_attack_starts_in_the_ball_and_takes_steps_of_its_length(options, radius, length):
    settings = Settings(eps_255=8.0, pgd_warmup_epochs=0, **options)
    model, images, points = _linear_and_its_inputs()
    METHODS["adversarial"](model, images, torch.tensor([0, 0]), 0.0, settings)
    assert len(points) == options["pgd_steps"] + 1
    assert 0.9 * radius / 255 < (points[0] - images).abs().max() < radius / 255 + 1e-6
    uphill = -model[1].weight[0].sign().reshape(3, 8, 8)  # of class 0's cross-entropy
    for before, after in itertools.pairwise(points):
        step = (before + length / 255 * uphill - images).clamp(-radius / 255, radius / 255)
        torch.testing.assert_close(after, images + step, rtol=0, atol=1e-6)


def test_gradnorms_random_start_is_uniform_in_its_ball():
    model, images, points = _linear_and_its_inputs()
    settings = Settings(eps_255=8.0, random_start_255=4.0)
    METHODS["gradnorm"](model, images, torch.tensor([0, 1]), 1.0, settings)
    moved = 255 / 4 * (points[0] - images)
    assert 0.9 < moved.abs().max() < 1 + 1e-4
    assert moved.mean().abs() < 0.1
    assert moved.abs().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("most", "factor"), [(19.0, 2.0 + 3 * 0.5), (3.0, 3.0)])
def test_edges_weight_grows_by_whole_epochs_to_its_limit(most, factor):
    settings = Settings(edge_weight=2.0, edge_weight_per_epoch=0.5, edge_weight_max=most)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 3)).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    losses = METHODS["edge"](model, images, torch.tensor([0, 2]), 3.7, settings)
    expected = losses.cross_entropy + factor * losses.penalty
    torch.testing.assert_close(losses.total.detach(), expected)


def test_natural_is_the_cross_entropy_alone():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    labels = torch.tensor([0, 1, 2, 0, 1])
    losses = METHODS["natural"](model, images, labels, 9.0, Settings(label_smoothing=0.0))
    expected = -model(images).log_softmax(1)[range(5), labels].mean()
    torch.testing.assert_close(losses.total, expected)
    assert losses.penalty == 0


def test_gradnorm_leaves_the_callers_images_alone():
    images = torch.rand(3, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.GELU())
    METHODS["gradnorm"](model, images, torch.tensor([0, 1, 2]), 1.0, Settings())
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("start", "slope", "limit", "epoch", "factor"),
    [
        (0.0, 0.2, 1.0, 0.0, 0.0),
        (0.0, 0.2, 1.0, 0.5, 0.1),
        (0.0, 0.2, 1.0, 3.0, 0.6),
        (0.0, 0.2, 1.0, 5.0, 1.0),
        (0.0, 0.2, 1.0, 40.0, 1.0),
        (1.0, 0.0, 1.0, 0.0, 1.0),
        (0.5, 0.1, 2.0, 10.0, 1.5),
    ],
)
def test_ramp(start, slope, limit, epoch, factor):
    settings = Settings(ramp_start=start, ramp_per_epoch=slope, ramp_max=limit)
    assert recipe.penalty_factor(epoch, settings) == pytest.approx(factor, abs=1e-12)


def test_learning_rate():
    settings = Settings(lr=1e-2, lr_min=1e-4, warmup_epochs=2.0, epochs=10)
    rates = {0: 1e-4, 1: 5.05e-3, 2: 1e-2, 6: 5.05e-3, 10: 1e-4}
    for epoch, rate in rates.items():
        assert recipe.learning_rate(epoch, settings) == pytest.approx(rate, rel=1e-12)
    third = 1e-4 + 9.9e-3 * (1 + math.cos(math.pi / 4)) / 2
    assert recipe.learning_rate(4, settings) == pytest.approx(third, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "magic"},
        {"activation": "magic"},
        {"eps_255": -1.0},
        {"lr": math.nan},
        {"epochs": 0},
        {"seed": -1},
        {"patch_size": 3},
        {"num_heads": 5},
        {"warmup_epochs": 40.0},
        {"label_smoothing": 1.0},
    ],
)
def test_settings_refuse_nonsense_in_one_sentence(changes):
    with pytest.raises(InputError, match=next(iter(changes))) as error:
        Settings(**changes)
    assert "\n" not in str(error.value)


def test_every_method_and_dataset_is_an_option():
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert fields["method"].metadata["choices"] == tuple(METHODS)
    assert set(recipe.DEFAULTS) == set(recipe.DATASETS)
    for name, defaults in recipe.DEFAULTS.items():
        Settings(**defaults, dataset=name)
