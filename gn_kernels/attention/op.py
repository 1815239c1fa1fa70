"""The raw ops of attention: schemas, checks, fake kernels, and the choice of a backend.

    gn_kernels::attention_forward(q, k, v, bias, scale)                  O, log-sum-exp of each row
    gn_kernels::attention_backward(grad, q, k, v, bias, out, lse, scale, output_mask, packed)
                                                                         for q, k, v, bias
    gn_kernels::attention_double_backward(aq, ak, av, abias, grad, q, k, v, bias, out, lse, scale,
                                          output_mask, packed)           for grad, q, k, v, bias

q is (batch, heads, N, d), k and v are (batch, heads, M, d), bias is as in ``formula``. Nothing of
size N×M is stored by triton, nor by native on a CPU. O and the gradients of q, k and v lie in
memory as (batch, length, heads, d), so that joining the heads again takes no copy. An output that
``output_mask`` does not ask for comes back with size [0].

With ``packed``, the gradients of q, k and v are one tensor (3, batch, heads, N, d), in memory
(batch, N, 3, heads, d) as the linear layer lays out its output that q, k and v are views of. It
stands in the place of q's; those of k and v have size [0].
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gn_kernels import backend
from gn_kernels.attention import formula, native_cuda
from gn_kernels.autograd import (
    Gradients,
    Orders,
    differentiable,
    register_raw_op,
)

MAX_TRITON_HEAD_SIZE = 128

# Tasks among which the native kernels share the gradient of a small bias: more than most machines
# have threads, and the same number on all, so that the bits are the same too.
_NATIVE_TASKS = 32

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? bias"
_SAVED = f"Tensor grad, {_INPUTS}, Tensor out, Tensor lse, float scale"
_SECOND = f"Tensor? aq, Tensor? ak, Tensor? av, Tensor? abias, {_SAVED}"
_SCHEMAS = {
    "attention_forward": f"({_INPUTS}, float scale) -> (Tensor, Tensor)",
    "attention_backward": (
        f"({_SAVED}, bool[4] output_mask, bool packed=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "attention_double_backward": (
        f"({_SECOND}, bool[5] output_mask, bool packed=False)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}
# Those that csrc/ registers its CPU kernels under fill tensors that are given, or None.
_NATIVE_SCHEMAS = {
    "attention_forward": f"({_INPUTS}, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "attention_backward": (
        f"({_SAVED}, Tensor(a!)? for_q, Tensor(b!)? for_k, Tensor(c!)? for_v, Tensor(d!)? sums)"
        " -> ()"
    ),
    "attention_double_backward": (
        f"({_SECOND}, Tensor(a!)? for_grad, Tensor(b!)? for_q, Tensor(c!)? for_k,"
        " Tensor(d!)? for_v, Tensor(e!)? sums) -> ()"
    ),
}

_library = torch.library.Library("gn_kernels", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.define(f"{_name}.native{_NATIVE_SCHEMAS[_name]}")

_ops = torch.ops.gn_kernels


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise, naming the argument, unless they are (…, heads, N, d), (…, heads, M, d) and a bias."""
    _check_tensor("q", q, q)
    if q.ndim < 3:
        raise RuntimeError(f"q must be (…, heads, N, d), but got shape {tuple(q.shape)}")
    if q.shape[-1] == 0:
        raise RuntimeError(f"q must have a head size of at least 1, but got {tuple(q.shape)}")
    for name, value in (("k", k), ("v", v)):
        _check_tensor(name, value, q)
        if value.ndim != q.ndim or value.shape[:-2] != q.shape[:-2]:
            expected = (*q.shape[:-2], "M", q.shape[-1])
        elif value.shape[-1] != q.shape[-1]:
            raise RuntimeError(
                f"{name} must have q's head size {q.shape[-1]}, but got {value.shape[-1]}"
            )
        else:
            continue
        raise RuntimeError(
            f"{name} must be of shape {expected} as q is, but got {tuple(value.shape)}"
        )
    if v.shape != k.shape:
        raise RuntimeError(f"v must be of k's shape {tuple(k.shape)}, but got {tuple(v.shape)}")
    if k.shape[-2] == 0:
        raise RuntimeError("k must have at least one row: a softmax over none is undefined")
    if bias is not None:
        if isinstance(bias, Tensor) and bias.dtype == torch.bool:
            raise RuntimeError(
                "bias must be added to the scores, so of q's dtype; turn a boolean mask into one "
                "with torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)"
            )
        _check_tensor("bias", bias, q)


def _check_tensor(name: str, value: Tensor, q: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
    if value.dtype not in backend.DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.DTYPES)
        raise NotImplementedError(f"{name} must be {accepted}, but got {value.dtype}")
    if value.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, but got {value.layout}")
    if value.device != q.device:
        raise RuntimeError(f"{name} must be on the device of q, {q.device}, not {value.device}")
    if value.dtype != q.dtype:
        raise RuntimeError(f"{name} must be of q's dtype, {q.dtype}, but got {value.dtype}")


def as_raw(q: Tensor, bias: Tensor | None, keys: int) -> Tensor | None:
    """bias, broadcastable to (…, heads, N, M), as the raw ops take it: (period, …, …, …).

    A view, unless bias is broadcast inside the leading dimensions, as (B, 1, heads, N, M) is.
    """
    if bias is None:
        return None
    scores = (*q.shape[:-1], keys)
    missing = len(scores) - bias.ndim
    full = (1,) * missing + tuple(bias.shape)
    if missing < 0 or any(b not in (1, s) for b, s in zip(full, scores, strict=True)):
        raise RuntimeError(
            f"bias must be broadcastable to {scores}, but got shape {tuple(bias.shape)}"
        )
    leading, batch = full[:-3], scores[:-3]
    first = next((i for i, size in enumerate(leading) if size != 1), len(leading))
    bias = bias.reshape(full)
    if leading[first:] != batch[first:]:
        bias = bias.expand(*leading[:first], *batch[first:], *full[-3:])
    return bias.reshape(math.prod(bias.shape[:-3]), *full[-3:])


def _check_raw(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    **others: tuple[Tensor | None, Tensor],
) -> None:
    check(q, k, v, bias)
    if q.ndim != 4:
        raise RuntimeError(f"q must be (batch, heads, N, d), but got shape {tuple(q.shape)}")
    if bias is not None:
        scores = (*q.shape[:3], k.shape[2])
        if (
            bias.ndim != 4
            or any(b not in (1, s) for b, s in zip(bias.shape[1:], scores[1:], strict=True))
            or (bias.shape[0] == 0 and scores[0] != 0)
            or (bias.shape[0] != 0 and scores[0] % bias.shape[0] != 0)
        ):
            raise RuntimeError(
                f"bias must be broadcastable to {scores} with a period that divides the batch, "
                f"but got shape {tuple(bias.shape)}"
            )
    for name, (value, like) in others.items():
        if value is not None:
            _check_tensor(name, value, like)
            if value.shape != like.shape:
                raise RuntimeError(
                    f"{name} must be of shape {tuple(like.shape)}, but got {tuple(value.shape)}"
                )


def _check_lse(lse: Tensor, q: Tensor) -> None:
    dtype = formula.compute_dtype(q.dtype)
    if lse.shape != q.shape[:3] or lse.dtype != dtype or not lse.is_contiguous():
        raise RuntimeError(
            f"lse must be contiguous, of shape {tuple(q.shape[:3])} and {dtype}, "
            f"but got {tuple(lse.shape)} of {lse.dtype}"
        )


def _kernels(q: Tensor) -> Any:
    # What holds the kernels of the backend that serves q, or None for the formula.
    unsupported = []
    if q.dtype == torch.float64:
        unsupported.append(("triton", "its attention computes in float32, not in float64"))
    if q.shape[-1] > MAX_TRITON_HEAD_SIZE:
        unsupported.append(("triton", f"its attention takes head sizes to {MAX_TRITON_HEAD_SIZE}"))
    name = backend.select(q.device.type, q.dtype, backend.requested(), tuple(unsupported))
    if name == "reference" or q.numel() == 0:
        return None
    if name == "native":
        return _Native if q.device.type == "cpu" else native_cuda
    return _triton()


def _triton() -> Any:
    return importlib.import_module("gn_kernels.attention.triton_kernels")


class _Native:
    forward = _ops.attention_forward.native

    @staticmethod
    def backward(*arguments: Any) -> None:
        *given, for_bias = arguments
        sums = _native_sums(given[1], given[2], for_bias)
        _ops.attention_backward.native(*given, sums)
        _add_up(sums, for_bias)

    @staticmethod
    def double_backward(*arguments: Any) -> None:
        *given, for_bias = arguments
        sums = _native_sums(given[5], given[6], for_bias)
        _ops.attention_double_backward.native(*given, sums)
        _add_up(sums, for_bias)


def _native_sums(q: Tensor, k: Tensor, for_bias: Tensor | None) -> Tensor | None:
    # Where the native kernels sum the gradient of bias: (shares, period, heads or 1, N, M).
    if for_bias is None:
        return None
    period, heads = for_bias.shape[:2]
    turns = (q.shape[0] // period) * (q.shape[1] // heads)
    shares = min(turns, -(-_NATIVE_TASKS // (period * heads)))
    shape = (shares, period, heads, q.shape[2], k.shape[2])
    return q.new_zeros(shape, dtype=formula.compute_dtype(q.dtype))


def _add_up(sums: Tensor | None, for_bias: Tensor | None) -> None:
    if sums is not None and for_bias is not None:
        for_bias.copy_(sums.sum(0).sum_to_size(for_bias.shape))


def _rows(*tensors: Tensor | None) -> tuple[Any, ...]:
    # Backends take any strides, but the numbers of one row side by side.
    return tuple(
        tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in tensors
    )


def _heads_last(like: Tensor) -> Tensor:
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size).transpose(1, 2)


def _packed_heads_last(like: Tensor) -> Tensor:
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _outputs(
    of_rows: Sequence[Tensor], bias: Tensor | None, wanted: Sequence[bool], packed: bool
) -> tuple[Tensor, ...]:
    # To be filled: one for each of those tensors and for bias, of size [0] where it is not wanted.
    *rows_wanted, bias_wanted = wanted
    makers = [_heads_last for _ in of_rows]
    if packed:  # the last three are q, k and v
        makers[-3:] = [_packed_heads_last, _nothing, _nothing]
    rows = (
        make(tensor) if asked else _nothing(tensor)
        for make, tensor, asked in zip(makers, of_rows, rows_wanted, strict=True)
    )
    for_bias = bias.new_empty(bias.shape) if bias is not None and bias_wanted else None
    return *rows, _nothing(of_rows[0]) if for_bias is None else for_bias


def _targets(
    outputs: Sequence[Tensor], bias: Tensor | None, wanted: Sequence[bool], packed: bool
) -> list[Tensor | None]:
    *of_rows, for_bias = outputs
    if packed and wanted[-2]:
        *before, for_qkv, _, _ = of_rows
        of_rows = [*before, *for_qkv.unbind(0)]
    here = (*wanted[:-1], wanted[-1] and bias is not None)
    return [out if asked else None for out, asked in zip((*of_rows, for_bias), here, strict=True)]


def _fill(targets: Sequence[Tensor | None], results: Gradients) -> None:
    for target, result in zip(targets, results, strict=True):
        if target is not None:
            target.zero_() if result is None else target.copy_(result)


def _forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_last(q), q.new_empty(q.shape[:3], dtype=formula.compute_dtype(q.dtype))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    kernels, (out, lse) = _kernels(q), _forward_outputs(q)
    if kernels is None:
        out.copy_(formula.forward(q, k, v, bias, scale))
        lse.copy_(formula.log_sum_exp(q, k, bias, scale))
    else:
        kernels.forward(*_rows(q, k, v), bias, scale, out, lse)
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> tuple[Tensor, ...]:
    kernels, outputs = _kernels(q), _outputs((q, k, v), bias, output_mask, packed)
    targets = _targets(outputs, bias, output_mask, packed)
    if kernels is None:
        wanted = cast(tuple[bool, bool, bool, bool], tuple(output_mask))
        _fill(targets, formula.backward(grad, q, k, v, bias, scale, wanted))
    else:
        grad, q, k, v, out = _rows(grad, q, k, v, out)
        kernels.backward(grad, q, k, v, bias, out, lse, scale, *targets)
    return outputs


def _double_backward(
    aq: Tensor | None,
    ak: Tensor | None,
    av: Tensor | None,
    abias: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> tuple[Tensor, ...]:
    kernels, outputs = _kernels(q), _outputs((grad, q, k, v), bias, output_mask, packed)
    targets = _targets(outputs, bias, output_mask, packed)
    if all(cotangent is None for cotangent in (aq, ak, av, abias)):
        _fill(targets, (None,) * 5)
    elif kernels is None:
        wanted = cast(tuple[bool, bool, bool, bool, bool], tuple(output_mask))
        cotangents = (aq, ak, av, abias)
        _fill(
            targets,
            formula.double_backward(cotangents, grad, q, k, v, bias, scale, wanted),
        )
    else:
        aq, ak, av, grad, q, k, v, out = _rows(aq, ak, av, grad, q, k, v, out)
        kernels.double_backward(aq, ak, av, abias, grad, q, k, v, bias, out, lse, scale, *targets)
    return outputs


def _check_packed(packed: bool, q: Tensor, k: Tensor, of_inputs: Sequence[bool]) -> None:
    if packed and q.shape != k.shape:
        raise RuntimeError(
            f"packed gradients need a k of q's shape {tuple(q.shape)}, but got {tuple(k.shape)}"
        )
    if packed and len(set(of_inputs[:3])) > 1:
        raise RuntimeError(
            "output_mask must ask for all of q, k and v, or for none, where their gradients are "
            f"packed, but got {tuple(of_inputs[:3])}"
        )


def _check_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> None:
    _check_raw(q, k, v, bias)


def _check_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> None:
    _check_raw(q, k, v, bias, grad=(grad, q), out=(out, q))
    _check_lse(lse, q)
    _check_packed(packed, q, k, output_mask)


def _check_double_backward(
    aq: Tensor | None,
    ak: Tensor | None,
    av: Tensor | None,
    abias: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> None:
    if abias is not None and bias is None:
        raise RuntimeError("abias must be None, since bias is")
    given = {"aq": (aq, q), "ak": (ak, k), "av": (av, v), "grad": (grad, q), "out": (out, q)}
    if bias is not None:
        given["abias"] = (abias, bias)
    _check_raw(q, k, v, bias, **given)
    _check_lse(lse, q)
    _check_packed(packed, q, k, output_mask[1:])


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(q)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> tuple[Tensor, ...]:
    return _outputs((q, k, v), bias, output_mask, packed)


def _fake_double_backward(
    aq: Tensor | None,
    ak: Tensor | None,
    av: Tensor | None,
    abias: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    output_mask: Sequence[bool],
    packed: bool = False,
) -> tuple[Tensor, ...]:
    return _outputs((grad, q, k, v), bias, output_mask, packed)


_call_forward = register_raw_op(
    _library, "attention_forward", _check_forward, _forward, _fake_forward
)
_call_backward = register_raw_op(
    _library, "attention_backward", _check_backward, _backward, _fake_backward
)
_call_double_backward = register_raw_op(
    *(_library, "attention_double_backward", _check_double_backward),
    *(_double_backward, _fake_double_backward),
)


def _product_flops(q: Sequence[int], k: Sequence[int]) -> int:
    # One product of the size of Q·Kᵀ or P·V.
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[2] * size


@register_flop_formula(_ops.attention_forward)
def _forward_flops(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return 2 * _product_flops(q, k)


@register_flop_formula(_ops.attention_backward)
def _backward_flops(
    grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, scale: Any, mask: Any,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    # Each GPU kernel recomputes S and, but for dV alone, dP.
    for_q, for_k, for_v, for_bias = mask
    over_keys = int(for_k or for_v) + 2 * for_k + for_v
    return _product_flops(q, k) * int(3 * for_q + over_keys + 2 * for_bias)


@register_flop_formula(_ops.attention_double_backward)
def _double_backward_flops(
    aq: Any, ak: Any, av: Any, abias: Any, grad: Any, q: Any, k: Any, v: Any, bias: Any, out: Any,
    lse: Any, scale: Any, mask: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    # S, dP, T and U again in each of the GPU kernels: that of the statistics and up to three more.
    for_grad, for_q, for_k, for_v, for_bias = mask
    has_q, has_k, has_v = (one is not None for one in (aq, ak, av))
    recomputed = 2 + has_q + has_k + has_v
    kernels = 1 + (for_grad or for_q) + (for_k or for_v) + for_bias
    products = (1 + has_v) * for_grad + (1 + has_k) * for_q + (1 + has_q) * for_k + for_v
    return _product_flops(q, k) * int(kernels * recomputed + products)


def _forward_order(inputs: tuple[Any, ...], options: tuple[float]) -> tuple[Tensor, ...]:
    out, lse = _call_forward(*inputs, *options)
    return out, out, lse


def _backward_order(
    wanted: tuple[bool, ...],
    grad: Tensor,
    inputs: tuple[Any, ...],
    residuals: tuple[Tensor, Tensor],
    options: tuple[float],
) -> Gradients:
    outputs = _call_backward(grad, *inputs, *residuals, *options, wanted)
    return tuple(out if asked else None for out, asked in zip(outputs, wanted, strict=True))


def _double_backward_order(
    wanted: tuple[bool, ...],
    cotangents: tuple[Tensor | None, ...],
    grad: Tensor,
    inputs: tuple[Any, ...],
    residuals: tuple[Tensor, Tensor],
    options: tuple[float],
) -> Gradients:
    outputs = _call_double_backward(
        *cotangents,
        grad,
        *inputs,
        *residuals,
        *options,
        wanted,
    )
    return tuple(out if asked else None for out, asked in zip(outputs, wanted, strict=True))


KERNELS = Orders(_forward_order, _backward_order, _double_backward_order)

AttentionFunction, apply = differentiable(
    "AttentionFunction",
    arity=4,
    kernels=KERNELS,
    formula=formula.FORMULA,
    cheap=False,
)


def _packed_forward_order(
    inputs: tuple[Tensor, Tensor | None], options: tuple[float]
) -> tuple[Tensor, ...]:
    qkv, bias = inputs
    return _forward_order((*qkv.unbind(0), bias), options)


def _packed_backward_order(
    wanted: tuple[bool, bool],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, Tensor],
    options: tuple[float],
) -> Gradients:
    (qkv, bias), (asked, bias_asked) = inputs, wanted
    mask = (asked, asked, asked, bias_asked)
    outputs = _call_backward(grad, *qkv.unbind(0), bias, *residuals, *options, mask, True)
    return outputs[0] if asked else None, outputs[3] if bias_asked else None


def _packed_double_backward_order(
    wanted: tuple[bool, bool, bool],
    cotangents: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, Tensor],
    options: tuple[float],
) -> Gradients:
    (aqkv, abias), (qkv, bias), (grad_asked, asked, bias_asked) = cotangents, inputs, wanted
    outputs = _call_double_backward(
        *((None, None, None) if aqkv is None else aqkv.unbind(0)),
        *(abias, grad, *qkv.unbind(0), bias, *residuals, *options),
        *((grad_asked, asked, asked, asked, bias_asked), True),
    )
    return (
        outputs[0] if grad_asked else None,
        outputs[1] if asked else None,
        outputs[4] if bias_asked else None,
    )


PackedAttentionFunction, apply_packed = differentiable(
    "PackedAttentionFunction",
    arity=2,
    kernels=Orders(_packed_forward_order, _packed_backward_order, _packed_double_backward_order),
    formula=formula.PACKED,
    cheap=False,
)
