"""A step of the loop: parts, precision, averages, frozen statistics, memory."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_kernels.training import InputError, Settings, Training, average, events, load, loop, recipe
from tests.training.conftest import TINY


def _network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 10)]
    return nn.Sequential(*layers).to(dtype)


def _batch(count=32, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 8, 8, generator=generator, dtype=dtype)
    return images, torch.randint(10, (count,), generator=generator)


def _updated(parts, model=None, scaler=None, **settings):
    settings = Settings(**{"optimizer": "sgd", "lr": 0.1, "warmup_epochs": 0.0, **settings})
    model = _network() if model is None else model
    loop.set_mode(model, settings)
    optimizer = loop._optimizer(model, settings)
    losses = loop.update(model, optimizer, parts, 10.0, settings, scaler or loop._scaler(settings))
    return model, losses


@pytest.mark.parametrize("method", ["natural", "gradnorm"])
@pytest.mark.parametrize("eval_mode", [True, False])
def test_two_parts_of_sixteen_are_one_of_thirty_two(method, eval_mode):
    images, labels = _batch()
    frozen = {"eval_mode": True} if eval_mode else {"freeze_batchnorm": True}
    one, losses = _updated([(images, labels)], method=method, **frozen)
    parts = list(zip(images.split(16), labels.split(16), strict=True))
    two, both = _updated(parts, method=method, **frozen)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for a, b in zip(losses, both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({"eval_mode": True}, True), ({"freeze_batchnorm": True}, True), ({}, False)],
)
def test_frozen_statistics_stay_as_they_are(settings, kept):
    before = {name: x.clone() for name, x in _network().named_buffers()}
    model, _ = _updated([_batch()], method="gradnorm", **settings)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == kept
    # What BatchNorm learns is trained all the same.
    assert not torch.equal(model[1].weight, torch.ones(4, dtype=torch.float64))
    assert model[0].training == (not settings.get("eval_mode", False))


def test_clipping_limits_the_length_of_the_step():
    start = torch.cat([p.flatten() for p in _network().parameters()])
    lengths = {}
    for limit in (0.0, 1e-3, 1e6):
        model, _ = _updated([_batch()], clip_norm=limit, weight_decay=0.0)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        lengths[limit] = (weights - start).norm().item()
    rate = recipe.learning_rate(10.0, Settings(lr=0.1, warmup_epochs=0.0))
    assert lengths[1e-3] == pytest.approx(1e-3 * rate, rel=1e-2)  # over ‖gradient‖ + 1e-6
    assert lengths[0.0] == lengths[1e6] > 10 * lengths[1e-3]


def test_average_is_the_weighted_sum_of_all_weights():
    model, decay, weights = nn.Linear(3, 2).double(), 0.4, []
    mean = average.start(model)
    weights.append(model.weight.detach().clone())
    for step in range(6):
        model.weight.data.add_(torch.randn(2, 3))
        average.update(mean, model, step, decay)
        weights.append(model.weight.detach().clone())
    factors = [min(0.4, (1 + step) / (10 + step)) for step in range(6)]
    assert factors[0] == 0.1 < factors[-1] == 0.4
    shares = [math.prod(factors)]
    shares += [(1 - factors[t]) * math.prod(factors[t + 1 :]) for t in range(6)]
    expected = sum(share * weight for share, weight in zip(shares, weights, strict=True))
    torch.testing.assert_close(mean["weight"], expected, rtol=1e-12, atol=1e-14)


def test_the_averaged_weights_are_what_is_used(settings):
    training = Training(Settings(**TINY, ema_decay=0.9), load(settings))
    training.run()
    used = training.trained()
    assert used is not training.model
    for name, tensor in used.state_dict().items():
        assert torch.equal(tensor, training.average[name])
    assert not torch.equal(used.state_dict()[name], training.model.state_dict()[name])
    plain = Training(settings, load(settings))
    assert plain.trained() is plain.model


@pytest.mark.parametrize("method", ["gradnorm", "edge", "adversarial"])
def test_the_scale_of_the_loss_leaves_the_step_as_it_is(method):
    images, labels = _batch(dtype=torch.float32)
    models = []
    for scale in (1.0, 2.0**10):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(5)
        model, _ = _updated(
            [(images, labels)],
            _network(torch.float32),
            scaler,
            method=method,
            freeze_batchnorm=True,
        )
        models.append(model)
    # A power of two changes no bit of a product.
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_nearly_the_same(settings, precision):
    whole, half = (
        Training(Settings(**TINY, precision=name), load(settings))
        for name in ("float32", precision)
    )
    whole.run()
    half.run()
    assert half.model.transformer.head.weight.dtype == torch.float32
    assert half._scaler.is_enabled() == (precision == "float16")
    assert not torch.equal(half.record[:, 0], whole.record[:, 0])
    # 2^-8 a rounding; 21 steps.
    torch.testing.assert_close(half.record[:, 0], whole.record[:, 0], rtol=2e-2, atol=0)


def test_a_step_that_overflows_is_left_out_and_the_next_scale_is_smaller():
    model = _network(torch.float32)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    _updated([_batch(dtype=torch.float32)], model, scaler, method="gradnorm", freeze_batchnorm=True)
    assert scaler.get_scale() == pytest.approx(1.5e38)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch):
    model = _network()
    before = copy.deepcopy(model.state_dict())

    def method(model, images, targets, epoch, settings, scale=1.0):
        loss = F.cross_entropy(model(images), targets)
        # √0 has the value 0 and the gradient ∞·0.
        root = (model[0].weight * 0).sum().sqrt()
        return recipe.Losses(loss + root, loss.detach(), root.detach())

    monkeypatch.setitem(recipe.METHODS, "natural", method)
    with pytest.raises(FloatingPointError, match="the loss or its gradient is not finite"):
        _updated([_batch()], model, method="natural", freeze_batchnorm=True)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("option", ["checkpoint_activations", "recompute"])
@pytest.mark.parametrize("method", ["gradnorm", "edge"])
def test_computing_again_keeps_less_and_changes_no_bit(settings, option, method):
    saved, bits = [], []
    for on in (False, True):
        chosen = Settings(**{**TINY, "depth": 2, "method": method, option: on})
        training = Training(chosen, load(settings))
        seen = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        if option == "checkpoint_activations":
            images, _ = training._parts(0)[0]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                training.model(images)
        training.run()
        saved.append(sum(seen.values()))
        bits.append(training.state()["tensors"])
    if option == "checkpoint_activations":
        assert saved[1] < 0.5 * saved[0]
    for name, tensor in bits[0].items():
        if name != "record:":
            assert torch.equal(tensor, bits[1][name])
    assert torch.equal(bits[0]["record:"][:, :2], bits[1]["record:"][:, :2])


def test_recompute_is_active_in_the_method_alone(settings, monkeypatch):
    from gn_kernels import saving

    seen = []
    original = recipe.METHODS["gradnorm"]

    def method(*arguments):
        seen.append(saving.is_active())
        return original(*arguments)

    monkeypatch.setitem(recipe.METHODS, "gradnorm", method)
    for on in (False, True):
        Training(Settings(**TINY, recompute=on), load(settings))._advance()
    assert seen == [False, True]
    assert not saving.is_active()


def test_a_model_without_blocks_to_compute_again(settings, monkeypatch):
    monkeypatch.setattr(loop, "build", lambda settings, data: _network(torch.float32))
    chosen = Settings(**TINY, checkpoint_activations=True, swap=False)
    with pytest.raises(InputError, match="checkpoint-activations needs a model of timm or"):
        Training(chosen, load(settings))


def test_channels_last(settings, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "build", lambda settings, data: _network(torch.float32))
    original = recipe.METHODS["natural"]

    def method(model, images, *arguments):
        seen.append((model[0].weight, images.expand(-1, 2, -1, -1)))
        assert images.is_contiguous(memory_format=torch.channels_last)
        return original(model, images, *arguments)

    monkeypatch.setitem(recipe.METHODS, "natural", method)
    chosen = Settings(**TINY, channels_last=True, method="natural")
    Training(chosen, load(settings))._advance()
    assert seen[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_transformers_model_is_checkpointed_without_reentrance(settings):
    calls = []

    class Model(nn.Module):
        def gradient_checkpointing_enable(self, options):
            calls.append(options)

    loop.lay_out(nn.Sequential(Model()), Settings(checkpoint_activations=True))
    assert calls == [{"use_reentrant": False}]


def test_events_are_written_for_each_step(tmp_path, monkeypatch):
    rows = []

    class Writer:
        def __init__(self, folder):
            rows.append(folder)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            rows.append("closed")

        def add_scalar(self, *row):
            rows.append(row)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with events.events(tmp_path) as observe:
        observe(loop.Progress(3, 9, 0.5, 12.0, 100.0, 2.3, 0.4))
    scalars = [("loss", 2.3, 3), ("penalty", 0.4, 3), ("step_ms", 12.0, 3)]
    assert rows == [str(tmp_path), *scalars, ("images_per_second", 100.0, 3), "closed"]


def test_events_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"), events.events(tmp_path):
        pass
