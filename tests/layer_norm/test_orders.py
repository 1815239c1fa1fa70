"""The three orders of every backend against autograd's derivatives of the definition, float64."""

from __future__ import annotations

import itertools

import pytest
import torch

import gn_kernels
from tests.layer_norm import plain
from tests.layer_norm.plain import OPS, make

ROW_LENGTHS = (1, 2, 3, 7, 48, 49, 197, 384, 768, 1000)
WITH = tuple(itertools.product((True, False), repeat=2))

# Both sides round in float64; autograd's chain of about 30 operations more often than a kernel.
UNITS = 200 * 2.0**-53

with_parameters = pytest.mark.parametrize(("weight", "bias"), WITH)


def check(case, actual=None):
    actual = plain.raw(case) if actual is None else actual
    expected, scales = plain.derived(case), plain.scales(case)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        error = ((value - expected[name]).abs() / (scales[name] + 1e-300)).max().item()
        assert error < UNITS, f"{name} is off by {error:.1e} of its terms"


@pytest.mark.parametrize("row_length", ROW_LENGTHS)
def test_row_lengths(row_length, backend):
    with gn_kernels.use_backend(backend):
        check(make((5, row_length)))


@pytest.mark.parametrize("row_length", [8192, 10000])
def test_long_rows(row_length, backend):
    with gn_kernels.use_backend(backend):
        check(make((2, row_length)))


@pytest.mark.parametrize("rows", [1, 31, 65, 300])
def test_numbers_of_rows(rows, backend):
    # Tiles that are not full, and programs with several tiles.
    with gn_kernels.use_backend(backend):
        check(make((rows, 12)))


@with_parameters
@pytest.mark.parametrize("cotangents", ["vut", "v", "u", "t", "ut"])
def test_absent_parameters_and_cotangents(weight, bias, cotangents, backend):
    case = make((6, 7), weight=weight, bias=bias, cotangents=cotangents)
    if case.v is case.u is case.t is None:
        pytest.skip("nothing to differentiate")
    with gn_kernels.use_backend(backend):
        check(case)


@pytest.mark.parametrize(
    ("shape", "normalized_shape"),
    [
        ((2, 3, 4, 5), (5,)),
        ((2, 3, 4, 5), (4, 5)),
        ((3, 4), (3, 4)),
        ((7,), (7,)),
        ((4, 1, 1), (1, 1)),
    ],
)
def test_ranks(shape, normalized_shape, backend):
    with gn_kernels.use_backend(backend):
        check(make(shape, normalized_shape))


def test_any_strides(backend):
    case = make((3, 4, 5, 6))
    turned = case._replace(
        x=case.x.transpose(0, 2).contiguous().transpose(0, 2),
        grad=case.grad[:, :1, :1, :1].expand(3, 4, 5, 6),
        v=torch.stack((case.v, case.v), dim=-1)[..., 0],
        weight=torch.stack((case.weight, case.weight), dim=-1)[..., 1],
        u=case.u[:1].expand(6),
    )
    with gn_kernels.use_backend(backend):
        check(turned)


@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=3)))
def test_output_masks(mask, backend):
    # What is not asked for is never computed, what is does not depend on the rest.
    x, shape, weight, bias, grad, v, u, t, eps = make((5, 6))
    with gn_kernels.use_backend(backend):
        _, mean, rstd = OPS.layer_norm_forward(x, shape, weight, bias, eps)
        saved = (grad, x, shape, weight)
        for op, arguments in (
            (OPS.layer_norm_backward, (*saved, bias, mean, rstd)),
            (OPS.layer_norm_double_backward, (v, u, t, *saved, mean, rstd)),
        ):
            everything = op(*arguments, [True] * 3)
            for asked, some, whole in zip(mask, op(*arguments, mask), everything, strict=True):
                torch.testing.assert_close(some, whole if asked else whole.new_empty(0))


@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7)])
def test_empty_batch(shape, backend):
    with gn_kernels.use_backend(backend):
        actual = plain.raw(make(shape))
    for name in ("y", "dx", "for grad", "for x"):
        assert actual[name].shape == shape
    for name in ("dweight", "dbias", "for weight"):
        torch.testing.assert_close(actual[name], torch.zeros(7, dtype=torch.float64))


def arguments(case):
    leaves = [one for one in (case.x, case.weight, case.bias) if one is not None]
    leaves = [one.clone().requires_grad_() for one in leaves]

    def function(x, *parameters):
        parameters = iter(parameters)
        weight = None if case.weight is None else next(parameters)
        bias = None if case.bias is None else next(parameters)
        return gn_kernels.layer_norm(x, case.normalized_shape, weight, bias)

    return function, leaves


@with_parameters
def test_gradcheck(weight, bias, backend):
    if backend == "triton" and not (weight and bias):
        pytest.skip("covered by test_absent_parameters_and_cotangents")
    function, leaves = arguments(make((2, 5), weight=weight, bias=bias))
    with gn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(function, leaves)


@with_parameters
def test_gradgradcheck(weight, bias, backend):
    # Every entry of every second derivative; the interpreter is too slow for more than one case.
    if backend == "triton" and not (weight and bias):
        pytest.skip("covered by test_absent_parameters_and_cotangents")
    function, leaves = arguments(make((2, 4), weight=weight, bias=bias))
    with gn_kernels.use_backend(backend):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[1:])
def test_subsets_of_inputs_that_need_a_gradient(needs):
    case = make((4, 6), seed=3)

    def gradients(function):
        leaves = [
            one.clone().requires_grad_(need)
            for one, need in zip((case.x, case.weight, case.bias), needs, strict=True)
        ]
        y = function(leaves[0], (6,), *leaves[1:])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        total = sum(one.pow(2).sum() for one in first)
        second = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        return (*first, *second)

    actual, expected = gradients(gn_kernels.layer_norm), gradients(plain.layer_norm)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [3, 4])
@with_parameters
def test_higher_orders(order, weight, bias):
    case = make((2, 5), weight=weight, bias=bias)

    def derivatives(function):
        leaves = [one for one in (case.x, case.weight, case.bias) if one is not None]
        leaves = [one.clone().requires_grad_() for one in leaves]
        parameters = iter(leaves[1:])
        y = function(
            leaves[0],
            (5,),
            next(parameters) if weight else None,
            next(parameters) if bias else None,
        )
        total = (y * case.grad).pow(3).sum()
        for _ in range(order):
            results = torch.autograd.grad(
                total, leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            total = sum(one.sin().sum() for one in results)
        return [one.detach() for one in results]

    for a, e in zip(derivatives(gn_kernels.layer_norm), derivatives(plain.layer_norm), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * e.abs().max().item())


def test_the_same_bits_every_time(backend):
    case = make((300, 33), dtype=torch.float32)
    with gn_kernels.use_backend(backend):
        first, second = plain.raw(case), plain.raw(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
