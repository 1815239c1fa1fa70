"""Layer normalisation on GPU: one Triton kernel per order, over tiles of whole rows.

The formulas are those of ``formula.py``, in fp32 (fp64 for fp64). A tile is [ROWS, BLOCK], BLOCK a
power of two that holds a row of N numbers. Where gradients of weight or bias are asked for, a
fixed number of programs walks over the tiles, each leaves its own sum over its rows, and a second
kernel adds those up: no atomics, and the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gn_kernels.layer_norm.formula import compute_dtype

_ELEMENTS_PER_THREAD = 8  # of 16 bits: one 128-bit access
_TILE = 128 * _ELEMENTS_PER_THREAD
_MAX_ROWS = 32
_MAX_THREADS = 1024
_COLUMNS, _PARTIALS = 32, 64  # the tile of the second kernel

# Programs that walk over the tiles, for each multiprocessor: enough to fill it, and few enough
# for their sums to stay small beside x.
_WALKERS = 4


@triton.jit
def _load(pointer, mask, WIDE: tl.constexpr):
    return tl.load(pointer, mask=mask, other=0.0).to(WIDE)


@triton.jit
def _mean(a, N: tl.constexpr):
    return tl.sum(a, axis=1)[:, None] * (1.0 / N)


@triton.jit
def _reciprocal_root(a):
    # Correctly rounded; a GPU's own reciprocal root is 2 ulp off, in every element of the row.
    if a.dtype == tl.float64:
        root = 1.0 / tl.sqrt(a)
    else:
        root = tl.div_rn(tl.zeros_like(a) + 1.0, tl.sqrt_rn(a))
    return root


@triton.jit
def _tile(tile, rows, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Where a tile begins in the rows and in x; its rows, elements and masks relative to that.
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    first_row = tile * tl.full((), ROWS, tl.int64)
    of_rows = row < rows - first_row
    return first_row, first_row * N, row, row * N + column, of_rows, of_rows & (column < N)


@triton.jit
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    rows,
    eps: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    WIDE: tl.constexpr = mean.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    first_row, start, row, element, of_rows, inside = _tile(tl.program_id(0), rows, N, ROWS, BLOCK)

    # Relative to its first number a constant row is exactly 0, and its variance too. Relative to
    # the mean that this gives, what is left of the mean corrects it.
    a = _load(x + start + element, inside, WIDE)
    shift = _load(x + start + row * N, of_rows, WIDE)
    about = shift + _mean(tl.where(inside, a - shift, 0.0), N)
    centred = tl.where(inside, a - about, 0.0)
    rest = _mean(centred, N)
    variance = _mean(centred * centred, N) - rest * rest
    r = _reciprocal_root(tl.where(variance < 0, 0.0, variance) + eps)
    mu = about + rest

    result = (a - mu) * r
    if HAS_WEIGHT:
        result *= _load(weight + column, column < N, WIDE)
    if HAS_BIAS:
        result += _load(bias + column, column < N, WIDE)
    tl.store(y + start + element, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + first_row + row, mu, mask=of_rows)
    tl.store(rstd + first_row + row, r, mask=of_rows)


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    mean,
    rstd,
    for_x,
    for_weight,
    for_bias,
    rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    FOR_BIAS: tl.constexpr,
):
    WIDE: tl.constexpr = mean.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        w = _load(weight + column, column < N, WIDE)
    sum_for_weight = tl.zeros((ROWS, BLOCK), WIDE)
    sum_for_bias = tl.zeros((ROWS, BLOCK), WIDE)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first_row, start, row, element, of_rows, inside = _tile(tile, rows, N, ROWS, BLOCK)
        g = _load(grad + start + element, inside, WIDE)
        if FOR_BIAS:
            sum_for_bias += g
        if FOR_X or FOR_WEIGHT:
            r = _load(rstd + first_row + row, of_rows, WIDE)
            x_hat = _load(x + start + element, inside, WIDE)
            x_hat = (x_hat - _load(mean + first_row + row, of_rows, WIDE)) * r
            if FOR_WEIGHT:
                sum_for_weight += g * x_hat
            if FOR_X:
                h = g
                if HAS_WEIGHT:
                    h *= w
                result = r * (h - _mean(h, N) - x_hat * _mean(h * x_hat, N))
                tl.store(for_x + start + element, result.to(for_x.dtype.element_ty), mask=inside)

    partial = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK)
    if FOR_WEIGHT:
        tl.store(for_weight + partial, tl.sum(sum_for_weight, axis=0), mask=tl.arange(0, BLOCK) < N)
    if FOR_BIAS:
        tl.store(for_bias + partial, tl.sum(sum_for_bias, axis=0), mask=tl.arange(0, BLOCK) < N)


@triton.jit
def _double_backward_kernel(
    v,
    u,
    t,
    grad,
    x,
    weight,
    mean,
    rstd,
    for_grad,
    for_x,
    for_weight,
    rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FOR_GRAD: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
):
    WIDE: tl.constexpr = mean.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    if HAS_WEIGHT:
        w = _load(weight + column, column < N, WIDE)
    if HAS_U:
        of_weight = _load(u + column, column < N, WIDE)
    if HAS_T:
        of_bias = _load(t + column, column < N, WIDE)
    sum_for_weight = tl.zeros((ROWS, BLOCK), WIDE)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first_row, start, row, element, of_rows, inside = _tile(tile, rows, N, ROWS, BLOCK)
        r = _load(rstd + first_row + row, of_rows, WIDE)
        x_hat = _load(x + start + element, inside, WIDE)
        x_hat = (x_hat - _load(mean + first_row + row, of_rows, WIDE)) * r
        if FOR_X or FOR_WEIGHT:
            g = _load(grad + start + element, inside, WIDE)
        if HAS_V:
            a = _load(v + start + element, inside, WIDE)
            mean_a = _mean(a, N)
            mean_ax = _mean(a * x_hat, N)
            r_pa = r * (a - mean_a - x_hat * mean_ax)
            if FOR_WEIGHT:
                sum_for_weight += g * r_pa

        if FOR_GRAD:
            result = tl.zeros((ROWS, BLOCK), WIDE)
            if HAS_V:
                result = r_pa
                if HAS_WEIGHT:
                    result *= w
            if HAS_U:
                result += x_hat * of_weight
            if HAS_T:
                result += of_bias
            tl.store(for_grad + start + element, result.to(for_grad.dtype.element_ty), mask=inside)

        if FOR_X:
            result = tl.zeros((ROWS, BLOCK), WIDE)
            if HAS_U:
                k = g * of_weight
                result = r * (k - _mean(k, N) - x_hat * _mean(k * x_hat, N))
            if HAS_V:
                h = g
                if HAS_WEIGHT:
                    h *= w
                mean_h = _mean(h, N)
                mean_hx = _mean(h * x_hat, N)
                along = _mean(a * h, N) - mean_a * mean_h - 2.0 * mean_ax * mean_hx
                result -= r * (mean_hx * r_pa + r * (mean_ax * (h - mean_h) + along * x_hat))
            tl.store(for_x + start + element, result.to(for_x.dtype.element_ty), mask=inside)

    if FOR_WEIGHT:
        partial = tl.program_id(0).to(tl.int64) * N + tl.arange(0, BLOCK)
        tl.store(for_weight + partial, tl.sum(sum_for_weight, axis=0), mask=tl.arange(0, BLOCK) < N)


@triton.jit
def _column_sums_kernel(
    partials, first, second, count, N: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr
):
    # [2 or 1, count, N] to the outputs first and second of N numbers.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    partials += tl.program_id(1).to(tl.int64) * count * N
    total = tl.zeros((COUNT, BLOCK), partials.dtype.element_ty)
    for start in range(0, count, COUNT):
        row = start + tl.arange(0, COUNT)[:, None]
        total += tl.load(partials + row * N + column, mask=(row < count) & (column < N), other=0.0)
    sums = tl.sum(total, axis=0)[None, :].to(first.dtype.element_ty)
    if tl.program_id(1) == 0:
        tl.store(first + column, sums, mask=column < N)
    else:
        tl.store(second + column, sums, mask=column < N)


@functools.cache
def tiling(row_length: int, threads_per_warp: int) -> dict[str, int]:
    """The compile-time parameters and the warps of the kernels for one row length."""
    block = triton.next_power_of_2(row_length)
    rows = min(_MAX_ROWS, max(1, _TILE // block))
    threads = min(_MAX_THREADS, rows * block // _ELEMENTS_PER_THREAD)
    warps = max(1, threads // threads_per_warp)
    return {"N": row_length, "ROWS": rows, "BLOCK": block, "num_warps": warps}


def _launch(row_length: int) -> dict[str, int]:
    # fp_fusion's default is about to change, and costs 10 to 30 % more instructions when off.
    threads_per_warp = 32 if torch.version.hip is None else 64
    return {**tiling(row_length, threads_per_warp), "enable_fp_fusion": True}


@functools.cache
def _walkers(device: torch.device) -> int:
    if device.type != "cuda":
        return _WALKERS
    return _WALKERS * torch.cuda.get_device_properties(device).multi_processor_count


def _on(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device.
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _grid(x: Tensor, row_length: int, walks: bool) -> int:
    tiles = triton.cdiv(x.numel() // row_length, _launch(row_length)["ROWS"])
    return min(tiles, _walkers(x.device)) if walks else tiles


def _partials(x: Tensor, row_length: int, programs: int, sums: int) -> Tensor:
    return x.new_empty(sums, programs, row_length, dtype=compute_dtype(x.dtype))


def _add_up(partials: Tensor, first: Tensor, second: Tensor) -> None:
    sums, count, row_length = partials.shape
    _column_sums_kernel[(triton.cdiv(row_length, _COLUMNS), sums)](
        partials, first, second, count, N=row_length, BLOCK=_COLUMNS, COUNT=_PARTIALS
    )


def forward(
    x: Tensor, row_length: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // row_length
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=compute_dtype(x.dtype)) for _ in range(2))
    with _on(x):
        _forward_kernel[(_grid(x, row_length, walks=False),)](
            *(x, weight, bias, y, mean, rstd, rows),
            eps=eps,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            **_launch(row_length),
        )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    row_length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    for_x, for_weight, for_bias = (
        torch.empty_like(like) if asked and like is not None else x.new_empty(0)
        for like, asked in zip((x, weight, bias), output_mask, strict=True)
    )
    _, *sums = zip((for_x, for_weight, for_bias), output_mask, strict=True)
    summed = [out for out, asked in sums if asked]
    programs = _grid(x, row_length, walks=bool(summed))
    partials = _partials(x, row_length, programs, len(summed))
    with _on(x):
        _backward_kernel[(programs,)](
            *(grad, x, weight, mean, rstd, for_x),
            *(partials[0] if summed else partials, partials[-1] if summed else partials),
            x.numel() // row_length,
            HAS_WEIGHT=weight is not None,
            FOR_X=output_mask[0],
            FOR_WEIGHT=output_mask[1],
            FOR_BIAS=output_mask[2],
            **_launch(row_length),
        )
        if summed:
            _add_up(partials, summed[0], summed[-1])
    return for_x, for_weight, for_bias


def double_backward(
    v: Tensor | None,
    u: Tensor | None,
    t: Tensor | None,
    grad: Tensor,
    x: Tensor,
    row_length: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    for_grad, for_x, for_weight = (
        torch.empty_like(like) if asked and like is not None else x.new_empty(0)
        for like, asked in zip((grad, x, weight), output_mask, strict=True)
    )
    programs = _grid(x, row_length, walks=output_mask[2])
    partials = _partials(x, row_length, programs, int(output_mask[2]))
    with _on(x):
        _double_backward_kernel[(programs,)](
            *(v, u, t, grad, x, weight, mean, rstd, for_grad, for_x, partials),
            x.numel() // row_length,
            HAS_V=v is not None,
            HAS_U=u is not None,
            HAS_T=t is not None,
            HAS_WEIGHT=weight is not None,
            FOR_GRAD=output_mask[0],
            FOR_X=output_mask[1],
            FOR_WEIGHT=output_mask[2],
            **_launch(row_length),
        )
        if output_mask[2]:
            _add_up(partials, for_weight, for_weight)
    return for_grad, for_x, for_weight
