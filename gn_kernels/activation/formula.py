"""The activations in plain PyTorch: specification, oracle, fallback, and what compilers trace.

Every row holds f, f′ and f″ as functions of a float32 or float64 tensor. They keep to the limits
at ±inf and give NaN only for NaN, also when autograd differentiates them: where an argument is
clamped, its derivative has underflowed to zero in float64 already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gn_kernels.autograd import Gradients, Orders

Scalar = Tensor | float


class Activation(NamedTuple):
    """f, f′ and f″, each element by element."""

    value: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _gelu() -> Activation:
    # f = x·Φ(x), f′ = Φ(x) + x·φ(x), f″ = (2 − x²)·φ(x), with the normal distribution's Φ and φ.
    bound = 40.0  # φ(40) is 0 in float64

    def cdf(x: Tensor) -> Tensor:
        tail: Tensor = torch.special.erfc(x * -math.sqrt(0.5))  # 1 + erf would lose it
        return tail * 0.5

    def pdf(x: Tensor) -> Tensor:
        return torch.exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))

    def value(x: Tensor) -> Tensor:
        return x.clamp(min=-bound) * cdf(x.clamp(-bound, bound))

    def first(x: Tensor) -> Tensor:
        x = x.clamp(-bound, bound)
        return cdf(x) + x * pdf(x)

    def second(x: Tensor) -> Tensor:
        x = x.clamp(-bound, bound)
        return (2.0 - x * x) * pdf(x)

    return Activation(value, first, second)


def _gated(gate: Callable[[Tensor], tuple[Tensor, Scalar, Scalar]], bound: float) -> Activation:
    # f = x·σ(g), f′ = σ + x·σ′·g′, f″ = σ′·(2g′ + x·(g″ + (1 − 2σ)·g′²)), with g = g(x).
    # Through e = exp(−|g|): σ is 1/(1 + e) or e/(1 + e), σ′ = e/(1 + e)², and nothing cancels.
    # `gate` gives g, g′ and g″; exp(−g(bound)) is 0 in float64.

    def sigmoid(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # torch.where instead of abs(): abs() has the derivative 0 at 0.
        positive = g >= 0
        magnitude = torch.where(positive, g, -g)
        e = torch.exp(-magnitude)
        r = 1.0 / (1.0 + e)
        tanh = -torch.expm1(-magnitude) * r  # |2σ − 1|
        return (
            torch.where(positive, r, e * r),
            e * r * r,
            torch.where(positive, -tanh, tanh),
        )

    def value(x: Tensor) -> Tensor:
        g, _, _ = gate(x.clamp(-bound, bound))
        sigma, _, _ = sigmoid(g)
        return x.clamp(min=-bound) * sigma

    def first(x: Tensor) -> Tensor:
        x = x.clamp(-bound, bound)
        g, g1, _ = gate(x)
        sigma, sigma1, _ = sigmoid(g)
        return sigma + x * sigma1 * g1

    def second(x: Tensor) -> Tensor:
        x = x.clamp(-bound, bound)
        g, g1, g2 = gate(x)
        _, sigma1, one_minus_two_sigma = sigmoid(g)
        return sigma1 * (2.0 * g1 + x * (g2 + one_minus_two_sigma * g1 * g1))

    return Activation(value, first, second)


def _tanh_gate(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # ½(1 + tanh u) = σ(2u), with u = √(2/π)·(x + 0.044715·x³)
    scale, cubic = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
    return (
        scale * (x + cubic * x * x * x),
        scale * (1.0 + 3.0 * cubic * x * x),
        (6.0 * scale * cubic) * x,
    )


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu(),
    "gelu_tanh": _gated(_tanh_gate, bound=22.0),
    "silu": _gated(lambda x: (x, 1.0, 0.0), bound=760.0),
    "quick_gelu": _gated(lambda x: (1.702 * x, 1.702, 0.0), bound=450.0),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a result is computed in before its one rounding: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(x: Tensor, kind: str) -> Tensor:
    """f(x), computed in :func:`compute_dtype` and rounded once."""
    return ACTIVATIONS[kind].value(x.to(compute_dtype(x.dtype))).to(x.dtype)


def backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """grad·f′(x), likewise."""
    wide = compute_dtype(x.dtype)
    return (grad.to(wide) * ACTIVATIONS[kind].first(x.to(wide))).to(x.dtype)


def double_backward(
    v: Tensor, grad: Tensor, x: Tensor, kind: str, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(v·f′(x), v·grad·f″(x)), likewise; None for what is not wanted."""
    wide = compute_dtype(x.dtype)
    row, x_wide, v_wide = ACTIVATIONS[kind], x.to(wide), v.to(wide)
    for_grad = (v_wide * row.first(x_wide)).to(x.dtype) if wanted[0] else None
    for_x = (v_wide * grad.to(wide) * row.second(x_wide)).to(x.dtype) if wanted[1] else None
    return for_grad, for_x


def _forward(inputs: tuple[Tensor], options: tuple[str]) -> tuple[Tensor]:
    return (forward(*inputs, *options),)


def _backward(
    wanted: tuple[bool], grad: Tensor, inputs: tuple[Tensor], _: object, options: tuple[str]
) -> Gradients:
    return (backward(grad, *inputs, *options),)


def _double_backward(
    wanted: tuple[bool, bool],
    cotangents: tuple[Tensor],
    grad: Tensor,
    inputs: tuple[Tensor],
    _: object,
    options: tuple[str],
) -> Gradients:
    return double_backward(*cotangents, grad, *inputs, *options, wanted)


FORMULA = Orders(_forward, _backward, _double_backward)
