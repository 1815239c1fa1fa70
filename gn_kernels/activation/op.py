"""The raw ops of the activations: schemas, checks, fake kernels, and the choice of a backend.

    gn_kernels::activation_forward(x, kind)                              y = f(x)
    gn_kernels::activation_backward(grad, x, kind)                       grad·f′(x)
    gn_kernels::activation_double_backward(v, grad, x, kind, output_mask)
                                                                (v·f′(x), v·grad·f″(x))

They move 2, 3 and 5 tensors and allocate their outputs only. An output that ``output_mask`` does
not ask for comes back with size [0].
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from gn_kernels import backend
from gn_kernels.activation import formula
from gn_kernels.autograd import (
    Gradients,
    Orders,
    differentiable,
    register_raw_op,
)

_SCHEMAS = {
    "activation_forward": "(Tensor x, str kind) -> Tensor",
    "activation_backward": "(Tensor grad, Tensor x, str kind) -> Tensor",
    "activation_double_backward": (
        "(Tensor v, Tensor grad, Tensor x, str kind, bool[2] output_mask) -> (Tensor, Tensor)"
    ),
}

_library = torch.library.Library("gn_kernels", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.define(f"{_name}.native{_schema}")  # csrc/ registers its kernels under these

_ops = torch.ops.gn_kernels


def check(kind: str, x: Tensor, **others: Tensor) -> None:
    """Raise, naming the argument, where a raw op can't take what it is given."""
    check_kind(kind)
    check_dtype("x", x)
    for name, other in others.items():
        for what, given, accepted in (
            ("on the device", other.device, x.device),
            ("of dtype", other.dtype, x.dtype),
            ("of shape", tuple(other.shape), tuple(x.shape)),
        ):
            if given != accepted:
                raise RuntimeError(f"{name} must be {what} of x, {accepted}, but got {given}")


def check_kind(kind: str) -> None:
    """ValueError unless ``kind`` names an activation."""
    if kind not in formula.ACTIVATIONS:
        raise ValueError(f"kind must be one of {tuple(formula.ACTIVATIONS)}, but got {kind!r}")


def check_dtype(name: str, value: Tensor) -> None:
    """TypeError unless it is a tensor, NotImplementedError unless it is dense and floating."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
    if value.dtype not in backend.DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.DTYPES)
        raise NotImplementedError(f"{name} must be {accepted}, but got {value.dtype}")
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, but got {value.layout}")


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or cast(bool, torch.ops.aten.is_non_overlapping_and_dense(x))


def _with_layout_of(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    # Backends loop over storage: every tensor dense, all with the strides that outputs get.
    if not _is_dense(x):
        x = x.clone()
    return x, *(_with_strides_of(x, other) for other in others)


def _with_strides_of(x: Tensor, other: Tensor) -> Tensor:
    if other.stride() == x.stride():
        return other
    if x.is_contiguous() and other.is_contiguous():  # they differ where a size is 0 or 1
        return other.as_strided(x.shape, x.stride())
    return torch.empty_like(x).copy_(other)


def _kernels(x: Tensor) -> ModuleType | None:
    # The module of the backend that serves x, or None for the formula.
    name = backend.select(x.device.type, x.dtype, backend.requested(), small=backend.is_small(x))
    return None if name == "reference" else _backend_module(name)


def _backend_module(name: str) -> Any:
    if name == "native":
        return _Native
    return importlib.import_module("gn_kernels.activation.triton_kernels")


class _Native:
    forward = _ops.activation_forward.native
    backward = _ops.activation_backward.native
    double_backward = _ops.activation_double_backward.native


def _check_forward(x: Tensor, kind: str) -> None:
    check(kind, x)


def _check_backward(grad: Tensor, x: Tensor, kind: str) -> None:
    check(kind, x, grad=grad)


def _check_double_backward(
    v: Tensor, grad: Tensor, x: Tensor, kind: str, output_mask: Sequence[bool]
) -> None:
    check(kind, x, v=v, grad=grad)


def _forward(x: Tensor, kind: str) -> Tensor:
    kernels = _kernels(x)
    (x,) = _with_layout_of(x)
    if kernels is None:
        return formula.forward(x, kind)
    return cast(Tensor, kernels.forward(x, kind))


def _backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    kernels = _kernels(x)
    x, grad = _with_layout_of(x, grad)
    if kernels is None:
        return formula.backward(grad, x, kind)
    return cast(Tensor, kernels.backward(grad, x, kind))


def _double_backward(
    v: Tensor, grad: Tensor, x: Tensor, kind: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(x)
    x, v, grad = _with_layout_of(x, v, grad)
    if kernels is None:
        for_grad, for_x = formula.double_backward(
            v, grad, x, kind, (output_mask[0], output_mask[1])
        )
        return (
            x.new_empty(0) if for_grad is None else for_grad,
            x.new_empty(0) if for_x is None else for_x,
        )
    return cast(tuple[Tensor, Tensor], kernels.double_backward(v, grad, x, kind, list(output_mask)))


def _fake_forward(x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    return torch.empty_like(x)


def _fake_double_backward(
    v: Tensor, grad: Tensor, x: Tensor, kind: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    for_grad, for_x = (torch.empty_like(x) if asked else x.new_empty(0) for asked in output_mask)
    return for_grad, for_x


_call_forward = register_raw_op(
    _library, "activation_forward", _check_forward, _forward, _fake_forward
)
_call_backward = register_raw_op(
    _library, "activation_backward", _check_backward, _backward, _fake_backward
)
_call_double_backward = register_raw_op(
    *(_library, "activation_double_backward", _check_double_backward),
    *(_double_backward, _fake_double_backward),
)


def _forward_order(inputs: tuple[Tensor], options: tuple[str]) -> tuple[Tensor]:
    check(*options, *inputs)  # users may call ActivationFunction.apply
    return (_call_forward(*inputs, *options),)


def _backward_order(
    wanted: tuple[bool], grad: Tensor, inputs: tuple[Tensor], _: object, options: tuple[str]
) -> Gradients:
    return (_call_backward(grad, *inputs, *options),)


def _double_backward_order(
    wanted: tuple[bool, bool],
    cotangents: tuple[Tensor],
    grad: Tensor,
    inputs: tuple[Tensor],
    _: object,
    options: tuple[str],
) -> Gradients:
    outputs = _call_double_backward(*cotangents, grad, *inputs, *options, wanted)
    return tuple(out if asked else None for out, asked in zip(outputs, wanted, strict=True))


KERNELS = Orders(_forward_order, _backward_order, _double_backward_order)

ActivationFunction, apply = differentiable(
    "ActivationFunction",
    arity=1,
    kernels=KERNELS,
    formula=formula.FORMULA,
    cheap=True,
)
