"""Ulp by hand, and what the accuracy table must show of PyTorch's own errors."""

import torch

from benchmarks import accuracy
from benchmarks.accuracy import errors, spacing


def test_spacing_is_the_distance_to_the_next_number():
    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
        x = torch.tensor([1.0, 1.5, 1.99, 2.0, 1e-3, 700.0, 0.0, 1e-39]).to(dtype)
        following = (x.view(bits) + 1).view(dtype)
        assert torch.equal(spacing(x.double(), dtype), following.double() - x.double())


def test_errors_by_hand():
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    actual = torch.tensor([1.0 + 2**-7, 4.0], dtype=torch.bfloat16)
    row = errors([actual], [exact], [0.0])
    assert row["max_ulp"] == 1.0
    assert row["mean_ulp"] == 0.5
    assert row["max_ulp_rms"] == 0.5  # the root mean square is 2.9, with twice the ulp of 1
    assert row["relative"] == 2**-7 / 17**0.5
    assert errors([actual], [exact], [2**-7])["max_ulp"] == 0.0


def test_half_precision_inputs_are_every_number_of_the_range():
    (x,) = accuracy.make_case("silu", torch.bfloat16, 1).inputs
    assert len(set(x.tolist())) == len(
        {
            v
            for v in torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).tolist()
            if abs(v) <= 10
        }
    )


def test_the_formula_is_correctly_rounded_and_pytorch_is_not():
    rows = list(accuracy.operation_rows(["gelu_tanh"], 2**12))
    second = {
        row["provider"]: row["max_ulp"]
        for row in rows
        if row["dtype"] == "bfloat16" and row["order"] == "double backward"
    }
    assert second["gn_kernels, reference"] <= 0.51
    assert second["eager"] > 5


def test_a_result_that_is_not_finite_is_red(monkeypatch):
    make = accuracy.make_case
    monkeypatch.setattr(
        accuracy,
        "make_case",
        lambda *given: make(*given)._replace(ours=lambda x: torch.nn.functional.silu(x) * 1e308),
    )
    rows = list(accuracy.operation_rows(["silu"], 2**6))
    ours = [row for row in rows if row["provider"] != "eager" and row["order"] == "forward"]
    assert {row["error"] for row in ours} == {"not finite where float64 is"}


def test_finite_differences_lose_what_double_backpropagation_keeps():
    model = accuracy.small_vit()
    accuracy.use_math_attention(model)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    exact = accuracy.penalty_gradient(
        accuracy.copy.deepcopy(model).double(), images.double(), labels, "l2"
    )

    def error(step):
        gradient = accuracy.penalty_gradient(model, images, labels, "l2", step)
        return float((gradient - exact).norm() / exact.norm())

    assert error(None) < 1e-5
    assert 1e-5 < error(1e-2) < 0.1
