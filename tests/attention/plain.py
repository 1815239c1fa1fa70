"""Attention as models write it, and its three orders by autograd: what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCH, HEADS = 2, 2


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def pytorch_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def make_inputs(
    queries: int,
    keys: int | None = None,
    size: int = 16,
    bias_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """q, k, v and perhaps bias. The scores spread over several units, so that P is not uniform."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    keys = queries if keys is None else keys
    shapes = [(BATCH, HEADS, n, size) for n in (queries, keys, keys)]
    inputs = [normal(*shape) * 1.5 for shape in shapes]
    return inputs if bias_shape is None else [*inputs, normal(*bias_shape)]


def three_orders(
    attention: Callable[..., Tensor],
    inputs: list[Tensor],
    seed: int = 1,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The result, its gradients, and the gradients of those along fixed random directions."""
    generator = torch.Generator().manual_seed(seed)

    def direction(like: Tensor) -> Tensor:
        normal = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        # All precisions see the same numbers: what bfloat16 holds, float16 and wider hold too.
        return normal.bfloat16().to(like.dtype)

    names = ["q", "k", "v", "bias"][: len(inputs)]
    leaves = [one.detach().requires_grad_() for one in inputs]
    out = attention(*leaves, scale=scale)
    grad = direction(out).requires_grad_()
    first = torch.autograd.grad(out, leaves, grad, create_graph=True)
    directions = [direction(one) for one in first]
    second = torch.autograd.grad(first, [grad, *leaves], directions)
    return {
        "out": out.detach(),
        **{f"first {name}": one.detach() for name, one in zip(names, first, strict=True)},
        **{f"second {name}": one for name, one in zip(["grad", *names], second, strict=True)},
    }


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each, relative to the root mean square."""
    assert actual.keys() == expected.keys()
    return {
        name: ((actual[name].double() - value).norm() / value.norm()).item()
        for name, value in expected.items()
    }


class Block(nn.Module):
    """A ViT block whose q, k and v are views of one packed tensor, as in timm."""

    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.proj, self.heads, self.attention = nn.Linear(width, width), heads, attention
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        distance = torch.arange(length, device=x.device, dtype=x.dtype)
        bias = self.bias * (distance[:, None] - distance).abs()
        out = self.attention(q, k, v, bias.to(q.dtype))
        return x + self.proj(out.transpose(1, 2).reshape(batch, length, width))


class TinyViT(nn.Module):
    def __init__(self, attention: Callable[..., Tensor], width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, heads, attention) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def make_vit(attention: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> TinyViT:
    torch.manual_seed(1)
    model = TinyViT(attention).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)
