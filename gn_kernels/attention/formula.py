"""Attention in plain PyTorch: specification, oracle, fallback, and what compilers trace.

With S = scale·QKᵀ + bias and P = softmax(S), row by row:

* forward: O = PV;
* backward, from dO: dP = dO·Vᵀ, δ = rowsum(P∘dP), dS = P∘(dP − δ); then dQ = scale·dS·K,
  dK = scale·dSᵀ·Q, dV = Pᵀ·dO, and bias gets dS, summed over what was broadcast;
* double backward, from the cotangents aQ, aK, aV, aB of those four:
  T = scale·(aQ·Kᵀ + Q·aKᵀ) + aB, τ = rowsum(P∘T), U = dO·aVᵀ; the cotangents of dP, P and S are
  G = P∘(T − τ), aP = T∘(dP − δ) − τ·dP + U and aS = P∘(aP − ρ), with ρ = rowsum(P∘aP). Then
  dO gets G·V + P·aV, Q gets scale·(aS·K + dS·aK), K gets scale·(aSᵀ·Q + dSᵀ·aQ), V gets Gᵀ·dO,
  and bias gets aS, summed.

All that lies between the inputs and the one rounding of a result is float32 (float64 for float64).
A row that is masked entirely (S = −∞) has P = 0, as in PyTorch's ``scaled_dot_product_attention``.

q is (batch, heads, N, d), k and v are (batch, heads, M, d). bias is (period, heads or 1, N or 1,
M or 1), where period divides batch, and element b of the batch meets ``bias[b % period]``.

``FORMULA`` has q, k, v and bias as inputs; ``PACKED`` has qkv, (3, batch, heads, N, d), and bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gn_kernels.autograd import Gradients, Orders

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a result is computed in before its one rounding: float32, or float64 for itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def _spread(bias: Tensor, batch: int) -> Tensor:
    # bias for every element of the batch; no copy where its period is 1 or the whole batch.
    period = bias.shape[0]
    if period in (1, batch):
        return bias
    repeated = bias.unsqueeze(0).expand(batch // period, *bias.shape)
    return repeated.reshape(batch, *bias.shape[1:])


def collect(scores: Tensor, bias: Tensor) -> Tensor:
    """The transpose of broadcasting bias to the scores: their sum to its shape"""
    period = bias.shape[0]
    if period != scores.shape[0]:
        scores = scores.reshape(-1, period, *scores.shape[1:]).sum(0)
    return scores.sum_to_size(bias.shape)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = (q * scale) @ k.mT
    return scores if bias is None else scores + _spread(_wide(bias), q.shape[0])


def _softmax(scores: Tensor, maskable: bool) -> Tensor:
    if not maskable:
        return scores.softmax(-1)
    # Filled before and after, so that autograd meets no 0·NaN in a row that is masked entirely.
    masked = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)


def _rowsum(scores: Tensor) -> Tensor:
    return scores.sum(-1, keepdim=True)


def _sum(*terms: Tensor | None) -> Tensor | None:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def _rounded(dtype: torch.dtype, *results: Tensor | None) -> Gradients:
    return tuple(None if result is None else result.to(dtype) for result in results)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """O = softmax(scale·QKᵀ + bias)·V"""
    dtype = q.dtype
    q, k, v = map(_wide, (q, k, v))
    return (_softmax(_scores(q, k, bias, scale), bias is not None) @ v).to(dtype)


def log_sum_exp(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Of each row of S; +∞ where the row is masked entirely, so that P is exp(S − lse) there too"""
    lse = _scores(_wide(q), _wide(k), bias, scale).logsumexp(-1)
    return lse.masked_fill(lse == -math.inf, math.inf)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool, bool],
) -> Gradients:
    """For q, k, v and bias; None for what is not wanted"""
    dtype = q.dtype
    grad, q, k, v = map(_wide, (grad, q, k, v))
    p = _softmax(_scores(q, k, bias, scale), bias is not None)
    for_q = for_k = for_bias = None
    if wanted[0] or wanted[1] or wanted[3]:
        dp = grad @ v.mT
        ds = p * (dp - _rowsum(p * dp))
        for_q = ds @ k * scale if wanted[0] else None
        for_k = ds.mT @ q * scale if wanted[1] else None
        for_bias = collect(ds, bias) if bias is not None and wanted[3] else None
    for_v = p.mT @ grad if wanted[2] else None
    return _rounded(dtype, for_q, for_k, for_v, for_bias)


def double_backward(
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> Gradients:
    """For grad, q, k, v and bias; None for what is not wanted, and for what is zero by form"""
    dtype = q.dtype
    grad, q, k, v = map(_wide, (grad, q, k, v))
    aq, ak, av, ab = (None if one is None else _wide(one) for one in cotangents)
    p = _softmax(_scores(q, k, bias, scale), bias is not None)
    t = _sum(
        None if aq is None else (aq * scale) @ k.mT,
        None if ak is None else (q * scale) @ ak.mT,
        None if ab is None else _spread(ab, q.shape[0]),
    )
    g = tau = None
    if t is not None:
        tau = _rowsum(p * t)
        g = p * (t - tau)

    for_grad = for_q = for_k = for_v = for_bias = None
    if wanted[0]:
        for_grad = _sum(None if g is None else g @ v, None if av is None else p @ av)
    if wanted[1] or wanted[2] or wanted[4]:
        dp = grad @ v.mT
        centred = dp - _rowsum(p * dp)
        ap = _sum(
            None if t is None or tau is None else t * centred - tau * dp,
            None if av is None else grad @ av.mT,
        )
        if ap is not None:
            as_, ds = p * (ap - _rowsum(p * ap)), p * centred
            if wanted[1]:
                for_q = scale * (as_ @ k if ak is None else as_ @ k + ds @ ak)
            if wanted[2]:
                for_k = scale * (as_.mT @ q if aq is None else as_.mT @ q + ds.mT @ aq)
            if wanted[4] and bias is not None:
                for_bias = collect(as_, bias)
    if wanted[3] and g is not None:
        for_v = g.mT @ grad
    return _rounded(dtype, for_grad, for_q, for_k, for_v, for_bias)


def _forward(inputs: Inputs, options: tuple[float]) -> tuple[Tensor]:
    return (forward(*inputs, *options),)


def _backward(
    wanted: tuple[bool, bool, bool, bool],
    grad: Tensor,
    inputs: Inputs,
    _: object,
    options: tuple[float],
) -> Gradients:
    return backward(grad, *inputs, *options, wanted)


def _double_backward(
    wanted: tuple[bool, bool, bool, bool, bool],
    cotangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    grad: Tensor,
    inputs: Inputs,
    _: object,
    options: tuple[float],
) -> Gradients:
    return double_backward(cotangents, grad, *inputs, *options, wanted)


FORMULA = Orders(_forward, _backward, _double_backward)


def _stacked(like: Tensor, *parts: Tensor | None) -> Tensor | None:
    # Gradients of q, k and v as one of qkv; None is a gradient of 0.
    if all(part is None for part in parts):
        return None
    return torch.stack([torch.zeros_like(like[0]) if part is None else part for part in parts])


def _packed_forward(
    inputs: tuple[Tensor, Tensor | None], options: tuple[float]
) -> tuple[Tensor, ...]:
    qkv, bias = inputs
    q, k, v = qkv.unbind(0)
    return (forward(q, k, v, bias, *options),)


def _packed_backward(
    wanted: tuple[bool, bool],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    _: object,
    options: tuple[float],
) -> Gradients:
    (qkv, bias), (asked, bias_asked) = inputs, wanted
    q, k, v = qkv.unbind(0)
    *parts, for_bias = backward(grad, q, k, v, bias, *options, (asked, asked, asked, bias_asked))
    return _stacked(qkv, *parts), for_bias


def _packed_double_backward(
    wanted: tuple[bool, bool, bool],
    cotangents: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
    inputs: tuple[Tensor, Tensor | None],
    _: object,
    options: tuple[float],
) -> Gradients:
    (aqkv, abias), (qkv, bias), (grad_asked, asked, bias_asked) = cotangents, inputs, wanted
    aq, ak, av = (None, None, None) if aqkv is None else aqkv.unbind(0)
    q, k, v = qkv.unbind(0)
    mask = (grad_asked, asked, asked, asked, bias_asked)
    for_grad, *parts, for_bias = double_backward(
        (aq, ak, av, abias), grad, q, k, v, bias, *options, mask
    )
    return for_grad, _stacked(qkv, *parts), for_bias


PACKED = Orders(_packed_forward, _packed_backward, _packed_double_backward)
