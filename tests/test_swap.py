"""swap on plain PyTorch modules. Whole models of timm and transformers: test_swap_models.py."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import gn_kernels
from gn_kernels.counting import Counter
from gn_kernels.swap import attention, swap

from .small_transformer import relative_error, weight_gradients

# Both sides are float64; their difference is rounding.
ROUNDING = 1e-10


class Attention(nn.Module):
    """A stock attention layer, with an activation in its forward to make it interesting."""

    def __init__(self, width: int = 8, causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.proj(F.gelu(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, width: int = 8, checkpointed: bool = False) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm, self.act, self.gate = nn.LayerNorm(width), nn.SiLU(), F.silu
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x):
        x = x + self.attn(self.norm(x))
        return self.gate(x + self.fc2(self.act(self.fc1(x))))


class Classifier(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


OURS = {"ActivationFunction", "PackedAttentionFunction"}
IMAGES = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 2, 1])


def make_model(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    model = Classifier(*(blocks or (Block(), Block()))).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def total_loss(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    return autograd_step(model)(images.clone().requires_grad_())


def autograd_step(model):
    def step(images):
        loss = F.cross_entropy(model(images), LABELS, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images, create_graph=True)
        return loss + gradient.flatten(1).norm(dim=1).sum()

    return step


def func_step(model):
    def loss(images):
        return F.cross_entropy(model(images), LABELS, reduction="sum")

    def step(images):
        gradient, value = torch.func.grad_and_value(loss)(images)
        return value + gradient.flatten(1).norm(dim=1).sum()

    return step


def gradients(model: nn.Module) -> torch.Tensor:
    return weight_gradients(model, total_loss(model))


def expected(model: nn.Module) -> torch.Tensor:
    """PyTorch's own, by its attention from single operations."""
    with sdpa_kernel(SDPBackend.MATH):
        return gradients(model)


def runs_on_gn_kernels(output: torch.Tensor) -> set[str]:
    """Our Functions in the graph of a result."""
    seen, names, stack = set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names |= {name for name in (*OURS, "AttentionFunction") if node.name().startswith(name)}
        stack.extend(following for following, _ in node.next_functions)
    return names


MODULES = {
    "GELU": (lambda: nn.GELU(), gn_kernels.nn.GELU),
    "GELU tanh": (lambda: nn.GELU(approximate="tanh"), gn_kernels.nn.GELU),
    "SiLU": (lambda: nn.SiLU(), gn_kernels.nn.SiLU),
    "SiLU inplace": (lambda: nn.SiLU(inplace=True), gn_kernels.nn.SiLU),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_becomes_ours_and_undo_brings_it_back(name):
    make, ours = MODULES[name]
    model = nn.Sequential(nn.Linear(4, 4), make()).double().eval()
    before, attributes = model[1], dict(vars(model[1]))
    x = torch.randn(3, 4, dtype=torch.float64)
    reference = model(x)
    report = swap(model)
    assert (report.swapped, report.left) == (1, 0)
    assert report.rows[0].path == "1"
    assert model[1] is before
    assert type(before) is ours
    assert not before.training
    assert runs_on_gn_kernels(model(x)) == {"ActivationFunction"}
    torch.testing.assert_close(model(x), reference, rtol=1e-13, atol=1e-15)
    report.undo()
    report.undo()
    assert type(before) is type(make())
    assert vars(before) == attributes
    assert torch.equal(model(x), reference)
    assert not runs_on_gn_kernels(model(x))


FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu inplace": functools.partial(F.silu, inplace=True),
}


class Holder(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), function

    def forward(self, x):
        return self.act(self.linear(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_held_as_an_attribute_becomes_ours(name):
    function = FUNCTIONS[name]
    model = Holder(function).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    reference = model(x)
    report = swap(model)
    assert (report.swapped, report.left) == (1, 0)
    assert report.rows[0].path == "act"
    assert runs_on_gn_kernels(model(x)) == {"ActivationFunction"}
    torch.testing.assert_close(model(x), reference, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), reference)
    report.undo()
    assert model.act is function


def test_an_inplace_function_still_works_in_place():
    class Statement(nn.Module):
        def forward(self, x):
            x = x + 1
            F.silu(x, inplace=True)
            return x

    model, x = Statement(), torch.randn(5, requires_grad=True)
    reference = model(x)
    assert swap(model).swapped == 1
    torch.testing.assert_close(model(x), reference)
    torch.testing.assert_close(
        torch.autograd.grad(model(x).sum(), x), torch.autograd.grad(reference.sum(), x)
    )


LEFT = {
    "ReLU": (nn.ReLU, "second derivative is zero"),
    "LeakyReLU": (nn.LeakyReLU, "second derivative is zero"),
    "Hardswish": (nn.Hardswish, "no kernel"),
    "Mish": (nn.Mish, "no kernel"),
    "ELU": (nn.ELU, "no kernel"),
    "Softplus": (nn.Softplus, "no kernel"),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_activations_are_left_with_the_reason(name):
    make, reason = LEFT[name]
    report = swap(nn.Sequential(nn.Linear(2, 2), make()))
    assert (report.swapped, report.left) == (0, 1)
    assert reason in report.rows[0].reason
    assert "Nothing to swap." in str(report)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (F.relu, "second derivative is zero"),
        (torch.relu, "second derivative is zero"),
        (functools.partial(F.leaky_relu, negative_slope=0.2), "second derivative is zero"),
        (F.mish, "no kernel"),
        (lambda x: x**3, "not an activation that swap knows"),
    ],
)
def test_other_functions_are_left_with_the_reason(function, reason):
    model = Holder(function)
    report = swap(model)
    assert (report.swapped, report.left) == (0, 1)
    assert reason in report.rows[0].reason
    assert model.act is function


class DoubledGELU(nn.GELU):
    def forward(self, input):
        return 2 * super().forward(input)


class FakeGELU(nn.GELU):
    def forward(self, input):
        return input**3


class CustomAct(nn.Module):
    def forward(self, x):
        return x * x


def test_a_subclass_with_a_forward_of_its_own_keeps_it():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    doubled, fake = DoubledGELU(), FakeGELU()
    reference = doubled(x)
    assert swap(doubled).swapped == 1  # the F.gelu inside
    torch.testing.assert_close(doubled(x), reference)
    assert runs_on_gn_kernels(doubled(x)) == {"ActivationFunction"}
    report = swap(fake)
    assert (report.swapped, report.left) == (0, 1)
    assert "not an activation that swap knows" in report.rows[0].reason
    assert torch.equal(fake(x), x**3)
    (row,) = swap(nn.ModuleDict({"act": CustomAct()})).rows
    assert "not an activation that swap knows" in row.reason


def test_a_model_that_is_an_activation():
    model = nn.GELU()
    report = swap(model)
    assert type(model) is gn_kernels.nn.GELU
    assert report.rows[0].path == ""
    assert "(model)" in str(report)


def test_a_shared_module_has_a_row_for_each_path():
    shared = nn.SiLU()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = swap(model)
    assert [row.path for row in report.rows] == ["a", "b.0"]
    assert report.swapped == 2
    assert model["a"] is model["b"][0]
    report.undo()
    assert type(shared) is nn.SiLU


def test_hooks_survive():
    model = nn.Sequential(nn.GELU(), Attention())
    calls = []
    for module in model:
        module.register_forward_hook(lambda module, *_: calls.append(("after", module)))
        module.register_forward_pre_hook(lambda module, *_: calls.append(("before", module)))
    assert swap(model).left == 0
    model(torch.randn(2, 5, 8))
    assert calls == [(when, module) for module in model for when in ("before", "after")]


def test_a_forward_replaced_on_the_instance_is_left():
    model = nn.Sequential(nn.GELU(), Attention())
    for module in model:
        module.forward = lambda x: x
    report = swap(model)
    assert (report.swapped, report.left) == (0, 2)
    assert all("replaced on the instance" in row.reason for row in report.rows)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrized_module_is_left():
    model = Attention()
    model.weight = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model, "weight", Double())
    (row,) = swap(model).rows
    assert "parametrized" in row.reason
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is Attention


def test_parametrizing_after_the_swap_works():
    model = Attention()
    model.weight = nn.Parameter(torch.ones(1))
    report = swap(model)
    parametrize.register_parametrization(model, "weight", Double())
    assert runs_on_gn_kernels(model(torch.randn(2, 5, 8))) == OURS
    with pytest.raises(RuntimeError, match="can't undo: __class__ of the model was changed"):
        report.undo()
    parametrize.remove_parametrizations(model, "weight")
    report.undo()
    assert type(model) is Attention


def test_a_stock_model_raises():
    with pytest.raises(RuntimeError, match=r"derivative for aten::_scaled_dot_product.* is not"):
        gradients(make_model())


def test_weight_gradients_of_a_penalty():
    model = make_model()
    reference, output = expected(model), model(IMAGES)
    report = swap(model)
    assert [(row.path, row.old) for row in report.rows if row.path.startswith("blocks.0")] == [
        ("blocks.0.gate", "F.silu"),
        ("blocks.0.attn", "F.scaled_dot_product_attention in Attention"),
        ("blocks.0.attn", "F.gelu in Attention"),
        ("blocks.0.norm", "torch.nn.LayerNorm"),
        ("blocks.0.act", "torch.nn.SiLU"),
    ]
    assert (report.swapped, report.left) == (10, 0)
    assert runs_on_gn_kernels(model(IMAGES)) == OURS
    torch.testing.assert_close(model(IMAGES), output, rtol=1e-12, atol=1e-14)
    assert relative_error(gradients(model), reference) < ROUNDING
    report.undo()
    assert torch.equal(model(IMAGES), output)
    assert not runs_on_gn_kernels(model(IMAGES))
    with pytest.raises(RuntimeError, match="derivative for aten"):
        gradients(model)


def test_as_a_context():
    model = make_model()
    with swap(model) as report:
        assert runs_on_gn_kernels(model(IMAGES)) == OURS
        assert report.swapped == 10
    assert not runs_on_gn_kernels(model(IMAGES))


def test_a_second_swap_finds_nothing_to_do():
    model = make_model()
    swap(model)
    report = swap(model)
    assert report.swapped == 0
    assert {row.reason for row in report.rows} == {"already gn_kernels'"}
    assert "Nothing to swap." in str(report)
    report.undo()
    assert runs_on_gn_kernels(model(IMAGES)) == OURS


CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(2, 1, 5, 7) > 0.4},
    "masked row": {"attn_mask": torch.arange(5)[:, None].ne(2).expand(5, 7)},
    "float mask": {"attn_mask": torch.randn(4, 5, 7, dtype=torch.float64)},
    "grouped": {"enable_gqa": True},
    "2-d": {},
}


@pytest.mark.parametrize("value_size", [6, 3])  # the kernels take the first alone
@pytest.mark.parametrize("name", CASES)
def test_attention_is_scaled_dot_product_attention(name, value_size):
    options = dict(CASES[name])
    lead, heads = ((), 0) if name == "2-d" else ((2,), 4)
    kv_heads = 2 if name == "grouped" else heads

    def make(heads, *shape):
        shape = (*lead, *([heads] if heads else []), *shape)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    inputs = [
        make(heads, 5, 6),
        make(kv_heads, 7, 6),
        make(kv_heads, 7, value_size),
    ]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = mask.clone().requires_grad_()
        inputs.append(options["attn_mask"])

    def orders(function):
        output = function(*inputs[:3], **options)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs)
        return output, *first, *second

    with sdpa_kernel(SDPBackend.MATH):
        reference = orders(F.scaled_dot_product_attention)
    torch.testing.assert_close(orders(attention), reference, rtol=1e-9, atol=1e-11)


def test_a_mask_of_another_dtype():
    q, mask = torch.randn(2, 4, 5, 6, dtype=torch.bfloat16), torch.randn(5, 5)
    expected = F.scaled_dot_product_attention(q, q, q, mask.bfloat16())
    for dropout in (0.0, 1e-9):  # with and without the kernels
        actual = attention(q, q, q, mask, dropout)
        assert actual.dtype == q.dtype
        torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)  # bfloat16 has 2^-8


def test_attention_drops_weights_in_training():
    query, key = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 7, 6)
    value = torch.eye(7).expand(2, 4, 7, 7)  # the result is the weights themselves
    kept = attention(query, key, value)
    dropped = attention(query, key, value, dropout_p=0.5)
    alive = dropped != 0
    assert 0.3 < alive.float().mean() < 0.7
    torch.testing.assert_close(dropped[alive], 2 * kept[alive])


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_report_says_what_dropout_costs(dropout):
    (row,) = swap(nn.MultiheadAttention(8, 2, dropout)).rows
    note = "; in training single operations, for its dropout is 0.25: set that to 0"
    assert row.new.startswith("gn_kernels.attention" + (note if dropout else ""))
    assert ("single operations" in row.new) == (dropout > 0)


def test_attention_refuses_what_pytorch_refuses():
    q = torch.randn(2, 4, 5, 6)
    with pytest.raises(RuntimeError, match="attn_mask must be None"):
        attention(q, q, q, attn_mask=torch.ones(5, 5).bool(), is_causal=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights, masked):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
            options = {"attn_mask": mask, "is_causal": True} if masked else {}
            return self.attn(x, x, x, need_weights=need_weights, **options)[0]

    model = make_model(Net())
    if not need_weights:
        with pytest.raises(RuntimeError, match="derivative for aten"):
            gradients(model)
    reference = expected(model)
    report = swap(model)
    assert (report.swapped, report.left) == (1, 0)
    assert isinstance(model.blocks[0].attn, nn.MultiheadAttention)
    assert relative_error(gradients(model), reference) < ROUNDING
    if not need_weights:
        assert runs_on_gn_kernels(model(IMAGES)) == {"AttentionFunction"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("activation", ["gelu", "relu", F.gelu, nn.GELU()])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(training, activation):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation, batch_first=True)
    model = make_model(nn.TransformerEncoder(layer, 2)).train(training)
    reference, output = expected(model), model(IMAGES)
    with torch.no_grad():
        fast = model(IMAGES)
    report = swap(model)
    assert (report.swapped, report.left) == ((6, 2) if activation == "relu" else (8, 0))
    torch.testing.assert_close(model(IMAGES), output, rtol=1e-12, atol=1e-14)
    assert relative_error(gradients(model), reference) < ROUNDING
    with torch.no_grad():  # in eval mode this is PyTorch's fast path, nested tensors included
        torch.testing.assert_close(model(IMAGES), fast, rtol=1e-12, atol=1e-14)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
        assert model.blocks[0](IMAGES, src_key_padding_mask=padding).shape == IMAGES.shape
    report.undo()
    assert torch.equal(model(IMAGES), output)


def test_both_passes_of_a_reentrant_checkpoint_are_the_same():
    class Net(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    model, x = Net(), torch.randn(2, 4, 50, 6)
    swap(model)
    torch.manual_seed(0)
    with torch.no_grad():
        first = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)


def test_without_gradients_pytorchs_fused_attention_runs():
    model = make_model().eval()
    with torch.no_grad():
        output = model(IMAGES)
        swap(model.blocks[0].attn)
        assert torch.equal(model(IMAGES), output)


class Helper(nn.Module):
    """Calls through a method, through a helper beside it, and through a parent's forward."""

    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return _helper(x)


def _helper(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Parent(Helper):
    def forward(self, x):
        return super().forward(x) + 1


class Decorated(nn.Module):
    @staticmethod
    def decorate(function):
        @functools.wraps(function)
        def inner(*args, **kwargs):
            return function(*args, **kwargs)

        return inner

    @decorate
    def forward(self, x):
        return torch.cat([F.scaled_dot_product_attention(y, y, y) for y in [x]])


class Named(nn.Module):
    """Names what swap looks for and calls none of it."""

    def __init__(self):
        super().__init__()
        self.gelu = nn.Identity()

    def forward(self, x):
        scaled_dot_product_attention = self.gelu
        return scaled_dot_product_attention(x)


@pytest.mark.parametrize("cls", [Helper, Parent, Decorated])
def test_calls_are_found_where_they_are(cls):
    model, x = cls(), torch.randn(1, 2, 3, 4, requires_grad=True)
    report = swap(model)
    assert [row.old for row in report.rows] == [f"F.scaled_dot_product_attention in {cls.__name__}"]
    assert runs_on_gn_kernels(model(x)) == {"AttentionFunction"}


def test_a_name_alone_is_no_call():
    assert swap(Named()).rows == []


flash_attn = types.ModuleType("flash_attn")
exec("def flash_attn_func(q, k, v): return q", vars(flash_attn))


def test_attention_without_a_second_derivative_is_named():
    class Flash(nn.Module):
        def forward(self, x):
            return flash_attn.flash_attn_func(x, x, x)

    class Flex(nn.Module):
        def forward(self, x):
            return flex_attention(x, x, x)

    report = swap(nn.Sequential(Flash(), Flex()))
    assert [row.old for row in report.rows] == [
        "flash_attn.flash_attn_func in Flash",
        "torch.nn.attention.flex_attention.flex_attention in Flex",
    ]
    assert all("no second derivative" in row.reason for row in report.rows)
    assert report.swapped == 0


def test_class_and_state_dict_stay():
    model = make_model()
    names, layer = list(model.state_dict()), model.blocks[0].attn
    swap(model)
    assert list(model.state_dict()) == names
    assert isinstance(layer, Attention)
    assert type(layer) is type(model.blocks[1].attn)
    assert repr(type(layer)) == repr(Attention)
    assert inspect.signature(layer.forward) == inspect.signature(Attention().forward)


def test_a_replica_is_swapped_too():
    layer = Attention()
    swap(layer)
    assert runs_on_gn_kernels(layer._replicate_for_data_parallel()(torch.randn(2, 5, 8))) == OURS


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_swapped_too(duplicate):
    model = make_model()
    reference = expected(model)
    report = swap(model)
    if duplicate == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = duplicate(model)
    report.undo()  # of the original alone
    assert type(model.blocks[0].attn) is Attention
    assert runs_on_gn_kernels(twin(IMAGES)) == OURS
    assert relative_error(gradients(twin), reference) < ROUNDING
    assert isinstance(twin.blocks[0].attn, Attention)


def test_a_pickle_names_the_original_class():
    model = Attention()
    swap(model)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(model, protocol))
        assert type(twin) is type(model)


def test_checkpointing():
    model = make_model(Block(checkpointed=True))
    plain = make_model(Block())
    reference = expected(plain)
    swap(model)
    assert relative_error(gradients(model), reference) < ROUNDING


def test_an_exception_leaves_no_mode_behind():
    model = Attention()
    swap(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5, 3))
    assert torch.overrides._len_torch_function_stack() == 0


def test_threads_do_not_see_each_other():
    model = make_model()
    swap(model.blocks[0])
    swapped, stock = model.blocks[0].attn, model.blocks[1].attn
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    barrier, outcomes = threading.Barrier(4), []

    def work(module, expected):
        barrier.wait()
        for _ in range(50):
            outcomes.append(runs_on_gn_kernels(module(x)) == expected)

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in [(swapped, OURS), (stock, set())] * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 200


def test_torch_func():
    model = make_model()
    reference = expected(model)
    swap(model)
    parameters = dict(model.named_parameters())

    def total(parameters):
        def loss(images):
            output = torch.func.functional_call(model, parameters, (images,))
            return F.cross_entropy(output, LABELS, reduction="sum")

        gradient, value = torch.func.grad_and_value(loss)(IMAGES)
        return value + gradient.flatten(1).norm(dim=1).sum()

    grads = torch.func.grad(total)(parameters)
    actual = torch.cat([grads[name].flatten() for name in parameters])
    assert relative_error(actual, reference) < ROUNDING


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["stock", "multihead"])
@pytest.mark.parametrize("route", [func_step, autograd_step])
def test_compiled_step(route, kind, compiler):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    model = make_model(Block() if kind == "stock" else layer)
    reference = expected(model)
    swap(model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step = torch.compile(route(model), fullgraph=True, backend=compiler)
        loss = step(IMAGES.clone().requires_grad_(route is autograd_step))
    assert relative_error(weight_gradients(model, loss), reference) < ROUNDING


def test_autocast():
    model = make_model().float()
    swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].attn(IMAGES.float()).dtype == torch.bfloat16
        loss = total_loss(model, IMAGES.float())
    assert weight_gradients(model, loss).isfinite().all()


def test_a_traced_model_is_left():
    model = torch.fx.symbolic_trace(Attention())
    report = swap(model)
    assert report.swapped == 0
    assert report.left == 2
    assert all("before tracing" in row.reason for row in report.rows)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_left():
    report = swap(torch.jit.script(nn.Sequential(nn.GELU())))
    assert (report.swapped, report.left) == (0, 1)
    assert "before scripting" in report.rows[0].reason


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_swapped_inside(in_place):
    torch._dynamo.reset()
    original = make_model().eval()
    reference = original(IMAGES)
    model = original
    if in_place:
        original.compile(backend="eager")
    else:
        model = torch.compile(original, backend="eager")
    model(IMAGES)
    report = swap(model)
    assert report.rows[0].path == ""
    assert "compile the whole training step" in report.rows[0].reason
    assert (report.swapped, report.left) == (10, 1)
    assert type(original.blocks[0].act) is gn_kernels.nn.SiLU
    torch.testing.assert_close(model(IMAGES), reference, rtol=1e-12, atol=1e-14)


def test_the_table_folds_numbered_paths():
    report = swap(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(3))))
    assert str(report).splitlines() == [
        "site     was            is",
        "*.* (3)  torch.nn.GELU  gn_kernels.nn.GELU",
        "3 swapped, 0 left",
    ]
    assert len(report.rows) == 3


@pytest.mark.parametrize("wrong", [None, F.gelu, nn.GELU, {}])
def test_only_modules(wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, but got"):
        swap(wrong)


def test_neither_timm_nor_transformers_is_imported():
    import subprocess

    code = (
        "import sys, torch; from gn_kernels.swap import swap; swap(torch.nn.GELU());"
        "print([name for name in ('timm', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Mish(), nn.Softmax(dim=-1)])
def test_what_is_left_says_what_it_costs(activation):
    x, grad = (torch.empty(32, 32, device="meta", requires_grad=True) for _ in range(2))
    with Counter() as counter:  # the benchmarks' own
        (gradient,) = torch.autograd.grad(activation(x), x, grad, create_graph=True)
        torch.autograd.grad(gradient, (grad, x), torch.empty_like(x), allow_unused=True)
    tensors = round(counter.bytes / (4 * x.numel()))
    assert tensors > 10
    assert f": {tensors} tensors moved in the three orders" in str(swap(activation))
