"""Weight gradients of an input-gradient penalty through a transformer with our LayerNorm."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gn_kernels
from tests.layer_norm import plain
from tests.small_transformer import (
    expected_gradients,
    functional_loss,
    make_batch,
    make_model,
    relative_error,
    sample_losses,
    total_loss,
    weight_gradients,
)

# All weight gradients together; eager PyTorch in float32 is at 2e-7 to 6e-7 on this model.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 2e-6}


def make(dtype=torch.float64):
    model = make_model(F.gelu, dtype)
    for block in model.blocks:
        for name in ("norm1", "norm2"):
            theirs = getattr(block, name)
            ours = gn_kernels.nn.LayerNorm(theirs.normalized_shape, dtype=dtype)
            ours.load_state_dict(theirs.state_dict())
            setattr(block, name, ours)
    return model


@functools.cache
def expected():
    return expected_gradients("gelu")


def check(gradients, dtype=torch.float64):
    assert relative_error(gradients, expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_eager(dtype, backend):
    model = make(dtype)
    with gn_kernels.use_backend(backend):
        check(weight_gradients(model, total_loss(model, *make_batch(dtype))), dtype)


def test_retained_graph_gives_the_same_gradients_twice():
    model = make()
    loss = total_loss(model, *make_batch())
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        check(torch.cat([p.grad.flatten() for p in model.parameters()]))


def test_torch_func_grad_of_grad():
    model, batch = make(), make_batch()
    gradients = torch.func.grad(lambda p: functional_loss(model, p, *batch))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.flatten() for g in gradients.values()]))


def test_torch_func_inside_backward_outside():
    model = make()
    loss = functional_loss(model, dict(model.named_parameters()), *make_batch())
    check(weight_gradients(model, loss))


def test_vmap_over_samples():
    model, (images, labels) = make(), make_batch()
    gradients = torch.func.grad(lambda p: sample_losses(model, p, images, labels))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.flatten() for g in gradients.values()]))


def test_batched_gradients_of_a_graph_made_in_eager_mode():
    case = plain.make((2, 5))

    def hessian(function, vectorize):
        def total(x):
            return function(x, (5,), case.weight, case.bias).pow(3).sum()

        return torch.autograd.functional.hessian(total, case.x, vectorize=vectorize)

    torch.testing.assert_close(
        hessian(gn_kernels.layer_norm, True), hessian(plain.layer_norm, False)
    )


@pytest.mark.parametrize("transform", ["jvp of grad", "dual numbers over grad", "grad of jvp"])
def test_forward_mode(transform):
    # Against the definition: F.layer_norm's own grad of jvp is wrong in torch 2.14.
    case = plain.make((4, 6))
    direction = case.v

    def loss(x, function=gn_kernels.layer_norm):
        return function(x, (6,), case.weight, case.bias).pow(3).sum()

    leaf = case.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, plain.layer_norm), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, leaf, direction)
    if transform == "jvp of grad":
        _, actual = torch.func.jvp(torch.func.grad(loss), (case.x,), (direction,))
    elif transform == "grad of jvp":
        actual = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(case.x)
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf, direction)
            (gradient,) = torch.autograd.grad(loss(dual), dual, create_graph=True)
            actual = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_penalty_through_torch_func(dtype):
    torch._dynamo.reset()
    model, batch = make(dtype), make_batch(dtype)
    compiled = torch.compile(lambda p: functional_loss(model, p, *batch), fullgraph=True)
    check(weight_gradients(model, compiled(dict(model.named_parameters()))), dtype)


@pytest.mark.slow
def test_compiled_penalty_through_autograd_grad():
    torch._dynamo.reset()
    model = make()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(total_loss, fullgraph=True)(model, *make_batch())
    check(weight_gradients(model, loss))


@pytest.mark.slow
def test_compiled_forward_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(gn_kernels.layer_norm, fullgraph=True, dynamic=True)
    for shape in ((3, 7), (5, 11), (2, 4, 6)):
        case = plain.make(shape)
        arguments = (case.x, case.normalized_shape, case.weight, case.bias)
        torch.testing.assert_close(compiled(*arguments), plain.layer_norm(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_pytorch(dtype):
    def error(model):
        with torch.autocast("cpu", dtype=dtype):
            loss = total_loss(model, *make_batch(torch.float32))
        return relative_error(weight_gradients(model, loss), expected())

    # Most of the error is the matrix products', and both errors are single draws.
    assert error(make(torch.float32)) < 1.5 * error(make_model(F.gelu, torch.float32))


def test_checkpointing():
    model = make()
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    check(weight_gradients(model, total_loss(model, *make_batch())))


def test_anomaly_mode_and_saved_tensor_hooks():
    model = make()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = total_loss(model, *make_batch())
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        check(weight_gradients(model, loss))
