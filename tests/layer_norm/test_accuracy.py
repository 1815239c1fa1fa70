"""Rounding errors of every order, dtype and backend, beside those of eager PyTorch; extremes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import gn_kernels
from tests.layer_norm import plain
from tests.layer_norm.plain import NAMES, make

# NumPy warns of inf − inf, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# In ulp of the result's format. Triton's interpreter truncates to bf16.
ULP = {"native": 0.51, "reference": 0.51, "triton": 1.0}

# Beside that, in units of 2⁻²⁴ of the terms that a result is a sum of: the roundings on the way to
# an element (of the statistics, of x̂, of row sums and of their products), and of a sum over rows.
ROUNDINGS = dict.fromkeys(NAMES, 8.0) | {"dweight": 4.0, "dbias": 4.0, "for weight": 12.0}

HALF = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}


def ulp(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mantissa, smallest = HALF[dtype]
    exponent = torch.frexp(expected.abs())[1].double() - 1
    return torch.exp2(exponent.clamp(min=smallest) - mantissa)


@pytest.mark.parametrize("parameters", ["of x's dtype", "float32"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("row_length", [49, 384, 1000])
def test_half_precision(row_length, dtype, parameters, backend):
    if backend == "triton" and row_length == 1000:
        pytest.skip("one second each in the interpreter")
    parameter_dtype = torch.float32 if parameters == "float32" else dtype
    case = make((40, row_length), dtype=dtype, parameter_dtype=parameter_dtype)
    with gn_kernels.use_backend(backend):
        actual = plain.raw(case)
    expected, scales = plain.derived(case), plain.scales(case)
    for name, value in actual.items():
        is_parameter = name in ("dweight", "dbias", "for weight")
        assert value.dtype == (parameter_dtype if is_parameter else dtype)
        bound = ROUNDINGS[name] * 2.0**-24 * scales[name]
        if value.dtype in HALF:
            bound += ULP[backend] * ulp(expected[name], dtype)
        assert ((value.double() - expected[name]).abs() <= bound).all(), name


@pytest.mark.parametrize("shape", [(64, 197), (512, 384), (16, 1000), (3, 8192)])
def test_float32_is_no_worse_than_eager(shape, backend):
    if backend == "triton" and shape != (64, 197):
        pytest.skip("the interpreter adds up in another order than a GPU")
    case = make(shape, dtype=torch.float32)
    with gn_kernels.use_backend(backend):
        actual = plain.raw(case)
    expected, scales = plain.derived(case), plain.scales(case)
    eager = plain.derived(case, F.layer_norm, torch.float32)

    def error(results, name):
        return ((results[name] - expected[name]) / scales[name]).square().mean().sqrt().item()

    for name in actual:
        # Two draws of the same size of error differ by so much; half a unit is the last rounding.
        assert error(actual, name) <= 1.1 * error(eager, name) + 2.0**-26, name


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_rows_far_from_zero_are_no_worse_than_eager(offset, backend):
    x = (torch.randn(8, 384, dtype=torch.float64) + offset).float()
    expected = plain.layer_norm(x.double(), (384,))
    with gn_kernels.use_backend(backend):
        ours = (gn_kernels.layer_norm(x, (384,)) - expected).abs().max()
    eager = (F.layer_norm(x, (384,)) - expected).abs().max()
    assert ours <= 1.1 * eager + 2.0**-23  # a rounding of the largest results


def everything(function, x, eps=1e-5):
    """y, the first and the second derivative, of float32 rows with weight and bias."""
    x = x.clone().requires_grad_()
    weight = torch.linspace(0.5, 2.0, x.shape[-1]).requires_grad_()
    bias = torch.linspace(-1.0, 1.0, x.shape[-1]).requires_grad_()
    grad = torch.linspace(-1.0, 2.0, x.numel()).view(x.shape).requires_grad_()
    y = function(x, x.shape[-1:], weight, bias, eps)
    first = torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True)
    second = torch.autograd.grad(first[0], (grad, x, weight), torch.ones_like(x).cumsum(-1))
    return [one.detach() for one in (y, *first, *second)]


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, 1e-30, 1e30])
@pytest.mark.parametrize("row_length", [1, 3, 384])
def test_constant_rows(value, row_length, backend):
    # y is the bias, to the bit; PyTorch's own mean of such a row can be off.
    x = torch.full((3, row_length), value)
    with gn_kernels.use_backend(backend):
        y, *others = everything(gn_kernels.layer_norm, x)
    torch.testing.assert_close(
        y, torch.linspace(-1.0, 1.0, row_length).expand_as(y), rtol=0, atol=0
    )
    assert all(one.isfinite().all() for one in others)


def test_constant_rows_without_eps_are_nan(backend):
    # 0/0, as in PyTorch
    x = torch.stack((torch.full((7,), 0.1), torch.arange(7.0)))
    with gn_kernels.use_backend(backend):
        actual = everything(gn_kernels.layer_norm, x, eps=0.0)
    for a, e in zip(actual, everything(F.layer_norm, x, eps=0.0), strict=True):
        assert a.isnan().equal(e.isnan())


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_only_the_row_with_an_infinity_is_nan(value, backend):
    x = torch.randn(4, 48)
    x[1, 5] = value
    with gn_kernels.use_backend(backend):
        actual = everything(gn_kernels.layer_norm, x)
    for a, e in zip(actual, everything(F.layer_norm, x), strict=True):
        assert a.isnan().equal(e.isnan())


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e17])
def test_tiny_and_huge_rows(factor, backend):
    # Over 1e18 the variance overflows float32: PyTorch gives 0 or NaN then.
    x = torch.randn(4, 48) * factor
    with gn_kernels.use_backend(backend):
        y = everything(gn_kernels.layer_norm, x)[0]
    expected = everything(
        lambda *a: plain.layer_norm(
            *(one.double() if isinstance(one, torch.Tensor) else one for one in a)
        ),
        x,
    )[0]
    torch.testing.assert_close(y.double(), expected.double(), rtol=1e-5, atol=1e-6)
    overflown = gn_kernels.layer_norm(x.sign() * 1e30, (48,))
    assert ((overflown == 0) | overflown.isnan()).all()
