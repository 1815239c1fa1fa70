"""Scaling of gradients, and a picture that can be read back."""

import matplotlib.image
import pytest
import torch
from torch import nn

from gn_kernels.robustness import gradient_figure
from gn_kernels.robustness.figures import symmetric_scale


def test_scale_is_symmetric_and_saturates_at_the_quantile():
    gradient = torch.arange(-100.0, 101.0).view(1, 1, 1, 201)
    scaled = symmetric_scale(gradient).flatten()
    # 99% of the 201 magnitudes 0, 1, 1, ..., 100, 100 are at most 99.
    torch.testing.assert_close(scaled[100 + 33], torch.tensor(0.5 + 33 / 99 / 2))
    torch.testing.assert_close(scaled + scaled.flip(0), torch.ones(201))
    assert scaled[0] == 0
    assert scaled[-1] == 1
    assert (symmetric_scale(torch.zeros(2, 1, 3, 3)) == 0.5).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_figure_is_written_and_the_model_left_alone(tmp_path, channels):
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 16, 3))
    path = tmp_path / "gradients.png"
    images, labels = torch.rand(3, channels, 4, 4), torch.tensor([0, 1, 2])
    gradient_figure(path, model, images, labels, ("cat", "dog", "newt"), "title")
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.1
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
