"""The products around the CUDA softmax kernels, with plain PyTorch in the kernels' place.

The kernels themselves are tested in ``tests/native/test_cuda_kernels.cpp``.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from gn_kernels.attention import formula, native_cuda

BATCH, HEADS, N, M, SIZE = 4, 2, 5, 7, 3


def scores(products, bias, scale):
    s = products * scale
    return s if bias is None else s + bias.repeat(products.shape[0] // bias.shape[0], 1, 1, 1)


def fill(target, value):
    if target is not None:
        target.copy_(value)


def softmax_forward(products, bias, scale, probabilities, log_sums):
    s = scores(products, bias, scale)
    lse = s.logsumexp(-1)
    log_sums.copy_(lse.masked_fill(lse == -math.inf, math.inf))
    probabilities.copy_((s - log_sums[..., None]).exp())


def softmax_backward(products, bias, scale, log_sums, dp, probabilities, ds):
    p = (scores(products, bias, scale) - log_sums[..., None]).exp()
    dp = torch.zeros_like(p) if dp is None else dp
    fill(probabilities, p)
    fill(ds, p * (dp - (p * dp).sum(-1, keepdim=True)))


def softmax_double_backward(
    products, bias, scale, log_sums, dp, t_products, t_bias, u, probabilities, g, ds, for_s
):
    p = (scores(products, bias, scale) - log_sums[..., None]).exp()
    zeros = torch.zeros_like(p)
    dp, t, u = (zeros if one is None else one for one in (dp, t_products, u))
    t = scores(t, t_bias, scale)

    def centred(a):
        return p * (a - (p * a).sum(-1, keepdim=True))

    delta, tau = (p * dp).sum(-1, keepdim=True), (p * t).sum(-1, keepdim=True)
    fill(probabilities, p)
    fill(g, centred(t))
    fill(ds, centred(dp))
    fill(for_s, centred(t * (dp - delta) - tau * dp + u))


def with_checked_rows(function):
    """As the kernels read scores: in vectors, and what lies between rows holds anything."""

    def check(products, bias, *others):
        for one in (products, *others):
            if isinstance(one, torch.Tensor) and one.shape == products.shape:
                lanes = 16 // one.element_size()
                assert one.stride(2) == -(-one.shape[3] // lanes) * lanes
                assert one.stride()[:2] == (HEADS * N * one.stride(2), N * one.stride(2))
                assert one.data_ptr() % 16 == 0
                one._base[..., one.shape[3] :] = math.nan
        function(products, bias, *others)

    return check


@pytest.fixture(autouse=True)
def _kernels_in_plain_pytorch():
    library = torch.library.Library("gn_kernels", "IMPL")
    for function in (softmax_forward, softmax_backward, softmax_double_backward):
        library.impl(f"{function.__name__}.native", with_checked_rows(function), "CPU")
    yield
    library._destroy()


def tensors(bias_shape, n=N, m=M):
    torch.manual_seed(0)
    q, aq, grad = (torch.randn(BATCH, HEADS, n, SIZE, dtype=torch.float64) for _ in range(3))
    k, v, ak, av = (torch.randn(BATCH, HEADS, m, SIZE, dtype=torch.float64) for _ in range(4))
    bias = abias = None
    if bias_shape is not None:
        bias, abias = (torch.randn(bias_shape, dtype=torch.float64) for _ in range(2))
        bias.view(-1)[1:3] = -math.inf
    return (q, k, v, bias), (aq, ak, av, abias), grad


def filled(expected):
    return [None if one is None else torch.full_like(one, math.nan) for one in expected]


@pytest.mark.parametrize("bias_shape", [None, (1, HEADS, N, M), (2, 1, N, M), (BATCH, 1, 1, M)])
def test_three_orders(bias_shape):
    inputs, cotangents, grad = tensors(bias_shape)
    scale = 0.3
    out, lse = torch.empty(BATCH, HEADS, N, SIZE, dtype=torch.float64), grad.new_empty(0)
    lse = grad.new_empty(BATCH, HEADS, N)
    native_cuda.forward(*inputs, scale, out, lse)
    torch.testing.assert_close(out, formula.forward(*inputs, scale))
    q, k, _, bias = inputs
    torch.testing.assert_close(lse, formula.log_sum_exp(q, k, bias, scale))

    for asked in itertools.product((True, False), repeat=4):
        expected = formula.backward(grad, *inputs, scale, asked)
        targets = filled(expected)
        native_cuda.backward(grad, *inputs, out, lse, scale, *targets)
        torch.testing.assert_close(targets, list(expected))

    for given in itertools.product((True, False), repeat=4):
        some = tuple(one if there else None for one, there in zip(cotangents, given, strict=True))
        if all(one is None for one in some):
            continue
        full = formula.double_backward(some, grad, *inputs, scale, (True,) * 5)
        zeros = (grad, *inputs)  # None from the formula stands for 0
        full = tuple(
            torch.zeros_like(zero) if one is None and zero is not None else one
            for one, zero in zip(full, zeros, strict=True)
        )
        for asked in itertools.product((True, False), repeat=5):
            expected = [one if ask else None for one, ask in zip(full, asked, strict=True)]
            targets = filled(expected)
            native_cuda.double_backward(*some, grad, *inputs, out, lse, scale, *targets)
            torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(5, 49), (5, 8), (1, 7), (5, 1), (1, 1)])
def test_products_lie_in_padded_rows_without_a_copy(n, m, dtype):
    (q, k, _, _), (aq, *_), _ = tensors(None, n, m)
    q, k, aq = (one.to(dtype) for one in (q, k, aq))
    # oneDNN, which CPUs with instructions for bf16 take for it, copies what is not contiguous.
    blas = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None)
    with blas, torch.profiler.profile() as profile, warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = native_cuda._scores(q, k, 0.5)
        between = scores._base[..., m:].fill_(math.nan)
        rows = [native_cuda._rows(scores, k, 0.5), native_cuda._rows(scores.mT, q, 0.5)]
    assert scores.stride(2) * dtype.itemsize == -(-m * dtype.itemsize // 16) * 16
    assert not {one.key for one in profile.key_averages()} & {"aten::copy_", "aten::clone"}
    expected = 0.5 * q.double() @ k.double().mT
    bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(scores.double(), expected, rtol=0.0, atol=bound)
    for row, left, right in ((rows[0], scores, k), (rows[1], scores.mT, q)):
        truth = 0.5 * left.double() @ right.double()
        bound = 8 * torch.finfo(dtype).eps * truth.abs().max()
        torch.testing.assert_close(row.double(), truth, rtol=0.0, atol=bound)
    same = native_cuda._scores(aq, k, 0.5, plus=scores)
    assert same is scores
    expected = expected + 0.5 * aq.double() @ k.double().mT
    bound = 16 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(same.double(), expected, rtol=0.0, atol=bound)
    assert between.isnan().all()


def test_the_factor_comes_before_the_rounding():
    q = torch.full((1, 1, 2, 64), 64.0, dtype=torch.float16)  # products of 2¹⁸
    scores = native_cuda._scores(q, q, 0.125)
    assert (scores == 2.0**15).all()
    assert (native_cuda._rows(scores, q, 2.0**-11) == 2.0**11).all()


def test_a_small_bias_is_copied_into_padded_rows():
    scores = native_cuda._padded((64, 2, 7, 49), torch.empty(0, dtype=torch.bfloat16))
    for shape, padded in (
        ((1, 2, 7, 49), True),
        ((8, 1, 1, 49), True),
        ((32, 2, 7, 49), False),  # half of the scores
        ((1, 2, 7, 1), False),
        ((1, 2, 7, 56), False),  # lies so already
    ):
        bias = torch.randn(shape).bfloat16()
        found = native_cuda._aligned(bias, scores)
        assert (found is not bias) == padded
        assert torch.equal(found, bias)
        if padded:
            assert found.stride(2) == 56
            assert native_cuda._aligned(found, scores) is found
    assert native_cuda._aligned(None, scores) is None
