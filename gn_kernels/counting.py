"""Counts what a step does, on meta tensors or real ones: bytes, kernel calls, FLOP and memory.

Every call of an operation counts with the bytes of its tensor inputs and outputs; views and
allocations are free. A raw op of gn_kernels is one call. Matrix products, convolutions and
attention (the products inside the kernel and what it recomputes) count their FLOP by the formulas
that are registered in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ALLOCATIONS = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


class Machine(NamedTuple):
    """What a GPU is assumed to sustain."""

    name: str
    bytes_s: float
    flop_s: float


# 90 % of the memory bandwidth (2.04, 3.35, 8.0 TB/s) and 66 % of the dense bf16 rate (312, 989,
# 2,250 TFLOP/s) that the vendor states for the SXM form.
MACHINES = (
    Machine("A100", 1.8e12, 205e12),
    Machine("H100", 3.0e12, 650e12),
    Machine("B200", 7.2e12, 1480e12),
)

ASSUMPTIONS = (
    "each call takes the longer of its bytes at the memory's rate and its FLOP at the rate of the "
    "matrix units; no launch costs, no overlap; assumed is 90 % of the memory bandwidth and 66 % "
    "of the dense bf16 rate that the vendor states: "
) + "; ".join(
    f"{machine.name}: {machine.bytes_s / 1e12:.1f} TB/s, {machine.flop_s / 1e12:,.0f} TFLOP/s"
    for machine in MACHINES
)


class Op(NamedTuple):
    """One call of a kernel."""

    name: str
    bytes: int
    flop: int


class Counter(TorchDispatchMode):
    """Counts every operation that runs inside the context.

    Attributes:
        ops: the calls, in order.
        live: bytes of the storages that were allocated inside and are alive now.
        peak: the largest ``live`` so far. What a kernel allocates for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, kwargs)))
        output = func(*args, **kwargs)
        outputs = list(_tensors(output))
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [one for one in outputs if one.untyped_storage()._cdata not in before]
        for tensor in fresh:
            self._allocated(tensor.untyped_storage())
        packet = func._overloadpacket
        if packet in _ALLOCATIONS or not (fresh or func._schema.is_mutable):
            return output
        formula = flop_registry.get(packet)
        flop = 0 if formula is None else formula(*args, **kwargs, out_val=output)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in inputs + outputs)
        self.ops.append(Op(str(packet), moved, flop))
        return output

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._known:
            return
        self._known.add(identity)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, identity, size)

    def _freed(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size

    @property
    def bytes(self) -> int:
        """Moved by all calls."""
        return sum(op.bytes for op in self.ops)

    @property
    def flop(self) -> int:
        """Of all calls."""
        return sum(op.flop for op in self.ops)

    def seconds(self, machine: Machine) -> float:
        """The roofline model: every call takes the longer of its bytes and its FLOP."""
        return sum(max(op.bytes / machine.bytes_s, op.flop / machine.flop_s) for op in self.ops)

    def seconds_without_product_bytes(self, machine: Machine) -> float:
        """The same, but whatever has FLOP takes the time of its FLOP alone."""
        return sum(
            op.flop / machine.flop_s if op.flop else op.bytes / machine.bytes_s for op in self.ops
        )


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
