"""Modules with the constructors and state dicts of ``torch.nn``, over ``gn_kernels.functional``."""

from __future__ import annotations

from torch import Tensor, nn

from gn_kernels import functional


class GELU(nn.Module):
    """:class:`torch.nn.GELU` over :func:`gn_kernels.gelu`.

    Args:
        approximate: ``"none"`` for x·Φ(x), ``"tanh"`` for its tanh form.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(nn.Module):
    """:class:`torch.nn.SiLU` over :func:`gn_kernels.silu`.

    Args:
        inplace: accepted for the sake of code that passes it. The result is always a new tensor:
            a second derivative needs the input.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input)


class QuickGELU(nn.Module):
    """CLIP's x·σ(1.702·x) over :func:`gn_kernels.quick_gelu`.

    Args:
        inplace: as for :class:`SiLU`.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` over :func:`gn_kernels.layer_norm`.

    A subclass, so that code that treats ``torch.nn.LayerNorm`` apart (weight decay, initial
    values) treats it alike; same constructor, same state dict.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
