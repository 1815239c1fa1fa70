"""Determinism, resuming, signals, and the comparison of step times."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from gn_kernels.penalty import gradient_norm
from gn_kernels.training import InputError, Settings, Training, checkpoint, compare_steps, load
from gn_kernels.training.loop import Interrupted, settings_of
from tests.training.conftest import TINY, environment


def _bits(training):
    optimizer = training.optimizer.state_dict()["state"]
    return [
        *(tensor.clone() for tensor in training.model.state_dict().values()),
        *(value.clone() for _, state in sorted(optimizer.items()) for value in state.values()),
        training.record[:, :2].clone(),
    ]


def _assert_same_bits(left, right):
    for a, b in zip(_bits(left), _bits(right), strict=True):
        assert torch.equal(a, b)


def _finished(settings):
    training = Training(settings, load(settings))
    training.run()
    return training


@pytest.mark.usefixtures("noisy")
def test_same_seed_same_bits_other_seed_other_bits(settings):
    first = _finished(settings)
    _assert_same_bits(first, _finished(settings))
    other = _finished(Settings(**TINY, seed=1))
    assert not torch.equal(_bits(first)[2], _bits(other)[2])


def test_run_leaves_the_callers_generator_and_threads_alone(training):
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    training.run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_epoch_takes_each_image_at_most_once_in_a_new_order(training):
    size, per_epoch = training.settings.batch_size, training.steps_per_epoch
    everything = load_digits().data.shape[0] - 360
    assert per_epoch == everything // size
    epochs = [
        [tuple(image.flatten().tolist()) for step in range(per_epoch) for image in batch(step)]
        for batch in (
            lambda step: training._parts(step)[0][0],
            lambda step: training._parts(per_epoch + step)[0][0],
        )
    ]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == per_epoch * size


def _interrupt_at(training, step, signum):
    def observer(progress):
        if progress.step == step:
            signal.raise_signal(signum)

    return observer


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(settings, tmp_path, signum):
    whole = _finished(settings)
    step = random.Random(int(signum)).randrange(1, whole.total_steps)
    path = tmp_path / "checkpoint.pt"
    training = Training(settings, load(settings))
    handler = signal.getsignal(signum)
    with pytest.raises(Interrupted) as interruption:
        training.run(path, _interrupt_at(training, step, signum))
    # The observer is called after the step, the flag is seen after the observer.
    assert (interruption.value.signum, interruption.value.step) == (signum, step)
    assert signal.getsignal(signum) is handler

    state = checkpoint.load(path)
    resumed = Training(settings_of(state), load(settings))
    resumed.load_state(state)
    assert resumed.step == step
    resumed.run()
    _assert_same_bits(resumed, whole)


_KILLED = """
import os, signal, sys
from pathlib import Path
from gn_kernels.training import Settings, Training, load
settings = Settings(**{settings!r})
training = Training(settings, load(settings))
def observer(progress):
    if progress.step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
training.run(Path({path!r}), observer, save_every_steps=2)
"""


def test_killed_between_two_checkpoints_and_resumed_equals_uninterrupted(settings, tmp_path):
    path = tmp_path / "checkpoint.pt"
    script = _KILLED.format(settings=TINY, step=7, path=str(path))
    ended = subprocess.run([sys.executable, "-c", script], env=environment(), check=False)
    assert ended.returncode == -signal.SIGKILL
    state = checkpoint.load(path)
    assert state["step"] == 6
    resumed = Training(settings_of(state), load(settings))
    resumed.load_state(state)
    resumed.run()
    _assert_same_bits(resumed, _finished(settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 4}, "epochs 3, not 4"),
        ({"swap": False}, "swap True, not False"),
        ({"embed_dim": 16}, "embed_dim 8, not 16"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(training, changes, words):
    other = Settings(**{**TINY, **changes})
    with pytest.raises(InputError, match=words):
        Training(other, load(other)).load_state(training.state())


def test_checkpoint_of_another_model_or_data_set_is_refused(training):
    for change, words in (
        ({"tensors": {"model:weight": torch.zeros(2)}}, "model does not fit"),
        ({"dataset": {**training.data.summary(), "train_images": 3}}, "train_images 3"),
        ({"step": "x"}, "can't be continued"),
    ):
        with pytest.raises(InputError, match=words):
            training.load_state({**training.state(), **change})


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(training, tmp_path):
    path = tmp_path / "checkpoint.pt"

    def observer(progress):
        if progress.step == 5:
            next(training.model.parameters()).data.fill_(float("nan"))

    with pytest.raises(InputError, match="not finite at step 6"):
        training.run(path, observer, save_every_steps=4)
    assert checkpoint.load(path)["step"] == 4


def test_step_comparison_is_there_and_touches_nothing(training):
    training.run()
    before = [bits.clone() for bits in _bits(training)]
    state, mode = torch.get_rng_state(), training.model.training
    comparison = compare_steps(training, steps=3, warmup_steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert training.model.training == mode
    for old, new in zip(before, _bits(training), strict=True):
        assert torch.equal(old, new)
    fused, activations, plain = comparison.timings
    assert "PyTorch" in plain
    assert "math attention" in plain
    for timing in comparison.timings.values():
        assert 0 < timing.p20_ms <= timing.median_ms <= timing.p80_ms
        assert timing.steps == 3
    assert comparison.speedup(plain) == 1
    for variant in (fused, activations):
        ratio = comparison.timings[plain].median_ms / comparison.timings[variant].median_ms
        assert comparison.speedup(variant) == pytest.approx(ratio)
    # Three ways to compute one float32 loss: a few roundings of 6e-8, with the sums behind them.
    assert comparison.loss_difference < 1e-5


@pytest.mark.parametrize(("step_ms", "steps"), [(1.0, 40), (2000.0, 10), (60_000.0, 3)])
def test_slow_steps_are_compared_less_often(training, step_ms, steps):
    training.step = 1  # of which the record says how long it took
    training.record[0, 2] = step_ms
    comparison = compare_steps(training)
    assert {timing.steps for timing in comparison.timings.values()} == {steps}


def test_swapped_and_plain_training_learn_the_same(settings):
    # 21 steps in float32, whose roundings AdamW's division by a small root magnifies.
    fused, plain = _finished(settings), _finished(Settings(**TINY, swap=False))
    assert fused.swapped is not None
    assert plain.swapped is None
    torch.testing.assert_close(fused.record[:, :2], plain.record[:, :2], rtol=2e-3, atol=1e-4)


def test_more_weight_on_the_penalty_lowers_the_gradient_norm_and_clean_accuracy():
    common = {"depth": 1, "embed_dim": 32, "num_heads": 2, "epochs": 8, "warmup_epochs": 1.0}
    norms, accuracies = [], []
    for method, penalty in (("natural", 0.0), ("gradnorm", 1.2), ("gradnorm", 1.9)):
        settings = Settings(method=method, weight_ce=2 - penalty, weight_gradnorm=penalty, **common)
        training = _finished(settings)
        images, labels = training.data.test.batch(torch.arange(len(training.data.test)))
        images.requires_grad_()
        logits = training.model.eval()(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        norms.append(gradient_norm(loss, images, create_graph=False).item())
        accuracies.append((logits.argmax(1) == labels).double().mean().item())
    assert norms[2] < norms[1] < 0.7 * norms[0]
    assert accuracies[2] < accuracies[1] < accuracies[0] + 0.02
    assert min(accuracies[:2]) > 0.5  # chance is 0.1


@pytest.mark.slow
def test_killed_at_twenty_random_places_and_resumed_equals_uninterrupted(tmp_path):
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(script), str(tmp_path), "0"]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True, timeout=300
    )
    assert len(done.stdout.splitlines()) == 20
