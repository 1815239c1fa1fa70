"""The products around the CUDA softmax kernels, with plain PyTorch in the kernels' place.

The kernels themselves are tested in ``tests/native/test_cuda_kernels.cpp``.
"""

from __future__ import annotations

import itertools
import math

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


@pytest.fixture(autouse=True)
def _kernels_in_plain_pytorch():
    library = torch.library.Library("gn_kernels", "IMPL")
    for function in (softmax_forward, softmax_backward, softmax_double_backward):
        library.impl(f"{function.__name__}.native", function, "CPU")
    yield
    library._destroy()


def tensors(bias_shape):
    torch.manual_seed(0)
    q, aq, grad = (torch.randn(BATCH, HEADS, N, SIZE, dtype=torch.float64) for _ in range(3))
    k, v, ak, av = (torch.randn(BATCH, HEADS, M, SIZE, dtype=torch.float64) for _ in range(4))
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
