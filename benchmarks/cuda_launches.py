"""What csrc/cuda launches the kernels over rows with: tiling, arguments, grid and block.

In step with the host code of layer_norm.cu and softmax.cu, for whoever runs or reads these kernels
without a GPU. A tensor is known by its address, one that is absent has none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_bool, c_double, c_float, c_int, c_int64, c_uint32, c_uint64
from typing import Any, NamedTuple

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_DTYPES = tuple(SIZES)  # in the order of csrc/types.h
ROWS_OF_WARPS = 4
LAYER_NORM_ELEMENTS = 8  # of each tensor that a thread holds
_LEAST_PART, _THREADS_OF_PARTS = 4, 128  # of scores: threads of a row, and of a block
_WARP, _VECTOR_BYTES = 32, 16
_MAX_GRID = 16 * 132 * 16
_LAYER_NORM_THREADS, _SOFTMAX_THREADS = 512, 256  # of a row, at most
_WALKERS = 4  # blocks for each multiprocessor
_COLUMN_THREADS, _ROW_THREADS = 8, 32  # of column_sums


class RowTiling(ctypes.Structure):
    """Of indices.h."""

    _fields_ = (
        ("n", c_int),
        ("threads", c_int),
        ("together", c_int),
        ("chunks", c_int),
        ("vectors", c_bool),
    )


class Parameter(ctypes.Structure):
    """Of rows.cuh."""

    _fields_ = (("data", c_uint64), ("is_wide", c_bool))


class Divider(ctypes.Structure):
    """Of indices.h."""

    _fields_ = (
        ("divisor", c_uint32),
        ("factor", c_uint32),
        ("first", c_int),
        ("second", c_int),
    )

    @classmethod
    def by(cls, divisor: int) -> Divider:
        """For a divisor below 2³²."""
        log = (divisor - 1).bit_length()
        factor = (((1 << log) - divisor << 32) // divisor + 1) % (1 << 32)
        return cls(divisor, factor, min(log, 1), log - min(log, 1))


class Scores(ctypes.Structure):
    """Of indices.h."""

    _fields_ = (
        ("rows", c_uint32),
        ("pitch", c_uint32),
        ("last", c_uint32 * 4),
        ("n", Divider),
        ("heads", Divider),
        ("period", Divider),
    )


class SoftmaxBias(ctypes.Structure):
    """Of kernels.h."""

    _fields_ = (
        ("data", c_uint64),
        ("element", c_int64),
        ("head", c_int64),
        ("query", c_int64),
        ("key", c_int64),
        ("vectors", c_bool),
    )


class Launch(NamedTuple):
    """A kernel with what it is launched with.

    Attributes:
        kernel: function, dtype, and the other values of its template.
        arguments: in order, as ctypes has them.
        tensors: the names of those that it reads or writes.
    """

    kernel: tuple[str, str, tuple[int, ...]]
    arguments: tuple[Any, ...]
    grid: tuple[int, int]
    block: tuple[int, int]
    tensors: tuple[str, ...]


def tiling_of(n: int, elements: int, lanes: int, is_aligned: bool, most_threads: int) -> RowTiling:
    """Of indices.h."""
    threads = min(-(-n // (elements * _WARP)) * _WARP, most_threads)
    together = ROWS_OF_WARPS if threads == _WARP else 1
    return RowTiling(
        n, threads, together, -(-n // (threads * elements)), is_aligned and n % lanes == 0
    )


def _aligned(*addresses: int) -> bool:
    return all(address % _VECTOR_BYTES == 0 for address in addresses)


def _groups(t: RowTiling, rows: int) -> int:
    return -(-rows // t.together)


class LayerNorm(NamedTuple):
    """A call of layer_norm.cu, on a GPU of so many multiprocessors."""

    dtype: str
    parameter_dtype: str
    rows: int
    length: int
    processors: int

    def launches(
        self, order: str, at: Mapping[str, int], eps: float = 1e-6, grid: int = 0
    ) -> list[Launch]:
        """Those of an order.

        Args:
            order: forward, backward or double_backward.
            at: the addresses of x, weight, bias, y, mean, rstd; of grad, for_x, for_weight,
                for_bias, partials; of v, u, t, for_grad.
            eps: of the forward pass.
            grid: blocks at most, fewer than the launch code takes.
        """
        walks = order != "forward" and ("for_weight" in at or "for_bias" in at)
        reads, writes = {
            "forward": (("x", "weight", "bias"), ("y", "mean", "rstd")),
            "backward": (("grad", "x", "weight", "mean", "rstd"), ("for_x",)),
            "double_backward": (
                ("v", "u", "t", "grad", "x", "weight", "mean", "rstd"),
                ("for_grad", "for_x"),
            ),
        }[order]
        tensors = (*reads, *writes, *(("partials",) if walks else ()))
        rows_of = [one for one in tensors if one not in ("mean", "rstd")]
        t = self._tiling(_aligned(*(at.get(one, 0) for one in rows_of)))
        blocks = _groups(t, self.rows)
        blocks = min(blocks, grid or (_WALKERS * self.processors if walks else _MAX_GRID))
        count = blocks * t.together

        def pointer(name: str) -> c_uint64:
            return c_uint64(at.get(name, 0))

        def parameter(name: str) -> Parameter:
            return Parameter(at.get(name, 0), self._is_wide)

        wide = c_double if self.dtype == "float64" else c_float
        partials = at.get("partials", 0)
        after = count * self.length * ctypes.sizeof(wide)
        for_weight = c_uint64(partials if walks and "for_weight" in at else 0)
        for_bias = c_uint64(
            partials + ("for_weight" in at) * after if walks and "for_bias" in at else 0
        )
        arguments: tuple[Any, ...] = {
            "forward": (
                *(pointer("x"), parameter("weight"), parameter("bias")),
                *(pointer("y"), pointer("mean"), pointer("rstd"), wide(eps)),
            ),
            "backward": (
                *(pointer("grad"), pointer("x"), parameter("weight")),
                *(pointer("mean"), pointer("rstd"), pointer("for_x"), for_weight, for_bias),
            ),
            "double_backward": (
                *(pointer("v"), parameter("u"), parameter("t"), pointer("grad"), pointer("x")),
                *(parameter("weight"), pointer("mean"), pointer("rstd")),
                *(pointer("for_grad"), pointer("for_x"), for_weight),
            ),
        }[order]
        kind = 0 if not t.vectors or t.chunks > 1 else 1 if t.threads == _WARP else 2
        template: tuple[bool, ...] = ()
        if order == "backward":
            template = (walks or kind == 0,)
        elif order == "double_backward":
            template = ("u" in at,)
        found = [
            Launch(
                (order, self.dtype, (*map(int, template), kind)),
                (*arguments, c_int64(self.rows), t),
                (blocks, 1),
                (t.threads, t.together),
                tuple(one for one in tensors if one in at),
            )
        ]
        if walks:
            found.append(self._column_sums(order, at, count))
        return found

    def _column_sums(self, order: str, at: Mapping[str, int], count: int) -> Launch:
        wide = "float64" if self.dtype == "float64" else "float32"
        lanes = _VECTOR_BYTES // SIZES[wide]
        sums = ["for_weight", "for_bias"] if order == "backward" else ["for_weight"]
        sums = [one for one in sums if one in at]
        partials = at["partials"]
        return Launch(
            ("column_sums", wide, ()),
            (
                *(c_uint64(partials), c_int(count), c_int(self.length)),
                c_bool(_aligned(partials) and self.length % lanes == 0),
                *(c_uint64(at[sums[0]]), c_uint64(at["for_bias"] if "for_bias" in sums else 0)),
                c_int(_DTYPES.index(self.parameter_dtype)),
            ),
            (-(-self.length // (_COLUMN_THREADS * lanes)), len(sums)),
            (_COLUMN_THREADS, _ROW_THREADS),
            ("partials", *sums),
        )

    @property
    def _is_wide(self) -> bool:
        return self.dtype in ("float32", "float64") or self.parameter_dtype != self.dtype

    def _tiling(self, is_aligned: bool) -> RowTiling:
        size = SIZES[self.dtype]
        threads = _LAYER_NORM_THREADS // (2 if size == 8 else 1)
        return tiling_of(
            self.length, LAYER_NORM_ELEMENTS, _VECTOR_BYTES // size, is_aligned, threads
        )


class SoftmaxRows(NamedTuple):
    """A call of softmax.cu."""

    dtype: str
    shape: tuple[int, int, int, int]  # batch, heads, queries, keys
    scale: float = 1.0
    period: int = 1  # elements of bias
    pitch: int = 0  # elements from row to row, as padded() has them

    def padded(self) -> SoftmaxRows:
        """With rows as native_cuda.py allocates them: at multiples of 16 bytes."""
        return self._replace(pitch=-(-self.shape[3] // self._lanes) * self._lanes)

    def launch(
        self,
        order: str,
        at: Mapping[str, int],
        strides: tuple[int, int, int, int] = (0, 0, 0, 0),
        grid: int = 0,
    ) -> Launch:
        """That of an order.

        Args:
            order: forward, backward or double_backward.
            at: the addresses of products, bias, probabilities, log_sums; of dp, ds; of
                t_products, t_bias, u, g, as.
            strides: of bias and t_bias.
            grid: blocks at most, fewer than the launch code takes.
        """
        reads, writes = {
            "forward": (("products",), ("probabilities",)),
            "backward": (("products", "dp"), ("probabilities", "ds")),
            "double_backward": (
                ("products", "dp", "t_products", "u"),
                ("probabilities", "g", "ds", "as"),
            ),
        }[order]
        batch, heads, n, length = self.shape
        rows = batch * heads * n
        part, t = self._tiling(_aligned(*(at.get(one, 0) for one in (*reads, *writes))))

        def pointer(name: str) -> c_uint64:
            return c_uint64(at.get(name, 0))

        def bias(name: str) -> SoftmaxBias:
            if name not in at:
                return SoftmaxBias()
            *others, key = strides
            vectors = t.vectors and key == 1 and _aligned(at[name])
            vectors = vectors and all(one % self._lanes == 0 for one in others)
            vectors = vectors and (length % self._lanes == 0 or any(others))
            return SoftmaxBias(at[name], *strides, vectors)

        log_sums = pointer("log_sums")
        arguments: tuple[Any, ...] = {
            "forward": (pointer("products"), bias("bias"), pointer("probabilities"), log_sums),
            "backward": (
                *(pointer("products"), bias("bias"), log_sums, pointer("dp")),
                *(pointer("probabilities"), pointer("ds")),
            ),
            "double_backward": (
                *(pointer("products"), bias("bias"), log_sums, pointer("dp")),
                *(pointer("t_products"), bias("t_bias"), pointer("u")),
                *(pointer("probabilities"), pointer("g"), pointer("ds"), pointer("as")),
            ),
        }[order]
        ends = length % self._lanes * SIZES[self.dtype]  # bytes of a vector that holds a row's end
        bits = (1 << 8 * ends) - 1
        scores = Scores(
            *(rows, self.pitch or length),
            (c_uint32 * 4)(*(bits >> 32 * word & 0xFFFFFFFF for word in range(4))),
            *(Divider.by(one) for one in (n, heads, self.period)),
        )
        scale = (c_double if self.dtype == "float64" else c_float)(self.scale)
        names = (*reads, *writes, "bias", "t_bias", "log_sums")
        return Launch(
            (order, self.dtype, (part,)),
            (*arguments, scale, scores, t),
            (_groups(t, rows) if part else min(_groups(t, rows), grid or _MAX_GRID), 1),
            (t.threads, t.together),
            tuple(one for one in names if one in at),
        )

    @property
    def _lanes(self) -> int:
        return _VECTOR_BYTES // SIZES[self.dtype]

    def _tiling(self, is_aligned: bool) -> tuple[int, RowTiling]:
        """With the threads of a part of a warp, or 0."""
        length, elements = self.shape[3], 4 if self.dtype == "float64" else 8
        vectors = is_aligned and (self.pitch or length) % self._lanes == 0
        t = tiling_of(length, elements, self._lanes, vectors, _SOFTMAX_THREADS)
        t.vectors = vectors
        part = _LEAST_PART
        while part < _WARP and part * 2 * elements < length:
            part *= 2
        if not vectors or not part * elements < length <= part * 2 * elements:
            return 0, t
        return part, RowTiling(length, part, _THREADS_OF_PARTS // part, 1, True)
