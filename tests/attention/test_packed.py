"""Attention of one tensor qkv: the same numbers, and no copy between it and the linear layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gn_kernels
from gn_kernels.counting import Counter
from tests.attention.plain import (
    HEADS,
    errors,
    make_inputs,
    make_vit,
    plain_attention,
    three_orders,
)
from tests.small_transformer import (
    functional_loss,
    make_batch,
    relative_error,
    sample_losses,
    total_loss,
    weight_gradients,
)

ops = torch.ops.gn_kernels


def packed_attention(q, k, v, bias=None, scale=None):
    """With the gradients of q, k and v taken apart again, so that the tests of those serve."""
    qkv = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    return gn_kernels.attention_qkv(qkv, bias, scale)


@pytest.mark.parametrize(
    ("length", "size", "bias_shape"),
    [(1, 16, None), (7, 24, None), (49, 32, (HEADS, 49, 49)), (9, 16, (2, 1, 9, 9))],
)
def test_three_orders(length, size, bias_shape, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = [one.float() for one in make_inputs(length, None, size, bias_shape)]
    expected = three_orders(plain_attention, [one.double() for one in inputs], scale=0.3)
    with gn_kernels.use_backend(backend):
        actual = three_orders(packed_attention, [one.to(dtype) for one in inputs], scale=0.3)
        separate = three_orders(gn_kernels.attention, [one.to(dtype) for one in inputs], scale=0.3)
    bound = 30 * torch.finfo(dtype).eps
    for name, error in errors(actual, expected).items():
        if length > 1:  # else P = 1, and all but V's derivatives are roundings
            assert error < bound, name
        if backend != "reference":
            assert torch.equal(actual[name], separate[name]), name
    # The formula's products are those of a BLAS, whose order of sums may follow the strides.
    if length > 1:
        assert max(errors(actual, separate).values()) < bound


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_only_what_is_wanted(wanted, backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v, bias = make_inputs(5, None, 16, (HEADS, 5, 5), dtype)
    grad, inputs = torch.randn_like(q), [torch.stack([q, k, v]), bias]

    def second(attention, dtype):
        leaves = [
            one.to(dtype).requires_grad_(asked)
            for one, asked in zip((grad, *inputs), wanted, strict=True)
        ]
        asked = [leaf for leaf in leaves[1:] if leaf.requires_grad]
        first = torch.autograd.grad(attention(*leaves[1:]), asked, leaves[0], create_graph=True)
        every = [leaf for leaf in leaves if leaf.requires_grad]
        return first, torch.autograd.grad(sum(one.square().sum() for one in first), every)

    if any(wanted[1:]):
        with gn_kernels.use_backend(backend):
            actual = second(gn_kernels.attention_qkv, dtype)
        expected = second(lambda qkv, bias: plain_attention(*qkv, bias), torch.float64)
        for orders in zip(actual, expected, strict=True):
            for one, other in zip(*orders, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def check(gradients):
    model = make_vit(plain_attention)
    expected = weight_gradients(model, total_loss(model, *make_batch()))
    assert relative_error(gradients, expected) < 1e-13


def test_torch_func_and_vmap():
    model, batch = make_vit(packed_attention), make_batch()
    check(weight_gradients(model, functional_loss(model, dict(model.named_parameters()), *batch)))
    for losses in (functional_loss, sample_losses):
        gradients = torch.func.grad(lambda p, losses=losses: losses(model, p, *batch))(
            dict(model.named_parameters())
        )
        check(torch.cat([g.flatten() for g in gradients.values()]))


@pytest.mark.slow
def test_compiled_penalty():
    torch._dynamo.reset()
    model, batch = make_vit(packed_attention), make_batch()
    compiled = torch.compile(
        lambda parameters: functional_loss(model, parameters, *batch), fullgraph=True
    )
    check(weight_gradients(model, compiled(dict(model.named_parameters()))))


def test_gradgradcheck(backend):
    if backend == "triton":
        pytest.skip("no float64 there")
    leaves = [torch.randn(3, 1, 2, 3, 4), torch.randn(2, 3, 3)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    with gn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(gn_kernels.attention_qkv, leaves)
        assert torch.autograd.gradgradcheck(gn_kernels.attention_qkv, leaves)


def test_third_order_and_absent_cotangents():
    def derivatives(attention):
        torch.manual_seed(1)
        qkv = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
        value = attention(qkv, bias).pow(3).sum()
        for leaf in (bias, qkv, qkv):  # at first the bias alone has a gradient
            (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
            value = slope.pow(3).sum()
        return slope

    actual = derivatives(gn_kernels.attention_qkv)
    expected = derivatives(lambda qkv, bias: plain_attention(*qkv, bias))
    assert relative_error(actual, expected) < 1e-11


def test_other_numbers_of_dimensions():
    qkv = torch.randn(3, 4, 2, 5, 6, 8)
    torch.testing.assert_close(gn_kernels.attention_qkv(qkv), plain_attention(*qkv))
    torch.testing.assert_close(
        gn_kernels.attention_qkv(qkv[:, 0, 0]), plain_attention(*qkv[:, 0, 0])
    )


@pytest.mark.parametrize("order", ["backward", "double_backward"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_lie_as_the_linear_layer_wants_them(order, device, backend):
    qkv = torch.randn(2, 7, 3, HEADS, 16, device=device).permute(2, 0, 3, 1, 4)
    with gn_kernels.use_backend(backend):
        out, lse = ops.attention_forward(*qkv, None, 0.25)
        saved = (out, *qkv, None, out, lse, 0.25)
        if order == "backward":
            packed, *rest = ops.attention_backward(*saved, [True] * 3 + [False], True)
        else:
            mask = [False] + [True] * 3 + [False]
            _, packed, *rest = ops.attention_double_backward(*qkv, None, *saved, mask, True)
    assert packed.shape == qkv.shape
    assert packed.permute(1, 3, 0, 2, 4).is_contiguous()
    assert [one.numel() for one in rest] == [0, 0, 0]


def test_opcheck(backend):
    qkv = torch.randn(2, 5, 3, HEADS, 16).permute(2, 0, 3, 1, 4)
    with gn_kernels.use_backend(backend):
        out, lse = ops.attention_forward(*qkv, None, 0.25)
        saved = (torch.randn_like(out), *qkv, None, out, lse, 0.25)
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        mask = [True] * 3 + [False]
        torch.library.opcheck(
            ops.attention_backward.default, (*saved, mask, True), test_utils=tests
        )
        torch.library.opcheck(
            ops.attention_double_backward.default,
            (*qkv, None, *saved, [True, *mask], True),
            test_utils=tests,
        )


def test_flops_are_those_of_separate_gradients():
    qkv = torch.empty(3, 2, HEADS, 7, 16, device="meta")
    counts = []
    for packed in (False, True):
        with Counter() as counter:
            out, lse = ops.attention_forward(*qkv, None, 0.25)
            saved = (out, *qkv, None, out, lse, 0.25)
            ops.attention_backward(*saved, [True] * 3 + [False], packed)
            ops.attention_double_backward(*qkv, None, *saved, [True] * 4 + [False], packed)
        counts.append((counter.flop, counter.bytes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((None,), TypeError, "qkv must be a Tensor, but got NoneType"),
        ((torch.zeros(2, 1, 2, 5, 8),), RuntimeError, r"qkv must be \(3, …, heads, N, d\)"),
        ((torch.zeros(3, 5, 8),), RuntimeError, r"qkv must be \(3, …, heads, N, d\)"),
        ((torch.zeros(3, 1, 2, 0, 8),), RuntimeError, "k must have at least one row"),
        ((torch.zeros(3, 1, 2, 5, 8).int(),), NotImplementedError, "q must be float16"),
        ((torch.zeros(3, 1, 2, 5, 8), torch.zeros(4, 4)), RuntimeError, "bias must be broadcast"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        gn_kernels.attention_qkv(*arguments)


def test_raw_ops_refuse_what_can_not_be_packed():
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)
    lse = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="a k of q's shape"):
        ops.attention_backward(q, q, k, k, None, q, lse, 1.0, [True] * 4, True)
    with pytest.raises(RuntimeError, match="all of q, k and v, or for none"):
        ops.attention_backward(q, q, q, q, None, q, lse, 1.0, [True, True, False, False], True)


def test_autocast_casts_once():
    qkv = torch.randn(3, 1, 2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gn_kernels.attention_qkv(qkv, torch.zeros(5, 5))
    assert out.dtype == torch.bfloat16
    assert out.grad_fn.name().startswith("PackedAttentionFunction")


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


def penalised(model, x):
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


def test_a_swapped_layer_copies_nothing_around_qkv():
    model = Counted()
    gn_kernels.swap(model)
    with Counter() as counter:
        penalised(model, torch.randn(4, 9, 32, requires_grad=True))
    names = {op.name for op in counter.ops}
    assert "gn_kernels.attention_double_backward" in names
    assert not names & {"aten.stack", "aten.clone", "aten.cat", "aten.copy_"}


@pytest.mark.parametrize("how", ["hook", "retain_grad", "replaced", "reordered", "other dim"])
def test_parts_that_somebody_looks_at_stay_apart(how):
    seen = []

    class Watched(Counted):
        def forward(self, x):
            qkv = self.qkv(x).reshape(4, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.transpose(0, 1).unbind(1) if how == "other dim" else qkv.unbind(0)
            if how == "hook":
                k.register_hook(seen.append)
            elif how == "retain_grad":
                k.retain_grad()
                self.k = k
            elif how == "replaced":
                k = k * 2
            elif how == "reordered":
                q, k = k, q
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model, x = Watched(), torch.randn(4, 9, 32, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        penalised(model, x)
    expected = model.qkv.weight.grad
    model.zero_grad()
    gn_kernels.swap(model)
    assert model(x).grad_fn.name().startswith("AttentionFunction")
    del seen[:]
    penalised(model, x)
    torch.testing.assert_close(model.qkv.weight.grad, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == (2 if how == "hook" else 0)
    assert how != "retain_grad" or model.k.grad is not None
