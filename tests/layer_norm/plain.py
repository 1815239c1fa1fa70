"""Layer normalisation as its definition says, differentiated by autograd alone, in float64.

The oracle of these tests. Not ``F.layer_norm``: its third derivative is wrong (torch 2.14 takes
the statistics that its backward pass saved for constants).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OPS = torch.ops.gn_kernels


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


class Case(NamedTuple):
    """Everything that three orders take; an absent tensor is None."""

    x: Tensor
    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    grad: Tensor
    v: Tensor | None
    u: Tensor | None
    t: Tensor | None
    eps: float = 1e-5


def make(
    shape,
    normalized_shape=None,
    dtype=torch.float64,
    parameter_dtype=None,
    weight=True,
    bias=True,
    cotangents="vut",
    seed=0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    normalized_shape = shape[-1:] if normalized_shape is None else normalized_shape
    parameter_dtype = parameter_dtype or dtype

    def normal(shape, dtype, mean=0.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
        return values.to(dtype)

    return Case(
        normal(shape, dtype, mean=0.5),
        tuple(normalized_shape),
        normal(normalized_shape, parameter_dtype, mean=1.0) if weight else None,
        normal(normalized_shape, parameter_dtype) if bias else None,
        normal(shape, dtype, mean=0.3),
        normal(shape, dtype, mean=-0.2) if "v" in cotangents else None,
        normal(normalized_shape, parameter_dtype) if "u" in cotangents and weight else None,
        normal(normalized_shape, parameter_dtype) if "t" in cotangents and bias else None,
    )


NAMES = ("y", "dx", "dweight", "dbias", "for grad", "for x", "for weight")


def raw(case: Case) -> dict[str, Tensor]:
    """All that the three raw ops give, on the backend that is in force."""
    x, shape, weight, bias, grad, v, u, t, eps = case
    y, mean, rstd = OPS.layer_norm_forward(x, shape, weight, bias, eps)
    saved = (grad, x, shape, weight)
    mask = [True, weight is not None, bias is not None]
    first = OPS.layer_norm_backward(*saved, bias, mean, rstd, mask)
    results = [y, *(out if asked else None for out, asked in zip(first, mask, strict=True))]
    mask = [True, True, weight is not None]
    second = OPS.layer_norm_double_backward(v, u, t, *saved, mean, rstd, mask)
    results += [out if asked else None for out, asked in zip(second, mask, strict=True)]
    return {name: result for name, result in zip(NAMES, results, strict=True) if result is not None}


def derived(case: Case, function=layer_norm, dtype=torch.float64) -> dict[str, Tensor]:
    """The same from autograd's two derivatives of ``function`` computed in ``dtype``."""

    def leaf(value):
        return None if value is None else value.detach().to(dtype).requires_grad_()

    def fixed(value):
        return None if value is None else value.to(dtype)

    x, weight, bias, grad = leaf(case.x), leaf(case.weight), leaf(case.bias), leaf(case.grad)
    y = function(x, case.normalized_shape, weight, bias, case.eps)
    inputs = [value for value in (x, weight, bias) if value is not None]
    first = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    dx, dweight, dbias = (None if one is None else next(first) for one in (x, weight, bias))
    pairs = [
        (out, fixed(cotangent))
        for out, cotangent in ((dx, case.v), (dweight, case.u), (dbias, case.t))
        if out is not None and cotangent is not None
    ]
    sources = [value for value in (grad, x, weight) if value is not None]
    second = torch.autograd.grad(
        [out for out, _ in pairs],
        sources,
        [cotangent for _, cotangent in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    for_grad, for_x, *for_weight = second
    results = (y, dx, dweight, dbias, for_grad, for_x, *(for_weight or [None]))
    return {
        name: result.detach()
        for name, result in zip(NAMES, results, strict=True)
        if result is not None
    }


def scales(case: Case) -> dict[str, Tensor]:
    """What each result is a difference of: its terms with absolute values, in float64."""
    x, shape, weight, bias, grad, v, u, t, eps = (
        one.double() if isinstance(one, Tensor) else one for one in case
    )
    dims = tuple(range(-len(shape), 0))

    def mean(a):
        return a.abs().mean(dims, keepdim=True)

    def over_rows(a):
        return a.abs().reshape(-1, *shape).sum(0)

    mu = x.mean(dims, keepdim=True)
    r = 1.0 / ((x - mu).square().mean(dims, keepdim=True) + eps).sqrt()
    x_hat = (x.abs() + mu.abs()) * r
    w = torch.ones(shape, dtype=torch.float64) if weight is None else weight.abs()
    h = grad.abs() * w

    def projected(a):
        return a.abs() + mean(a) + x_hat * mean(a * x_hat)

    result = {
        "y": x_hat * w + (0.0 if bias is None else bias.abs()),
        "dx": r * projected(h),
        "dweight": over_rows(grad * x_hat),
        "dbias": over_rows(grad),
    }
    for_grad, for_x, for_weight = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(w)
    if v is not None:
        along = mean(v * h) + mean(v) * mean(h) + 3.0 * mean(v * x_hat) * mean(h * x_hat)
        for_grad += r * projected(v) * w
        for_x += r * r * (mean(h * x_hat) * projected(v) + mean(v * x_hat) * projected(h))
        for_x += r * r * along * x_hat
        for_weight += over_rows(grad * r * projected(v))
    if u is not None:
        for_grad += x_hat * u.abs()
        for_x += r * projected(grad * u)
    if t is not None:
        for_grad += t.abs()
    return {**result, "for grad": for_grad, "for x": for_x, "for weight": for_weight}
