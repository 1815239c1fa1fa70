"""Layer normalisation with forward, backward and double backward."""

from gn_kernels.layer_norm.op import LayerNormFunction, apply, check, check_tensor

__all__ = ["LayerNormFunction", "apply", "check", "check_tensor"]
