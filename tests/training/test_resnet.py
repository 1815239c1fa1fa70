"""The small ResNet: its depth, its samples apart from each other, its activations."""

import pytest
import torch
from torch import nn

from gn_kernels.penalty import gradient_norm
from gn_kernels.training import InputError, Settings, load
from gn_kernels.training.model import build, prepare


def _settings(**options):
    return Settings(model="resnet", embed_dim=8, depth=2, **options)


@pytest.fixture(scope="module")
def data():
    return load(_settings())


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_layers_and_activations(data, activation):
    model = build(_settings(activation=activation), data)
    main_path = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]
    assert len(main_path) == 12 * 2 + 2
    kinds = {
        type(module).__name__.lower() for name, module in model.named_modules() if "act" in name
    }
    assert kinds == {activation}


def test_samples_do_not_interact_and_all_weights_are_penalised(data):
    torch.manual_seed(0)
    model = build(_settings(activation="gelu"), data).double()
    prepare(model, _settings(activation="gelu"))
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):  # the blocks begin as identities
            nn.init.ones_(parameter)
    images, labels = data.test.batch(torch.arange(4))
    images = images.double().requires_grad_()
    losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
    (of_first,) = torch.autograd.grad(losses[0], images, retain_graph=True)
    assert of_first[0].abs().sum() > 0
    assert of_first[1:].abs().sum() == 0
    gradient_norm(losses, images).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_an_activation_without_a_gain_is_refused(data):
    with pytest.raises(InputError, match="relu, gelu, silu, softplus, not quick_gelu"):
        build(_settings(activation="quick_gelu"), data)
