"""swap on models of timm and transformers, from their configurations alone.

The expected weight gradients are those of the same model, not swapped, in float64, with plain
attention: timm's own, and for transformers PyTorch's.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gn_kernels
from gn_kernels.swap import swap

# Both sides are float64, and an L1 norm has no rounding of its own.
ROUNDING = 1e-10


def gradients(logits, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The weight gradients of loss + ‖∇ₓ loss‖₁."""
    x = x.clone().requires_grad_()
    loss = F.cross_entropy(logits(model, x), torch.arange(len(x)) % 3, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss + gradient.abs().sum(), weights, allow_unused=True)


def assert_same(actual, expected):
    assert [g is None for g in actual] == [g is None for g in expected]
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None]
    error = sum((a - e).square().sum() for a, e in pairs).sqrt()
    assert error < ROUNDING * sum(e.square().sum() for _, e in pairs).sqrt()


def enlarge(model: nn.Module) -> nn.Module:
    """Weights large enough that softmax and activations are not linear."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.double()


VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
DINO = {**VIT, "img_size": 28}
TIMM = {  # model: its arguments, how many sites are swapped and left
    "vit_tiny_patch16_224": (VIT, 9, 0),
    "deit_tiny_distilled_patch16_224": (VIT, 9, 0),
    "vit_tiny_patch16_224 tanh": ({**VIT, "act_layer": "gelu_tanh"}, 9, 0),
    "vit_tiny_patch16_224 quick": ({**VIT, "act_layer": "quick_gelu"}, 9, 0),
    "vit_tiny_patch16_224 qk_norm": ({**VIT, "qk_norm": True}, 13, 0),
    # LayerScale, at first 1e-5: the residual would be all there is
    "vit_small_patch14_dinov2": ({**DINO, "init_values": 0.5}, 9, 0),
    "vit_small_patch14_reg4_dinov2": ({**DINO, "init_values": 0.5}, 9, 0),
    "vit_giant_patch14_dinov2": ({**DINO, "init_values": 0.5}, 9, 0),  # SwiGLU
    "swin_tiny_patch4_window7_224": (
        {
            "img_size": 56,
            "embed_dim": 8,
            "depths": (2, 1),
            "num_heads": (1, 2),
            "drop_path_rate": 0.0,
        },
        15,
        3,  # the Softmax that its plain attention would use
    ),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 13, 0),
    "efficientnet_b0": ({}, 49, 16),
    "resnet10t": ({"act_layer": "silu"}, 11, 0),
    "nf_resnet26": ({"act_layer": "silu"}, 25, 0),
}


def make_timm(name: str, fused: bool) -> nn.Module:
    timm = pytest.importorskip("timm")
    before = timm.layers.use_fused_attn(), timm.layers.use_fused_attn(experimental=True)
    timm.layers.set_fused_attn(fused, experimental=fused)  # Swin's is experimental
    try:
        torch.manual_seed(1)
        model = timm.create_model(name.split()[0], num_classes=3, **TIMM[name][0])
    finally:
        timm.layers.set_fused_attn(*before)
    return enlarge(model)


def call(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    size = TIMM[name][0].get("img_size", 64)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    model = make_timm(name, fused=True)
    types, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    expected = gradients(call, make_timm(name, fused=False), x)
    model.eval()
    outputs = model(x)
    report = swap(model)
    assert (report.swapped, report.left) == TIMM[name][1:], str(report)
    torch.testing.assert_close(model(x), outputs, rtol=1e-10, atol=1e-12)
    model.train()
    assert_same(gradients(call, model, x), expected)
    report.undo()
    assert [type(module) for module in model.modules()] == types
    model.load_state_dict(state)  # training moved the statistics of batch norm
    assert torch.equal(model.eval()(x), outputs)


def test_drop_path():
    # The same paths are dropped, and the others scaled.
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    TIMM["vit_tiny_patch16_224 drop_path"] = ({**VIT, "drop_path_rate": 0.6}, 9, 0)
    models = [make_timm("vit_tiny_patch16_224 drop_path", fused=False).train() for _ in range(2)]
    swap(models[1])
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(gradients(call, model, x))
    assert_same(results[1], results[0])
    torch.manual_seed(4)
    other = gradients(call, models[0], x)
    assert any(not torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_a_stock_vit_raises():
    model = make_timm("vit_tiny_patch16_224", fused=True)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        gradients(call, model, torch.randn(2, 3, 32, 32, dtype=torch.float64))


def test_plain_attention_is_swapped_too():
    model = make_timm("vit_tiny_patch16_224", fused=False)
    report = swap(model)
    assert (report.swapped, report.left) == (9, 0)
    assert model.blocks[0].attn.fused_attn
    report.undo()
    assert not model.blocks[0].attn.fused_attn


def test_attention_dropout():
    model = make_timm("vit_tiny_patch16_224", fused=True)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.3
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    report = swap(model)
    notes = [row.new for row in report.rows if "set that to 0 to have the kernels" in row.new]
    assert len(notes) == len(model.blocks)
    assert all("its attn_drop is 0.3" in note for note in notes)
    assert not torch.equal(model(x), model(x))
    assert all(gradient.isfinite().all() for gradient in gradients(call, model, x))


def test_timms_gradient_checkpointing():
    model = make_timm("vit_tiny_patch16_224", fused=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gradients(call, make_timm("vit_tiny_patch16_224", fused=False), x)
    swap(model)
    model.set_grad_checkpointing()
    assert_same(gradients(call, model, x), expected)


def test_timms_functions():
    activations = pytest.importorskip("timm.layers.activations")
    me = pytest.importorskip("timm.layers.activations_me")
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    functions = [
        getattr(activations, name) for name in ("gelu", "gelu_tanh", "quick_gelu", "swish")
    ]
    classes = [getattr(activations, name) for name in ("GELU", "GELUTanh", "QuickGELU", "Swish")]
    for function, make in zip([*functions, me.swish_me], [*classes, me.SwishMe], strict=True):
        holder, module = nn.Module(), make()
        holder.act = function
        reference = function(x)
        assert swap(holder).swapped == swap(module).swapped == 1
        assert type(module).__module__ == gn_kernels.nn.__name__
        for result in (holder.act(x), holder.act(x, inplace=False), module(x)):
            assert result.grad_fn.name().startswith("ActivationFunction")
            torch.testing.assert_close(result, reference, rtol=1e-13, atol=1e-15)
    mish = swap(activations.Mish())
    assert (mish.swapped, mish.left) == (0, 1)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_labels": 3,
}


def classify(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).logits


def pool(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).last_hidden_state.mean(1)


def read(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Tokens as embeddings, the second sequence padded."""
    mask = torch.ones(len(x), 16, dtype=torch.long)
    mask[1, 10:] = 0
    return model(inputs_embeds=x.reshape(len(x), -1, 16)[:, :16], attention_mask=mask).logits


TRANSFORMERS = {  # model: its configuration, how it is called, sites swapped and left
    "ViTForImageClassification": ("ViTConfig", VISION, classify, 9, 0),
    "ViTModel": ("ViTConfig", VISION, pool, 9, 1),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION, pool, 10, 0),
    "SwinForImageClassification": ("SwinConfig", SWIN, classify, 15, 0),
    "BertForSequenceClassification": (
        "BertConfig",
        {**SMALL, "vocab_size": 20, "hidden_dropout_prob": 0.0},
        read,
        9,
        1,
    ),
    "SiglipForImageClassification": (
        "SiglipConfig",
        {"vision_config": VISION, "num_labels": 3},
        classify,
        12,
        0,
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3},
        classify,
        13,
        0,
    ),
}


def make_transformers(name: str, attention: str | None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    config, arguments = TRANSFORMERS[name][:2]
    config = getattr(transformers, config)(**arguments)
    if attention and name != "ConvNextForImageClassification":
        config._attn_implementation = attention
    for dropout in ("attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    torch.manual_seed(1)
    return enlarge(getattr(transformers, name)(config))


def transformers_images(name: str) -> torch.Tensor:
    size = 64 if "ConvNext" in name else 16
    return torch.randn(2, 3, size, size, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    output, *counts = TRANSFORMERS[name][2:]
    x = transformers_images(name)
    model = make_transformers(name, "sdpa")
    types = [type(module) for module in model.modules()]
    with sdpa_kernel(SDPBackend.MATH):  # transformers' "eager" takes its softmax in float32
        expected = gradients(output, make_transformers(name, "sdpa"), x)
    model.eval()
    outputs = output(model, x)
    report = swap(model)
    assert [report.swapped, report.left] == counts, str(report)
    torch.testing.assert_close(output(model, x), outputs, rtol=1e-10, atol=1e-12)
    model.train()
    assert_same(gradients(output, model, x), expected)
    report.undo()
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(output(model.eval(), x), outputs)


@pytest.mark.slow
def test_a_stock_transformers_vit_raises():
    name = "ViTForImageClassification"
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        gradients(classify, make_transformers(name, "sdpa"), transformers_images(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "reason"),
    [("eager", "can be differentiated twice"), ("flex_attention", "set_attn_implementation")],
)
def test_other_implementations_of_attention_are_left(attention, reason):
    report = swap(make_transformers("ViTForImageClassification", attention))
    assert (report.swapped, report.left) == (7, 2)
    assert all(reason in row.reason for row in report.rows if row.reason)


@pytest.mark.slow
def test_every_activation_of_transformers():
    registry = pytest.importorskip("transformers.activations").ACT2CLS
    x = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    swapped = set()
    for name in registry:
        if name in ("prelu", "xielu"):  # with parameters
            continue
        function = pytest.importorskip("transformers.activations").ACT2FN[name]
        reference = function(x)
        if swap(function).swapped:
            swapped.add(name)
            # FastGELU writes √(2/π) with ten digits.
            torch.testing.assert_close(function(x), reference, rtol=1e-10, atol=1e-11)
            assert function(x).grad_fn.name().startswith("ActivationFunction")
            assert torch.equal(pickle.loads(pickle.dumps(function))(x), function(x))
    assert swapped == {
        *("gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh"),
        *("gelu_python_tanh", "gelu_accurate", "quick_gelu", "silu", "swish"),
    }
