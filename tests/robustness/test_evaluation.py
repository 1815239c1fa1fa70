"""The figures of an evaluation, counted by hand."""

import pytest
import torch
from torch import nn

from gn_kernels.robustness import evaluate


@pytest.fixture
def model():
    # logits (x, 1 - x)·40 of one pixel: the boundary is at 0.5, and class 0 is above it.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[40.0], [-40.0]]))
        model[1].bias.copy_(torch.tensor([0.0, 40.0]))
    return model


def _batches():
    pixels = torch.tensor([0.9, 0.55, 0.45, 0.1, 0.52]).view(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])
    return [(pixels[:2], labels[:2]), (pixels[2:], labels[2:])]


def test_accuracies_and_norm_over_batches_of_different_size(model):
    result = evaluate(model, _batches(), eps_255=0.1 * 255, attack_steps=4, restarts=2)
    assert result.images == 5
    assert result.clean_accuracy == pytest.approx(3 / 5)  # wrong: 0.45 as 0, 0.52 as 1
    assert result.robust_accuracy == pytest.approx(2 / 5)  # 0.55 is 0.05 from the boundary
    # d/dx of softplus(∓80(x - ½)) is ∓80·σ(∓80(x - ½)).
    margins = torch.tensor([0.4, 0.05, -0.05, 0.4, -0.02], dtype=torch.float64)
    expected = (80 * torch.sigmoid(-80 * margins)).mean().item()
    assert result.gradient_norm_l1 == pytest.approx(expected, rel=1e-5)


def test_an_attack_without_strength_changes_nothing(model):
    result = evaluate(model, _batches(), eps_255=0.0, attack_steps=1, restarts=1)
    assert result.robust_accuracy == result.clean_accuracy


def test_no_images_are_refused(model):
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate(model, [], eps_255=1.0)
