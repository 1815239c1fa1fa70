"""Scaled dot-product attention with forward, backward and double backward, block by block."""

from gn_kernels.attention.op import (
    AttentionFunction,
    PackedAttentionFunction,
    apply,
    apply_packed,
    as_raw,
    check,
)

__all__ = [
    "AttentionFunction",
    "PackedAttentionFunction",
    "apply",
    "apply_packed",
    "as_raw",
    "check",
]
