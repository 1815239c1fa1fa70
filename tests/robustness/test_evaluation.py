"""The figures of an evaluation, counted by hand and by AutoAttack's own driver."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gn_kernels.robustness import NotDifferentiableError, evaluate, evaluation
from gn_kernels.robustness.evaluation import pack, unpack
from tests.robustness.conftest import Rounded, Saturated


@pytest.fixture
def model():
    # logits (x, 1 - x)·40 of one pixel: the boundary is at 0.5, and class 0 is above it.
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[40.0], [-40.0]]))
        model[1].bias.copy_(torch.tensor([0.0, 40.0]))
    return model


def _images():
    pixels = torch.tensor([0.9, 0.55, 0.45, 0.1, 0.52]).view(5, 1, 1, 1)
    return TensorDataset(pixels, torch.tensor([0, 0, 0, 1, 1]))


def test_accuracies_and_norm_over_batches_of_different_size(model):
    result = evaluate(model, _images(), eps_255=0.1 * 255, attack_steps=4, restarts=2, batch_size=2)
    assert result.images == 5
    assert result.clean_accuracy == pytest.approx(3 / 5)  # wrong: 0.45 as 0, 0.52 as 1
    assert result.robust_accuracy == pytest.approx(2 / 5)  # 0.55 is 0.05 from the boundary
    assert unpack(result.correct, 5).tolist() == [True, True, False, True, False]
    assert unpack(result.sweep[0]["standing"], 5).tolist() == [True, False, False, True, False]
    # d/dx of softplus(∓80(x - ½)) is ∓80·σ(∓80(x - ½)).
    margins = torch.tensor([0.4, 0.05, -0.05, 0.4, -0.02], dtype=torch.float64)
    expected = (80 * torch.sigmoid(-80 * margins)).mean().item()
    assert result.gradient_norm_l1 == pytest.approx(expected, rel=1e-5)
    assert result.warnings == ()


def test_a_sweep_is_sorted_and_falls(model):
    result = evaluate(model, _images(), eps_255=[127.5, 0, 10, 20], attack_steps=4)
    # The pixels 0.9 and 0.1 are 0.4 from the boundary, 0.55 is 0.05.
    found = {radius["eps_255"]: radius["accuracy"] for radius in result.sweep}
    assert list(found) == [0, 10, 20, 127.5]
    assert found == pytest.approx({0: 0.6, 10: 0.6, 20: 0.4, 127.5: 0})
    assert result.robust_accuracy == 0
    assert result.eps_255 == 127.5


def test_later_attacks_and_larger_radii_see_only_what_stands(classifier, monkeypatch):
    model, images = classifier
    seen = []
    originals = {"pgd": evaluation.pgd, "attack": evaluation.autoattack.attack}

    def pgd(model, pixels, labels, eps, **options):
        seen.append((f"pgd {255 * eps:.0f}", len(pixels)))
        return originals["pgd"](model, pixels, labels, eps, **options)

    def attack(name, model, pixels, labels, eps, seed):
        seen.append((f"{name} {255 * eps:.0f}", len(pixels)))
        return originals["attack"](name, model, pixels, labels, eps, seed)

    monkeypatch.setattr(evaluation, "pgd", pgd)
    monkeypatch.setattr(evaluation.autoattack, "attack", attack)
    result = evaluate(
        model,
        images,
        eps_255=(16, 24),
        attacks=("pgd", "autoattack-quick"),
        attack_steps=2,
        restarts=1,
        check_gradients=False,
    )
    before = round(60 * result.clean_accuracy)
    for (name, count), (attack, eps) in zip(
        seen, [(a, e) for e in (16, 24) for a in ("pgd", "apgd-ce", "apgd-t")], strict=True
    ):
        assert name == f"{attack} {eps}"
        assert count == before
        radius = next(r for r in result.sweep if r["eps_255"] == eps)
        before = round(60 * radius["after"][attack])
    assert result.sweep[1]["accuracy"] < result.sweep[0]["accuracy"] < result.clean_accuracy
    assert result.robust_accuracy == result.sweep[1]["after"]["apgd-t"]


def test_autoattack_breaks_what_its_own_driver_breaks(classifier):
    from pyautoattack import AutoAttack

    model, images = classifier
    state = torch.get_rng_state()
    result = evaluate(
        model,
        images,
        eps_255=20,
        attacks=("apgd-ce", "apgd-t", "fab-t"),
        seed=3,
        batch_size=40,
        check_gradients=False,
    )
    assert torch.equal(torch.get_rng_state(), state)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    driver = AutoAttack(
        model, norm="Linf", eps=20 / 255, seed=3, version="custom", attacks=list(result.attacks)
    )
    driver.apgd.n_restarts = driver.fab.n_restarts = 1
    driver.apgd_targeted.n_target_classes = driver.fab.n_target_classes = 3
    pixels, labels = images.tensors
    _, predicted = driver.run_standard_evaluation(pixels, labels, batch_size=40)
    expected = predicted == labels
    assert 0 < expected.sum() < round(60 * result.clean_accuracy)
    assert torch.equal(unpack(result.sweep[0]["standing"], 60), expected)


class _PulledThePlugError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(classifier, tmp_path, monkeypatch):
    model, images = classifier
    options = {
        "eps_255": (10, 20),
        "attacks": ("pgd", "apgd-ce"),
        "attack_steps": 3,
        "batch_size": 13,
    }
    whole = evaluate(model, images, **options)
    total = []
    evaluate(model, images, observer=total.append, **options)
    file = tmp_path / "progress"
    attacked = []
    original = evaluation.pgd

    def pgd(model, pixels, labels, eps, **rest):
        attacked.append(len(pixels))
        return original(model, pixels, labels, eps, **rest)

    monkeypatch.setattr(evaluation, "pgd", pgd)
    for last in (2, 4, 3, 5):  # stages after which each call ends
        stages = []

        def stop(stage, stages=stages, last=last):
            stages.append(stage)
            if len(stages) == last:
                raise _PulledThePlugError

        with pytest.raises(_PulledThePlugError):
            evaluate(model, images, progress_file=file, observer=stop, **options)
        assert file.exists()
    again = evaluate(model, images, progress_file=file, **options)
    assert again._replace(seconds=0) == whole._replace(seconds=0)
    # What is complete is not measured again.
    attacked_once = sum(attacked)
    evaluate(model, images, progress_file=file, check_gradients=False, **options)
    assert sum(attacked) == attacked_once
    # PGD saw each standing image once at each radius (and the checks the correct ones thrice).
    assert sum(attacked) == round(60 * (whole.clean_accuracy + whole.sweep[0]["accuracy"]))


def test_a_progress_file_of_something_else_is_refused(classifier, tmp_path):
    model, images = classifier
    file = tmp_path / "progress"

    def stop(stage):
        raise _PulledThePlugError

    with pytest.raises(_PulledThePlugError):
        evaluate(model, images, eps_255=8, progress_file=file, observer=stop)
    with pytest.raises(ValueError, match="another eps_255"):
        evaluate(model, images, eps_255=9, progress_file=file)
    with torch.no_grad():
        model[1].bias += 1
    with pytest.raises(ValueError, match="another model"):
        evaluate(model, images, eps_255=8, progress_file=file)
    file.write_bytes(b"not a measurement")
    with pytest.raises(ValueError, match="damaged"):
        evaluate(model, images, eps_255=8, progress_file=file)


def test_square_beating_the_gradient_is_warned_of(classifier):
    # The cross-entropy's gradient is 0 in float32: PGD stays where it starts, Square does not.
    model, images = classifier
    images = TensorDataset(*images[:20])
    result = evaluate(
        Saturated(model), images, eps_255=24, attacks=("pgd", "square"), attack_steps=2, restarts=1
    )
    after = result.sweep[0]["after"]
    assert after["square"] < after["pgd"]
    assert any("black-box beats white-box" in warning for warning in result.warnings)
    assert any("vanish" in warning for warning in result.warnings)


def test_leaves_the_model_as_it_was(model):
    model.train()
    evaluate(model, _images(), eps_255=8)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class _Broken(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :1] * torch.tensor([1.0, torch.nan])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"eps_255": -1.0}, "radii at least 0"),
        ({"eps_255": ()}, "must not be empty"),
        ({"attack_steps": 0}, "attack_steps"),
        ({"attacks": ("magic",)}, "autoattack-quick.*but got 'magic'"),
        ({"attacks": ("autoattack",)}, "at least 4 classes"),
        ({"attacks": ("apgd-dlr",)}, "at least 3 classes"),
        ({"images": TensorDataset(torch.rand(0, 1, 1, 1), torch.zeros(0).long())}, "one image"),
        (
            {"images": TensorDataset(255 * torch.rand(9, 1, 1, 1), torch.zeros(9).long())},
            r"\[0, 1\]",
        ),
        (
            {"images": TensorDataset(torch.full((9, 1, 1, 1), torch.nan), torch.zeros(9).long())},
            r"\[0, 1\]",
        ),
        ({"images": TensorDataset(torch.rand(9, 1, 1, 1), torch.full((9,), 2))}, "2 classes"),
        ({"model": _Broken()}, "NaN or infinite"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(model, wrong, words):
    options = {"model": model, "images": _images(), "eps_255": 8.0, **wrong}
    with pytest.raises(ValueError, match=words):
        evaluate(options.pop("model"), options.pop("images"), **options)


def test_a_model_without_gradient_is_told(model):
    with pytest.raises(NotDifferentiableError, match="not differentiable"):
        evaluate(Rounded(model), _images(), eps_255=8)


def test_flags_are_packed_and_unpacked():
    flags = torch.rand(37) > 0.5
    assert torch.equal(unpack(pack(flags), 37), flags)
    assert pack(torch.tensor([True] + 7 * [False] + [True])) == "8080"
