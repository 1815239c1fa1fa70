"""Attention on GPU without Triton: PyTorch's matrix products around csrc/cuda's softmax kernels.

    gn_kernels::softmax_forward.native          fills P and the log-sum-exp of each row
    gn_kernels::softmax_backward.native         fills P and dS
    gn_kernels::softmax_double_backward.native  fills P, G, dS and aS

of S = scale·products + bias, with the names of ``formula.py``; inputs that may be None count as 0,
results that are None are not computed. Tensors of size N×M are stored in the dtype of q, so that
memory and accuracy are those of plain PyTorch; but each order passes over them once, between the
products. A row of scores is read once while it has at most 2048 keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gn_kernels.attention import formula

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


def _product(a: Tensor, b: Tensor, factor: float = 1.0, plus: Tensor | None = None) -> Tensor:
    # plus + factor·a·b, the factor before the rounding: products in fp16 overflow without it.
    shape = (*a.shape[:2], a.shape[2], b.shape[3])
    start = a.new_empty(()) if plus is None else plus.flatten(0, 1)
    beta = 0 if plus is None else 1
    out = torch.baddbmm(start, a.flatten(0, 1), b.flatten(0, 1), beta=beta, alpha=factor)
    return out.view(shape)


def _empty_where(asked: bool, like: Tensor) -> Tensor | None:
    return torch.empty_like(like) if asked else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill ``out`` with O and ``lse``, +∞ in a row that is masked entirely."""
    scores = _product(q, k.mT, scale)
    p = torch.empty_like(scores)
    _ops.softmax_forward.native(scores, bias, 1.0, p, lse)
    out.copy_(_product(p, v))


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
    scores = _product(q, k.mT, scale)
    of_scores = any(one is not None for one in (for_q, for_k, for_bias))
    p = _empty_where(for_v is not None, scores)
    ds = _empty_where(of_scores, scores)
    dp = _product(grad, v.mT) if of_scores else None
    _ops.softmax_backward.native(scores, bias, 1.0, lse, dp, p, ds)
    if p is not None and for_v is not None:
        for_v.copy_(_product(p.mT, grad))
    if ds is not None:
        if for_q is not None:
            for_q.copy_(_product(ds, k, scale))
        if for_k is not None:
            for_k.copy_(_product(ds.mT, q, scale))
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
    scores = _product(q, k.mT, scale)
    t = None if aq is None else _product(aq, k.mT, scale)
    if ak is not None:
        t = _product(q, ak.mT, scale, plus=t)
    u = None if av is None else _product(grad, av.mT)
    of_scores = any(one is not None for one in (for_q, for_k, for_bias))
    dp = _product(grad, v.mT) if of_scores else None
    has_t = t is not None or abias is not None
    p = _empty_where(for_grad is not None and av is not None, scores)
    g = _empty_where(has_t and (for_grad is not None or for_v is not None), scores)
    of_ds = (for_q is not None and ak is not None) or (for_k is not None and aq is not None)
    ds = _empty_where(of_ds, scores)
    for_s = _empty_where(of_scores, scores)
    _ops.softmax_double_backward.native(
        *(scores, bias, 1.0, lse, dp, t, abias, u),
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
            total = _product(a, b, factor, plus=total)
    if total is None:
        target.zero_()
    else:
        target.copy_(total)
