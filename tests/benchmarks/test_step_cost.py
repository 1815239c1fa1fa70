"""The training steps that are compared, and the count of whole models."""

import pytest
import torch

from benchmarks import step_cost
from benchmarks.step_cost import METHODS, NATURAL, Method, Size
from gn_kernels.counting import MACHINES, Counter

EAGER = next(method for method in METHODS if method.name == step_cost.EAGER)
H100 = next(machine for machine in MACHINES if machine.name == "H100")
TINY = Size(
    "vit_small_patch16_224", {"depth": 1, "embed_dim": 64, "num_heads": 1}, 32, batch=2, rounds=2
)


def test_two_blocks_of_a_vit_cost_what_was_counted_before():
    # An independent count of these two steps: 7.0 GB and 104 calls; 31.5 GB and 602 calls, 3.84
    # natural steps on a model in which matrix products take the time of their FLOP.
    natural = step_cost.count(NATURAL, "vit_base_patch16_224", depth=2).counter
    penalised = step_cost.count(EAGER, "vit_base_patch16_224", depth=2).counter
    assert len(natural.ops) == 104
    assert natural.bytes == pytest.approx(7.0e9, rel=0.01)
    assert len(penalised.ops) == pytest.approx(602, rel=0.02)
    assert penalised.bytes == pytest.approx(31.5e9, rel=0.01)
    ratio = penalised.seconds_without_product_bytes(H100)
    ratio /= natural.seconds_without_product_bytes(H100)
    assert ratio == pytest.approx(3.84, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "natural", "penalised"),
    [
        ("vit_base_patch16_224", (41e9, 534), (177e9, 3022)),
        # that count took the allocations of DropPath for calls: 46 in a step
        ("swin_base_patch4_window7_224", (76e9, 1641), (300e9, 7072)),
    ],
)
def test_whole_models_cost_what_was_counted_before(model, natural, penalised):
    for method, (moved, calls) in ((NATURAL, natural), (EAGER, penalised)):
        counter = step_cost.count(method, model).counter
        assert counter.bytes == pytest.approx(moved, rel=0.02)
        assert len(counter.ops) == pytest.approx(calls, rel=0.03)


def test_methods_agree_where_they_should():
    methods = METHODS
    steps = step_cost.make_steps(TINY, "gelu", methods, with_compile=False, device="cpu")
    assert step_cost.check_steps(steps) == {}


def test_a_compiled_step_that_runs_eagerly_is_red(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    steps = step_cost.make_steps(TINY, "gelu", (NATURAL, EAGER), with_compile=True, device="cpu")
    wrong = step_cost.check_steps(steps)
    assert list(wrong) == [step_cost.COMPILED]
    assert "0 graphs" in wrong[step_cost.COMPILED]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_step_is_one_graph_and_right():
    steps = step_cost.make_steps(TINY, "gelu", (NATURAL, EAGER), with_compile=True, device="cpu")
    assert step_cost.check_steps(steps) == {}


def test_a_lean_attack_that_attacks_otherwise_is_red():
    def elsewhere(model, images, labels):
        return step_cost.pgd_lean(model, images.flip(-1), labels)

    reference = next(method for method in METHODS if method.name == "PGD-3 of the reference")
    methods = (reference, Method("PGD-3, lean", elsewhere, step_cost.use_math_attention))
    steps = step_cost.make_steps(TINY, "gelu", methods, with_compile=False, device="cpu")
    assert "differ" in step_cost.check_steps(steps)["PGD-3, lean"]


def test_a_penalty_that_is_dropped_is_red_and_gets_no_time(monkeypatch):
    dropped = Method("gradient-norm, gn_kernels", step_cost.natural, step_cost.use_math_attention)
    monkeypatch.setattr(step_cost, "METHODS", (NATURAL, EAGER, dropped))
    *right, wrong, compiled = step_cost.measure(TINY, ["gelu"], with_compile=False, device="cpu")
    assert all(row["median_ms"] > 0 and not row["error"] for row in right)
    assert "differ" in wrong["error"]
    assert "median_ms" not in wrong
    assert "not asked for" in compiled["note"]


def test_an_attack_stays_in_its_ball_and_moves():
    images = torch.rand(2, 3, 32, 32)
    start = step_cost._start(images)
    moved = step_cost._attack_step(images, start.requires_grad_(), torch.ones_like(images))
    assert float((moved - images).abs().max()) <= 4 / 255 + 1e-6
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert not torch.equal(moved, start)


def test_a_method_that_raises_is_a_row_with_its_error():
    def fail(model, images, labels):
        raise RuntimeError("no second derivative")

    rows = step_cost.count_rows(
        ["vit_tiny_patch16_224"], [NATURAL, Method("broken", fail, lambda model: None)], batch=1
    )
    assert rows[0]["calls"] > 0
    assert "no second derivative" in rows[1]["error"]
    assert "calls" not in rows[1]


# Whole models, batch 64, bfloat16: limits that a change may not cross. Peaks are relative to eager
# PyTorch's, steps to a natural step of the roofline model of an H100, with the time of products by
# their FLOP alone and by the larger of both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "gigabytes", "calls", "steps", "recomputed_peak"),
    [
        ("vit_base_patch16_224", 75, 1100, 2.2, 0.5),
        ("swin_base_patch4_window7_224", 160, 3000, 2.5, 0.6),
    ],
)
def test_a_whole_model_stays_within_its_limits(model, gigabytes, calls, steps, recomputed_peak):
    methods = {method.name: method for method in step_cost.METHODS}
    natural, eager, ours, recomputed = (
        step_cost.count(methods[name], model)
        for name in (
            "natural",
            "gradient-norm, eager",
            "gradient-norm, gn_kernels",
            "gradient-norm, gn_kernels, recompute",
        )
    )
    assert ours.counter.bytes <= 1e9 * gigabytes
    assert len(ours.counter.ops) <= calls
    for seconds in (Counter.seconds, Counter.seconds_without_product_bytes):
        assert seconds(ours.counter, H100) <= steps * seconds(natural.counter, H100)
    assert recomputed.peak <= recomputed_peak * eager.peak
    assert recomputed.counter.bytes <= 1e9 * gigabytes
    assert len(recomputed.counter.ops) <= calls
