"""The raw ops as PyTorch's tools see them: fakes, FLOPs, and what they allocate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gn_kernels
from gn_kernels.attention import op
from tests.attention.plain import make_inputs

ops = torch.ops.gn_kernels
BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 2, 40, 33, 16
PRODUCT = 2 * BATCH * HEADS * QUERIES * KEYS * SIZE  # FLOP of Q·Kᵀ


def arguments(bias_shape=None, device="cpu"):
    inputs = make_inputs(QUERIES, KEYS, SIZE, bias_shape, torch.float32)
    q, k, v, bias = (*inputs, None)[:4]
    q, k, v = (one.to(device) for one in (q, k, v))
    bias = None if bias is None else bias.to(device)
    return q, k, v, bias, 0.25


def call(order, q, k, v, bias, scale):
    """The result of one raw op on these inputs."""
    out, lse = ops.attention_forward(q, k, v, bias, scale)
    if order == "forward":
        return out, lse
    saved = (torch.empty_like(q).copy_(q), q, k, v, bias, out, lse, scale)
    if order == "backward":
        return ops.attention_backward(*saved, [True] * 4)
    cotangents = (q, k, v, bias)
    return ops.attention_double_backward(*cotangents, *saved, [True] * 5)


ORDERS = ("forward", "backward", "double_backward")
each_order = pytest.mark.parametrize("order", ORDERS)
each_bias = pytest.mark.parametrize("bias_shape", [None, (1, HEADS, QUERIES, KEYS)])


@each_order
@each_bias
def test_opcheck(order, bias_shape, backend):
    q, k, v, bias, scale = arguments(bias_shape)
    q, k, v = q[:, :, :5], k[:, :, :6], v[:, :, :6]
    bias = None if bias is None else bias[..., :5, :6]
    with gn_kernels.use_backend(backend):
        out, lse = ops.attention_forward(q, k, v, bias, scale)
        saved = (torch.randn_like(q), q, k, v, bias, out, lse, scale)
        given = {
            "forward": (q, k, v, bias, scale),
            "backward": (*saved, [True, False, True, True]),
            "double_backward": (q, None, v, bias, *saved, [True, True, False, True, True]),
        }[order]
        torch.library.opcheck(
            getattr(ops, f"attention_{order}").default,
            given,
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@each_order
@each_bias
def test_meta_tensors_have_the_layout_of_real_ones(order, bias_shape, backend):
    with gn_kernels.use_backend(backend):
        real = call(order, *arguments(bias_shape))
    meta = call(order, *arguments(bias_shape, "meta"))
    for one, other in zip(real, meta, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_joining_the_heads_takes_no_copy():
    q, k, v, bias, scale = arguments()
    for one in (call("forward", q, k, v, bias, scale)[0], *call("backward", q, k, v, bias, scale)):
        if one.ndim == 4:
            assert one.transpose(1, 2).is_contiguous()


class Allocations(TorchDispatchMode):
    """The largest number of bytes behind a tensor that an op returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes())
        return result


@each_bias
def test_nothing_of_the_size_of_the_scores_is_allocated(bias_shape, backend):
    # The functions behind the ops: a dispatch mode does not see inside an op.
    q, k, v, bias, scale = arguments(bias_shape)
    with gn_kernels.use_backend(backend), Allocations() as seen:
        out, lse = op._forward(q, k, v, bias, scale)
        saved = (q.clone(), q, k, v, bias, out, lse, scale)
        op._backward(*saved, [True] * 3 + [False])
        op._double_backward(q, k, v, bias, *saved, [True] * 4 + [False])
    largest_input = max(one.nbytes for one in (q, k, bias) if one is not None)
    assert (seen.largest <= largest_input) == (backend != "reference")
    assert (seen.largest < 4 * BATCH * HEADS * QUERIES * KEYS) == (backend != "reference")


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
def test_flops_are_counted_with_what_is_recomputed(given):
    q, k, v, bias, scale = arguments(None, "meta")

    def count(op, *arguments):
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        return counter.get_total_flops() / PRODUCT

    out, lse = ops.attention_forward(q, k, v, bias, scale)
    assert count(ops.attention_forward, q, k, v, bias, scale) == 2
    saved = (out, q, k, v, bias, out, lse, scale)
    # dQ: S, dP, dS·K. dK and dV: S, dP, dSᵀ·Q, Pᵀ·dO.
    assert (
        count(ops.attention_backward, *saved, [*given, False])
        == [0, 2, 3, 4, 3, 5, 6, 7][4 * given[0] + 2 * given[1] + given[2]]
    )
    # Each of three kernels: S, dP, two for T, and U; then 2 + 2 and 2 + 1 products of their own.
    every = count(ops.attention_double_backward, q, k, v, None, *saved, [*[True] * 4, False])
    assert every == 3 * 5 + 7


def test_step_of_a_vit_is_counted_on_meta_tensors():
    # 64 images of 197 tokens: 12 heads of 64. Bytes of the attention kernels of one layer.
    q, k, v = (torch.empty(64, 12, 197, 64, dtype=torch.bfloat16, device="meta") for _ in "qkv")
    leaves = [one.requires_grad_() for one in (q, k, v)]
    with FlopCounterMode(display=False) as counter, Allocations() as seen:
        out = gn_kernels.attention(*leaves)
        grads = torch.autograd.grad(
            out, leaves, torch.empty_like(out).requires_grad_(), create_graph=True
        )
        torch.autograd.grad([one.sum() for one in grads], leaves)
    assert seen.largest == q.nbytes
    assert counter.get_total_flops() > 0
