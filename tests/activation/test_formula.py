"""The formulas against mpmath, PyTorch and finite differences."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from gn_kernels.activation.formula import ACTIVATIONS, FORMULA
from tests.small_transformer import PYTORCH

KINDS = tuple(ACTIVATIONS)


def _mp_sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


MPMATH = {
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: (
        x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2
    ),
    "silu": lambda x: x * _mp_sigmoid(x),
    "quick_gelu": lambda x: x * _mp_sigmoid(mpmath.mpf("1.702") * x),
}


def exact(kind: str, order: int, x: float) -> float:
    with mpmath.workdps(400):  # 1 + tanh(−300) takes 261 of them
        return float(mpmath.diff(MPMATH[kind], mpmath.mpf(x), order))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_float64_against_mpmath(kind, order):
    values = [*(k / 4 for k in range(-48, 49) if k), -20.0, 1e-3, -1e-9]
    x = torch.tensor(values, dtype=torch.float64)
    expected, scale = (
        torch.tensor([f(value) for value in values], dtype=torch.float64)
        for f in (lambda value: exact(kind, order, value), lambda value: size(kind, order, value))
    )
    actual = ACTIVATIONS[kind][order](x)
    # A few roundings of the terms that are added up; an exponential multiplies the rounding of
    # its argument by that argument, which is below 4x² + 8 for every kind.
    tolerance = (8 + 4 * (x * x + 2)) * 2.0**-53 * scale
    worst = ((actual - expected).abs() / tolerance).argmax()
    assert (actual - expected).abs()[worst] <= tolerance[worst], x[worst]


def size(kind: str, order: int, x: float) -> float:
    """The size of the terms that make up f, f′ or f″ and may cancel near its roots."""
    tail = abs(exact(kind, 0, -abs(x)) / x)  # Φ(−|x|) or σ(−|g|)
    here = max(tail, abs(exact(kind, 0, x) / x))
    return here * abs(x) if order == 0 else here + tail * (1 + abs(x)) ** (3 * order)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorch(kind):
    x = torch.linspace(-10, 10, 1001).double()
    torch.testing.assert_close(
        FORMULA.forward((x,), (kind,))[0], PYTORCH[kind](x), rtol=1e-12, atol=1e-15
    )


SPECIAL = [math.inf, 1e300, 1e30, 65504.0, 5e-324, 0.0, -0.0, -5e-324, -65504.0, -1e30, -math.inf]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_limits(kind, dtype):
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    one = torch.ones_like(x)
    (y,) = FORMULA.forward((x,), (kind,))
    (d1,) = FORMULA.backward((True,), one, (x,), (), (kind,))
    _, d2 = FORMULA.double_backward((True, True), (one,), one, (x,), (), (kind,))
    large = x.abs() > 1e4
    torch.testing.assert_close(y[large], x[large].relu(), rtol=0, atol=0)
    torch.testing.assert_close(d1[large], (x[large] > 0).to(dtype), rtol=0, atol=0)
    assert (d2[large] == 0).all()
    torch.testing.assert_close(y[~large], x[~large] / 2, rtol=0, atol=0)
    assert y[SPECIAL.index(-0.0) + 1].signbit()
    assert FORMULA.forward((torch.full((1,), math.nan, dtype=dtype),), (kind,))[0].isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_of_the_formula_keeps_the_limits(kind):
    # While compiling, the derivatives are autograd's of the formula.
    x = torch.tensor([math.inf, 1e30, -1e30, -math.inf], requires_grad=True)
    (d1,) = torch.autograd.grad(FORMULA.forward((x,), (kind,))[0].sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad(d1.sum(), x)
    assert d1.tolist() == [1, 1, 0, 0]
    assert d2.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_order_is_the_derivative_of_the_one_before(kind):
    x, grad, v = (torch.randn(20).double().requires_grad_() for _ in range(3))
    torch.autograd.gradcheck(lambda x: FORMULA.forward((x,), (kind,)), (x,))
    torch.autograd.gradcheck(
        lambda grad, x: FORMULA.backward((True,), grad, (x,), (), (kind,)), (grad, x)
    )
    torch.autograd.gradcheck(
        lambda v, grad, x: FORMULA.double_backward((True, True), (v,), grad, (x,), (), (kind,)),
        (v, grad, x),
    )
    (dx,) = FORMULA.backward((True,), grad, (x,), (), (kind,))
    expected = torch.autograd.grad(dx, (grad, x), v)
    actual = FORMULA.double_backward((True, True), (v,), grad, (x,), (), (kind,))
    torch.testing.assert_close(actual, expected)
