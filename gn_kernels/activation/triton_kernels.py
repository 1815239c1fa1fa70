"""The activations on GPU: one Triton kernel for each order, with the activation as a parameter.

The arithmetic is fp32, or fp64 for fp64, and each result is rounded once. HALF says that it is
rounded to 16 bits: then the forms take the fewest instructions that stay within 0.01 ulp of the
correctly rounded result. Otherwise they are within a few ulp, also in the tails; only fp64's gelu,
which has erf but no erfc to build on, is there as accurate as erf is at 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BOUND = tl.constexpr(1000.0)

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN2_HIGH = tl.constexpr(float.fromhex("0x1.63p-1"))  # 9 bits: n·_LN2_HIGH is exact
_LN2_LOW = tl.constexpr(float.fromhex("-0x1.bd0106p-13"))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_TANH_SCALE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))
_TANH_CUBIC = tl.constexpr(0.044715)

# Highest power first. benchmarks/coefficients.py makes them, and says what they approximate.
_TAIL_SCALE = tl.constexpr(0.26)
_TAIL = tl.constexpr(
    (-0.0746126905, 0.23510149, -0.11553806, 0.173281217, 0.0705611395, 0.107733926, 0.10347296)
)
_CENTRE = tl.constexpr(
    (
        *(-1.66664614e-8, 5.21935356e-7, -8.95710405e-6, 0.000114461283),
        *(-0.00118620664, 0.00997286536, -0.0664901876, 0.398942265),
    )
)
_EXP = tl.constexpr((0.00138146232, 0.00836870991, 0.0416683873, 0.166665207, 0.499999935))


@triton.jit
def _polynomial(u, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    p = u * COEFFICIENTS[0] + COEFFICIENTS[1]
    for i in tl.static_range(2, DEGREE + 1):
        p = p * u + COEFFICIENTS[i]
    return p


@triton.jit
def _exp(y):
    # exp(y) = 2ⁿ·exp(r), within 1 ulp in fp32; the hardware's exp2 of y·log₂e is not.
    if y.dtype == tl.float64:
        e = tl.exp(y)
    else:
        # n = −127 and n = 128 give the bit patterns of 0 and of infinity.
        y = tl.clamp(y, -88.0, 89.0, propagate_nan=tl.PropagateNan.ALL)
        n = tl.floor(y * _LOG2_E + 0.5)
        r = (y - n * _LN2_HIGH) - n * _LN2_LOW
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        e = (r * r * _polynomial(r, _EXP, 4) + r + 1.0) * power
    return e


@triton.jit
def _divide(x, w, HALF: tl.constexpr):
    if HALF:
        root = tl.rsqrt(w)  # the one fast approximation that Triton has on every GPU
        quotient = x * (root * root)
    else:
        quotient = x / w if w.dtype == tl.float64 else tl.div_rn(x, w)
    return quotient


@triton.jit
def _magnitude(x):
    # Beyond the bound exp has underflowed and everything is at its limit; 0·|x| stays 0.
    return tl.minimum(tl.abs(x), _BOUND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _odd_about_half(x, at_minus_a):
    # What f(−a) = 1 − f(a) is at x.
    return tl.where(x < 0, at_minus_a, 1.0 - at_minus_a)


# gelu: f = x·Φ(x), f′ = Φ(x) + x·φ(x), f″ = (2 − x²)·φ(x), all from a = |x|:
# f = max(x, 0) − a·Φ(−a), f′(−a) = Φ(−a) − a·φ(a) = 1 − f′(a).


@triton.jit
def _gaussian(a, FAST: tl.constexpr):
    # exp(−a²/2) = √(2π)·φ(a)
    s = a * a
    return tl.exp2(s * (-0.5 * _LOG2_E)) if FAST else _exp(s * -0.5)


@triton.jit
def _normal_tail(a, e, HALF: tl.constexpr):
    # Φ(−a) = e·t·P(t), with e from above and t = 1/(1 + 0.26a), is accurate far into the tail. Near
    # 0, where fp32 needs better, Φ(−a) = ½ − a·C(a²).
    if a.dtype == tl.float64:
        tail = 0.5 - 0.5 * tl.erf(a * _SQRT_HALF)
    else:
        t = _divide(1.0, a * _TAIL_SCALE + 1.0, True)
        tail = e * (t * _polynomial(t, _TAIL, 6))
        if not HALF:
            tail = tl.where(a < 2.0, 0.5 - a * _polynomial(a * a, _CENTRE, 7), tail)
    return tail


@triton.jit
def _gelu_value(x, GATE: tl.constexpr, HALF: tl.constexpr):
    a = tl.abs(x)
    e = _gaussian(a, x.dtype == tl.float32)  # fp32 uses it where a ≥ 2: fast is accurate enough
    tail = _normal_tail(a, e, HALF)
    if HALF:
        value = tl.maximum(x, -_BOUND) * _odd_about_half(x, tail)
    else:
        product = tl.minimum(a, _BOUND) * tail
        value = tl.where(x < 0, -product, x - product)  # rounds once
    return value


@triton.jit
def _gelu_first(x, GATE: tl.constexpr, HALF: tl.constexpr):
    a = _magnitude(x)
    e = _gaussian(a, HALF)
    return _odd_about_half(x, _normal_tail(a, e, HALF) - e * (a * _DENSITY_AT_0))


@triton.jit
def _gelu_both(x, GATE: tl.constexpr, HALF: tl.constexpr):
    a = _magnitude(x)
    e = _gaussian(a, HALF)
    first = _odd_about_half(x, _normal_tail(a, e, HALF) - e * (a * _DENSITY_AT_0))
    return first, e * (2.0 * _DENSITY_AT_0 - (a * a) * _DENSITY_AT_0)


# gelu_tanh, silu, quick_gelu: f = x·σ(g) with an odd g(x), and from a = |x| and the tail σ(−g(a)),
# f′(−a) = σ(−g) − a·g′·σ′ = 1 − f′(a), f″(±a) = σ′·(2g′ + a·g″ − a·g′²·(1 − 2σ(−g))).
# A gate returns SCALE·g, g′ and 2g′ + a·g″.


@triton.jit
def _tanh_gate(x, SCALE: tl.constexpr):
    # ½(1 + tanh u) = σ(2u): g = 2√(2/π)·(x + 0.044715x³)
    s = x * x
    c: tl.constexpr = SCALE * _TANH_SCALE
    return (
        x * (s * (c * _TANH_CUBIC) + c),
        s * (3.0 * _TANH_SCALE * _TANH_CUBIC) + _TANH_SCALE,
        s * (12.0 * _TANH_SCALE * _TANH_CUBIC) + 2.0 * _TANH_SCALE,
    )


@triton.jit
def _silu_gate(x, SCALE: tl.constexpr):
    return x * SCALE, 1.0, 2.0


@triton.jit
def _quick_gelu_gate(x, SCALE: tl.constexpr):
    # A function hands plain numbers on in float32: not near enough for float64.
    slope = tl.full((), 1.702, x.dtype)
    return x * (SCALE * 1.702), slope, slope * 2.0


@triton.jit
def _exp_of_minus_gate(x, GATE: tl.constexpr, HALF: tl.constexpr):
    if HALF:
        y, _, _ = GATE(x, -_LOG2_E)
        e = tl.exp2(y)
    else:
        y, _, _ = GATE(x, -1.0)
        e = _exp(y)
    return e


@triton.jit
def _gated_value(x, GATE: tl.constexpr, HALF: tl.constexpr):
    e = _exp_of_minus_gate(x, GATE, HALF)  # infinity is right: σ = 0
    lower = tl.maximum(x, -_BOUND)
    if HALF:
        value = _divide(lower, e + 1.0, True)
    else:
        # x·σ, or where σ nears 1 the more accurate x − x·(1 − σ)
        near_1 = x > 1.0
        ratio = _divide(tl.where(near_1, -tl.minimum(x, _BOUND) * e, lower), e + 1.0, False)
        value = tl.where(near_1, x + ratio, ratio)
    return value


@triton.jit
def _sigmoid_tail(a, GATE: tl.constexpr, HALF: tl.constexpr):
    # σ(−g(a)) and σ′(g(a)), a ≥ 0
    e = _exp_of_minus_gate(a, GATE, HALF)
    tail = _divide(e, e + 1.0, HALF)
    return tail, tail - tail * tail


@triton.jit
def _gated_first(x, GATE: tl.constexpr, HALF: tl.constexpr):
    a = _magnitude(x)
    tail, slope = _sigmoid_tail(a, GATE, HALF)
    _, g1, _ = GATE(a, 1.0)
    return _odd_about_half(x, tail - a * g1 * slope)


@triton.jit
def _gated_both(x, GATE: tl.constexpr, HALF: tl.constexpr):
    a = _magnitude(x)
    tail, slope = _sigmoid_tail(a, GATE, HALF)
    _, g1, curvature = GATE(a, 1.0)
    h = a * g1
    second = slope * (curvature - h * (g1 - (2.0 * g1) * tail))
    return _odd_about_half(x, tail - h * slope), second


class _Activation(NamedTuple):
    value: Any
    first: Any
    both: Any
    gate: Any = None


_ACTIVATIONS = {
    "gelu": _Activation(_gelu_value, _gelu_first, _gelu_both),
    "gelu_tanh": _Activation(_gated_value, _gated_first, _gated_both, _tanh_gate),
    "silu": _Activation(_gated_value, _gated_first, _gated_both, _silu_gate),
    "quick_gelu": _Activation(_gated_value, _gated_first, _gated_both, _quick_gelu_gate),
}
KINDS = tuple(_ACTIVATIONS)


@triton.jit
def _load(pointer, offsets, mask):
    x = tl.load(pointer + offsets, mask)
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _forward_block(x_ptr, y_ptr, offsets, mask, FUNCTION: tl.constexpr, GATE: tl.constexpr):
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    y = FUNCTION(_load(x_ptr, offsets, mask), GATE, HALF)
    tl.store(y_ptr + offsets, y, mask)


@triton.jit
def _backward_block(
    grad_ptr, x_ptr, out_ptr, offsets, mask, FUNCTION: tl.constexpr, GATE: tl.constexpr
):
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    x = _load(x_ptr, offsets, mask)
    grad = _load(grad_ptr, offsets, mask)
    tl.store(out_ptr + offsets, grad * FUNCTION(x, GATE, HALF), mask)


@triton.jit
def _double_backward_block(
    v_ptr, grad_ptr, x_ptr, for_grad_ptr, for_x_ptr, offsets, mask,
    FUNCTION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    x = _load(x_ptr, offsets, mask)
    v = _load(v_ptr, offsets, mask)
    grad = _load(grad_ptr, offsets, mask)
    first, second = FUNCTION(x, GATE, HALF)
    if for_grad_ptr is not None:
        tl.store(for_grad_ptr + offsets, v * first, mask)
    tl.store(for_x_ptr + offsets, v * grad * second, mask)


# The first `whole` blocks take the branch without a mask, whose accesses are 128 bits wide however
# many elements there are; a last block has `rest` of them. The start of a block is a 64-bit scalar,
# for tensors of more than 2³¹ elements; offsets in a block are 32-bit.


@triton.jit(do_not_specialize=["whole", "rest"])
def _forward_kernel(
    x_ptr, y_ptr, whole, rest, FUNCTION: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    x_ptr += start
    y_ptr += start
    offsets = tl.arange(0, BLOCK)
    if tl.program_id(0) < whole:
        _forward_block(x_ptr, y_ptr, offsets, None, FUNCTION, GATE)
    else:
        _forward_block(x_ptr, y_ptr, offsets, offsets < rest, FUNCTION, GATE)


@triton.jit(do_not_specialize=["whole", "rest"])
def _backward_kernel(
    grad_ptr, x_ptr, out_ptr, whole, rest,
    FUNCTION: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    grad_ptr += start
    x_ptr += start
    out_ptr += start
    offsets = tl.arange(0, BLOCK)
    if tl.program_id(0) < whole:
        _backward_block(grad_ptr, x_ptr, out_ptr, offsets, None, FUNCTION, GATE)
    else:
        _backward_block(grad_ptr, x_ptr, out_ptr, offsets, offsets < rest, FUNCTION, GATE)


@triton.jit(do_not_specialize=["whole", "rest"])
def _double_backward_kernel(
    v_ptr, grad_ptr, x_ptr, for_grad_ptr, for_x_ptr, whole, rest,
    FUNCTION: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    v_ptr += start
    grad_ptr += start
    x_ptr += start
    for_x_ptr += start
    if for_grad_ptr is not None:
        for_grad_ptr += start
    offsets = tl.arange(0, BLOCK)
    if tl.program_id(0) < whole:
        _double_backward_block(
            v_ptr, grad_ptr, x_ptr, for_grad_ptr, for_x_ptr, offsets, None, FUNCTION, GATE
        )
    else:
        _double_backward_block(
            v_ptr, grad_ptr, x_ptr, for_grad_ptr, for_x_ptr, offsets, offsets < rest,
            FUNCTION, GATE,
        )  # fmt: skip


_BLOCK = 1024


def _launch(kernel: Any, function: Any, gate: Any, x: Tensor, *tensors: Tensor | None) -> None:
    whole, rest = divmod(x.numel(), _BLOCK)
    blocks = whole + (rest > 0)
    if blocks == 0:
        return
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        kernel[(blocks,)](
            *tensors,
            whole,
            rest,
            FUNCTION=function,
            GATE=gate,
            BLOCK=_BLOCK,
            # 8 elements a thread, with AMD's 64 threads a warp too: 128-bit accesses in 16 bits.
            num_warps=2 if torch.version.hip else 4,
            enable_fp_fusion=True,  # Triton 3.10 turns it off by default: 10 to 30% more work
        )


def forward(x: Tensor, kind: str) -> Tensor:
    """f(x) in the layout of x, which is dense."""
    row = _ACTIVATIONS[kind]
    y = torch.empty_like(x)
    _launch(_forward_kernel, row.value, row.gate, x, x, y)
    return y


def backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """grad·f′(x), of dense tensors with the same strides."""
    row = _ACTIVATIONS[kind]
    out = torch.empty_like(x)
    _launch(_backward_kernel, row.first, row.gate, x, grad, x, out)
    return out


def double_backward(
    v: Tensor, grad: Tensor, x: Tensor, kind: str, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """(v·f′(x), v·grad·f″(x)); an output that is not asked for has size [0]."""
    row = _ACTIVATIONS[kind]
    if not output_mask[1]:
        return backward(v, x, kind) if output_mask[0] else x.new_empty(0), x.new_empty(0)
    for_grad = torch.empty_like(x) if output_mask[0] else None
    for_x = torch.empty_like(x)
    _launch(_double_backward_kernel, row.both, row.gate, x, v, grad, x, for_grad, for_x)
    return x.new_empty(0) if for_grad is None else for_grad, for_x
