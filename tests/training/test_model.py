"""Models by name: sizes, weights, converted activations, and what is said of what does not fit."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import timm
import torch
from torch import nn

from gn_kernels.training import METHODS, InputError, Settings
from gn_kernels.training.data import Dataset, TensorSplit
from gn_kernels.training.model import build, convert_activations, prepare

SWIN = "embed_dim=12,depths=(1,1,2,1),num_heads=(1,2,3,4),window_size=4"


def _data(side=32, classes=4, channels=3):
    images = torch.randint(0, 256, (8, channels, side, side), dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(8) % classes, 255)
    names = tuple(str(index) for index in range(classes))
    return Dataset("noise", split, split, names, (0.5,) * channels, (0.25,) * channels)


def _settings(**options):
    return Settings(**{"image_size": 32, "patch_size": 4, **options})


SMALL = {
    "vit": {},
    "resnet": {"embed_dim": 8, "depth": 1},
    "preactresnet18": {"eval_mode": True, "image_size": 8},
    "resnet18": {"freeze_batchnorm": True},
    "swin_base_patch4_window7_224": {"model_options": SWIN},
    "convnext_atto": {"model_options": "depths=(1,1,1,1)"},
    "transformers:vit": {
        "model_options": "hidden_size=24,num_hidden_layers=1,num_attention_heads=3,"
        "intermediate_size=48,patch_size=8"
    },
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("swapped", [True, False])
def test_every_kind_of_model_trains_with_a_penalty(name, swapped):
    settings = _settings(model=name, swap=swapped, **SMALL[name])
    data = _data(settings.image_size)
    torch.manual_seed(0)
    model = build(settings, data)
    assert (prepare(model, settings) is not None) == swapped
    images, labels = data.train.batch(torch.arange(8))
    losses = METHODS["gradnorm"](model.eval(), images, labels, 9.0, settings)
    losses.total.backward()
    assert model(images).shape == (8, 4)
    assert losses.penalty > 0
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_grey_images_and_their_class_count_reach_the_model():
    model = build(_settings(model="resnet18", freeze_batchnorm=True), _data(channels=1, classes=7))
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [("gelu", "ReLU", nn.GELU), ("silu", "ReLU", nn.SiLU), ("relu", "ReLU", nn.ReLU)],
)
def test_a_resnets_activations_are_all_converted_each_to_its_own(kind, old, new):
    model = timm.create_model("resnet50", num_classes=3)
    sites = {path for path, module in model.named_modules() if isinstance(module, nn.ReLU)}
    assert len(sites) == 49
    converted = convert_activations(model, kind)
    assert set(converted) == sites
    assert set(converted.values()) == {old}
    modules = [model.get_submodule(path) for path in sites]
    assert all(type(module) is new for module in modules)
    assert len({id(module) for module in modules}) == 49
    assert not any(getattr(module, "inplace", False) for module in modules)


def test_shared_and_nested_activations_get_modules_of_their_own():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(nn.Sequential(shared)), nn.Sigmoid(), nn.Softmax())
    converted = convert_activations(model, "gelu")
    assert converted == {"0": "ReLU", "1.0.0": "ReLU"}
    assert model[0] is not model[1][0][0]
    assert isinstance(model[2], nn.Sigmoid)
    with pytest.raises(InputError, match="no activation module"):
        convert_activations(nn.Sequential(nn.Linear(1, 1)), "gelu")


def test_conversion_is_reported_and_changes_the_output():
    options = {"model": "resnet18", "freeze_batchnorm": True}
    torch.manual_seed(0)
    relu = build(_settings(**options), _data()).eval()
    torch.manual_seed(0)
    silu = build(_settings(**options, activation="silu"), _data()).eval()
    assert relu.converted == {}
    assert len(silu.converted) == 17
    images = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(relu(images), silu(images))
    pairs = zip(relu.parameters(), silu.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "ddp", "safetensors", "ours"])
def test_weights_come_from_files_in_the_usual_forms(tmp_path, wrapping):
    options = {"model": "resnet18", "freeze_batchnorm": True}
    torch.manual_seed(0)
    source = build(_settings(**options), _data())
    named = source.network.state_dict()
    path = tmp_path / ("weights.safetensors" if wrapping == "safetensors" else "weights.pt")
    if wrapping == "safetensors":
        from safetensors.torch import save_file

        save_file(named, path)
    else:
        whole = {f"model:{name}": x for name, x in source.state_dict().items()}
        average = {f"average:{name}": x + 1.0 for name, x in source.state_dict().items()}
        content = {
            "plain": named,
            "state_dict": {"epoch": 3, "state_dict": named},
            "ddp": {"model": {f"module.{name}": x for name, x in named.items()}},
            "ours": {"tensors": {**whole, **average}, "step": 3},
        }
        torch.save(content[wrapping], path)
    torch.manual_seed(1)
    model = build(_settings(**options, weights=str(path)), _data())
    shift = 1 if wrapping == "ours" else 0  # the averaged weights
    for name, tensor in model.network.state_dict().items():
        torch.testing.assert_close(tensor, (named[name] + shift).to(tensor.dtype))


def test_a_classifier_of_other_classes_is_left_and_said(tmp_path, caplog):
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "ten.pt")
    settings = _settings(model="resnet18", freeze_batchnorm=True, weights=str(tmp_path / "ten.pt"))
    model = build(settings, _data(classes=4))
    assert model.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert "is for 10 classes and is not used: the data has 4" in caplog.text


class _Code:
    def __reduce__(self):
        return os.putenv, ("gn_kernels_ran", "1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nonsense", "is damaged"),
        (pickle.dumps({"a": 1}), "can't be read"),
        (None, "no file of weights"),
        ({"weight": torch.zeros(3)}, "do not fit the model: conv1.weight is missing"),
        ({"note": "none"}, "holds no weights"),
        ({"state_dict": _Code()}, "could run code"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, words):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    settings = _settings(model="resnet18", freeze_batchnorm=True, weights=str(path))
    with pytest.raises(InputError, match=words) as error:
        build(settings, _data())
    assert "\n" not in str(error.value)
    assert "gn_kernels_ran" not in os.environ


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "resnet81"}, "timm has no model 'resnet81'"),
        ({"model": "swin_base_patch4_window7"}, "it has swin_base_patch4_window7_224"),
        ({"model": "resnet18"}, "--freeze-batchnorm"),
        ({"model": "vit_tiny_patch16_224", "model_options": "depths"}, "must be keywords"),
        ({"model": "vit_tiny_patch16_224", "model_options": "depth=open('x')"}, "plain values"),
        ({"model": "vit_tiny_patch16_224", "model_options": "colour=1"}, "colour"),
        ({"model": "transformers:/no/such/model"}, "can't be made"),
    ],
)
def test_models_that_cannot_be_made_are_told_in_one_sentence(options, words):
    with pytest.raises(InputError, match=words) as error:
        build(_settings(**options), _data())
    assert "\n" not in str(error.value)


def test_a_configuration_file_of_transformers_is_enough(tmp_path):
    config = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 1, "patch_size": 8}
    config |= {"num_attention_heads": 3, "intermediate_size": 48, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(_settings(model=f"transformers:{tmp_path}", activation="silu"), _data())
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert len(model.converted) == 1
