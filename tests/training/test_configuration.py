"""Configurations and presets: layers, misspelt keys, and what a dry run counts."""

from __future__ import annotations

import dataclasses

import pytest

from gn_kernels.training import InputError, Settings, configuration
from gn_kernels.training.estimate import estimate

# Of the paper's runs: base rate for 512 images, images in a step.
RATES = {
    "gradnorm-swin-b": (0.625e-3, 532),
    "gradnorm-swin-l": (0.625e-3, 532),
    "adversarial-swin-b": (1.25e-3, 512),
    "edge-swin-b": (0.625e-3, 608),
    "gradnorm-resnet50-gelu": (1.25e-3, 256),
    "adversarial-resnet50-relu": (1.25e-3, 256),
    "edge-resnet50-gelu": (1.25e-3, 266),
    "sweep-swin-b-0.6": (2.5e-5, 532),
    "gradnorm-cifar10": (1.25e-3, 256),
}


@pytest.mark.parametrize("name", configuration.presets())
def test_every_preset_makes_settings(name):
    settings = configuration.combined(configuration.preset(name))
    assert settings.method in name or name.split("-")[0] in (
        *("imagenet", "fgsm", "sweep", "finetune", "channels", "threshold", "random"),
    )
    assert settings.eps_255 == 4
    assert settings.sigma == 0.225
    if name in RATES:
        base, batch = RATES[name]
        assert settings.batch_size == batch
        assert settings.lr == pytest.approx(base * batch / 512, rel=2e-3)
    if name.startswith("sweep"):
        assert settings.weight_ce == float(name.split("-")[-1])
        assert settings.weight_ce + settings.weight_gradnorm == pytest.approx(2)


def test_the_resnets_recipes_differ_in_their_activation_alone():
    for method in ("natural", "gradnorm", "adversarial"):
        kinds = ("relu", "gelu", "silu")
        three = [configuration.preset(f"{method}-resnet50-{kind}") for kind in kinds]
        assert tuple(one.pop("activation") for one in three) == kinds
        assert three[0] == three[1] == three[2]


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    settings = Settings(channel_weights=(1.0, 2.0, 1.0), lr=1e-5, rand_augment="rand-m9", flip=0.5)
    configuration.write(path, settings)
    assert configuration.combined(configuration.read(path)) == settings


def test_later_layers_win_and_a_file_may_build_on_a_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: gradnorm-swin-b\nepochs: 7\nlr: 1e-5\n")
    settings = configuration.combined(configuration.read(path), {"epochs": 9})
    assert (settings.epochs, settings.lr, settings.batch_size) == (9, 1e-5, 532)
    # The data set's own defaults lie below all that.
    assert configuration.combined({"dataset": "fashion-mnist"}).image_size == 28


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weight_gradnrom: 1\n", "'weight_gradnrom', which is no setting: did you mean weight_gr"),
        ("eps-255: 1\n", "did you mean eps_255"),
        ("- 1\n", "key: value"),
        ("a: [1\n", "is not YAML"),
        ("epochs: many\n", "epochs must be an int"),
        ("preset: gradnorm-swin-x\n", "did you mean gradnorm-swin-"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        configuration.combined(configuration.read(path))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="can't be read"):
        configuration.read(tmp_path / "none.yaml")


def _small(**options):
    return Settings(**{"dataset": "cifar10", "image_size": 32, "patch_size": 4, **options})


@pytest.mark.parametrize("method", ["natural", "gradnorm", "adversarial", "edge"])
def test_estimates_scale_with_the_batch_and_the_epochs(method):
    one, two = estimate(_small(method=method)), estimate(_small(method=method), gpus=2)
    assert (one.images_per_part, two.images_per_part) == (64, 32)
    # The same images in all, on half as many each.
    assert one.teraflop_per_step == pytest.approx(two.teraflop_per_step, rel=1e-6)
    assert two.memory_gb < one.memory_gb
    assert one.steps == 40 * (50_000 // 64)
    longer = estimate(_small(method=method, epochs=80))
    assert longer.hours["A100"] == pytest.approx(2 * one.hours["A100"], rel=1e-6)
    assert one.hours["H100"] < one.hours["A100"]
    assert "not read" in one.data


def test_the_penalty_doubles_the_flop_and_accumulation_halves_the_activations():
    # Unswapped, since our attention recomputes and the count has that; wide, as real ones are.
    wide = {"swap": False, "embed_dim": 384, "num_heads": 6}
    natural, penalised = (estimate(_small(method=m, **wide)) for m in ("natural", "gradnorm"))
    assert penalised.teraflop_per_step / natural.teraflop_per_step == pytest.approx(2.05, rel=0.05)
    parts = estimate(_small(accumulate_steps=4, **wide))
    assert parts.images_per_part == 16
    assert parts.memory_gb < 0.5 * penalised.memory_gb
    assert parts.teraflop_per_step == pytest.approx(penalised.teraflop_per_step, rel=1e-6)
    with pytest.raises(InputError, match="multiple of the 3 parts"):
        estimate(_small(), gpus=3)


def test_an_estimate_takes_no_weights_and_no_gpu():
    settings = _small(device="cuda", weights="/no/such/file", pretrained=True)
    assert estimate(settings) == estimate(dataclasses.replace(settings, device="cpu"))
