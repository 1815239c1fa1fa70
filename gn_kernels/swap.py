"""Put the kernels into a model that exists: ``swap(model)``.

Three kinds of site, one mechanism each, and none of them rebuilds a module:

* a module whose class is in ``_MODULES``: its class is changed. It stays the same object, so
  hooks, the training flag, sharing and references to it survive;
* a function held as an attribute, in ``_ATTRIBUTES``: the attribute is set;
* a class whose methods name a function of ``_FUNCTIONS`` (``F.scaled_dot_product_attention`` in
  a ``forward``): the module's class becomes a generated subclass, in which these methods run
  under a ``TorchFunctionMode`` that calls the replacement. The mode is local to the thread.

timm and transformers are recognised by name and never imported.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gn_kernels import backend, functional
from gn_kernels import nn as gn_nn
from gn_kernels.autograd import must_be_transparent


class SwapRow(NamedTuple):
    """One site of a model: ``new`` is None where it was left, for the ``reason``."""

    path: str
    old: str
    new: str | None
    reason: str | None


class _Change(NamedTuple):
    module: nn.Module
    path: str
    name: str  # of the attribute; "__class__" for the class
    old: Any
    new: Any


@dataclass
class SwapReport:
    """What :func:`swap` found. ``print(report)`` shows the table, ``with`` undoes at its end."""

    rows: list[SwapRow]
    _changes: list[_Change] = field(default_factory=list, repr=False, compare=False)

    @property
    def swapped(self) -> int:
        """How many sites run on gn_kernels because of this call."""
        return sum(row.new is not None for row in self.rows)

    @property
    def left(self) -> int:
        """How many sites were left as they were."""
        return len(self.rows) - self.swapped

    def undo(self) -> None:
        """Restore every class and attribute that was changed. A second call does nothing.

        Raises:
            RuntimeError: something else changed one of them since. Nothing is restored then.
        """
        for change in self._changes:
            if _get(change.module, change.name) is not change.new:
                raise RuntimeError(
                    f"can't undo: {change.name} of {change.path or 'the model'} was changed after "
                    "the swap; undo that change first"
                )
        while self._changes:
            change = self._changes.pop()
            _set(change.module, change.name, change.old)

    def __enter__(self) -> SwapReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        def pattern(row: SwapRow) -> SwapRow:
            return row._replace(path=re.sub(r"(?<![^.])\d+(?![^.])", "*", row.path))

        counts = Counter(pattern(row) for row in self.rows)
        cells = [("site", "was", "is")]
        for row in self.rows:
            folded = pattern(row)
            count = counts.pop(folded, 0)
            if count:
                path = f"{folded.path} ({count})" if count > 1 else row.path
                cells.append((path or "(model)", row.old, row.new or f"left: {row.reason}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        if not self.swapped:
            lines.append("Nothing to swap.")
        return "\n".join([*lines, f"{self.swapped} swapped, {self.left} left"])


def swap(model: nn.Module) -> SwapReport:
    """Make a model run on gn_kernels, in place, and cheap to differentiate twice.

    A penalty on the input gradient differentiates the model twice
    (``torch.autograd.grad(loss, x, create_graph=True)``, then ``backward()``). That needs a second
    derivative of every operation. PyTorch's fused attention has none, so that a stock ViT raises;
    its activations have slow ones. Replaced are, in plain PyTorch, timm and transformers:

    * GELU (both forms), SiLU (Swish) and QuickGELU: modules, functions stored as attributes
      (``self.act = F.gelu``, also in a ``functools.partial``), and calls of ``F.gelu`` and
      ``F.silu`` in a module's methods. A module that worked in place works out of place;
    * LayerNorm: modules of ``torch.nn``, timm and transformers that call ``F.layer_norm``;
    * attention: ``F.scaled_dot_product_attention`` called in a module's methods,
      ``nn.MultiheadAttention`` (and so ``nn.TransformerEncoder``), and transformers models whose
      attention implementation is ``"sdpa"``. The replacement is :func:`gn_kernels.attention`; with
      dropout it is softmax(scale·QKᵀ + mask)·V from single operations, which keeps the N×N
      scores, and the report says so. Without gradients and in eval mode PyTorch's fused attention
      still runs.

    Every other activation is left to PyTorch; the report says why, and names attention that can't
    be differentiated twice. Parameters, buffers, the state dict, hooks, ``isinstance`` of every
    module but the activations, deepcopy and pickle stay as they were; a pickle needs gn_kernels to
    load. Works with checkpointing (``use_reentrant=False``), ``torch.func`` and
    ``torch.compile`` of a whole training step. Not seen: code outside a module's methods and
    arithmetic written out (``x * torch.sigmoid(x)``).

    Args:
        model: any module, an activation included (it is changed in place like the rest).

    Returns:
        The report: a row for each site, shared modules once for each path. Its ``undo()`` restores
        the model. A second swap finds nothing left to do.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Cost: a rerouted method spends one to two microseconds more on each PyTorch function it calls.
    Memory: as :func:`gn_kernels.activation` and :func:`gn_kernels.attention`.

    Example::

        model = timm.create_model("vit_base_patch16_224")
        print(gn_kernels.swap(model))
        loss = F.cross_entropy(model(x.requires_grad_()), target)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.abs().sum()).backward()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    report = SwapReport([])
    done: dict[int, list[SwapRow]] = {}
    for path, name, module in _sites(model):
        if id(module) not in done:
            # Rows of a module hold paths relative to it: it may be shared.
            rows = done[id(module)] = list(_swap_module(module, name, path, report._changes))
        else:
            rows = done[id(module)]
        for row in rows:
            report.rows.append(row._replace(path=".".join(filter(None, (path, row.path)))))
    return report


def _sites(
    module: nn.Module, path: str = "", name: str = ""
) -> Iterator[tuple[str, str, nn.Module]]:
    yield path, name, module
    if not isinstance(module, torch.jit.ScriptModule):
        for child_name, child in module.named_children():
            yield from _sites(child, f"{path}.{child_name}".lstrip("."), child_name)


# A class, its counterpart in gn_kernels.nn, and attributes that this one needs and that one lacks.
_MODULES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "torch.nn.modules.activation.GELU": (gn_nn.GELU, {}),
    "torch.nn.modules.activation.SiLU": (gn_nn.SiLU, {}),
    "torch.nn.modules.normalization.LayerNorm": (gn_nn.LayerNorm, {}),
    "timm.layers.activations.GELU": (gn_nn.GELU, {"approximate": "none"}),
    "timm.layers.activations.GELUTanh": (gn_nn.GELU, {"approximate": "tanh"}),
    "timm.layers.activations.QuickGELU": (gn_nn.QuickGELU, {}),
    "timm.layers.activations.Swish": (gn_nn.SiLU, {}),
    "timm.layers.activations_me.SwishMe": (gn_nn.SiLU, {}),
    "transformers.activations.GELUActivation": (gn_nn.GELU, {"approximate": "none"}),
    "transformers.activations.NewGELUActivation": (gn_nn.GELU, {"approximate": "tanh"}),
    "transformers.activations.FastGELUActivation": (gn_nn.GELU, {"approximate": "tanh"}),
    "transformers.activations.AccurateGELUActivation": (gn_nn.GELU, {"approximate": "tanh"}),
    "transformers.activations.GELUTanh": (gn_nn.GELU, {"approximate": "tanh"}),
    "transformers.activations.PytorchGELUTanh": (gn_nn.GELU, {"approximate": "tanh"}),
    "transformers.activations.QuickGELUActivation": (gn_nn.QuickGELU, {}),
    "transformers.activations.SiLUActivation": (gn_nn.SiLU, {}),
}
_OBSOLETE = ("act", "inplace", "precomputed_constant")  # attributes of these classes only

_ACTIVATION_FILES = (
    "torch.nn.modules.activation",
    "timm.layers.activations",
    "timm.layers.activations_me",
    "transformers.activations",
)
_IDENTITIES = (
    "torch.nn.modules.linear.Identity",
    "transformers.activations.LinearActivation",
)
_ACTIVATION_NAME = re.compile(r"(.*_)?act(ivation)?(_?(fn|func|function))?\d*")
_PIECEWISE_LINEAR = {
    *("relu", "relu6", "leakyrelu", "prelu", "rrelu", "threshold"),
    *("hardtanh", "hardsigmoid", "hardsigmoidme", "hardshrink", "softshrink"),
}

_ALREADY = "already gn_kernels'"
_SECOND_ZERO = "piecewise linear, its second derivative is zero"
_NO_KERNEL = "no kernel, PyTorch's own derivatives are used"
_UNKNOWN = "not an activation that swap knows; PyTorch's own derivatives are used"
_OWN_FORWARD = "its forward is replaced on the instance; remove that and swap again"
_PARAMETRIZED = "parametrized; swap before the parametrization is registered"
_TRACED = "a GraphModule regenerates its class; swap the model before tracing it"
_SCRIPTED = "a ScriptModule is compiled already; swap the model before scripting it"
_COMPILED = (
    "PyTorch can't differentiate a compiled model twice; compile the whole training step instead"
)


def _swap_module(
    module: nn.Module, name: str, path: str, changes: list[_Change]
) -> Iterator[SwapRow]:
    cls = type(module)
    was = _qualified(cls)
    old = _display(cls)

    def left(reason: str) -> SwapRow:
        return SwapRow("", old, None, reason)

    if isinstance(module, torch.jit.ScriptModule):
        yield left(_SCRIPTED)
        return
    if _is_ours(cls):
        yield left(_ALREADY)
    elif module._compiled_call_impl is not None or was.endswith("eval_frame.OptimizedModule"):
        yield left(_COMPILED)
    known = was in _MODULES
    sites = {} if known or _is_ours(cls) else _references(cls)
    if known or sites:
        if "forward" in vars(module):
            yield left(_OWN_FORWARD)
            return
        if parametrize.is_parametrized(module):
            yield left(_PARAMETRIZED)
            return
    if known:
        target, attributes = _MODULES[was]
        for attribute in _OBSOLETE:
            _change(changes, module, path, attribute, _MISSING)
        for attribute, value in attributes.items():
            _change(changes, module, path, attribute, value)
        _change(changes, module, path, "__class__", target)
        yield SwapRow("", old, f"gn_kernels.nn.{target.__name__}", None)
        return
    functions = {id(found): found for method in sites.values() for found in method}
    rows = [_row(function, module) for function in functions.values()]
    if any(row.new for row in rows):
        if isinstance(module, fx.GraphModule):
            rows = [row._replace(new=None, reason=_TRACED) if row.new else row for row in rows]
        else:
            if id(F.scaled_dot_product_attention) in functions and hasattr(module, "fused_attn"):
                # timm's switch between this function and plain attention, which Swin has off
                _change(changes, module, path, "fused_attn", True)
            _change(changes, module, path, "__class__", _rerouted(cls))
    yield from rows
    yield from _swap_attributes(module, path, changes)
    if not rows and not _is_ours(cls) and was not in _IDENTITIES:
        reason = _why_left(module, name)
        if reason is not None:
            yield left(reason)


def _why_left(module: nn.Module, name: str) -> str | None:
    # Of an activation that has no counterpart; None for any other module.
    files = {base.__module__ for base in type(module).__mro__} & set(_ACTIVATION_FILES)
    if files and not isinstance(module, nn.MultiheadAttention):
        if type(module).__module__ not in files:
            return _UNKNOWN  # a subclass
        if _plain(type(module).__name__) in _PIECEWISE_LINEAR:
            return _SECOND_ZERO
        return _NO_KERNEL + _cost(module)
    if _ACTIVATION_NAME.fullmatch(name) and not any(module.children()):
        return _UNKNOWN
    return None


def _swap_attributes(module: nn.Module, path: str, changes: list[_Change]) -> Iterator[SwapRow]:
    for name, value in list(vars(module).items()):
        function = value.func if type(value) is functools.partial else value
        if not isinstance(function, (FunctionType, BuiltinFunctionType)):
            continue
        attribute = _display(function)
        replacement = _ATTRIBUTES.get(_qualified(function))
        if replacement is not None:
            new: Any = replacement.function
            if function is not value:
                new = functools.partial(new, *value.args, **value.keywords)
            _change(changes, module, path, name, new)
            yield SwapRow(name, attribute, replacement.name, None)
        elif function.__module__ and function.__module__.split(".")[0] == "gn_kernels":
            yield SwapRow(name, attribute, None, _ALREADY)
        elif _ACTIVATION_NAME.fullmatch(name):
            linear = _plain(function.__name__) in _PIECEWISE_LINEAR
            known = function.__module__ in (*_ACTIVATION_FILES, "torch.nn.functional", "torch")
            no_kernel = _NO_KERNEL + (_cost(value) if known else "")
            reason = _SECOND_ZERO if linear else no_kernel if known else _UNKNOWN
            yield SwapRow(name, attribute, None, reason)


class _Traffic(TorchDispatchMode):
    """Counts the numbers that operations read and write; views and allocations are free."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if not function.is_view and "empty" not in function.__name__:
            tensors = (leaf for leaf in tree_leaves((args, kwargs, output)))
            self.numbers += sum(leaf.numel() for leaf in tensors if isinstance(leaf, Tensor))
        return output


def _cost(activation: Callable[[Tensor], Tensor]) -> str:
    """What an activation without a kernel moves in the three orders, counted on meta tensors."""
    call = (
        type(activation).forward.__get__(activation)
        if isinstance(activation, nn.Module)
        else activation
    )
    try:
        with torch.enable_grad(), _Traffic() as traffic:
            x, grad = (torch.empty(64, 64, device="meta", requires_grad=True) for _ in range(2))
            y = call(x)
            (gradient,) = torch.autograd.grad(y, x, grad, create_graph=True)
            torch.autograd.grad(gradient, (grad, x), torch.empty_like(x), allow_unused=True)
    except Exception:  # whatever a foreign module makes of a meta tensor: then it is not known
        return ""
    return (
        f": {traffic.numbers / x.numel():.0f} tensors moved in the three orders, where a kernel "
        "moves 10"
    )


def _row(found: Any, module: nn.Module) -> SwapRow:
    # The row of a function, or of transformers' registry, that a method of `module` names.
    where = f"in {type(module).__name__}"
    if _is_registry(found):
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        old = f"transformers' {implementation!r} attention {where}"
        if implementation == "eager":
            return SwapRow("", old, None, "its plain attention can be differentiated twice")
        if implementation in ("sdpa", None):
            return SwapRow("", old, _ATTENTION.name + _note_on_dropout(module), None)
        return SwapRow(
            "", old, None, _no_second_derivative("model.set_attn_implementation('sdpa')")
        )
    old = f"{_display(found)} {where}"
    replacement = _FUNCTIONS.get(found)
    if replacement is None:
        return SwapRow("", old, None, _no_second_derivative("F.scaled_dot_product_attention"))
    attends = replacement.name == _ATTENTION.name
    return SwapRow("", old, replacement.name + (_note_on_dropout(module) if attends else ""), None)


# What timm, transformers and torch.nn call the dropout of the attention weights: a number or a
# module.
_DROPOUTS = ("attn_drop", "attention_dropout", "dropout", "dropout_prob")


def _note_on_dropout(module: nn.Module) -> str:
    for name in _DROPOUTS:
        value = getattr(module, name, None)
        p = getattr(value, "p", value)
        if isinstance(p, float) and p > 0.0:
            return (
                f"; in training single operations, for its {name} is {p:g}: "
                "set that to 0 to have the kernels"
            )
    return ""


def _no_second_derivative(instead: str) -> str:
    return f"no second derivative is known for it; use {instead} and swap again"


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _qualified(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _display(thing: Any) -> str:
    for file, public in (
        ("torch.nn.modules.", "torch.nn"),
        ("torch.nn.functional", "F"),
        ("torch._C._nn", "F"),
    ):
        if (thing.__module__ or "").startswith(file):
            return f"{public}.{thing.__qualname__}"
    return _qualified(thing)


def _is_ours(cls: type) -> bool:
    return cls.__module__ == gn_nn.__name__ or "_gn_kernels_base" in vars(cls)


_MISSING = object()


def _get(module: nn.Module, name: str) -> Any:
    return type(module) if name == "__class__" else vars(module).get(name, _MISSING)


def _set(module: nn.Module, name: str, value: Any) -> None:
    if name == "__class__":
        module.__class__ = value
    elif value is _MISSING:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _change(changes: list[_Change], module: nn.Module, path: str, name: str, value: Any) -> None:
    old = _get(module, name)
    if old is not value:
        _set(module, name, value)
        changes.append(_Change(module, path, name, old, value))


def _supported(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype in backend.DTYPES
        and x.layout == torch.strided
        and not x.is_nested
    )


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    if not _supported(input):
        return F.gelu(input, approximate=approximate)
    return functional.gelu(input, approximate)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    if not _supported(input):
        return F.silu(input, inplace=inplace)
    if inplace:
        return input.copy_(functional.silu(input.clone()))
    return functional.silu(input)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not _supported(input):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def _timm_gelu(x: Tensor, inplace: bool = False) -> Tensor:
    return _gelu(x)


def _timm_gelu_tanh(x: Tensor, inplace: bool = False) -> Tensor:
    return _gelu(x, "tanh")


def _timm_quick_gelu(x: Tensor, inplace: bool = False) -> Tensor:
    return functional.quick_gelu(x)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention`, but twice differentiable.

    :func:`gn_kernels.attention` where that applies, else :func:`math_attention`: with dropout, with
    shapes that broadcast, with a head size of the values that differs from the keys'. ``packed``
    is the tensor of which query, key and value are the thirds, if there is one.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("attn_mask must be None when is_causal=True")
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(()).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(query.dtype)
    fits = (
        dropout_p == 0.0
        and all(map(_supported, (query, key, value)))
        and query.dtype == key.dtype == value.dtype
        and query.ndim >= 3
        and key.shape == value.shape == (*query.shape[:-2], key.shape[-2], query.shape[-1])
        and key.shape[-2] > 0
    )
    if fits and packed is not None:
        return functional.attention_qkv(packed, attn_mask, scale)
    if fits:
        return functional.attention(query, key, value, attn_mask, scale)
    return math_attention(query, key, value, attn_mask, dropout_p, scale)


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """dropout(softmax(scale·QKᵀ + bias))·V from single operations.

    A row that the bias masks entirely (-inf) gives zeros. Saved for backward: the N×M softmax, and
    its dropout mask.
    """
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    weights = scores.softmax(-1) if bias is None else torch._safe_softmax(scores + bias, -1)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return weights @ value


def _with_attention(attention: Callable[..., Tensor]) -> Callable[..., Any]:
    # F.multi_head_attention_forward calls the attention by a global name and shields it from
    # modes: the same code over globals in which that name is ours.
    original = F.multi_head_attention_forward
    names = {**original.__globals__, "scaled_dot_product_attention": attention}
    del names["__name__"]  # torch.compile would guard the globals of the module of that name
    clone = FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    clone.__kwdefaults__ = original.__kwdefaults__
    names["multi_head_attention_forward"] = clone
    return clone


class _Replacement(NamedTuple):
    function: Callable[..., Any]
    name: str


_ATTENTION = _Replacement(attention, "gn_kernels.attention")

# What a method may call: the function of PyTorch, as a TorchFunctionMode sees it.
_FUNCTIONS: dict[Callable[..., Any], _Replacement] = {
    F.gelu: _Replacement(_gelu, "gn_kernels.gelu"),
    F.silu: _Replacement(_silu, "gn_kernels.silu"),
    F.layer_norm: _Replacement(_layer_norm, "gn_kernels.layer_norm"),
    F.scaled_dot_product_attention: _ATTENTION,
    F.multi_head_attention_forward: _Replacement(
        _with_attention(_ATTENTION.function), _ATTENTION.name
    ),
}

# What a module may hold as an attribute: the above, and timm's functions.
_ATTRIBUTES: dict[str, _Replacement] = {
    **{_qualified(function): replacement for function, replacement in _FUNCTIONS.items()},
    "timm.layers.activations.gelu": _Replacement(_timm_gelu, "gn_kernels.gelu"),
    "timm.layers.activations.gelu_tanh": _Replacement(_timm_gelu_tanh, "gn_kernels.gelu"),
    "timm.layers.activations.quick_gelu": _Replacement(_timm_quick_gelu, "gn_kernels.quick_gelu"),
    "timm.layers.activations.swish": _Replacement(_silu, "gn_kernels.silu"),
    "timm.layers.activations_me.swish_me": _Replacement(_silu, "gn_kernels.silu"),
}


class _Reroute(TorchFunctionMode):
    # A tensor that was split into q, k and v, and these: attention's derivatives are then those of
    # that tensor, and nothing is copied to join three gradients.
    split: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = _FUNCTIONS.get(func)
        if replacement is not None:
            if replacement is _ATTENTION and self.split is not None:
                (packed, parts), self.split = self.split, None
                if _are_the_parts(parts, args):
                    return attention(*args, **kwargs, packed=packed)
            return replacement.function(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _UNBIND and not must_be_transparent() and _dim_of_unbind(args, kwargs) == 0:
            packed = args[0]
            if packed.ndim == 5 and len(result) == 3:
                self.split = packed, result
        return result


_UNBIND = (torch.Tensor.unbind, torch.unbind)


def _dim_of_unbind(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) == 2 else kwargs.get("dim", 0) if len(args) == 1 else None


def _are_the_parts(parts: Sequence[Tensor], args: Sequence[Any]) -> bool:
    # Nothing was done to them since, and nobody asked for the gradient of one of them.
    return len(args) >= 3 and all(
        part is given and not part._backward_hooks and not part.retains_grad
        for part, given in zip(parts, args, strict=False)
    )


_M = TypeVar("_M", bound=nn.Module)
_rerouted_classes: WeakValueDictionary[type, type] = WeakValueDictionary()


def _rerouted(base: type[_M]) -> type[_M]:
    """The subclass of ``base`` whose methods call the replacements. One for each base.

    It has the name of its base: wrapping policies, logs and transformers look at class names.
    """
    if base in _rerouted_classes:
        return cast(type[_M], _rerouted_classes[base])

    def reroute(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # In training also without gradients: the first pass of a reentrant checkpoint must
            # drop the same weights as the second one.
            if torch.is_grad_enabled() or self.training or must_be_transparent():
                with _Reroute():
                    return getattr(base, name)(self, *args, **kwargs)
            return getattr(base, name)(self, *args, **kwargs)

        return method

    def reduce(self: nn.Module, protocol: Any) -> Any:
        constructor, arguments, *rest = cast(Any, base.__reduce_ex__(self, protocol))
        arguments = tuple(base if item is generated else item for item in arguments)
        return _rebuild, (constructor, *arguments), *rest

    members: dict[str, Any] = {name: reroute(name) for name in _references(base)}
    members |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_gn_kernels_base": base,
    }
    generated: type[_M] = cast(Any, type(base))(base.__name__, (base,), members)
    _rerouted_classes[base] = generated
    return generated


def _rebuild(constructor: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    module = constructor(*arguments)
    module.__class__ = _rerouted(type(module))
    return module


def _is_registry(value: Any) -> bool:
    return _qualified(type(value)) == "transformers.modeling_utils.AttentionInterface"


def _lacks_second_derivative(function: Any) -> bool:
    package = (function.__module__ or "").split(".")[0]
    return (
        package in ("flash_attn", "flash_attn_interface", "xformers")
        or _qualified(function) == "torch.nn.attention.flex_attention.flex_attention"
    )


def _references(cls: type) -> dict[str, list[Any]]:
    """The methods of a class that name something swap looks for, and what each of them names."""
    references = {}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        own = name == "forward" or not (name.startswith("__") or hasattr(nn.Module, name))
        if own and isinstance(method, FunctionType):
            found: list[Any] = []
            _scan(method, cls, found, set())
            if found:
                references[name] = found
    return references


def _scan(function: FunctionType, cls: type, found: list[Any], seen: set[FunctionType]) -> None:
    if function in seen:
        return
    seen.add(function)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for value in _values(function.__code__, function.__globals__, cells):
        if _is_registry(value):
            if function.__module__ != type(value).__module__:  # not the library's own checks
                found.append(value)
        elif value is super:
            for base in cls.__mro__[1:]:
                inherited = vars(base).get(function.__name__)
                if base is not nn.Module and isinstance(inherited, FunctionType):
                    _scan(inherited, cls, found, seen)
        elif isinstance(value, (FunctionType, BuiltinFunctionType)):
            if value in _FUNCTIONS or _lacks_second_derivative(value):
                found.append(value)
            # A helper beside the class, or what a decorator wraps. No further: a model's loss and
            # mask utilities are not its attention.
            elif isinstance(value, FunctionType) and value.__module__ == function.__module__:
                _scan(value, cls, found, seen)


def _values(code: CodeType, names: dict[str, Any], cells: dict[str, Any]) -> Iterator[Any]:
    # What the global names, dotted through modules, and the enclosed names of a function are.
    value = _MISSING
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "EXTENDED_ARG":
            continue
        if operation == "LOAD_GLOBAL":
            value = names.get(name, getattr(builtins, name, _MISSING))
        elif operation == "LOAD_DEREF" and name in cells:
            try:
                value = cells[name].cell_contents
            except ValueError:  # not assigned yet
                value = _MISSING
        elif operation in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
            value = getattr(value, name, _MISSING)
        else:
            value = _MISSING
        if value is not _MISSING:
            yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _values(constant, names, cells)
