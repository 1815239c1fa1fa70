"""Scaled dot-product attention with forward, backward and double backward, block by block."""

from gn_kernels.attention.op import AttentionFunction, apply, as_raw, check

__all__ = ["AttentionFunction", "apply", "as_raw", "check"]
