"""The counter against sums done by hand, and against PyTorch's own memory tracker."""

import pytest
import torch
import torch.nn.functional as F

from gn_kernels import functional
from gn_kernels.counting import MACHINES, Counter, Machine

N = 1000


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def counted(function):
    with Counter() as counter:
        result = function()
    return counter, result


def test_an_element_wise_operation_moves_its_inputs_and_its_output():
    x, y = meta(N), meta(N)
    counter, _ = counted(lambda: x + y)
    assert (len(counter.ops), counter.bytes, counter.flop) == (1, 3 * 2 * N, 0)


def test_views_and_allocations_are_free():
    x = meta(4, N)
    counter, _ = counted(lambda: (x.t(), x[1:], x.view(-1), x.detach(), torch.empty_like(x)))
    assert counter.ops == []


def test_an_in_place_operation_counts():
    x, y = meta(N), meta(N)
    counter, _ = counted(lambda: x.add_(y))
    assert (len(counter.ops), counter.bytes, counter.peak) == (1, 3 * 2 * N, 0)


def test_a_matrix_product():
    a, b = meta(8, 16), meta(16, 32)
    counter, _ = counted(lambda: a @ b)
    assert counter.flop == 2 * 8 * 16 * 32
    assert counter.bytes == 2 * (8 * 16 + 16 * 32 + 8 * 32)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_an_activation_moves_2_3_and_5_tensors(kind):
    x, grad, v = meta(N).requires_grad_(), meta(N).requires_grad_(), meta(N)
    with Counter() as counter:
        y = functional.activation(x, kind)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        torch.autograd.grad(dx, (grad, x), v)
    assert [op.bytes for op in counter.ops] == [2 * 2 * N, 3 * 2 * N, 5 * 2 * N]


def test_attention_counts_its_products_and_no_scores():
    batch, heads, length, size = 2, 3, 50, 16
    q, k, v = (meta(batch, heads, length, size) for _ in range(3))
    counter, _ = counted(lambda: functional.attention(q, k, v))
    (op,) = [op for op in counter.ops if "attention" in op.name]
    assert op.flop == 2 * (2 * batch * heads * length * length * size)
    rows = batch * heads * length
    assert op.bytes == 4 * 2 * rows * size + 4 * rows  # q, k, v, the result; a float32 a row


def test_memory_by_hand():
    # Three results of which the second dies before the third is made.
    x = meta(N)
    with Counter() as counter:
        first = x + x
        second = x + x
        assert counter.live == 2 * 2 * N
        del second
        third = x + x
        view = third[::2]
        del third
    assert (counter.live, counter.peak) == (2 * 2 * N, 2 * 2 * N)
    del first, view
    assert counter.live == 0


def test_memory_of_a_penalised_step_agrees_with_pytorchs_tracker():
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def step(weights, x):  # functions: the tracker's hooks on modules don't allow autograd.grad
        first, scale, last = weights
        hidden = F.layer_norm(F.gelu(x @ first), scale.shape, scale)
        loss = (hidden @ last).square().mean()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.abs().sum()).backward()

    def fresh():
        shapes = ((64, 256), (256,), (256, 8), (128, 64))
        *weights, x = (torch.randn(shape, requires_grad=True) for shape in shapes)
        return weights, x

    weights, x = fresh()
    with Counter() as counter:
        step(weights, x)

    weights, x = fresh()
    tracker = mem_tracker.MemTracker()
    tracker.track_external(*weights, x)
    with tracker:
        step(weights, x)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    external = 4 * sum(tensor.numel() for tensor in (*weights, x))
    assert counter.peak == pytest.approx(peak - external, rel=0.02)


def test_the_roofline_takes_the_longer_of_bytes_and_flop():
    a, b = meta(64, 64), meta(64, 64)
    counter, _ = counted(lambda: (a + b, a @ b))
    moved, flop = 3 * 2 * 64 * 64, 2 * 64**3
    slow_memory = Machine("slow memory", 1.0, 1e30)
    slow_products = Machine("slow products", 1e30, 1.0)
    assert counter.seconds(slow_memory) == pytest.approx(2 * moved)
    assert counter.seconds(slow_products) == pytest.approx(flop)
    assert counter.seconds_without_product_bytes(slow_memory) == pytest.approx(moved)


def test_the_machines_stay_below_what_their_vendor_states():
    stated = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "B200": (8.0e12, 2250e12)}
    for machine in MACHINES:
        bandwidth, rate = stated[machine.name]
        assert machine.bytes_s == pytest.approx(0.9 * bandwidth, rel=0.02)
        assert machine.flop_s == pytest.approx(0.66 * rate, rel=0.02)
