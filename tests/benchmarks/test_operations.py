"""The operations that are timed: what is checked first, and what a red check leaves out."""

import pytest
import torch

from benchmarks import operations
from benchmarks.operations import COPY, EAGER, KERNELS_ALONE, ORDERS, OURS, Shape

SMALL = Shape(2, 4, 16, 2)
SWIN = Shape(2, 8, 16, 2, window=4)


@pytest.fixture(autouse=True)
def _formulas():
    import gn_kernels

    with gn_kernels.use_backend("reference"):
        yield


@pytest.mark.parametrize("name", operations.NAMES)
def test_every_order_is_right_and_timed(name):
    operation = operations.make_operation(name, SMALL, torch.float32)
    chosen = (OURS, KERNELS_ALONE, EAGER, COPY)
    rows = operations.measure(operation, rounds=2, chosen=chosen)
    assert [row["error"] for row in rows if row["error"]] == []
    timed = {(row["order"], row["provider"]) for row in rows if row.get("median_ms")}
    assert timed == {(order, name) for order in ORDERS for name in chosen}


def test_the_bias_of_a_swin_window_is_differentiated():
    operation = operations.make_operation("attention", SWIN, torch.float32)
    cotangents = operations.make_cotangents(operation)
    runs = operations.through_autograd(operation.ours, operation, cotangents)
    results = runs["double backward"]()
    assert len(results) == 5
    expected = operations.expected_results(operation, cotangents)["double backward"]
    assert operations.mistake(results, expected, 1e-5) == ""


def dropped_second_order(x):
    # f(x) and f'(x) are right, and the graph of f'(x) lacks its dependence on x.
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.nn.functional.gelu(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return torch.ops.aten.gelu_backward(grad, x.detach())

    return Dropped.apply(x)


def test_a_red_check_prints_no_speed(monkeypatch, capsys, tmp_path):
    make = operations._activation
    monkeypatch.setattr(
        operations,
        "_activation",
        lambda *arguments: make(*arguments)._replace(ours=dropped_second_order),
    )
    monkeypatch.setattr(operations, "QUICK", ("64-elements", (torch.float32,), ("gelu",)))
    monkeypatch.setattr(operations, "_compiled", lambda functions, *of: operations._copies(*of))
    status = operations.main(["--quick", "--device", "cpu", "--output", str(tmp_path)])
    assert status == 1
    rows = operations.common.read("operations", tmp_path)
    ours = {row["order"]: row for row in rows if row["provider"] == OURS}
    assert ours["forward"]["error"] == "wrong in another order"
    assert "missing" in ours["double backward"]["error"]
    for order in ORDERS:
        assert ours[order]["error"]
        assert ours[order]["median_ms"] == ""
        assert ours[order]["speedup"] == ""
    output = capsys.readouterr()
    assert "missing" in output.out
    assert "FAILED" in output.err


@pytest.mark.parametrize(
    ("actual", "said"),
    [
        ([torch.ones(3)], ""),
        ([torch.ones(3) * 1.01], "wrong by 1.0e-02"),
        ([torch.full((3,), float("nan"))], "wrong"),
        ([None], "missing"),
        ([torch.ones(2)], "another shape"),
        ([], "0 results"),
    ],
)
def test_mistake(actual, said):
    found = operations.mistake(actual, [torch.ones(3, dtype=torch.float64)], 1e-3)
    assert said in found
    assert bool(found) == bool(said)


def test_bytes_of_an_activation_are_2_3_and_5_tensors():
    operation = operations.make_operation("gelu", SMALL, torch.bfloat16)
    cotangents = operations.make_cotangents(operation)
    tensor = 2 * operation.inputs[0].numel()
    moved = operations.moved_bytes(operation, cotangents)
    assert [moved[order] // tensor for order in ORDERS] == [2, 3, 5, 10]


def test_what_is_named_runs_by_default():
    cases = operations.cases(None, None, None)
    assert ("gelu_tanh", "vit-b-8", torch.float32) in cases
    assert ("silu", "vit-s-64", torch.bfloat16) in cases
    assert ("quick_gelu", "64-elements", torch.float32) in cases
    for shape, size in (("vit-b-8", (8 * 197, 3072)), ("vit-s-64", (64 * 197, 1536))):
        operation = operations.SHAPES[shape]
        assert (operation.batch * operation.tokens, 4 * operation.width) == size


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a compiler's own
@pytest.mark.parametrize("name", ["silu", "layer_norm", "attention"])
def test_compiled_peers_compute_the_same(name):
    operation = operations.make_operation(name, SMALL, torch.float32)
    cotangents = operations.make_cotangents(operation)
    expected = operations.expected_results(operation, cotangents)
    peers = (operations.INDUCTOR, operations.INDUCTOR_AUTOGRAD)
    providers, absent = operations.make_providers(operation, cotangents, peers)
    assert [absent[peer] for peer in peers if peer in absent] == []
    for peer in peers:
        for order in ORDERS:
            assert operations.mistake(providers[peer][order](), expected[order], 1e-5) == ""
