"""Each order of attention against autograd of plain attention in float64."""

from __future__ import annotations

import math

import pytest
import torch

import gn_kernels
from gn_kernels.attention import formula
from tests.attention.plain import (
    BATCH,
    HEADS,
    errors,
    make_inputs,
    plain_attention,
    pytorch_attention,
    three_orders,
)

try:
    from gn_kernels.attention.triton_kernels import tiling as TILING
except ImportError:  # no Triton
    TILING = None

# Relative to the root mean square of each result. A sum of n products carries some √n roundings,
# and the second order is a chain of six such sums, so that 30 roundings are expected at N = 197;
# plain attention itself is at 4 to 12 roundings.
TOLERANCE = {torch.float64: 30 * 2.0**-53, torch.float32: 30 * 2.0**-24}

SHAPES = [
    # queries, keys, head size
    (1, 1, 16),
    (1, 7, 24),
    (7, 1, 32),
    (7, 7, 48),
    (5, 50, 80),
    (50, 9, 64),
    (49, 49, 32),
]
SLOW_SHAPES = [(50, 50, 128), (197, 197, 64), (197, 70, 16), (130, 197, 128), (65, 129, 48)]
SHAPES = [pytest.param(*s) for s in SHAPES] + [
    pytest.param(*s, marks=pytest.mark.slow) for s in SLOW_SHAPES
]
BIAS_SHAPES = [
    (HEADS, 7, 9),
    (1, HEADS, 7, 9),
    (BATCH, HEADS, 7, 9),
    (BATCH, 1, 7, 9),
    (7, 9),
    (BATCH, 1, 1, 9),
]


def dtypes_of(backend: str) -> list[torch.dtype]:
    return [torch.float32] if backend == "triton" else [torch.float64, torch.float32]


def check(backend, inputs, scale=None):
    expected = three_orders(plain_attention, inputs, scale=scale)
    for dtype in dtypes_of(backend):
        with gn_kernels.use_backend(backend):
            actual = three_orders(
                gn_kernels.attention, [one.to(dtype) for one in inputs], scale=scale
            )
        for name, error in errors(actual, expected).items():
            assert error < TOLERANCE[dtype], (name, dtype)
            assert actual[name].dtype == dtype


@pytest.mark.parametrize(("queries", "keys", "size"), SHAPES)
def test_lengths_and_head_sizes(queries, keys, size, backend):
    # What float32 holds exactly, so that every precision is given the same numbers.
    inputs = [one.float().double() for one in make_inputs(queries, keys, size)]
    if keys == 1:  # P = 1: all but V's derivatives are zero, and roundings alone would be compared
        with gn_kernels.use_backend(backend):
            actual = three_orders(gn_kernels.attention, [one.float() for one in inputs])
        expected = three_orders(plain_attention, inputs)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name].double(), value, rtol=1e-5, atol=1e-4)
    else:
        check(backend, inputs)


@pytest.mark.parametrize("bias_shape", BIAS_SHAPES)
def test_bias(bias_shape, backend):
    inputs = make_inputs(7, 9, 16, bias_shape)
    check(backend, [one.float().double() for one in inputs], scale=0.3)


@pytest.mark.parametrize("bias_shape", [(1, 1, 7, 1), (7, 1), (1,)])
def test_a_bias_that_shifts_whole_rows_has_no_gradient(bias_shape, backend):
    inputs = make_inputs(7, 9, 16, bias_shape, torch.float32)
    with gn_kernels.use_backend(backend):
        actual = three_orders(gn_kernels.attention, inputs)
    for name, value in three_orders(plain_attention, [x.double() for x in inputs]).items():
        torch.testing.assert_close(actual[name].double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bias_shape", [(HEADS, 70, 150), (BATCH, 1, 70, 150)])
def test_bias_over_several_blocks(bias_shape, backend):
    check(backend, [one.float().double() for one in make_inputs(70, 150, 32, bias_shape)])


@pytest.mark.parametrize("hip", [None, "6.4"])
@pytest.mark.parametrize("bias_shape", [None, (HEADS, 50, 70)])
@pytest.mark.parametrize("size", [24, pytest.param(80, marks=pytest.mark.slow)])
def test_blocks_as_gpus_have_them(size, bias_shape, hip, monkeypatch):
    # In place of those of conftest.py: what 16 bits take, of an NVIDIA and of an AMD GPU.
    triton_kernels = pytest.importorskip("gn_kernels.attention.triton_kernels")
    chosen = set()

    def tiling(kernel, size, dtype, biased, precision):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, "hip", hip)
            found = TILING(kernel, size, torch.bfloat16, biased, precision)
        chosen.add(found)
        return found

    monkeypatch.setattr(triton_kernels, "tiling", tiling)
    check("triton", [one.float().double() for one in make_inputs(50, 70, size, bias_shape)])
    assert len(chosen) > 1


def test_windows_with_a_bias_that_repeats(backend):
    # Swin's: windows of every image share a mask and a bias, (images, windows, heads, N, d).
    def inputs(dtype):
        torch.manual_seed(3)
        qkv = [torch.randn(3, 2, HEADS, 9, 8, dtype=torch.float64) for _ in range(3)]
        bias = torch.randn(2, HEADS, 9, 9, dtype=torch.float64)
        bias[1, :, :4, 5:] = -math.inf
        return [one.float().to(dtype) for one in (*qkv, bias)]

    expected = three_orders(plain_attention, inputs(torch.float64))
    with gn_kernels.use_backend(backend):
        actual = three_orders(gn_kernels.attention, inputs(torch.float32))
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("period", "heads"), [(1, 1), (2, HEADS), (2, 1), (4, 1)])
def test_raw_bias_periods(period, heads, backend):
    q, k, v = (torch.randn(4, HEADS, 5, 8) for _ in range(3))
    grad, aq, ak, av = (torch.randn(4, HEADS, 5, 8) for _ in range(4))
    bias, abias = (torch.randn(period, heads, 5, 5) for _ in range(2))
    arguments = (q, k, v, bias, 0.4)
    ops, every = torch.ops.gn_kernels, (True,) * 5
    wide = [one.double() for one in (aq, ak, av, abias, grad, q, k, v, bias)]
    with gn_kernels.use_backend(backend):
        out, lse = ops.attention_forward(*arguments)
        first = ops.attention_backward(grad, *arguments[:4], out, lse, 0.4, every[:4])
        second = ops.attention_double_backward(
            aq, ak, av, abias, grad, *arguments[:4], out, lse, 0.4, every
        )
    expected = (
        formula.backward(*wide[4:], 0.4, every[:4]),
        formula.double_backward(tuple(wide[:4]), *wide[4:], 0.4, every),
    )
    for actual, reference in zip((first, second), expected, strict=True):
        for one, other in zip(actual, reference, strict=True):
            assert (one - other).norm() < 2e-6 * other.norm()


def test_rows_masked_in_part_and_entirely(backend):
    # PyTorch's own function is the model: 0, not NaN, in all orders.
    inputs = make_inputs(6, 9, 16, (6, 9), torch.float32)
    inputs[3][0, 3:] = -math.inf
    inputs[3][2] = -math.inf
    inputs[3][5, 1:] = -math.inf
    expected = three_orders(pytorch_attention, [one.double() for one in inputs])
    with gn_kernels.use_backend(backend):
        actual = three_orders(gn_kernels.attention, inputs)
    assert not actual["out"][:, :, 2].any()
    for name, error in errors(actual, expected).items():
        assert error < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_scores(shift, backend):
    # exp of these overflows, or loses every digit, unless a maximum is subtracted.
    inputs = make_inputs(5, 40, 16, (5, 40), torch.float32)
    inputs[3] += shift
    expected = three_orders(plain_attention, [one.double() for one in inputs])
    with gn_kernels.use_backend(backend):
        actual = three_orders(gn_kernels.attention, inputs)
    # Scores of 300 are rounded to 1.5e-5 before exp sees them.
    assert max(errors(actual, expected).values()) < 1e-4


def test_nan_and_infinity_go_where_they_go_in_pytorch(backend):
    q, k, v = make_inputs(4, 5, 16, dtype=torch.float32)
    q[0, 0, 1, 3], v[0, 1, 2, 0], k[1, 1, 0, 0] = math.nan, math.inf, math.nan
    with gn_kernels.use_backend(backend):
        actual = gn_kernels.attention(q, k, v)
    expected = pytorch_attention(q, k, v)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "last strided", "expanded", "sliced"])
def test_layouts(layout, backend):
    q, k, v = make_inputs(6, 6, 16, dtype=torch.float32)
    if layout == "packed":
        packed = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
        views = packed.permute(2, 0, 3, 1, 4).unbind(0)
    elif layout == "last strided":
        views = [one.mT.contiguous().mT for one in (q, k, v)]
    elif layout == "sliced":
        views = [torch.cat([one, one], -1)[..., :16] for one in (q, k, v)]
    else:
        q, k, v = (one[:, :1] for one in (q, k, v))
        views = [one.expand(-1, HEADS, -1, -1) for one in (q, k, v)]
        q, k, v = (one.contiguous() for one in views)
    with gn_kernels.use_backend(backend):
        actual = three_orders(gn_kernels.attention, list(views))
        expected = three_orders(gn_kernels.attention, [q, k, v])
        # The gradient of a sum is an expanded scalar.
        leaf = views[0].detach().requires_grad_()
        gn_kernels.attention(leaf, views[1], views[2]).sum().backward()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    plain = q.detach().clone().requires_grad_()
    plain_attention(plain, k, v).sum().backward()
    torch.testing.assert_close(leaf.grad, plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_shape", [None, (HEADS, 50, 50)])
def test_half_precision_is_no_worse_than_pytorch(dtype, bias_shape, backend):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    inputs = make_inputs(50, 50, 32, bias_shape, dtype)
    expected = three_orders(plain_attention, [one.double() for one in inputs])
    with gn_kernels.use_backend(backend):
        ours = errors(three_orders(gn_kernels.attention, inputs), expected)
    eager = errors(three_orders(plain_attention, inputs), expected)
    for name, error in ours.items():
        assert error < eager[name], (name, ours, eager)
    if backend != "triton":  # PyTorch's own function computes in float32 on the CPU, as these do
        pytorch = errors(three_orders(pytorch_attention, inputs), expected)
        for name, error in ours.items():
            assert error < 1.1 * pytorch[name], (name, ours, pytorch)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias_leading", ["none", "outer", "inner", "full"])
def test_leading_dimensions(leading, bias_leading):
    shape = (*leading, HEADS, 5, 8)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sizes = {
        "none": (),
        "outer": (*leading[:1], *(1 for _ in leading[1:])),
        "inner": leading[1:],
        "full": leading,
    }[bias_leading]
    bias = torch.randn(*sizes, HEADS, 5, 5, dtype=torch.float64, requires_grad=True)
    leaves = [q, k, v, bias]
    actual, expected = gn_kernels.attention(*leaves), plain_attention(*leaves)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(
        torch.autograd.grad(actual.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)])
def test_empty(shape, backend):
    q = torch.randn(shape, requires_grad=True)
    keys = (*shape[:2], 3, 8)
    k, v = (torch.randn(keys, requires_grad=True) for _ in range(2))
    with gn_kernels.use_backend(backend):
        out = gn_kernels.attention(q, k, v)
        first = torch.autograd.grad(out.sum(), [q, k, v], create_graph=True)
        second = torch.autograd.grad(sum(one.sum() for one in first), [q, k, v])
    assert out.shape == shape
    for one, leaf in zip((*first, *second), (q, k, v) * 2, strict=True):
        assert one.shape == leaf.shape
        assert not one.any()


def test_deterministic(backend):
    inputs = make_inputs(20, 20, 16, (HEADS, 20, 20), torch.float32)
    with gn_kernels.use_backend(backend):
        once, twice = (three_orders(gn_kernels.attention, inputs) for _ in range(2))
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
