"""Models whose worst points are known, and images as measurements take them."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gn_kernels.training import Settings, Training, checkpoint, load
from tests.training.conftest import TINY


class Rounded(nn.Module):
    """256 levels, as integers: no gradient gets through."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model((255 * images).round().byte() / 255)


class Saturated(nn.Module):
    """Logits so large that the cross-entropy's gradient is 0 in float32."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return 1e6 * self.model(images)


class Noisy(nn.Module):
    """Each call moves the image at random."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images + 0.3 * torch.randn_like(images))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Two checkpoints of the digits, after a few steps: natural, and gradnorm with an average."""
    paths = {}
    for method in ("natural", "gradnorm"):
        settings = Settings(**TINY, method=method, ema_decay=0.0 if method == "natural" else 0.9)
        training = Training(settings, load(settings))
        training.run()
        paths[method] = tmp_path_factory.mktemp(method) / "checkpoint.pt"
        checkpoint.save(paths[method], training.state())
    return paths


@pytest.fixture
def classifier():
    """A trained four-class model and 60 images: colours around four corners of a cube."""
    torch.manual_seed(5)
    corners = torch.tensor([[0.35, 0.35], [0.35, 0.65], [0.65, 0.35], [0.65, 0.65]])
    labels = torch.arange(60) % 4
    images = (corners[labels].view(60, 2, 1, 1) + 0.12 * torch.randn(60, 2, 4, 4)).clamp(0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), TensorDataset(images, labels)
