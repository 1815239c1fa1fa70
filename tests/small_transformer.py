"""A small transformer in plain PyTorch, and the weight gradients of a penalty through it.

Whatever is under test must give the weight gradients that eager PyTorch gives in float64: the
check that sees a dropped second order, which outputs, first derivatives and opcheck don't.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

PYTORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Block(nn.Module):
    def __init__(self, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        x = x + self.proj(scores.softmax(-1) @ v)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class SmallTransformer(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, activation) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def make_model(
    activation: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64
) -> SmallTransformer:
    torch.manual_seed(1)
    model = SmallTransformer(activation).double()
    for parameter in model.parameters():  # large enough to leave the activations' linear part
        nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 5, 4, generator=generator, dtype=torch.float64)
    return images.to(dtype).requires_grad_(), torch.tensor([0, 1, 2, 1])


def total_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Loss plus the L2 norm of its input gradient, smooth so that precisions can be compared."""
    loss = F.cross_entropy(model(images).to(images.dtype), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
    return loss + gradient.flatten(1).norm(dim=1).sum()


def functional_loss(
    model: nn.Module, parameters: dict[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """:func:`total_loss` through ``torch.func``, as a function of the parameters."""

    def loss(images: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (images,))
        return F.cross_entropy(logits, labels, reduction="sum")

    gradient, value = torch.func.grad_and_value(loss)(images)
    return value + gradient.flatten(1).norm(dim=1).sum()


def sample_losses(
    model: nn.Module, parameters: dict[str, Tensor], images: Tensor, labels: Tensor
) -> Tensor:
    """The same, image by image under ``vmap``."""

    def total(image: Tensor, label: Tensor) -> Tensor:
        return functional_loss(model, parameters, image[None], label[None])

    return torch.func.vmap(total)(images, labels).sum()


def weight_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """All of them as one float64 vector."""
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def expected_gradients(kind: str) -> Tensor:
    """Eager PyTorch's, in float64."""
    model = make_model(PYTORCH[kind])
    return weight_gradients(model, total_loss(model, *make_batch()))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
