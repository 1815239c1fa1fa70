"""How exact the kernels are, beside eager PyTorch, against the formula in float64.

The formula itself is checked against mpmath in test_formula.py. The Triton kernels have tests of
their own, since the interpreter rounds otherwise than a GPU.
"""

from __future__ import annotations

import pytest
import torch

from gn_kernels import use_backend
from gn_kernels.activation import ACTIVATIONS
from tests.conftest import backends
from tests.small_transformer import PYTORCH

KINDS = tuple(ACTIVATIONS)
BACKENDS = [name for name in backends() if name != "triton"]
MIN_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}
MANTISSA = {torch.float16: 10, torch.bfloat16: 7}
ops = torch.ops.gn_kernels


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    exponent = value.abs().frexp().exponent - 1
    return torch.ldexp(
        torch.ones_like(value), exponent.clamp(min=MIN_EXPONENT[dtype]) - MANTISSA[dtype]
    )


def every_value(dtype: torch.dtype, largest: float) -> torch.Tensor:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.abs() <= largest]


def exact(kind: str, v, grad, x):
    row, (v, grad, x) = ACTIVATIONS[kind], (t.double() for t in (v, grad, x))
    return {
        "forward": row.value(x),
        "backward": grad * row.first(x),
        "double backward, grad": v * row.first(x),
        "double backward, x": v * grad * row.second(x),
    }


def ours(kind: str, v, grad, x, backend: str):
    with use_backend(backend):
        for_grad, for_x = ops.activation_double_backward(v, grad, x, kind, [True, True])
        return {
            "forward": ops.activation_forward(x, kind),
            "backward": ops.activation_backward(grad, x, kind),
            "double backward, grad": for_grad,
            "double backward, x": for_x,
        }


def eager(kind: str, v, grad, x):
    x, grad = x.clone().requires_grad_(), grad.clone().requires_grad_()
    y = PYTORCH[kind](x)
    (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
    for_grad, for_x = torch.autograd.grad(dx, (grad, x), v)
    names = ("forward", "backward", "double backward, grad", "double backward, x")
    return {name: t.detach() for name, t in zip(names, (y, dx, for_grad, for_x), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run_on", BACKENDS)
def test_half_precision_is_correctly_rounded_to_a_hundredth(kind, dtype, run_on):
    x = every_value(dtype, 10.0)
    generator = torch.Generator().manual_seed(3)
    v, grad = (torch.randn(x.shape, generator=generator).to(dtype) for _ in range(2))
    expected = exact(kind, v, grad, x)
    for name, result in ours(kind, v, grad, x, run_on).items():
        # 4e-7 of the cotangents is what one float32 rounding leaves near a root of f′ or f″.
        cotangents = {"forward": torch.zeros(()), "backward": grad, "double backward, grad": v}
        slack = 4e-7 * cotangents.get(name, v.double() * grad.double()).double().abs()
        error = (result.double() - expected[name]).abs() - slack
        worst = (error / ulp(expected[name], dtype)).max()
        assert worst <= 0.51, (name, worst)


BUCKETS = torch.arange(-10, 10, 0.125)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_float32_beside_eager(kind):
    """In each eighth of [-10, 10]: the largest error beside eager's.

    It is smaller in most of them, by orders of magnitude in the tails. It is not smaller in all:
    up to 2.2 times eager's where both are near one rounding, up to 1.35 times near a root of f″.
    """
    if "native" not in BACKENDS:
        pytest.skip("the C++ kernels are not built")
    torch.manual_seed(4)
    x = BUCKETS + torch.rand(len(BUCKETS), 4000) / 8
    one = torch.ones_like(x)
    expected = exact(kind, one, one, x)
    actual, reference = ours(kind, one, one, x, "native"), eager(kind, one, one, x)
    for name in expected:
        error, eagers = (
            (result[name].double() - expected[name]).abs().amax(1) for result in (actual, reference)
        )
        roundings = 5 * expected[name].abs().amax(1) * 2.0**-24
        worst = (error / (1.5 * eagers).maximum(roundings)).nan_to_num().argmax()
        assert error[worst] <= max(1.5 * eagers[worst], roundings[worst]), (name, x[worst, 0])
        assert (error <= eagers).double().mean() > 0.75, name


ABSOLUTE = {"gelu": (7e-7, 2e-7, 2e-7), "gelu_tanh": (7e-7, 2e-7, 3e-7)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run_on", BACKENDS)
def test_float32_absolute_errors(kind, run_on):
    x = torch.linspace(-10, 10, 400_001)
    one = torch.ones_like(x)
    expected, actual = exact(kind, one, one, x), ours(kind, one, one, x, run_on)
    bounds = ABSOLUTE.get(kind, (7e-7, 2e-7, 3e-7))
    for name, bound in zip(("forward", "backward", "double backward, x"), bounds, strict=True):
        error = (actual[name].double() - expected[name]).abs()
        # f grows with x; its error is bounded relatively there.
        error = error / expected[name].abs().clamp(min=1.0)
        assert error.max() <= bound, (name, error.max(), x[error.argmax()])
