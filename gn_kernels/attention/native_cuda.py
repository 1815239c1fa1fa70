"""Attention on GPU without Triton: PyTorch's matrix products around csrc/cuda's softmax kernels.

    gn_kernels::softmax_forward.native          fills P and the log-sum-exp of each row
    gn_kernels::softmax_backward.native         fills P and dS
    gn_kernels::softmax_double_backward.native  fills P, G, dS and aS

of S = scale·products + bias, with the names of ``formula.py``; inputs that may be None count as 0,
results that are None are not computed. Tensors of size N×M are stored in the dtype of q, so that
memory and accuracy are those of plain PyTorch; but each order passes over them once, between the
products. A row of scores is read once while it has at most 2048 keys.

Their rows begin at multiples of 16 bytes, also where there are 197 or 49 keys: the softmax kernels
then read and write 16 bytes at a time, as BLAS does. What lies between two rows is in no result,
and may be overwritten. The ops take contiguous scores too, but read them one by one, unless a row
is a multiple of 16 bytes by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gn_kernels.attention import formula

_ROW_BYTES = 16  # the widest access that a thread can make

_SCORES = "Tensor products, Tensor? bias, float scale"
_SCHEMAS = {
    "softmax_forward": f"({_SCORES}, Tensor(a!) probabilities, Tensor(b!) log_sums) -> ()",
    "softmax_backward": (
        f"({_SCORES}, Tensor log_sums, Tensor? dp, Tensor(a!)? probabilities, Tensor(b!)? ds) -> ()"
    ),
    "softmax_double_backward": (
        f"({_SCORES}, Tensor log_sums, Tensor? dp, Tensor? t_products, Tensor? t_bias, Tensor? u,"
        " Tensor(a!)? probabilities, Tensor(b!)? g, Tensor(c!)? ds, Tensor(d!)? for_s) -> ()"
    ),
}

_library = torch.library.Library("gn_kernels", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _library.define(f"{_name}.native{_schema}")

_ops = torch.ops.gn_kernels


def _padded(shape: Sequence[int], like: Tensor) -> Tensor:
    # Rows at multiples of 16 bytes, with nothing in them yet.
    *rows, m = shape
    lanes = _ROW_BYTES // like.element_size()
    return like.new_empty(*rows, -(-m // lanes) * lanes)[..., :m]


def _product(a: Tensor, b: Tensor, factor: float, into: Tensor, add: bool = False) -> Tensor:
    # factor·a·b, the factor before the rounding: products in fp16 overflow without it.
    out = into.flatten(0, 1)  # a view: BLAS takes any distance from row to row
    out.baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=int(add), alpha=factor)
    return into


def _scores(a: Tensor, b: Tensor, factor: float = 1.0, plus: Tensor | None = None) -> Tensor:
    # factor·a·bᵀ, added to `plus` where that is given.
    if plus is not None:
        return _product(a, b.mT, factor, plus, add=True)
    return _product(a, b.mT, factor, _padded((*a.shape[:3], b.shape[2]), a))


def _rows(a: Tensor, b: Tensor, factor: float = 1.0, plus: Tensor | None = None) -> Tensor:
    # factor·a·b of scores a, likewise.
    if plus is not None:
        return _product(a, b, factor, plus, add=True)
    return _product(a, b, factor, b.new_empty(*a.shape[:3], b.shape[3]))


def _empty_where(asked: bool, like: Tensor) -> Tensor | None:
    return _padded(like.shape, like) if asked else None


def _aligned(bias: Tensor | None, scores: Tensor) -> Tensor | None:
    # With rows at multiples of 16 bytes, if a copy is small beside the scores. To copy a larger one
    # takes longer than what it saves: where that has rows of 49, its elements are read one by one.
    if bias is None or bias.shape[3] == 1 or 4 * bias.numel() > scores.numel():
        return bias
    lanes = _ROW_BYTES // bias.element_size()
    strides = [s for n, s in zip(bias.shape, bias.stride(), strict=True) if n > 1]
    if strides[-1] == 1 and all(s % lanes == 0 for s in strides[:-1]):
        return bias
    return _padded(bias.shape, bias).copy_(bias)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill ``out`` with O and ``lse``, +∞ in a row that is masked entirely."""
    scores = _scores(q, k, scale)
    p = _padded(scores.shape, scores)
    _ops.softmax_forward.native(scores, _aligned(bias, scores), 1.0, p, lse)
    out.copy_(_rows(p, v))


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
    scores = _scores(q, k, scale)
    of_scores = any(one is not None for one in (for_q, for_k, for_bias))
    p = _empty_where(for_v is not None, scores)
    ds = _empty_where(of_scores, scores)
    dp = _scores(grad, v) if of_scores else None
    _ops.softmax_backward.native(scores, _aligned(bias, scores), 1.0, lse, dp, p, ds)
    if p is not None and for_v is not None:
        for_v.copy_(_rows(p.mT, grad))
    if ds is not None:
        if for_q is not None:
            for_q.copy_(_rows(ds, k, scale))
        if for_k is not None:
            for_k.copy_(_rows(ds.mT, q, scale))
        if for_bias is not None:
            for_bias.copy_(formula.collect(ds, for_bias))


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
    scores = _scores(q, k, scale)
    t = None if aq is None else _scores(aq, k, scale)
    if ak is not None:
        t = _scores(q, ak, scale, plus=t)
    u = None if av is None else _scores(grad, av)
    of_scores = any(one is not None for one in (for_q, for_k, for_bias))
    dp = _scores(grad, v) if of_scores else None
    has_t = t is not None or abias is not None
    p = _empty_where(for_grad is not None and av is not None, scores)
    g = _empty_where(has_t and (for_grad is not None or for_v is not None), scores)
    of_ds = (for_q is not None and ak is not None) or (for_k is not None and aq is not None)
    ds = _empty_where(of_ds, scores)
    for_s = _empty_where(of_scores, scores)
    _ops.softmax_double_backward.native(
        *(scores, _aligned(bias, scores), 1.0, lse, dp, t, _aligned(abias, scores), u),
        *(p, g, ds, for_s),
    )
    _fill_sum(for_grad, 1.0, (g, v), (p, av))
    _fill_sum(for_q, scale, (for_s, k), (ds, ak))
    _fill_sum(for_k, scale, (_transposed(for_s), q), (_transposed(ds), aq))
    _fill_sum(for_v, 1.0, (_transposed(g), grad))
    if for_bias is not None and for_s is not None:
        for_bias.copy_(formula.collect(for_s, for_bias))


def _transposed(scores: Tensor | None) -> Tensor | None:
    return None if scores is None else scores.mT


def _fill_sum(
    target: Tensor | None, factor: float, *pairs: tuple[Tensor | None, Tensor | None]
) -> None:
    # The sum of the products of those pairs that are there.
    if target is None:
        return
    total = None
    for a, b in pairs:
        if a is not None and b is not None:
            total = _rows(a, b, factor, plus=total)
    if total is None:
        target.zero_()
    else:
        target.copy_(total)
