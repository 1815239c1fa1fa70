"""The warnings of masked gradients: none for an honest model, the right one for each kind."""

import pytest
import torch
from torch import nn

from gn_kernels.robustness.masking import masking_warnings
from tests.robustness.conftest import Noisy, Saturated


def _warnings(model, images):
    pixels, labels = images.tensors
    with torch.no_grad():
        right = model(pixels).argmax(1) == labels
    generator = torch.Generator().manual_seed(0)
    return masking_warnings(model.eval(), pixels[right], labels[right], 0.08, 10, generator)


class Ripples(nn.Module):
    """Shallow steps whose slope points away from where the logits fall in the large."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        coarse = (images * 20).floor() / 20
        return self.model(coarse + 0.01 * (coarse - images))


def test_an_honest_model_gets_none(classifier):
    assert _warnings(*classifier) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [(Noisy, "random"), (Saturated, "vanish"), (Ripples, "a large attack fails")],
)
def test_each_kind_is_named(classifier, broken, words):
    model, images = classifier
    warnings = _warnings(broken(model), images)
    assert any(words in warning for warning in warnings), warnings
    if broken is not Noisy:
        assert not any("random" in warning for warning in warnings)


def test_one_step_beating_many_is_named():
    # Right at the start, then a wall: small steps are thrown back, one long step jumps over it.
    class Wall(nn.Module):
        def forward(self, images):
            distance = (images.flatten(1) - 0.5).abs().mean(1, keepdim=True)
            height = torch.where(distance < 0.04, 1 - 20 * distance + 900 * distance**2, -1.0)
            height = height - 0.2 * images.flatten(1).mean(1, keepdim=True)
            return torch.cat([height, torch.zeros_like(height)], 1)

    pixels, labels = torch.full((50, 1, 2, 2), 0.5) + 0.001, torch.zeros(50).long()
    warnings = masking_warnings(Wall(), pixels, labels, 0.08, 40)
    assert any("one step beats many" in warning for warning in warnings), warnings
