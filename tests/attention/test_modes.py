"""Attention in every mode of PyTorch, to higher orders; what it saves, computes and refuses."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gn_kernels
from tests.attention.plain import make_inputs, make_vit, plain_attention, pytorch_attention
from tests.small_transformer import (
    functional_loss,
    make_batch,
    relative_error,
    sample_losses,
    total_loss,
    weight_gradients,
)

# All weight gradients of the penalty together; float32 as eager PyTorch's, 1e-6 on this model.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


@functools.cache
def expected_gradients():
    model = make_vit(plain_attention)
    return weight_gradients(model, total_loss(model, *make_batch()))


def check(gradients, dtype=torch.float64):
    assert relative_error(gradients, expected_gradients()) < TOLERANCE[dtype]


def test_weight_gradients_of_a_penalty(backend):
    dtype = torch.float32 if backend == "triton" else torch.float64
    model = make_vit(gn_kernels.attention, dtype)
    with gn_kernels.use_backend(backend):
        check(weight_gradients(model, total_loss(model, *make_batch(dtype))), dtype)


def test_torch_func():
    model, batch = make_vit(gn_kernels.attention), make_batch()
    gradients = torch.func.grad(lambda p: functional_loss(model, p, *batch))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.flatten() for g in gradients.values()]))


def test_torch_func_inside_backward_outside():
    model = make_vit(gn_kernels.attention)
    loss = functional_loss(model, dict(model.named_parameters()), *make_batch())
    check(weight_gradients(model, loss))


def test_vmap_over_samples():
    model, (images, labels) = make_vit(gn_kernels.attention), make_batch()
    gradients = torch.func.grad(lambda p: sample_losses(model, p, images, labels))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.flatten() for g in gradients.values()]))


@pytest.mark.parametrize("transform", ["jvp of grad", "grad of jvp"])
def test_forward_mode(transform):
    inputs = tuple(make_inputs(5, 6, 8, (2, 5, 6)))
    directions = tuple(torch.randn_like(one) for one in inputs)

    def loss(*inputs, attention=gn_kernels.attention):
        return attention(*inputs).pow(3).sum()

    leaves = [one.clone().requires_grad_() for one in inputs]
    gradients = torch.autograd.grad(
        loss(*leaves, attention=plain_attention), leaves, create_graph=True
    )
    expected = torch.autograd.grad(gradients, leaves, directions)
    every = (0, 1, 2, 3)
    if transform == "jvp of grad":
        _, actual = torch.func.jvp(torch.func.grad(loss, every), inputs, directions)
    else:
        actual = torch.func.grad(lambda *x: torch.func.jvp(loss, x, directions)[1], every)(*inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_penalty_through_torch_func(dtype):
    torch._dynamo.reset()
    model, batch = make_vit(gn_kernels.attention, dtype), make_batch(dtype)
    compiled = torch.compile(
        lambda parameters: functional_loss(model, parameters, *batch), fullgraph=True
    )
    check(weight_gradients(model, compiled(dict(model.named_parameters()))), dtype)


@pytest.mark.slow
def test_compiled_penalty_through_autograd_grad():
    torch._dynamo.reset()
    model = make_vit(gn_kernels.attention)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(total_loss, fullgraph=True)(model, *make_batch())
    check(weight_gradients(model, loss))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_pytorch(dtype):
    def error(attention):
        model, batch = make_vit(attention, torch.float32), make_batch(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            loss = total_loss(model, *batch)
        return relative_error(weight_gradients(model, loss), expected_gradients())

    # Most of the error is the linear layers', and both errors are single draws.
    assert error(gn_kernels.attention) < 1.5 * error(pytorch_attention)


def test_autocast_casts_as_pytorch_does():
    q, k, v = make_inputs(3, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gn_kernels.attention(q, k.bfloat16(), v, torch.zeros(3, 3))
        assert out.dtype == F.scaled_dot_product_attention(q, k.bfloat16(), v).dtype


@pytest.mark.slow
@pytest.mark.parametrize("bias_shape", [None, (2, 3, 4), (2, 1, 1, 4)])
def test_gradcheck_and_gradgradcheck(bias_shape, backend):
    if backend == "triton":
        pytest.skip("no float64 there")
    leaves = [one.requires_grad_() for one in make_inputs(3, 4, 4, bias_shape)]
    with gn_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(gn_kernels.attention, leaves)
        assert torch.autograd.gradgradcheck(gn_kernels.attention, leaves)


@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders(order, backend):
    if (backend, order) == ("triton", 4):
        pytest.skip("beyond the third all is the formula's, and the interpreter is slow")
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make_inputs(3, 4, 4, (2, 3, 4))
    directions = [[torch.randn_like(one) for one in inputs] for _ in range(order)]

    def derivatives(attention, dtype):
        leaves = [one.to(dtype).requires_grad_() for one in inputs]
        value = attention(*leaves).square().sum()
        for along in directions:
            slopes = torch.autograd.grad(value, leaves, create_graph=True)
            pairs = zip(slopes, along, strict=True)
            value = sum((one * other.to(dtype)).sum() for one, other in pairs)
        return [one.double() for one in torch.autograd.grad(value, leaves)]

    with gn_kernels.use_backend(backend):
        actual = derivatives(gn_kernels.attention, dtype)
    expected = derivatives(plain_attention, torch.float64)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < (1e-12 if dtype == torch.float64 else 1e-4)


def test_what_is_saved():
    q, k, v, bias = (
        one.requires_grad_() for one in make_inputs(9, 11, 8, (1, 2, 9, 11), torch.float32)
    )
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = gn_kernels.attention(q, k, v, bias)
    places = {one.untyped_storage().data_ptr(): one.numel() for one in saved}
    for one in (q, k, v, bias, out):
        del places[one.untyped_storage().data_ptr()]
    assert list(places.values()) == [2 * 2 * 9]  # the log-sum-exp of each row


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=5)))
def test_only_what_is_wanted_is_computed(wanted, backend):
    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.gn_kernels.attention_double_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    if backend == "triton" and 1 < sum(wanted) < 4:
        pytest.skip("the interpreter is slow; one at a time, and all but one, are checked")
    masks: list[tuple[bool, ...]] = []
    inputs = make_inputs(4, 5, 16, (2, 4, 5), torch.float32)
    inputs = [torch.randn_like(inputs[0]), *inputs]

    def second(attention, inputs):
        grad, *leaves = (
            one.clone().requires_grad_(asked) for one, asked in zip(inputs, wanted, strict=True)
        )
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(attention(*leaves), asked, grad, create_graph=True)
        asked = [grad, *asked] if wanted[0] else asked
        value = sum(one.square().sum() for one in first)
        if not value.requires_grad:  # dV depends on neither v nor bias
            return []
        return torch.autograd.grad(value, asked, allow_unused=True, materialize_grads=True)

    if not any(wanted[1:]):
        return
    with gn_kernels.use_backend(backend), Masks():
        actual = second(gn_kernels.attention, inputs)
    expected = second(plain_attention, [one.double() for one in inputs])
    assert masks in ([wanted], [])
    if not expected:
        assert not any(one.any() for one in actual)
        return
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
def test_cotangents_that_are_absent_count_as_zero(given, backend):
    if backend == "triton" and sum(given) == 2:
        pytest.skip("the interpreter is slow; one at a time, and all but one, are checked")
    ops = torch.ops.gn_kernels
    q, k, v, bias = make_inputs(4, 5, 16, (1, 2, 4, 5), torch.float32)
    grad, scale = torch.randn_like(q), 0.3
    every = [torch.randn_like(one) for one in (q, k, v, bias)]
    with gn_kernels.use_backend(backend):
        out, lse = ops.attention_forward(q, k, v, bias, scale)
        rest = (grad, q, k, v, bias, out, lse, scale, [True] * 5)
        zeros = [
            one if here else torch.zeros_like(one) for one, here in zip(every, given, strict=True)
        ]
        expected = ops.attention_double_backward(*zeros, *rest)
        if not any(given):
            assert not any(one.any() for one in expected)
            return
        absent = [one if here else None for one, here in zip(every, given, strict=True)]
        actual = ops.attention_double_backward(*absent, *rest)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_raw_ops_refuse_to_be_differentiated():
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="raw kernel"):
        torch.ops.gn_kernels.attention_forward(q, q, q, None, 1.0)[0].sum().backward()


def q(*shape, **options):
    return torch.zeros(*(shape or (2, 3, 4, 8)), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.0], q(), q()), TypeError, "q must be a Tensor"),
        ((q(), q(), None), TypeError, "v must be a Tensor"),
        ((q(dtype=torch.int64),) * 3, NotImplementedError, "q must be float16, .*int64"),
        ((q().to_sparse(), q(), q()), NotImplementedError, "q must be a strided tensor"),
        ((q(), q(dtype=torch.float64), q()), RuntimeError, "k must be of q's dtype"),
        ((q(), q(device="meta"), q()), RuntimeError, "k must be on the device of q"),
        ((q(4, 8),) * 3, RuntimeError, r"q must be \(…, heads, N, d\)"),
        ((q(2, 3, 4, 0),) * 3, RuntimeError, "q must have a head size of at least 1"),
        ((q(), q(2, 3, 4, 16), q()), RuntimeError, "k must have q's head size 8, but got 16"),
        ((q(), q(2, 1, 4, 8), q()), RuntimeError, "k must be of shape .* as q is"),
        ((q(), q(3, 4, 8), q()), RuntimeError, "k must be of shape"),
        ((q(), q(2, 3, 5, 8), q()), RuntimeError, "v must be of k's shape"),
        ((q(), q(2, 3, 0, 8), q(2, 3, 0, 8)), RuntimeError, "k must have at least one row"),
        ((q(), q(), q(), q(3, 4, 5)), RuntimeError, r"bias must be broadcastable to \(2, 3, 4, 4"),
        ((q(), q(), q(), q(1, 2, 3, 4, 4)), RuntimeError, "bias must be broadcastable"),
        ((q(), q(), q(), q(4, 4, dtype=torch.float16)), RuntimeError, "bias must be of q's dtype"),
        ((q(), q(), q(), q(4, 4).bool()), RuntimeError, "turn a boolean mask into one"),
    ],
)
def test_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error, match=words):
        gn_kernels.attention(*arguments)


def test_raw_ops_check_too():
    ops, out = torch.ops.gn_kernels, q()
    with pytest.raises(RuntimeError, match="grad must be of shape"):
        ops.attention_backward(q(2, 3, 5, 8), out, out, out, None, out, q(2, 3, 4), 1.0, [True] * 4)
    with pytest.raises(RuntimeError, match="lse must be contiguous, of shape"):
        ops.attention_backward(out, out, out, out, None, out, q(2, 3, 5), 1.0, [True] * 4)
    with pytest.raises(RuntimeError, match="period that divides the batch"):
        ops.attention_forward(q(4, 3, 4, 8), q(4, 3, 4, 8), q(4, 3, 4, 8), q(3, 3, 4, 4), 1.0)
    with pytest.raises(RuntimeError, match="q must be \\(batch, heads, N, d\\)"):
        ops.attention_forward(q(3, 4, 8), q(3, 4, 8), q(3, 4, 8), None, 1.0)


def test_a_backend_asked_for_by_name_gives_its_reasons():
    wide, double = q(1, 1, 2, 160), q(1, 1, 2, 8, dtype=torch.float64)
    with gn_kernels.use_backend("triton"):
        with pytest.raises(RuntimeError, match="head sizes to 128"):
            gn_kernels.attention(wide, wide, wide)
        with pytest.raises(RuntimeError, match="not in float64"):
            gn_kernels.attention(double, double, double)
