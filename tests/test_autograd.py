"""The attachment to autograd in every mode: weight gradients of a penalty against float64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gn_kernels
from gn_kernels.activation import ACTIVATIONS
from gn_kernels.layer_norm import op as layer_norm_op
from tests.small_transformer import (
    PYTORCH,
    expected_gradients,
    functional_loss,
    make_batch,
    make_model,
    relative_error,
    sample_losses,
    total_loss,
    weight_gradients,
)

KINDS = tuple(ACTIVATIONS)

# Relative error of all weight gradients together. float64: a few hundred roundings of 1.1e-16.
# float32: the same count of 6e-8; eager PyTorch in float32 is at 2e-7 to 6e-7 on this model.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 2e-6}

each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def ours(kind: str):
    return functools.partial(gn_kernels.activation, kind=kind)


def check(gradients, kind, dtype=torch.float64):
    assert relative_error(gradients, expected_gradients(kind)) < TOLERANCE[dtype]


@each_kind
@each_dtype
def test_eager(kind, dtype, backend):
    model = make_model(ours(kind), dtype)
    with gn_kernels.use_backend(backend):
        check(weight_gradients(model, total_loss(model, *make_batch(dtype))), kind, dtype)


@each_kind
def test_retained_graph_gives_the_same_gradients_twice(kind):
    model = make_model(ours(kind))
    loss = total_loss(model, *make_batch())
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        check(torch.cat([p.grad.flatten() for p in model.parameters()]), kind)


@each_kind
@each_dtype
def test_torch_func_grad_of_grad(kind, dtype):
    model, (images, labels) = make_model(ours(kind), dtype), make_batch(dtype)
    gradients = torch.func.grad(lambda p: functional_loss(model, p, images, labels))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.double().flatten() for g in gradients.values()]), kind, dtype)


@each_kind
def test_torch_func_inside_backward_outside(kind):
    model = make_model(ours(kind))
    loss = functional_loss(model, dict(model.named_parameters()), *make_batch())
    check(weight_gradients(model, loss), kind)


@each_kind
def test_vmap_over_samples(kind):
    model, (images, labels) = make_model(ours(kind)), make_batch()
    gradients = torch.func.grad(lambda p: sample_losses(model, p, images, labels))(
        dict(model.named_parameters())
    )
    check(torch.cat([g.flatten() for g in gradients.values()]), kind)


@each_kind
@pytest.mark.parametrize("transform", ["jvp of grad", "dual numbers over grad", "grad of jvp"])
def test_forward_mode(kind, transform):
    # An op with register_autograd alone gives silent zeros here. An MLP, since in torch 2.14
    # F.layer_norm's own grad of jvp is wrong.
    w1, w2 = torch.randn(6, 9).double(), torch.randn(9, 6).double()
    x, direction = torch.randn(4, 6).double(), torch.randn(4, 6).double()

    def loss(x, activation=None):
        activation = activation or ours(kind)
        return activation(activation(x @ w1) @ w2).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, PYTORCH[kind]), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, leaf, direction)

    if transform == "jvp of grad":
        _, actual = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))
    elif transform == "grad of jvp":
        actual = torch.func.grad(lambda x: torch.func.jvp(loss, (x,), (direction,))[1])(x)
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(), direction)
            (gradient,) = torch.autograd.grad(loss(dual), dual, create_graph=True)
            actual = torch.autograd.forward_ad.unpack_dual(gradient).tangent
    assert relative_error(actual, expected) < TOLERANCE[torch.float64]


@each_kind
def test_batched_gradients_of_a_graph_made_in_eager_mode(kind):
    # The graph holds our Functions when vmap comes, at its backward.
    x = torch.randn(6, dtype=torch.float64)

    def hessian(activation, vectorize):
        return torch.autograd.functional.hessian(
            lambda x: activation(x).pow(3).sum(), x, vectorize=vectorize
        )

    torch.testing.assert_close(hessian(ours(kind), True), hessian(PYTORCH[kind], False))


@pytest.mark.slow
@each_kind
@each_dtype
def test_compiled_penalty_through_torch_func(kind, dtype):
    # A chain of Functions is silently wrong here: weight gradients off by 1e-3 to 5e-2.
    torch._dynamo.reset()
    model, batch = make_model(ours(kind), dtype), make_batch(dtype)
    compiled = torch.compile(
        lambda parameters: functional_loss(model, parameters, *batch), fullgraph=True
    )
    loss = compiled(dict(model.named_parameters()))
    check(weight_gradients(model, loss), kind, dtype)


@pytest.mark.slow
@each_kind
def test_compiled_penalty_through_autograd_grad(kind):
    torch._dynamo.reset()
    model = make_model(ours(kind))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        loss = torch.compile(total_loss, fullgraph=True)(model, *make_batch())
    check(weight_gradients(model, loss), kind)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_worse_than_pytorch(kind, dtype):
    def error(activation):
        model, batch = make_model(activation, torch.float32), make_batch(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            loss = total_loss(model, *batch)
        return relative_error(weight_gradients(model, loss), expected_gradients(kind))

    # Most of the error is the matrix products', and both errors are single draws.
    assert error(ours(kind)) < 1.5 * error(PYTORCH[kind])


@each_kind
def test_checkpointing(kind):
    model = make_model(ours(kind))
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    check(weight_gradients(model, total_loss(model, *make_batch())), kind)


@each_kind
def test_anomaly_mode_and_saved_tensor_hooks(kind):
    model = make_model(ours(kind))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = total_loss(model, *make_batch())
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        check(weight_gradients(model, loss), kind)


@each_kind
@pytest.mark.parametrize("order", [3, 4])
def test_higher_orders(kind, order):
    def derivative(activation):
        x = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
        y = activation(x)
        for _ in range(order):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.detach()

    torch.testing.assert_close(
        derivative(ours(kind)), derivative(PYTORCH[kind]), rtol=1e-12, atol=1e-13
    )


def test_only_inputs_are_saved():
    # silu in PyTorch keeps six buffers through a backward with create_graph.
    x = torch.randn(1000, requires_grad=True)
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    grad = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gn_kernels.silu(x)
        torch.autograd.grad(y, x, grad, create_graph=True)
    assert saved == {x.untyped_storage().data_ptr(), grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize("constant", ["grad", "x", "neither"])
def test_double_backward_computes_what_is_asked_for(constant):
    from torch.utils._python_dispatch import TorchDispatchMode

    masks = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.gn_kernels.activation_double_backward.default:
                masks.append(tuple(args[-1]))
            return func(*args, **(kwargs or {}))

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, dtype=torch.float64, requires_grad=constant != "grad")
    (dx,) = torch.autograd.grad(gn_kernels.gelu(x), x, grad, create_graph=True)
    wanted = [x] if constant == "grad" else [x, grad]
    with Masks():
        actual = torch.autograd.grad(dx.sum(), wanted)
    assert masks == [(constant != "grad", True)]
    (dx,) = torch.autograd.grad(F.gelu(x), x, grad, create_graph=True)
    for a, b in zip(actual, torch.autograd.grad(dx.sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function",
    [
        gn_kernels.gelu,
        lambda x: gn_kernels.layer_norm(x, (3,)),
        lambda x: gn_kernels.attention(x, x, x),
    ],
)
def test_gradients_that_do_not_fit_reach_no_kernel(function):
    # Inside the Functions nothing is checked again: autograd must have done it, in both orders.
    x, v = (torch.randn(1, 2, 3, requires_grad=True) for _ in range(2))
    grad = torch.randn(1, 2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(function(x), x, grad, create_graph=True)
    for output, source in ((function(x), x), (first, grad)):
        for wrong in (v[..., :2], v.to("meta"), v.detach().to_sparse()):
            with pytest.raises(RuntimeError):
                torch.autograd.grad(output, source, wrong, retain_graph=True)
        narrow, wide = (
            torch.autograd.grad(output, source, gradient, retain_graph=True)[0]
            for gradient in (v, v.double())
        )
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, narrow, rtol=0, atol=0)


def test_raw_ops_refuse_to_be_differentiated():
    # Without a rule the gradient would stop at the op, with a warning at most.
    x = torch.randn(3, requires_grad=True)
    ops = torch.ops.gn_kernels
    for y in (
        ops.activation_forward(x, "gelu"),
        ops.activation_backward(x, x, "gelu"),
        ops.activation_double_backward(x, x, x, "gelu", [True, True])[1],
    ):
        with pytest.raises(NotImplementedError, match="raw kernel"):
            y.sum().backward()


def _distributed_worker(rank: int, world: int, port: int, kind: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        model = make_model(ours(kind))
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        images, labels = (t.chunk(world)[rank] for t in make_batch())
        total_loss(parallel, images, labels).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        # DDP averages over the processes; the loss is a sum over the samples.
        check(gradients * world, kind)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_distributed_data_parallel(kind):
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_distributed_worker, (2, port, kind), nprocs=2)


def test_a_penalty_asks_for_no_parameter_gradient_in_its_first_pass(monkeypatch):
    # needs_input_grad says True of weight and bias all the while.
    asked = []
    real = layer_norm_op._call_backward
    monkeypatch.setattr(
        layer_norm_op, "_call_backward", lambda *args: asked.append(args[-1]) or real(*args)
    )
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((3, 4), (4,), (4,)))

    def output():
        return gn_kernels.layer_norm(x * 1.0, (4,), weight, bias).square().sum()

    (gradient,) = torch.autograd.grad(output(), x, create_graph=True)
    gradient.square().sum().backward()
    torch.autograd.grad(output(), (x, weight), create_graph=True)
    output().backward()
    assert asked[0] == (True, False, False)
    assert (True, True, False) in asked
    assert asked[-1] == (True, True, True)
