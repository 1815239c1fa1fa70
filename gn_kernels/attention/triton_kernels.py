"""Attention on GPU, block by block: nothing of size N×M is stored in any of the three orders.

Every kernel owns blocks of queries, of keys or of bias, computes its scores anew from q, k and the
log-sum-exp of the rows, and is the only writer of what it stores: no atomics, the same bits every
time. The names are those of ``formula``. A program that owns keys has the scores as (keys,
queries), every other as (queries, keys), so that what it sums is a plain product.

Scores are float32, and in units of ln 2 where exp2 takes them. The factors of a matrix product are
rounded to the dtype of the inputs. Arguments come in tuples, None for what is absent:
``of_queries`` (q, dO, aQ), ``of_keys`` (k, v, aK, aV), ``of_scores`` (bias, aB), each with the
strides of its members, and ``of_rows`` (lse, τ, δ, ρ), which are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))

# Programs among which the gradient of a small bias is spread: several for each processor of the
# largest GPUs.
_PROGRAMS = 1024


@triton.jit
def _place(HEADS, length, BLOCK: tl.constexpr):
    # The rows that this program owns, and their element of the batch and head.
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    rows = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    head = program // blocks
    return rows, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def _rows(tensor, strides, b, h, rows, length, SIZE: tl.constexpr, PADDED: tl.constexpr):
    values = None
    if tensor is not None:
        columns = tl.arange(0, PADDED)
        base = tensor + b * strides[0] + h * strides[1]
        place = base + rows.to(tl.int64)[:, None] * strides[2] + columns[None, :]
        mask = rows[:, None] < length
        if SIZE != PADDED:
            mask = mask & (columns[None, :] < SIZE)
        values = tl.load(place, mask, other=0.0)
    return values


@triton.jit
def _query_rows(of_queries, strides, b, h, rows, N, SIZE: tl.constexpr, PADDED: tl.constexpr):
    return (
        _rows(of_queries[0], strides[0], b, h, rows, N, SIZE, PADDED),
        _rows(of_queries[1], strides[1], b, h, rows, N, SIZE, PADDED),
        _rows(of_queries[2], strides[2], b, h, rows, N, SIZE, PADDED),
    )


@triton.jit
def _key_rows(of_keys, strides, b, h, rows, M, SIZE: tl.constexpr, PADDED: tl.constexpr):
    return (
        _rows(of_keys[0], strides[0], b, h, rows, M, SIZE, PADDED),
        _rows(of_keys[1], strides[1], b, h, rows, M, SIZE, PADDED),
        _rows(of_keys[2], strides[2], b, h, rows, M, SIZE, PADDED),
        _rows(of_keys[3], strides[3], b, h, rows, M, SIZE, PADDED),
    )


@triton.jit
def _across(values, KEYS_FIRST: tl.constexpr):
    # One number for each query, along the keys.
    return values[None, :] if KEYS_FIRST else values[:, None]


@triton.jit
def _row_number(tensor, b, h, queries, N, HEADS, other: tl.constexpr, KEYS_FIRST: tl.constexpr):
    values = None
    if tensor is not None:
        place = tensor + (b * HEADS + h) * N + queries
        values = _across(tl.load(place, queries < N, other=other), KEYS_FIRST)
    return values


@triton.jit
def _row_numbers(of_rows, b, h, queries, N, HEADS, KEYS_FIRST: tl.constexpr):
    # P is 0 beyond the last query.
    return (
        _row_number(of_rows[0], b, h, queries, N, HEADS, float("inf"), KEYS_FIRST),
        _row_number(of_rows[1], b, h, queries, N, HEADS, 0.0, KEYS_FIRST),
        _row_number(of_rows[2], b, h, queries, N, HEADS, 0.0, KEYS_FIRST),
        _row_number(of_rows[3], b, h, queries, N, HEADS, 0.0, KEYS_FIRST),
    )


@triton.jit
def _bias_block(bias, strides, element, h, queries, keys, N, M, KEYS_FIRST: tl.constexpr):
    values = None
    if bias is not None:
        rows, columns = queries.to(tl.int64), keys.to(tl.int64)
        place = bias + element * strides[0] + h * strides[1]
        if KEYS_FIRST:
            place += columns[:, None] * strides[3] + rows[None, :] * strides[2]
            mask = (columns[:, None] < M) & (rows[None, :] < N)
        else:
            place += rows[:, None] * strides[2] + columns[None, :] * strides[3]
            mask = (rows[:, None] < N) & (columns[None, :] < M)
        values = tl.load(place, mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _score_blocks(of_scores, strides, element, h, queries, keys, N, M, KEYS_FIRST: tl.constexpr):
    return (
        _bias_block(of_scores[0], strides[0], element, h, queries, keys, N, M, KEYS_FIRST),
        _bias_block(of_scores[1], strides[1], element, h, queries, keys, N, M, KEYS_FIRST),
    )


@triton.jit
def _store_rows(
    tensor, b, h, rows, length, values, PITCH, SIZE: tl.constexpr, PADDED: tl.constexpr
):
    # Into a tensor that lies in memory as (batch, length, heads, d), or into a third of one that
    # lies as (batch, length, 3, heads, d): PITCH is how many heads, of all, there are in a row.
    if tensor is not None:
        columns = tl.arange(0, PADDED)
        place = tensor + ((b * length + rows.to(tl.int64)[:, None]) * PITCH + h) * SIZE
        mask = rows[:, None] < length
        if SIZE != PADDED:
            mask = mask & (columns[None, :] < SIZE)
        tl.store(place + columns[None, :], values.to(tensor.dtype.element_ty), mask)


@triton.jit
def _store_row_number(tensor, b, h, queries, N, values, HEADS):
    tl.store(tensor + (b * HEADS + h) * N + queries, values, queries < N)


@triton.jit
def _each(queries, keys, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    # The product of each row of one with each row of the other.
    if KEYS_FIRST:
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
    else:
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    return scores


@triton.jit
def _sum(weights, rows, total, PRECISION: tl.constexpr):
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION)


@triton.jit
def _scores(q, k, bias, keys, M, scale, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    # S/ln 2, −∞ beyond the last key
    s = _each(q, k, KEYS_FIRST, PRECISION) * (scale * _LOG2_E)
    if bias is not None:
        s += bias * _LOG2_E
    inside = keys[:, None] < M if KEYS_FIRST else keys[None, :] < M
    return tl.where(inside, s, -float("inf"))


@triton.jit
def _p_and_dp(
    query_rows, key_rows, bias, lse, keys, M, scale,
    KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = _scores(query_rows[0], key_rows[0], bias, keys, M, scale, KEYS_FIRST, PRECISION)
    p = tl.exp2(s - lse * _LOG2_E)
    return p, _each(query_rows[1], key_rows[1], KEYS_FIRST, PRECISION)


@triton.jit
def _t_and_u(
    query_rows, key_rows, abias, p, scale, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr
):
    t = tl.zeros_like(p)
    if query_rows[2] is not None:
        t += _each(query_rows[2], key_rows[0], KEYS_FIRST, PRECISION)
    if key_rows[2] is not None:
        t += _each(query_rows[0], key_rows[2], KEYS_FIRST, PRECISION)
    t *= scale
    if abias is not None:
        t += abias
    u = tl.zeros_like(p)
    if key_rows[3] is not None:
        u = _each(query_rows[1], key_rows[3], KEYS_FIRST, PRECISION)
    return t, u


@triton.jit
def _ds_and_as(p, dp, t, u, row):
    # P∘(dP − δ) and P∘(aP − ρ), with aP = T∘(dP − δ) − τ·dP + U
    centred = dp - row[2]
    return p * centred, p * (t * centred - row[1] * dp + u - row[3])


@triton.jit
def _forward(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides,
    out, lse, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    queries, b, h = _place(HEADS, N, QUERIES)
    q = _rows(of_queries[0], query_strides[0], b, h, queries, N, SIZE, PADDED)
    highest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, M, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        bias = _bias_block(
            of_scores[0], score_strides[0], b % period, h, queries, keys, N, M, False
        )
        s = _scores(q, key_rows[0], bias, keys, M, scale, False, PRECISION)
        higher = tl.maximum(highest, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # all that was seen is masked
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(p, 1)
        result = _sum(p, key_rows[1], result * shrink[:, None], PRECISION)
        highest = higher
    masked = total == 0.0
    total = tl.where(masked, 1.0, total)
    result = result / total[:, None]
    _store_rows(out, b, h, queries, N, result, HEADS, SIZE, PADDED)
    values = tl.where(masked, float("inf"), (highest + tl.log2(total)) * _LN_2)
    _store_row_number(lse, b, h, queries, N, values, HEADS)


@triton.jit
def _backward_delta(
    grad, grad_strides, out, out_strides, delta, HEADS, N,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    # δ = rowsum(P∘dP) = rowsum(dO∘O)
    queries, b, h = _place(HEADS, N, QUERIES)
    grad_rows = _rows(grad, grad_strides, b, h, queries, N, SIZE, PADDED).to(tl.float32)
    out_rows = _rows(out, out_strides, b, h, queries, N, SIZE, PADDED).to(tl.float32)
    _store_row_number(delta, b, h, queries, N, tl.sum(grad_rows * out_rows, 1), HEADS)


@triton.jit
def _backward_queries(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_q, PITCH, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # scale·dS·K
    queries, b, h = _place(HEADS, N, QUERIES)
    query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
    row = _row_numbers(of_rows, b, h, queries, N, HEADS, False)
    result = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, M, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        biases = _score_blocks(of_scores, score_strides, b % period, h, queries, keys, N, M, False)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, False, PRECISION)
        result = _sum(p * (dp - row[2]), key_rows[0], result, PRECISION)
    _store_rows(for_q, b, h, queries, N, result * scale, PITCH, SIZE, PADDED)


@triton.jit
def _backward_keys(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_k, for_v, PITCH, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # scale·dSᵀ·Q and Pᵀ·dO
    keys, b, h = _place(HEADS, M, KEYS)
    key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
    k_result = tl.zeros([KEYS, PADDED], tl.float32)
    v_result = tl.zeros([KEYS, PADDED], tl.float32)
    for start in range(0, N, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
        row = _row_numbers(of_rows, b, h, queries, N, HEADS, True)
        biases = _score_blocks(of_scores, score_strides, b % period, h, queries, keys, N, M, True)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, True, PRECISION)
        if for_v is not None:
            v_result = _sum(p, query_rows[1], v_result, PRECISION)
        if for_k is not None:
            k_result = _sum(p * (dp - row[2]), query_rows[0], k_result, PRECISION)
    _store_rows(for_k, b, h, keys, M, k_result * scale, PITCH, SIZE, PADDED)
    _store_rows(for_v, b, h, keys, M, v_result, PITCH, SIZE, PADDED)


@triton.jit
def _bias_place(period, BIAS_HEADS, N, M, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    # The block of bias that this program owns, and which share of what meets it.
    across, down = tl.cdiv(M, KEYS), tl.cdiv(N, QUERIES)
    rest = tl.program_id(0)
    keys, rest = (rest % across) * KEYS + tl.arange(0, KEYS), rest // across
    queries, rest = (rest % down) * QUERIES + tl.arange(0, QUERIES), rest // down
    h, rest = (rest % BIAS_HEADS).to(tl.int64), rest // BIAS_HEADS
    return queries, keys, h, (rest % period).to(tl.int64), rest // period


@triton.jit
def _bias_turn(turn, element, bias_head, period, BIAS_HEADS, HEADS):
    # The element of the batch and the head of one pair that meets a block of bias.
    heads = HEADS // BIAS_HEADS
    return (turn // heads) * period + element, bias_head + turn % heads


@triton.jit
def _store_bias(for_bias, share, element, h, queries, keys, N, M, values, period, BIAS_HEADS):
    base = ((share.to(tl.int64) * period + element) * BIAS_HEADS + h) * N
    place = for_bias + (base + queries.to(tl.int64)[:, None]) * M + keys[None, :]
    mask = (queries[:, None] < N) & (keys[None, :] < M)
    tl.store(place, values.to(for_bias.dtype.element_ty), mask)


@triton.jit
def _backward_bias(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_bias, shares, turns, BIAS_HEADS, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # dS, summed over a share of the batch and heads
    queries, keys, bias_head, element, share = _bias_place(period, BIAS_HEADS, N, M, QUERIES, KEYS)
    biases = _score_blocks(of_scores, score_strides, element, bias_head, queries, keys, N, M, False)
    result = tl.zeros([QUERIES, KEYS], tl.float32)
    for turn in range(share, turns, shares):
        b, h = _bias_turn(turn, element, bias_head, period, BIAS_HEADS, HEADS)
        query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        row = _row_numbers(of_rows, b, h, queries, N, HEADS, False)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, False, PRECISION)
        result += p * (dp - row[2])
    _store_bias(
        for_bias, share, element, bias_head, queries, keys, N, M, result, period, BIAS_HEADS
    )


@triton.jit
def _double_statistics(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    tau, delta, rho, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # τ = rowsum(P∘T), δ = rowsum(P∘dP), ρ = rowsum(P∘(T∘dP + U)) − 2τδ
    queries, b, h = _place(HEADS, N, QUERIES)
    query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
    row = _row_numbers(of_rows, b, h, queries, N, HEADS, False)
    tau_rows = tl.zeros([QUERIES], tl.float32)
    delta_rows = tl.zeros([QUERIES], tl.float32)
    rho_rows = tl.zeros([QUERIES], tl.float32)
    for start in range(0, M, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        biases = _score_blocks(of_scores, score_strides, b % period, h, queries, keys, N, M, False)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, False, PRECISION)
        t, u = _t_and_u(query_rows, key_rows, biases[1], p, scale, False, PRECISION)
        tau_rows += tl.sum(p * t, 1)
        delta_rows += tl.sum(p * dp, 1)
        rho_rows += tl.sum(p * (t * dp + u), 1)
    _store_row_number(tau, b, h, queries, N, tau_rows, HEADS)
    _store_row_number(delta, b, h, queries, N, delta_rows, HEADS)
    _store_row_number(rho, b, h, queries, N, rho_rows - 2.0 * tau_rows * delta_rows, HEADS)


@triton.jit
def _double_queries(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_grad, for_q, PITCH, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # G·V + P·aV, with G = P∘(T − τ), and scale·(aS·K + dS·aK)
    queries, b, h = _place(HEADS, N, QUERIES)
    query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
    row = _row_numbers(of_rows, b, h, queries, N, HEADS, False)
    grad_result = tl.zeros([QUERIES, PADDED], tl.float32)
    q_result = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, M, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        biases = _score_blocks(of_scores, score_strides, b % period, h, queries, keys, N, M, False)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, False, PRECISION)
        t, u = _t_and_u(query_rows, key_rows, biases[1], p, scale, False, PRECISION)
        if for_grad is not None:
            grad_result = _sum(p * (t - row[1]), key_rows[1], grad_result, PRECISION)
            if key_rows[3] is not None:
                grad_result = _sum(p, key_rows[3], grad_result, PRECISION)
        if for_q is not None:
            ds, a_s = _ds_and_as(p, dp, t, u, row)
            q_result = _sum(a_s, key_rows[0], q_result, PRECISION)
            if key_rows[2] is not None:
                q_result = _sum(ds, key_rows[2], q_result, PRECISION)
    _store_rows(for_grad, b, h, queries, N, grad_result, HEADS, SIZE, PADDED)
    _store_rows(for_q, b, h, queries, N, q_result * scale, PITCH, SIZE, PADDED)


@triton.jit
def _double_keys(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_k, for_v, PITCH, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # scale·(aSᵀ·Q + dSᵀ·aQ) and Gᵀ·dO
    keys, b, h = _place(HEADS, M, KEYS)
    key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
    k_result = tl.zeros([KEYS, PADDED], tl.float32)
    v_result = tl.zeros([KEYS, PADDED], tl.float32)
    for start in range(0, N, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
        row = _row_numbers(of_rows, b, h, queries, N, HEADS, True)
        biases = _score_blocks(of_scores, score_strides, b % period, h, queries, keys, N, M, True)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, True, PRECISION)
        t, u = _t_and_u(query_rows, key_rows, biases[1], p, scale, True, PRECISION)
        if for_v is not None:
            v_result = _sum(p * (t - row[1]), query_rows[1], v_result, PRECISION)
        if for_k is not None:
            ds, a_s = _ds_and_as(p, dp, t, u, row)
            # dS first: with a bias on sm_100 only this order fits the registers.
            if query_rows[2] is not None:
                k_result = _sum(ds, query_rows[2], k_result, PRECISION)
            k_result = _sum(a_s, query_rows[0], k_result, PRECISION)
    _store_rows(for_k, b, h, keys, M, k_result * scale, PITCH, SIZE, PADDED)
    _store_rows(for_v, b, h, keys, M, v_result, PITCH, SIZE, PADDED)


@triton.jit
def _double_bias(
    of_queries, query_strides, of_keys, key_strides, of_scores, score_strides, of_rows,
    for_bias, shares, turns, BIAS_HEADS, period, scale, HEADS, N, M,
    SIZE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # aS, summed over a share of the batch and heads
    queries, keys, bias_head, element, share = _bias_place(period, BIAS_HEADS, N, M, QUERIES, KEYS)
    biases = _score_blocks(of_scores, score_strides, element, bias_head, queries, keys, N, M, False)
    result = tl.zeros([QUERIES, KEYS], tl.float32)
    for turn in range(share, turns, shares):
        b, h = _bias_turn(turn, element, bias_head, period, BIAS_HEADS, HEADS)
        query_rows = _query_rows(of_queries, query_strides, b, h, queries, N, SIZE, PADDED)
        key_rows = _key_rows(of_keys, key_strides, b, h, keys, M, SIZE, PADDED)
        row = _row_numbers(of_rows, b, h, queries, N, HEADS, False)
        p, dp = _p_and_dp(query_rows, key_rows, biases[0], row[0], keys, M, scale, False, PRECISION)
        t, u = _t_and_u(query_rows, key_rows, biases[1], p, scale, False, PRECISION)
        _, a_s = _ds_and_as(p, dp, t, u, row)
        result += a_s
    _store_bias(
        for_bias, share, element, bias_head, queries, keys, N, M, result, period, BIAS_HEADS
    )


class Tiling(NamedTuple):
    """How many queries and keys a program holds at a time, and how it is launched."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiling(
    kernel: str, size: int, dtype: torch.dtype, biased: bool, precision: str = "ieee"
) -> Tiling:
    """For a kernel of this module and a head size: what the registers of its GPU hold.

    Without tensor cores, products of float32 keep whole rows of both factors in registers; AMD has
    them for float32.
    """
    amd = torch.version.hip is not None
    double = kernel.startswith("_double")
    sums_rows = kernel.endswith(("_queries", "_keys"))
    if dtype == torch.float32 and not amd:
        block = 16 if double and precision == "ieee" else 32
        return Tiling(block, block, warps=8 if size > 64 or precision == "ieee" else 4, stages=1)
    if amd and kernel == "_double_statistics":
        double = False  # three numbers for each row are all it keeps
    owned, other = 64, 32 if double or biased else 64
    if dtype == torch.float32 or (double and size > (32 if biased else 64)):
        other = 16
    warps, stages = 4 if size <= 64 else 8, 2
    if amd:
        # Four wavefronts may have 512 registers a thread, eight 256, in which a second stage waits.
        warps, stages = 4, 1
    elif sums_rows and double and size > 64:
        # Eight warps would repeat the products of 64 rows by 16, four lack the registers for them.
        owned, other, warps = (16, 32, 4) if biased else (32, 16, 4)
    if sums_rows and biased and size > 32:
        stages = 1  # a second stage of a bias waits in registers, as 16 bits are not copied aside
    queries, keys = (other, owned) if kernel.endswith("_keys") else (owned, other)
    return Tiling(queries, keys, warps, stages)


def _options(tiling: Tiling) -> dict[str, int]:
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    if torch.version.hip is not None:
        # By 32 rows, the default, four wavefronts would compute products of 64 rows twice.
        options["matrix_instr_nonkdim"] = 16
    return options


def padded(size: int) -> int:
    """The columns of a block for a head size: a power of two, 16 at least for tl.dot."""
    return max(16, triton.next_power_of_2(size))


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    if bias is None:
        return (0, 0, 0, 0)
    sizes = zip(bias.shape, bias.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)


def _pitch(*outputs: Tensor | None) -> int:
    # Heads in a row of the tensor that these gradients are stored in, their own or a packed one.
    first = next((out for out in outputs if out is not None), None)
    return 0 if first is None else first.stride(2) // first.shape[3]


def _on(device: torch.device) -> AbstractContextManager[object]:
    # Triton launches on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        of_queries: tuple[Tensor, Tensor | None, Tensor | None],
        of_keys: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        of_scores: tuple[Tensor | None, Tensor | None],
        scale: float,
    ) -> None:
        rows = [(0, 0, 0) if one is None else one.stride()[:3] for one in (*of_queries, *of_keys)]
        self.inputs = (
            of_queries,
            tuple(rows[:3]),
            of_keys,
            tuple(rows[3:]),
            of_scores,
            tuple(_bias_strides(one) for one in of_scores),
        )
        q, bias = of_queries[0], of_scores[0]
        self.device, self.dtype = q.device, q.dtype
        self.batch, self.heads, self.n, self.size = q.shape
        self.m, self.scale = of_keys[0].shape[2], scale
        self.period = 1 if bias is None else bias.shape[0]
        self.precision = (
            "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        )

    def over_queries(self, kernel: Any, *arguments: Any) -> None:
        """One program for each block of queries of each head."""
        tiling = self._tiling(kernel)
        programs = self.batch * self.heads * triton.cdiv(self.n, tiling.queries)
        self._launch(kernel, programs, tiling, arguments)

    def over_keys(self, kernel: Any, *arguments: Any) -> None:
        """One program for each block of keys of each head."""
        tiling = self._tiling(kernel)
        programs = self.batch * self.heads * triton.cdiv(self.m, tiling.keys)
        self._launch(kernel, programs, tiling, arguments)

    def over_bias(self, kernel: Any, of_rows: tuple[Tensor | None, ...], for_bias: Tensor) -> None:
        """One program for each block of bias and share of what meets it: a sum in two steps."""
        tiling = self._tiling(kernel)
        shape = (*for_bias.shape[:2], self.n, self.m)
        tiles = shape[0] * shape[1]
        tiles *= triton.cdiv(self.n, tiling.queries) * triton.cdiv(self.m, tiling.keys)
        turns = (self.batch // shape[0]) * (self.heads // shape[1])
        shares = min(turns, triton.cdiv(_PROGRAMS, tiles))
        direct = shares == 1 and shape == for_bias.shape
        sums = for_bias if direct else for_bias.new_empty((shares, *shape), dtype=torch.float32)
        self._launch(kernel, tiles * shares, tiling, (of_rows, sums, shares, turns, shape[1]))
        if not direct:
            for_bias.copy_(sums.sum(0).sum_to_size(for_bias.shape))

    def delta(self, grad: Tensor, out: Tensor, delta: Tensor) -> None:
        """δ of each row, from dO and O."""
        queries = min(64, 4096 // padded(self.size))
        with _on(self.device):
            _backward_delta[(self.batch * self.heads * triton.cdiv(self.n, queries),)](
                grad,
                grad.stride()[:3],
                out,
                out.stride()[:3],
                delta,
                self.heads,
                self.n,
                self.size,
                padded(self.size),
                queries,
            )

    def _tiling(self, kernel: Any) -> Tiling:
        biased = self.inputs[4][0] is not None
        return tiling(str(kernel.__name__), self.size, self.dtype, biased, self.precision)

    def _launch(self, kernel: Any, programs: int, tiling: Tiling, own: Sequence[Any]) -> None:
        with _on(self.device):
            kernel[(programs,)](
                *self.inputs,
                *own,
                self.period,
                self.scale,
                self.heads,
                self.n,
                self.m,
                self.size,
                padded(self.size),
                tiling.queries,
                tiling.keys,
                self.precision,
                **_options(tiling),
            )


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill ``out`` with O and ``lse``, +∞ in a row that is masked entirely."""
    call = _Call((q, None, None), (k, v, None, None), (bias, None), scale)
    call.over_queries(_forward, out, lse)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    for_q: Tensor | None,
    for_k: Tensor | None,
    for_v: Tensor | None,
    for_bias: Tensor | None,
) -> None:
    """Fill those of the last four that are not None."""
    call = _Call((q, grad, None), (k, v, None, None), (bias, None), scale)
    delta = torch.empty_like(lse)
    of_rows = (lse, None, delta, None)
    call.delta(grad, out, delta)
    if for_q is not None:
        call.over_queries(_backward_queries, of_rows, for_q, _pitch(for_q))
    if for_k is not None or for_v is not None:
        call.over_keys(_backward_keys, of_rows, for_k, for_v, _pitch(for_k, for_v))
    if for_bias is not None:
        call.over_bias(_backward_bias, of_rows, for_bias)


def double_backward(
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
    for_grad: Tensor | None,
    for_q: Tensor | None,
    for_k: Tensor | None,
    for_v: Tensor | None,
    for_bias: Tensor | None,
) -> None:
    """Fill those of the last five that are not None."""
    call = _Call((q, grad, aq), (k, v, ak, av), (bias, abias), scale)
    tau, delta, rho = (torch.empty_like(lse) for _ in range(3))
    call.over_queries(_double_statistics, (lse, None, None, None), tau, delta, rho)
    of_rows = (lse, tau, delta, rho)
    if for_grad is not None or for_q is not None:
        call.over_queries(_double_queries, of_rows, for_grad, for_q, _pitch(for_q))
    if for_k is not None or for_v is not None:
        call.over_keys(_double_keys, of_rows, for_k, for_v, _pitch(for_k, for_v))
    if for_bias is not None:
        call.over_bias(_double_bias, of_rows, for_bias)
