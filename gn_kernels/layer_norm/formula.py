"""Layer normalisation in plain PyTorch: specification, oracle, fallback, what compilers trace.

A row is the n numbers of x's last dimensions, those of ``normalized_shape``; m(a) is the mean of a
over its row, Σ a sum over all rows. x, y, g (the gradient of y) and V have the shape of x; w, b, u
and t that of ``normalized_shape``; μ and r have one number a row. Then, with

    μ = m(x),  r = 1/√(m((x − μ)²) + eps),  x̂ = (x − μ)·r,  h = g·w,
    P(a) = a − m(a) − x̂·m(a·x̂),  so that  r·P  is the derivative of x̂ to x, and symmetric:

* forward: y = x̂·w + b;
* backward: x gets r·P(h), w gets Σ g·x̂, b gets Σ g;
* double backward, from the cotangents V, u and t of those three:
  g gets w·r·P(V) + x̂·u + t; w gets Σ g·r·P(V); b gets nothing; and with the products of means
  C = m(V·x̂), c = m(h·x̂), D = m(V·P(h)) = m(V·h) − m(V)·m(h) − C·c,
  x gets r·P(g·u) − r²·(c·P(V) + C·P(h) + D·x̂).

Written out, the last line needs the seven means m(h), m(h·x̂), m(V), m(V·x̂), m(V·h), m(g·u) and
m(g·u·x̂) of a row, and one pass: it is z − m(z) − x̂·(r·m(g·u·x̂) + r²·(D − 2·C·c)) with
z = r·g·u − r²·(c·V + C·h).

All that lies between the inputs and the one rounding of a result is float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gn_kernels.autograd import Gradients, Orders

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
Options = tuple[tuple[int, ...], float]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a result is computed in before its one rounding: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(value: Tensor) -> Tensor:
    return value.to(compute_dtype(value.dtype))


def _row_mean(value: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    return value.mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)


def _over_rows(value: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    return value.reshape(-1, *normalized_shape).sum(0)


def statistics(x: Tensor, normalized_shape: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """μ and r of every row, as (…, 1, …, 1)"""
    x = _wide(x)
    # Relative to its first number a constant row is exactly 0, and its variance too. Relative to
    # the mean that this gives, what is left of the mean corrects it.
    shift = x.detach()
    for dim in range(-len(normalized_shape), 0):
        shift = shift.narrow(dim, 0, 1)
    mean = shift + _row_mean(x - shift, normalized_shape)
    mean = mean + _row_mean(x - mean, normalized_shape)
    centred = x - mean
    return mean, (_row_mean(centred * centred, normalized_shape) + eps).rsqrt()


def forward(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    """(x − μ)·r·w + b"""
    y = (_wide(x) - mean) * rstd
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """For x, weight and bias; None for what is not wanted"""
    dtype = x.dtype
    x_hat, g = (_wide(x) - mean) * rstd, _wide(grad)
    for_x = for_weight = for_bias = None
    if wanted[0]:
        h = g if weight is None else g * _wide(weight)
        for_x = (rstd * _projected(h, x_hat, normalized_shape)).to(dtype)
    if wanted[1] and weight is not None:
        for_weight = _over_rows(g * x_hat, normalized_shape).to(weight.dtype)
    if wanted[2] and bias is not None:
        for_bias = _over_rows(g, normalized_shape).to(bias.dtype)
    return for_x, for_weight, for_bias


def _sum(terms: tuple[Tensor | None, ...], like: Tensor) -> Tensor:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return torch.zeros_like(like) if total is None else total.expand_as(like)


def _projected(a: Tensor, x_hat: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    # P(a)
    a = a - _row_mean(a, normalized_shape)
    return a - x_hat * _row_mean(a * x_hat, normalized_shape)


def double_backward(
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """For grad, x and weight; None for what is not wanted"""
    v, u, t = (None if one is None else _wide(one) for one in cotangents)
    dtype, g = x.dtype, _wide(grad)
    x_hat = (_wide(x) - mean) * rstd
    w = None if weight is None else _wide(weight)
    rpv = None if v is None else rstd * _projected(v, x_hat, normalized_shape)

    for_grad = for_x = for_weight = None
    if wanted[0]:
        terms = (
            rpv if rpv is None or w is None else rpv * w,
            None if u is None else x_hat * u,
            t,
        )
        for_grad = _sum(terms, g).to(dtype)
    if wanted[1]:
        through_statistics = None
        if v is not None and rpv is not None:
            h = g if w is None else g * w
            dx = rstd * _projected(h, x_hat, normalized_shape)
            mean_h = _row_mean(h * x_hat, normalized_shape)
            mean_v = _row_mean(v * x_hat, normalized_shape)
            mean_both = _row_mean(v * dx, normalized_shape)
            through_statistics = -rstd * (mean_h * rpv + mean_v * dx + mean_both * x_hat)
        through_weight = None
        if u is not None:
            through_weight = rstd * _projected(g * u, x_hat, normalized_shape)
        for_x = _sum((through_weight, through_statistics), g).to(dtype)
    if wanted[2] and weight is not None:
        for_weight = torch.zeros_like(weight)
        if rpv is not None:
            for_weight = _over_rows(g * rpv, normalized_shape).to(weight.dtype)
    return for_grad, for_x, for_weight


def _forward(inputs: Inputs, options: Options) -> tuple[Tensor]:
    (x, weight, bias), (normalized_shape, eps) = inputs, options
    return (forward(x, normalized_shape, weight, bias, *statistics(x, normalized_shape, eps)),)


def _backward(
    wanted: tuple[bool, bool, bool],
    grad: Tensor,
    inputs: Inputs,
    _: object,
    options: Options,
) -> Gradients:
    (x, weight, bias), (normalized_shape, eps) = inputs, options
    row = statistics(x, normalized_shape, eps)
    return backward(grad, x, normalized_shape, weight, bias, *row, wanted)


def _double_backward(
    wanted: tuple[bool, bool, bool, bool],
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    inputs: Inputs,
    _: object,
    options: Options,
) -> Gradients:
    (x, weight, _bias), (normalized_shape, eps) = inputs, options
    row = statistics(x, normalized_shape, eps)
    return *double_backward(cotangents, grad, x, normalized_shape, weight, *row, wanted[:3]), None


FORMULA = Orders(_forward, _backward, _double_backward)
