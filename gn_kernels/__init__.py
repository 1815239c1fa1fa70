"""Fused kernels for differentiating Vision Transformers twice.

``import gn_kernels`` touches no device and needs neither Triton nor a compiler.
"""

from gn_kernels import functional, nn, penalty
from gn_kernels.activation import ActivationFunction
from gn_kernels.attention import AttentionFunction
from gn_kernels.backend import info, use_backend
from gn_kernels.functional import (
    activation,
    attention,
    attention_qkv,
    gelu,
    layer_norm,
    quick_gelu,
    silu,
)
from gn_kernels.layer_norm import LayerNormFunction
from gn_kernels.saving import recompute
from gn_kernels.swap import SwapReport, swap
from gn_kernels.version import __version__

__all__ = [
    "ActivationFunction",
    "AttentionFunction",
    "LayerNormFunction",
    "SwapReport",
    "__version__",
    "activation",
    "attention",
    "attention_qkv",
    "functional",
    "gelu",
    "info",
    "layer_norm",
    "nn",
    "penalty",
    "quick_gelu",
    "recompute",
    "silu",
    "swap",
    "use_backend",
]
