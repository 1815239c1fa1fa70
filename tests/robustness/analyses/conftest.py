"""Models in float64 whose figures are known, and a small ViT."""

import pytest
import timm
import torch
from torch import nn

from gn_kernels.robustness.analyses import Options


class Linear(nn.Module):
    """Two classes, logits (w·x + b, 0)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, images):
        score = images.flatten(1) @ self.weight + self.bias
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.fixture
def linear():
    """The model, 9 colour images far from 0 and 1, and their labels, all of them right."""
    weight = torch.randn(48, dtype=torch.float64)
    images = 0.5 + 0.2 * (torch.rand(9, 3, 4, 4, dtype=torch.float64) - 0.5)
    model = Linear(weight, -0.5 * weight.sum())
    labels = model(images).argmax(1)
    return model, images, labels


@pytest.fixture
def options():
    return Options()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def small_vit():
    """Two blocks on 16×16 colour images, float64, PyTorch's own operations."""
    torch.manual_seed(7)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, num_classes=5, embed_dim=16, depth=2, num_heads=2
    )
    for parameter in model.parameters():  # large enough to leave the activations' linear part
        nn.init.normal_(parameter, std=0.3)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model.double().eval()
