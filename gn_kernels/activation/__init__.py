"""Activations with forward, backward and double backward: gelu, gelu_tanh, silu, quick_gelu."""

from gn_kernels.activation.formula import ACTIVATIONS
from gn_kernels.activation.op import ActivationFunction, apply, check_dtype, check_kind

__all__ = ["ACTIVATIONS", "ActivationFunction", "apply", "check_dtype", "check_kind"]
