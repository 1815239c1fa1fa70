"""The raw ops of layer normalisation: schemas, checks, fake kernels, and the choice of a backend.

    gn_kernels::layer_norm_forward(x, normalized_shape, weight, bias, eps)
                                                           y, and mean and rstd of every row
    gn_kernels::layer_norm_backward(grad, x, normalized_shape, weight, bias, mean, rstd,
                                    output_mask)           for x, weight, bias
    gn_kernels::layer_norm_double_backward(v, u, t, grad, x, normalized_shape, weight, mean, rstd,
                                           output_mask)    for grad, x, weight

v, u and t are the cotangents of the three results of the backward pass, each of which may be
absent. With N numbers in x they move 2N, 3N and 5N numbers; weight, bias, their gradients and the
statistics (float32, float64 for float64, of shape [rows]) are small beside that. The gradients
of weight and bias are sums of partial sums, in an order that is fixed for a shape and a device.
``bias`` gives the backward pass the dtype of its gradient. An output that ``output_mask`` does not
ask for comes back with size [0].
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gn_kernels import backend
from gn_kernels.autograd import (
    Gradients,
    Orders,
    differentiable,
    register_raw_op,
)
from gn_kernels.layer_norm import formula

MAX_TRITON_ROW = 65536  # a program holds a whole row

_SCHEMAS = {
    "layer_norm_forward": (
        "(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "layer_norm_backward": (
        "(Tensor grad, Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias,"
        " Tensor mean, Tensor rstd, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
    ),
    "layer_norm_double_backward": (
        "(Tensor? v, Tensor? u, Tensor? t, Tensor grad, Tensor x, SymInt[] normalized_shape,"
        " Tensor? weight, Tensor mean, Tensor rstd, bool[3] output_mask)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}

_library = torch.library.Library("gn_kernels", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    # csrc/ registers its kernels under these. All tensors are contiguous, and a row is as
    # long as x is divided by the number of statistics.
    _library.define(
        f"{_name}.native{_schema.replace('SymInt[] normalized_shape', 'int row_length')}"
    )

_ops = torch.ops.gn_kernels


def check(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> None:
    """Raise, naming the argument, unless they fit together as in ``F.layer_norm``."""
    check_tensor("x", x)
    shape = tuple(normalized_shape)
    if not shape:
        raise RuntimeError("normalized_shape must name at least one dimension, but is empty")
    if tuple(x.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"x must end in the dimensions of normalized_shape {shape}, but got shape "
            f"{tuple(x.shape)}"
        )
    if 0 in shape:
        raise RuntimeError(
            f"normalized_shape must have at least one element, but got {shape}: a row of length 0 "
            "has no mean"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check_parameter(name, value, x, shape)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(f"bias must be of weight's dtype {weight.dtype}, but got {bias.dtype}")


def _check_parameter(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    check_tensor(name, value)
    if value.device != x.device:
        raise RuntimeError(f"{name} must be on the device of x, {x.device}, not {value.device}")
    accepted = dict.fromkeys((x.dtype, formula.compute_dtype(x.dtype)))
    if value.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise RuntimeError(f"{name} must be {names} beside an x of {x.dtype}, not {value.dtype}")
    if tuple(value.shape) != shape:
        raise RuntimeError(
            f"{name} must be of normalized_shape {shape}, but got shape {tuple(value.shape)}"
        )


def check_tensor(name: str, value: Tensor) -> None:
    """TypeError unless it is a tensor, NotImplementedError unless it is dense and floating."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
    if value.dtype not in backend.DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.DTYPES)
        raise NotImplementedError(f"{name} must be {accepted}, but got {value.dtype}")
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, but got {value.layout}")


def _check_like(name: str, value: Tensor, x: Tensor) -> None:
    for what, given, accepted in (
        ("on the device", value.device, x.device),
        ("of dtype", value.dtype, x.dtype),
        ("of shape", tuple(value.shape), tuple(x.shape)),
    ):
        if given != accepted:
            raise RuntimeError(f"{name} must be {what} of x, {accepted}, but got {given}")


def _check_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    check(x, normalized_shape, weight, bias)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> None:
    _check_saved(x, normalized_shape, weight, bias, mean, rstd, grad=grad)
    _check_asked("weight", weight, output_mask[1])
    _check_asked("bias", bias, output_mask[2])


def _check_saved(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    **like_x: Tensor | None,
) -> None:
    check(x, normalized_shape, weight, bias)
    for name, value in like_x.items():
        if value is not None:
            _check_like(name, value, x)
    shape, dtype = (_rows(x, normalized_shape),), formula.compute_dtype(x.dtype)
    for name, value in (("mean", mean), ("rstd", rstd)):
        if tuple(value.shape) != shape or value.dtype != dtype or value.device != x.device:
            raise RuntimeError(
                f"{name} must be {dtype} of shape {shape} on {x.device}, as the forward pass "
                f"gives it, but got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
            )


def _check_asked(name: str, value: Tensor | None, asked: bool) -> None:
    if asked and value is None:
        raise RuntimeError(f"output_mask asks for the gradient of {name}, which is absent")


def _rows(x: Tensor, normalized_shape: Sequence[int]) -> int:
    return math.prod(x.shape[: x.ndim - len(normalized_shape)])


def _as_factor(statistic: Tensor, x: Tensor, normalized_shape: Sequence[int]) -> Tensor:
    # One number a row, as the formula multiplies x with it.
    inner = len(normalized_shape)
    return statistic.reshape(*x.shape[: x.ndim - inner], *(1,) * inner)


def _kernels(x: Tensor, row_length: int) -> Any:
    # What holds the kernels of the backend that serves x, or None for the formula.
    unsupported: tuple[tuple[str, str], ...] = ()
    if row_length > MAX_TRITON_ROW:
        unsupported = (("triton", f"its layer_norm takes rows up to {MAX_TRITON_ROW} numbers"),)
    small = backend.is_small(x)
    name = backend.select(x.device.type, x.dtype, backend.requested(), unsupported, small)
    if name == "reference" or x.numel() == 0:
        return None
    if name == "native":
        return _Native
    return importlib.import_module("gn_kernels.layer_norm.triton_kernels")


class _Native:
    forward = _ops.layer_norm_forward.native
    backward = _ops.layer_norm_backward.native
    double_backward = _ops.layer_norm_double_backward.native


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def _forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, row_length = tuple(normalized_shape), math.prod(normalized_shape)
    kernels = _kernels(x, row_length)
    if kernels is None:
        mean, rstd = formula.statistics(x, shape, eps)
        y = formula.forward(x, shape, weight, bias, mean, rstd)
        return y.contiguous(), mean.reshape(-1), rstd.reshape(-1)
    x, weight, bias = _contiguous(x, weight, bias)
    return cast(tuple[Tensor, Tensor, Tensor], kernels.forward(x, row_length, weight, bias, eps))


def _backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shape, row_length = tuple(normalized_shape), math.prod(normalized_shape)
    kernels = _kernels(x, row_length)
    if kernels is None:
        wanted = (output_mask[0], output_mask[1], output_mask[2])
        mean, rstd = (_as_factor(one, x, shape) for one in (mean, rstd))
        grads = formula.backward(grad, x, shape, weight, bias, mean, rstd, wanted)
        return _complete(grads, x)
    grad, x, weight, bias, mean, rstd = _contiguous(grad, x, weight, bias, mean, rstd)
    return cast(
        tuple[Tensor, Tensor, Tensor],
        kernels.backward(grad, x, row_length, weight, bias, mean, rstd, list(output_mask)),
    )


def _double_backward(
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shape, row_length = tuple(normalized_shape), math.prod(normalized_shape)
    kernels = _kernels(x, row_length)
    if kernels is None:
        wanted = (output_mask[0], output_mask[1], output_mask[2])
        mean, rstd = (_as_factor(one, x, shape) for one in (mean, rstd))
        grads = formula.double_backward((v, u, t), grad, x, shape, weight, mean, rstd, wanted)
        return _complete(grads, x)
    tensors = _contiguous(v, u, t, grad, x)
    weight, mean, rstd = _contiguous(weight, mean, rstd)
    return cast(
        tuple[Tensor, Tensor, Tensor],
        kernels.double_backward(*tensors, row_length, weight, mean, rstd, list(output_mask)),
    )


def _check_double_backward(
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> None:
    _check_saved(x, normalized_shape, weight, None, mean, rstd, grad=grad, v=v)
    for name, value in (("u", u), ("t", t)):
        if value is not None:
            _check_parameter(name, value, x, tuple(normalized_shape))
    _check_asked("weight", weight, output_mask[2])


def _complete(grads: Gradients, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The formula's results in the layout of the raw ops.
    first, second, third = (x.new_empty(0) if grad is None else grad.contiguous() for grad in grads)
    return first, second, third


def _fake_forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(x, normalized_shape)
    wide = formula.compute_dtype(x.dtype)
    y, mean, rstd = (_empty_like(x), *(x.new_empty(rows, dtype=wide) for _ in range(2)))
    return y, mean, rstd


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_where(output_mask, x, weight, bias)


def _fake_double_backward(
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_where(output_mask, grad, x, weight)


def _empty_where(
    output_mask: Sequence[bool], *inputs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    some = next(value for value in inputs if value is not None)
    first, second, third = (
        _empty_like(value) if asked and value is not None else some.new_empty(0)
        for value, asked in zip(inputs, output_mask, strict=True)
    )
    return first, second, third


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_like(value, memory_format=torch.contiguous_format)


_call_forward = register_raw_op(
    _library, "layer_norm_forward", _check_forward, _forward, _fake_forward
)
_call_backward = register_raw_op(
    _library, "layer_norm_backward", _check_backward, _backward, _fake_backward
)
_call_double_backward = register_raw_op(
    *(_library, "layer_norm_double_backward", _check_double_backward),
    *(_double_backward, _fake_double_backward),
)


def _forward_order(inputs: formula.Inputs, options: formula.Options) -> tuple[Tensor, ...]:
    (x, weight, bias), (normalized_shape, eps) = inputs, options
    return cast(
        tuple[Tensor, ...],
        _call_forward(x, normalized_shape, weight, bias, eps),
    )


def _backward_order(
    wanted: tuple[bool, bool, bool],
    grad: Tensor,
    inputs: formula.Inputs,
    statistics: tuple[Tensor, Tensor],
    options: formula.Options,
) -> Gradients:
    (x, weight, bias), (normalized_shape, _) = inputs, options
    outputs = _call_backward(
        *(grad, x, normalized_shape, weight, bias, *statistics, wanted),
    )
    return tuple(out if asked else None for out, asked in zip(outputs, wanted, strict=True))


def _double_backward_order(
    wanted: tuple[bool, bool, bool, bool],
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    inputs: formula.Inputs,
    statistics: tuple[Tensor, Tensor],
    options: formula.Options,
) -> Gradients:
    (x, weight, _bias), (normalized_shape, _) = inputs, options
    asked = wanted[:3]  # the bias takes no part in the backward pass
    outputs = _call_double_backward(
        *(*cotangents, grad, x, normalized_shape, weight, *statistics, asked),
    )
    return *(out if ask else None for out, ask in zip(outputs, asked, strict=True)), None


KERNELS = Orders(_forward_order, _backward_order, _double_backward_order)

LayerNormFunction, apply = differentiable(
    "LayerNormFunction",
    arity=3,
    kernels=KERNELS,
    formula=formula.FORMULA,
    cheap=True,
)
