"""Runs PTX on the CPU: every thread of some blocks in lockstep, with NumPy.

    kernel = parse(ptx)["name"]
    memory = Memory()
    x, y = memory.put(array), memory.reserve(nbytes)
    traffic = run(kernel, [x, y, n], grid=(3,), threads=128)
    memory.get(y, np.float32)

Each thread has a place in the code. The threads that are furthest back run next, together, so that
those which took different branches meet again where these end; at a shuffle they wait for their
warp. What a GPU leaves undefined or answers with garbage raises instead: an access outside of every
buffer (they lie far apart) or not aligned to its size, a read of what was never written, two
threads at one byte of shared memory without a barrier between, a barrier that some threads never
reach.

Arithmetic is that of IEEE 754: fma rounds once (in float64 within a millionth of an ulp of that).
The approximations (ex2, rcp, rsqrt, sqrt, lg2) are computed exactly and rounded, times a relative
error where one is given; rcp and rsqrt of float64 have no more than 20 bits.

Source: NVIDIA, PTX ISA 8.8, https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_BITS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_WARP = 32
_SHARED_BASE = 1 << 20  # shared addresses are small; global ones begin far above
_PARAMETER_BASE = 1 << 16
_GAP = 40  # buffers are 2⁴⁰ bytes apart


class FaultError(Exception):
    """What a correct kernel never does. The message names instruction, block and thread."""


class OutOfBoundsError(FaultError):
    """An access outside of what was given."""


class MisalignedError(FaultError):
    """An address that is no multiple of the access's size."""


class RaceError(FaultError):
    """Two threads at the same byte of shared memory, without a barrier between them."""


class UninitialisedError(FaultError):
    """A read of what nothing wrote."""


class DeadlockError(FaultError):
    """A barrier that some threads of a block don't reach."""


class UnsupportedError(Exception):
    """PTX that this machine does not know."""


# -- Text ----------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    text: str
    predicate: str | None
    negated: bool
    parts: tuple[str, ...]  # of the opcode, without what changes nothing here
    operands: tuple[str, ...]


@dataclass
class Kernel:
    """One entry of a PTX file."""

    name: str
    parameters: list[tuple[str, int, int]]  # name, bytes, elements of that size (0: no array)
    registers: list[tuple[str, int]]  # prefix, bits; 1 for predicates
    shared: dict[str, tuple[int, int]]  # offset and bytes
    code: list[Instruction]
    labels: dict[str, int]
    shared_bytes: int


_SCALAR_BYTES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2} | {
    kind: int(kind[1:]) // 8 for kind in ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
}
_VARIABLE = re.compile(
    r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;", re.ASCII
)


def parse(ptx: str) -> dict[str, Kernel]:
    """The entries of a PTX file, by name."""
    ptx = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)
    outside = _shared_variables(re.sub(r"\n\{.*?\n\}", "", ptx, flags=re.DOTALL), 0)
    kernels = {}
    for found in re.finditer(
        r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{;]*\n\{(.*?)\n\}", ptx, flags=re.DOTALL
    ):
        name, parameters, body = found.groups()
        kernels[name] = _parse_entry(name, parameters, body, outside)
    return kernels


def _shared_variables(text: str, offset: int) -> dict[str, tuple[int, int]]:
    variables = {}
    for align, kind, name, count in _VARIABLE.findall(text):
        step = int(align or 1)
        offset = -(-offset // step) * step
        size = _SCALAR_BYTES[kind] * (int(count) if count else 0 if "[" in text else 1)
        variables[name] = (offset, size)
        offset += size
    return variables


def _parse_entry(
    name: str, parameters: str, body: str, outside: Mapping[str, tuple[int, int]]
) -> Kernel:
    given = []
    for one in filter(None, (text.strip() for text in parameters.split(","))):
        kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", one)
        what = re.search(r"([\w$]+)(?:\[(\d+)\])?$", one)
        if not kind or not what:
            raise UnsupportedError(one)
        given.append((what[1], _SCALAR_BYTES[kind[1]], int(what[2] or 0)))
    used = max((offset + size for offset, size in outside.values()), default=0)
    shared = dict(outside) | _shared_variables(body, used)
    body = re.sub(r"^\s*\.(loc|file|pragma|section)\b[^\n]*", "", body, flags=re.MULTILINE)
    registers: list[tuple[str, int]] = []
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for chunk in body.split(";"):
        text = chunk.strip()
        while found := re.match(r"[{}]\s*|([\w$]+):\s*", text):
            if found[1]:
                labels[found[1]] = len(code)
            text = text[found.end() :]
        if not text:
            continue
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, flags=re.DOTALL):
            bits = 1 if declared[1] == "pred" else int(declared[1][1:])
            registers += [
                (re.sub(r"<\d+>", "", one.strip()), bits) for one in declared[2].split(",")
            ]
        elif not text.startswith("."):
            code.append(_parse_instruction(" ".join(text.split())))
    total = max((offset + size for offset, size in shared.values()), default=0)
    return Kernel(name, given, registers, shared, code, labels, total)


def _parse_instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(\S+)\s+", text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.partition(" ")
    ignored = ("uni", "volatile", "relaxed", "weak", "gpu", "cta", "sys", "nc", "L1", "sync")
    parts = tuple(
        part
        for part in opcode.replace("::cta", "").split(".")
        if part not in ignored or opcode.startswith(("bar", "barrier"))
    )
    split = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", operands)
    return Instruction(
        text,
        guard[2] if guard else None,
        bool(guard and guard[1]),
        parts,
        tuple(one.strip() for one in split),
    )


# -- Memory --------------------------------------------------------------------------------------


@dataclass
class _Buffer:
    """Bytes [first, first + data.size) of a tensor; the others exist and hold nothing."""

    data: np.ndarray
    first: int
    writes: np.ndarray
    reads: np.ndarray
    written: bool  # whether it had a content from the start


class Memory:
    """Global memory: buffers that lie 2⁴⁰ bytes apart."""

    def __init__(self) -> None:
        self._buffers: dict[int, _Buffer] = {}

    def put(self, array: np.ndarray, misaligned_by: int = 0, first: int = 0) -> int:
        """A copy of an array; its address. ``first`` bytes before it belong to it unseen."""
        data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy()
        return self._add(data, misaligned_by, first, True)

    def reserve(self, nbytes: int, misaligned_by: int = 0, first: int = 0) -> int:
        """Memory that holds nothing yet."""
        return self._add(np.full(nbytes, 0xA5, np.uint8), misaligned_by, first, False)

    def _add(self, data: np.ndarray, misaligned_by: int, first: int, written: bool) -> int:
        base = (len(self._buffers) + 1 << _GAP) + 256 + misaligned_by
        counts = (np.zeros(data.size, np.int32) for _ in range(2))
        self._buffers[base] = _Buffer(data, first, *counts, written)
        return base

    def get(self, address: int, dtype: type) -> np.ndarray:
        """What a buffer holds."""
        return self._buffers[address].data.view(dtype)

    def writes(self, address: int) -> np.ndarray:
        """How often each byte was written."""
        return self._buffers[address].writes

    def reads(self, address: int) -> np.ndarray:
        """How often each byte was read."""
        return self._buffers[address].reads

    def load(self, addresses: np.ndarray, size: int, where: _Where) -> np.ndarray:
        result = np.empty((addresses.size, size), np.uint8)
        for buffer, chosen, places in self._find(addresses, size, where):
            if not buffer.written and not (buffer.writes[places] > 0).all():
                raise UninitialisedError(where.say("reads global memory that nothing wrote"))
            result[chosen] = buffer.data[places]
            np.add.at(buffer.reads, places, 1)
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, where: _Where) -> None:
        for buffer, chosen, places in self._find(addresses, values.shape[1], where):
            buffer.data[places] = values[chosen]
            np.add.at(buffer.writes, places, 1)

    def _find(self, addresses: np.ndarray, size: int, where: _Where):
        wrong = addresses % np.uint64(size) != 0
        if wrong.any():
            address = int(addresses[wrong][0])
            message = f"address {address:#x} is no multiple of {size} bytes"
            raise MisalignedError(where.say(message, np.flatnonzero(wrong)[0]))
        owners = addresses >> np.uint64(_GAP)
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            base = next((b for b in self._buffers if b >> _GAP == int(owner)), None)
            if base is None:
                message = f"address {int(addresses[chosen[0]]):#x} belongs to no buffer"
                raise OutOfBoundsError(where.say(message, chosen[0]))
            buffer = self._buffers[base]
            offsets = addresses[chosen].astype(np.int64) - base - buffer.first
            outside = (offsets < 0) | (offsets + size > buffer.data.size)
            if outside.any():
                message = (
                    f"{size} bytes at offset {int(offsets[outside][0]) + buffer.first} of buffer "
                    f"{int(owner)}, which has bytes {buffer.first} to "
                    f"{buffer.first + buffer.data.size}"
                )
                raise OutOfBoundsError(where.say(message, chosen[np.flatnonzero(outside)[0]]))
            yield buffer, chosen, offsets[:, None] + np.arange(size)


class _Where:
    """Which instruction and threads, for messages."""

    def __init__(self, machine: _Machine, at: int, lanes: np.ndarray) -> None:
        self.machine, self.at, self.lanes = machine, at, lanes

    def say(self, what: str, index: int = 0) -> str:
        block, thread = divmod(int(self.lanes[index]), self.machine.threads)
        block = int(self.machine.blocks[block, 0])
        text = self.machine.kernel.code[self.at].text
        return f"{self.machine.kernel.name}, block {block}, thread {thread}: `{text}` {what}"


@dataclass
class _Shared:
    """Shared memory of each block, and who was at each byte since which barrier."""

    data: np.ndarray
    writer: np.ndarray = field(init=False)  # thread, −1 for none
    reader: np.ndarray = field(init=False)  # likewise, −2 for several
    written_at: np.ndarray = field(init=False)
    read_at: np.ndarray = field(init=False)
    defined: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        shape = self.data.shape
        self.writer, self.reader = (np.full(shape, -1, np.int32) for _ in range(2))
        self.written_at, self.read_at = (np.full(shape, -1, np.int64) for _ in range(2))
        self.defined = np.zeros(shape, bool)

    def places(self, machine: _Machine, addresses: np.ndarray, size: int, where: _Where):
        wrong = addresses % np.uint64(size) != 0
        if wrong.any():
            message = f"shared address is no multiple of {size} bytes"
            raise MisalignedError(where.say(message, np.flatnonzero(wrong)[0]))
        offsets = addresses.astype(np.int64) - _SHARED_BASE
        outside = (offsets < 0) | (offsets + size > self.data.shape[1])
        if outside.any():
            message = (
                f"{size} bytes at {int(offsets[outside][0])} of {self.data.shape[1]} bytes of "
                "shared memory"
            )
            raise OutOfBoundsError(where.say(message, np.flatnonzero(outside)[0]))
        blocks = where.lanes // machine.threads
        return blocks[:, None], offsets[:, None] + np.arange(size)

    def load(self, machine: _Machine, addresses: np.ndarray, size: int, where: _Where):
        at = self.places(machine, addresses, size, where)
        if not self.defined[at].all():
            raise UninitialisedError(where.say("reads shared memory that nothing wrote"))
        me = (where.lanes % machine.threads)[:, None]
        self._check(machine, at, me, self.writer, self.written_at, where, "wrote")
        now = machine.epoch[where.lanes][:, None]
        earlier, since = self.reader[at], self.read_at[at]
        # Two lanes of this very access may read one byte: the last assignment wins, so the first
        # is marked as several below.
        several = (earlier != me) & (earlier != -1) & (since == now)
        self.reader[at] = np.where(several, -2, np.broadcast_to(me, earlier.shape))
        self.read_at[at] = np.broadcast_to(now, earlier.shape)
        shared_by = self.reader[at] != me
        if shared_by.any():
            blocks = np.broadcast_to(at[0], at[1].shape)[shared_by]
            self.reader[blocks, at[1][shared_by]] = -2
        return self.data[at]

    def store(self, machine: _Machine, addresses, values: np.ndarray, where: _Where) -> None:
        at = self.places(machine, addresses, values.shape[1], where)
        me = (where.lanes % machine.threads)[:, None]
        self._check(machine, at, me, self.reader, self.read_at, where, "read")
        same = self.data[at] == values  # writes of the same value harm nobody
        self._check(machine, at, me, self.writer, self.written_at, where, "wrote", same)
        self.data[at] = values
        if not (self.data[at] == values).all():
            raise RaceError(where.say("stores different values of two threads in one place"))
        self.writer[at] = np.broadcast_to(me, values.shape)
        self.written_at[at] = np.broadcast_to(machine.epoch[where.lanes][:, None], values.shape)
        self.defined[at] = True

    def _check(self, machine, at, me, who, since, where, verb, harmless=False) -> None:
        # Barriers of a warp order what its own threads do.
        now = machine.epoch[where.lanes][:, None]
        other = who[at]
        within_warp = (other >= 0) & (other // _WARP == me // _WARP)
        passed = np.where(within_warp, since[at] < now, since[at] >> 20 < now >> 20)
        race = (other != -1) & (other != me) & ~passed & ~np.asarray(harmless)
        if race.any():
            index = np.flatnonzero(race.any(1))[0]
            thread = int(other[index][race[index]][0])
            whom = f"thread {thread}" if thread >= 0 else "several threads"
            message = f"touches shared memory that {whom} {verb} since the last barrier"
            raise RaceError(where.say(message, index))


# -- Arithmetic ----------------------------------------------------------------------------------


def _flush(x: np.ndarray) -> np.ndarray:
    # Subnormal float32 numbers to zeros of their sign.
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _upper_word(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint64) & ~np.uint64(0xFFFFFFFF)
    return np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), bits.view(np.float64))


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c of float32 with one rounding: the sum in float64 rounded to odd, then to float32."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # the product is exact
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.uint64) & np.uint64(1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c of float64, from an exact product in two parts."""

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = (x.view(np.uint64) & ~np.uint64((1 << 27) - 1)).view(np.float64)
        return high, x - high

    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    product = a * b
    (a1, a0), (b1, b0) = split(a), split(b)
    rest = ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    exact = total + (error + rest)
    return np.where(np.isfinite(total) & np.isfinite(exact), exact, total)


def bf16_bits(x: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """float32 to bfloat16, to nearest even or toward zero; its bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounding = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + (bits >> 16 & 1)
    return np.where(np.isnan(x), 0x7FFF, (bits + rounding) >> 16).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_APPROXIMATIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


# -- The machine ---------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """Bytes that threads asked of global memory."""

    read: int
    written: int
    instructions: int  # of all threads


class _Machine:
    def __init__(
        self,
        kernel: Kernel,
        memory: Memory,
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        errors: Mapping[str, float],
    ) -> None:
        self.kernel, self.memory, self.blocks = kernel, memory, blocks
        threads = block[0] * block[1] * block[2]
        self.grid, self.threads, self.errors = grid, threads, errors
        count = len(blocks)
        self.lanes = count * threads
        self.at = np.zeros(self.lanes, np.int64)
        self.waiting = np.zeros(self.lanes, bool)
        self.done = np.zeros(self.lanes, bool)
        # Barriers of the block passed, and in the lower 20 bits those of the warp since.
        self.epoch = np.zeros(self.lanes, np.int64)
        self.registers: dict[str, np.ndarray] = {}
        self.parameters = b""
        self.offsets: dict[str, int] = {}
        shape = (count, kernel.shared_bytes + dynamic_shared)
        self.shared = _Shared(np.zeros(shape, np.uint8))
        self.read = self.written = self.instructions = 0
        thread = np.tile(np.arange(threads), count)
        self.special = {"%laneid": thread % _WARP, "%warpid": thread // _WARP}
        before = 1
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = np.repeat(blocks[:, axis], threads)
            self.special[f"%nctaid.{name}"] = np.full(self.lanes, grid[axis])
            self.special[f"%tid.{name}"] = thread // before % block[axis]
            self.special[f"%ntid.{name}"] = np.full(self.lanes, block[axis])
            before *= block[axis]

    # Registers

    def width(self, name: str) -> int:
        prefixes = [(p, bits) for p, bits in self.kernel.registers if name.startswith(p)]
        fitting = [(p, bits) for p, bits in prefixes if name == p or name[len(p) :].isdigit()]
        if not fitting:
            raise UnsupportedError(f"{self.kernel.name}: register {name} is not declared")
        return max(fitting, key=lambda one: len(one[0]))[1]

    def bits(self, operand: str, width: int) -> np.ndarray:
        """An operand as unsigned integers of a width, or as bool for width 1."""
        if operand.startswith("!"):
            return ~self.bits(operand[1:], 1)
        if operand in self.special:
            return self.special[operand].astype(_BITS[width])
        if operand.startswith("%"):
            if operand not in self.registers:
                raise UninitialisedError(
                    f"{self.kernel.name}: register {operand} is read before it is written"
                )
            value = self.registers[operand]
            return value if width == 1 else value.astype(_BITS[width], copy=False)
        if operand in self.kernel.shared:
            number = _SHARED_BASE + self.kernel.shared[operand][0]
        elif operand in self.offsets:
            number = _PARAMETER_BASE + self.offsets[operand]
        elif operand[:2] in ("0f", "0F", "0d", "0D"):
            number = int(operand[2:], 16)
        elif operand in ("true", "false") or width == 1:
            return np.full(self.lanes, operand in ("true", "1", "-1"))
        else:
            try:
                number = int(operand.rstrip("U"), 0)
            except ValueError:
                raise UnsupportedError(f"{self.kernel.name}: operand {operand}") from None
        return np.full(self.lanes, number & (1 << width) - 1, _BITS[width])

    def value(self, operand: str, kind: str) -> np.ndarray:
        """An operand as numbers of a PTX type; bf16 and f16 as float32."""
        if kind == "pred":
            return self.bits(operand, 1)
        width = int(re.sub(r"\D", "", kind.replace("bf", "f"))[:2])
        raw = self.bits(operand, width)
        if kind == "bf16":
            return _from_bf16(raw)
        if kind in _FLOATS:
            number = raw.view(_FLOATS[kind])
            return number.astype(np.float32) if kind == "f16" else number
        return raw.view(_SIGNED[width]) if kind[0] == "s" else raw

    def put(self, name: str, result: np.ndarray, mask: np.ndarray, kind: str = "") -> None:
        """Write a register, as its width says; numbers of a float type as their bits."""
        if name == "_":
            return
        width = self.width(name)
        if width == 1:
            new = np.asarray(result, bool)
        else:
            if kind == "bf16":
                result = bf16_bits(result)
            elif kind == "f16":
                result = np.asarray(result).astype(np.float16).view(np.uint16)
            elif kind in _FLOATS:
                result = np.ascontiguousarray(result, _FLOATS[kind])
                result = result.view(_BITS[result.dtype.itemsize * 8])
            elif kind and kind[0] == "s":
                result = np.asarray(result).astype(_SIGNED[int(kind[1:])]).astype(_SIGNED[width])
            new = np.asarray(result).astype(_BITS[width])
        old = self.registers.get(name)
        if mask.all():
            self.registers[name] = np.array(np.broadcast_to(new, self.lanes))
        elif old is None:
            poison = np.zeros(self.lanes, new.dtype)
            poison[:] = False if width == 1 else (1 << width) - 1
            poison[mask] = np.broadcast_to(new, self.lanes)[mask]
            self.registers[name] = poison
        else:
            old[mask] = np.broadcast_to(new, self.lanes)[mask]

    # Control

    def run(self) -> None:
        code = self.kernel.code
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~(self.done | self.waiting)
                if not ready.any():
                    self.release()
                    continue
                at, mask = self.furthest_back(ready)
                self.at[mask] = at + 1
                one = code[at]
                if one.predicate is not None:
                    condition = self.bits(one.predicate, 1)
                    mask &= ~condition if one.negated else condition
                    if not mask.any():
                        continue
                self.instructions += int(mask.sum())
                self.step(at, one, mask)

    def furthest_back(self, ready: np.ndarray) -> tuple[int, np.ndarray]:
        """Where they are, and which; to a shuffle a warp goes when all of it is there."""
        while ready.any():
            at = int(self.at[ready].min())
            if at >= len(self.kernel.code):
                raise UnsupportedError(f"{self.kernel.name}: the code ends without ret")
            here = ready & (self.at == at)
            if self.kernel.code[at].parts[0] != "shfl":
                return at, here
            whole = (here | self.done).reshape(-1, _WARP).all(1)
            if (here & whole.repeat(_WARP)).any():
                return at, here & whole.repeat(_WARP)
            ready = ready & ~here
        raise DeadlockError(f"{self.kernel.name}: a shuffle is waited for, and a barrier")

    def release(self) -> None:
        blocks = self.waiting.reshape(-1, self.threads)
        done = self.done.reshape(-1, self.threads)
        for block in range(len(blocks)):
            # With none ready, every thread of a block waits or is done.
            if blocks[block].any():
                if done[block].any():
                    where = _Where(self, 0, np.array([block * self.threads]))
                    message = "a barrier is waited for, and some threads have ended before it"
                    raise DeadlockError(where.say(message))
                lanes = slice(block * self.threads, (block + 1) * self.threads)
                self.waiting[lanes] = False
                self.epoch[lanes] = ((self.epoch[lanes] >> 20).max() + 1) << 20

    def step(self, at: int, one: Instruction, mask: np.ndarray) -> None:
        operation, parts, operands = one.parts[0], one.parts, one.operands
        if operation == "bra":
            self.at[mask] = self.kernel.labels[operands[0]]
        elif operation in ("ret", "exit"):
            self.done |= mask
        elif operation in ("bar", "barrier"):
            self.barrier(at, one, mask)
        elif operation in ("ld", "st"):
            self.access(at, one, mask)
        elif operation == "shfl":
            self.shuffle(at, one, mask)
        elif operation == "ldmatrix":
            self.load_matrix(at, one, mask)
        elif operation == "mov":
            self.move(one, mask)
        elif operation == "cvt":
            self.convert(one, mask)
        elif operation == "cvta":
            self.put(operands[0], self.bits(operands[1], 64), mask)
        elif operation in ("setp", "set"):
            self.compare(one, mask)
        elif operation == "selp":
            width = 64 if parts[-1].endswith("64") else 16 if parts[-1].endswith("16") else 32
            first, second = (self.bits(operand, width) for operand in operands[1:3])
            self.put(operands[0], np.where(self.bits(operands[3], 1), first, second), mask)
        else:
            self.arithmetic(one, mask)

    def barrier(self, at: int, one: Instruction, mask: np.ndarray) -> None:
        if one.parts[1] == "warp":
            self.epoch[mask] += 1
        elif one.parts[:2] in (("bar", "sync"), ("barrier", "sync")) and len(one.operands) == 1:
            self.waiting |= mask
        else:
            raise UnsupportedError(one.text)

    # Memory

    def address(self, operand: str, mask: np.ndarray) -> np.ndarray:
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand)
        if not found:
            raise UnsupportedError(f"{self.kernel.name}: address {operand}")
        name = found[1]
        narrow = name.startswith("%") and self.width(name) == 32
        base = self.bits(name, 32 if narrow else 64).astype(np.uint64)
        offset = np.uint64(int(found[2] or "0", 0) & (1 << 64) - 1)
        return (base + offset)[mask]

    def access(self, at: int, one: Instruction, mask: np.ndarray) -> None:
        space, kind = one.parts[1], one.parts[-1]
        count = next((int(p[1:]) for p in one.parts if re.fullmatch(r"v\d", p)), 1)
        size = int(re.sub(r"\D", "", kind)) // 8
        loads = one.parts[0] == "ld"
        place, data = one.operands if not loads else one.operands[::-1]
        names = [name.strip() for name in data.strip("{} ").split(",")]
        if loads and space == "param":
            self.load_parameter(place, names, size, kind, mask)
            return
        if space not in ("global", "shared"):
            raise UnsupportedError(one.text)
        addresses = self.address(place, mask)
        where = _Where(self, at, np.flatnonzero(mask))
        total = size * count
        if loads:
            if space == "global":
                raw = self.memory.load(addresses, total, where)
                self.read += raw.size
            else:
                raw = self.shared.load(self, addresses, total, where)
            words = np.ascontiguousarray(raw).view(_BITS[size * 8])
            for column, name in enumerate(names):
                result = np.zeros(self.lanes, _BITS[size * 8])
                result[mask] = words[:, column]
                signed = kind[0] == "s"
                self.put(name, result.view(_SIGNED[size * 8]) if signed else result, mask,
                         kind if signed else "")  # fmt: skip
        else:
            columns = [self.bits(name, size * 8)[mask] for name in names]
            raw = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
            if space == "global":
                self.memory.store(addresses, raw, where)
                self.written += raw.size
            else:
                self.shared.store(self, addresses, raw, where)

    def load_parameter(
        self, place: str, names: list[str], size: int, kind: str, mask: np.ndarray
    ) -> None:
        starts = self.address(place, mask).astype(np.int64) - _PARAMETER_BASE
        known = np.frombuffer(self.parameters, np.uint8)
        for index, name in enumerate(names):
            at = starts[:, None] + index * size + np.arange(size)
            words = np.ascontiguousarray(known[at]).view(_BITS[8 * size])[:, 0]
            result = np.zeros(self.lanes, words.dtype)
            result[mask] = words
            signed = kind if kind[0] == "s" else ""
            self.put(name, result.view(_SIGNED[8 * size]) if signed else result, mask, signed)

    def shuffle(self, at: int, one: Instruction, mask: np.ndarray) -> None:
        mode = next(p for p in one.parts if p in ("bfly", "idx", "up", "down"))
        result, _, predicate = one.operands[0].partition("|")
        source = self.bits(one.operands[1], 32)
        amount = self.bits(one.operands[2], 32).astype(np.int64)
        clamp = self.bits(one.operands[3], 32).astype(np.int64)
        lane = np.arange(self.lanes) % _WARP
        first = np.arange(self.lanes) - lane
        segment, limit = clamp >> 8 & 31, clamp & 31
        low = lane & segment
        high = low | limit & ~segment
        chosen = {
            "bfly": lane ^ amount,
            "idx": low | amount & ~segment & 31,
            "up": lane - amount,
            "down": lane + amount,
        }[mode]
        inside = chosen >= low if mode == "up" else chosen <= high
        chosen = first + np.where(inside, chosen, lane)
        if not mask[np.minimum(chosen, self.lanes - 1)[mask]].all():
            where = _Where(self, at, np.flatnonzero(mask))
            raise UninitialisedError(where.say("takes a number from a thread that is not there"))
        self.put(result.strip(), source[chosen], mask)
        if predicate:
            self.put(predicate.strip(), inside, mask)

    def load_matrix(self, at: int, one: Instruction, mask: np.ndarray) -> None:
        if "b16" not in one.parts or not mask.all():
            raise UnsupportedError(one.text)
        count = next(int(p[1:]) for p in one.parts if p in ("x1", "x2", "x4"))
        names = [name.strip() for name in one.operands[0].strip("{} ").split(",")]
        addresses = self.address(one.operands[1], mask)
        lanes = np.arange(self.lanes)
        warp, lane = lanes // _WARP * _WARP, lanes % _WARP
        for index, name in zip(range(count), names, strict=True):
            if "trans" in one.parts:
                halves = []
                for k in range(2):
                    rows = warp + 8 * index + 2 * (lane % 4) + k
                    where = addresses[rows] + (2 * (lane // 4)).astype(np.uint64)
                    halves.append(self.shared.load(self, where, 2, _Where(self, at, lanes)))
                raw = np.concatenate(halves, 1)
            else:
                rows = warp + 8 * index + lane // 4
                where = addresses[rows] + (4 * (lane % 4)).astype(np.uint64)
                raw = self.shared.load(self, where, 4, _Where(self, at, lanes))
            self.put(name, np.ascontiguousarray(raw).view(np.uint32)[:, 0], mask)

    # Registers to registers

    def move(self, one: Instruction, mask: np.ndarray) -> None:
        target, source = one.operands
        kind = one.parts[-1]
        if kind == "pred":
            self.put(target, self.bits(source, 1), mask)
            return
        width = int(kind[1:])
        if target.startswith("{"):
            names = [name.strip() for name in target.strip("{} ").split(",")]
            raw, step = self.bits(source, width), width // len(names)
            for index, name in enumerate(names):
                part = raw >> np.array(index * step, raw.dtype)
                self.put(name, part.astype(_BITS[step]), mask)
        elif source.startswith("{"):
            names = [name.strip() for name in source.strip("{} ").split(",")]
            step = width // len(names)
            raw = np.zeros(self.lanes, _BITS[width])
            for index, name in enumerate(names):
                part = self.bits(name, step).astype(_BITS[width])
                raw |= part << np.array(index * step, raw.dtype)
            self.put(target, raw, mask)
        else:
            self.put(target, self.bits(source, width), mask)

    def convert(self, one: Instruction, mask: np.ndarray) -> None:
        *modes, to, source = one.parts[1:]
        if to.endswith("x2"):
            if modes != ["rn"] or source != "f32":
                raise UnsupportedError(one.text)
            halves = [self.value(operand, "f32") for operand in one.operands[1:3]]
            upper, lower = (self.half(half, to[:-2]).astype(np.uint32) for half in halves)
            self.put(one.operands[0], upper << np.uint32(16) | lower, mask)
            return
        x = self.value(one.operands[1], source)
        if "ftz" in modes and source == "f32":
            x = _flush(x)
        floats = ("f16", "bf16", *_FLOATS)
        if to in floats and source in floats:
            if to in ("f16", "bf16"):
                self.put(one.operands[0], self.half(x, to, modes), mask)
                return
            integral = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
            result = next((integral[m](x) for m in modes if m in integral), x)
            if "sat" in modes:
                result = np.clip(result, 0, 1)
            result = np.asarray(result).astype(_FLOATS[to])
            self.put(one.operands[0], _flush(result) if "ftz" in modes else result, mask, to)
        elif to in floats:
            wide = np.float64 if to == "f64" else np.float32
            self.put(one.operands[0], x.astype(wide), mask, to)
        elif source in floats:
            way = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}
            whole = next(way[m] for m in modes if m in way)(x.astype(np.float64))
            limits = np.iinfo((_SIGNED if to[0] == "s" else _BITS)[int(to[1:])])
            # NaN gives 0 in 32 bits; the largest number may not be one of float64.
            whole = np.nan_to_num(whole, nan=0.0)
            result = np.where(
                whole >= float(limits.max),
                limits.max,
                np.where(whole <= float(limits.min), limits.min, 0),
            ).astype(limits.dtype)
            inside = (whole < float(limits.max)) & (whole > float(limits.min))
            result[inside] = whole[inside].astype(limits.dtype)
            self.put(one.operands[0], result, mask, to if to[0] == "s" else "")
        else:
            if "sat" in modes:
                raise UnsupportedError(one.text)
            signed = source[0] == "s"
            result = x.astype((_SIGNED if signed else _BITS)[int(to[1:])])
            self.put(one.operands[0], result, mask, f"s{to[1:]}" if signed and to[0] == "s" else "")

    def half(self, x: np.ndarray, to: str, modes: Sequence[str] = ("rn",)) -> np.ndarray:
        """float32 or float64 as the bits of a 16-bit type."""
        if to == "bf16":
            return bf16_bits(x, toward_zero="rz" in modes)
        if "rz" in modes:
            raise UnsupportedError(f"{self.kernel.name}: cvt.rz.f16")
        return x.astype(np.float16).view(np.uint16)

    def compare(self, one: Instruction, mask: np.ndarray) -> None:
        *modes, kind = one.parts[1:]
        if one.parts[0] == "set":
            raise UnsupportedError(one.text)
        pairs = [(one.operands[1], one.operands[2], kind)]
        if kind.endswith("x2"):
            halves = [self.bits(operand, 32) for operand in one.operands[1:3]]
            results = []
            for shift in (0, 16):
                a, b = ((half >> np.uint32(shift)).astype(np.uint16) for half in halves)
                results.append(self.compared(modes[0], *(_of_16_bits(x, kind) for x in (a, b))))
        else:
            first, second, kind = pairs[0]
            a, b = self.value(first, kind), self.value(second, kind)
            if "ftz" in modes and kind == "f32":
                a, b = _flush(a), _flush(b)
            results = [self.compared(modes[0], a, b)]
        joined = next((m for m in modes[1:] if m in ("and", "or", "xor")), None)
        if joined:
            third = self.bits(one.operands[3], 1)
            function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined]
            results = [function(result, third) for result in results]
        targets = one.operands[0].split("|")
        if len(results) != len(targets):
            raise UnsupportedError(one.text)
        for target, result in zip(targets, results, strict=True):
            self.put(target.strip(), result, mask)

    def compared(self, how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
        if how in ("nan", "num"):
            return nan if how == "nan" else ~nan
        if how.endswith("u") and how not in _COMPARE:  # true also where one is NaN
            return _COMPARE[how[:-1]](a, b) | nan
        return _COMPARE[how](a, b) & ~nan

    def arithmetic(self, one: Instruction, mask: np.ndarray) -> None:
        operation, *modes, kind = one.parts
        if len(one.operands) < 2:
            raise UnsupportedError(one.text)
        target, *sources = one.operands
        if kind == "pred":
            values = [self.bits(source, 1) for source in sources]
            logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
            result = ~values[0] if operation == "not" else logic[operation](*values)
            self.put(target, result, mask)
        elif kind == "f32x2":
            raw = [self.bits(source, 64) for source in sources]
            words = []
            for shift in (0, 32):
                parts = [(x >> np.uint64(shift)).astype(np.uint32).view(np.float32) for x in raw]
                result = self.floating(one, operation, modes, "f32", parts)
                words.append(result.view(np.uint32).astype(np.uint64))
            self.put(target, words[1] << np.uint64(32) | words[0], mask)
        elif kind.endswith("x2"):
            raw = [self.bits(source, 32) for source in sources]
            halves = []
            for shift in (0, 16):
                parts = [_of_16_bits((x >> np.uint32(shift)).astype(np.uint16), kind) for x in raw]
                result = self.floating(one, operation, modes, kind[:-2], parts)
                halves.append(self.half(result, kind[:-2]).astype(np.uint32))
            self.put(target, halves[1] << np.uint32(16) | halves[0], mask)
        elif kind in ("f16", "bf16", *_FLOATS):
            values = [self.value(source, kind) for source in sources]
            result = self.floating(one, operation, modes, kind, values)
            self.put(target, result, mask, kind)
        else:
            self.put(target, *self.integer(one, operation, modes, kind, sources, mask))

    def floating(
        self, one: Instruction, operation: str, modes: list[str], kind: str, x: list[np.ndarray]
    ) -> np.ndarray:
        ftz = "ftz" in modes and kind == "f32"
        if ftz:
            x = [_flush(value) for value in x]
        if any(mode in ("rz", "rm", "rp", "sat", "xorsign") for mode in modes):
            raise UnsupportedError(one.text)
        approximate = "approx" in modes or operation in ("ex2", "lg2", "rsqrt", "tanh")
        if operation in ("rcp", "rsqrt") and kind == "f64" and approximate:  # of and to upper words
            result = _upper_word(_APPROXIMATIONS[operation](_upper_word(x[0])))
        elif operation in _APPROXIMATIONS and approximate:
            exact = _APPROXIMATIONS[operation](x[0].astype(np.float64))
            result = (exact * (1 + self.errors.get(operation, 0.0))).astype(x[0].dtype)
        elif operation in ("min", "max"):
            nan = "NaN" in modes
            function = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[operation][nan]
            result = function(*x)
        elif operation == "fma":
            if kind in ("f16", "bf16"):
                raise UnsupportedError(one.text)
            result = (fma64 if kind == "f64" else fma32)(*x)
        else:
            functions = {
                "add": np.add,
                "sub": np.subtract,
                "mul": np.multiply,
                "div": np.divide,
                "neg": np.negative,
                "abs": np.abs,
                "sqrt": np.sqrt,
                "rcp": np.reciprocal,
                "copysign": lambda sign, magnitude: np.copysign(magnitude, sign),
            }
            if operation not in functions:
                raise UnsupportedError(one.text)
            result = functions[operation](*x)
        return _flush(result) if ftz else result

    def integer(
        self,
        one: Instruction,
        operation: str,
        modes: list[str],
        kind: str,
        sources: list[str],
        mask: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, str]:
        bits = int(kind[1:])
        signed = kind[0] == "s"
        as_signed = f"s{bits}" if signed else ""
        if operation in ("shl", "shr"):
            x = self.value(sources[0], kind)
            by = self.bits(sources[1], 32)
            few = np.minimum(by, bits - 1).astype(x.dtype)
            if operation == "shl":
                return np.where(by < bits, x << few, 0), mask, as_signed
            return np.where((by < bits) | signed, x >> few, 0), mask, as_signed
        if (operation == "mul" and "wide" in modes) or (operation == "mad" and "wide" in modes):
            wide = (_SIGNED if signed else _BITS)[2 * bits]
            a, b = (self.value(source, kind).astype(wide) for source in sources[:2])
            result = a * b
            if operation == "mad":
                result = result + self.value(sources[2], f"{kind[0]}{2 * bits}")
            return result, mask, f"s{2 * bits}" if signed else ""
        x = [self.value(source, kind) for source in sources if not source.startswith("{")]
        if "hi" in modes:
            if bits != 32:
                raise UnsupportedError(one.text)
            wide = np.int64 if signed else np.uint64
            result = (x[0].astype(wide) * x[1].astype(wide)) >> np.array(32, wide)
            result = result.astype(x[0].dtype)
            return (result + x[2] if operation == "mad" else result), mask, as_signed
        if operation in ("div", "rem"):
            if (x[1][mask] == 0).any():
                raise UnsupportedError(f"division by zero: {one.text}")
            divisor = np.where(x[1] == 0, 1, x[1]).astype(x[0].dtype)
            quotient = (np.abs(x[0]) // np.abs(divisor)).astype(x[0].dtype)
            if signed:
                quotient = np.where((x[0] < 0) != (divisor < 0), -quotient, quotient)
            return (
                (quotient if operation == "div" else x[0] - quotient * divisor),
                mask,
                as_signed,
            )
        if operation == "bfe":
            start, length = (self.bits(source, 32).astype(np.int64) for source in sources[1:3])
            raw = x[0].astype(np.int64)
            if bits == 64 or signed:
                raise UnsupportedError(one.text)
            return raw >> start & (1 << length) - 1, mask, ""
        if operation == "bfi":
            start, length = (self.bits(source, 32).astype(np.uint64) for source in sources[2:4])
            ones = (np.uint64(1) << length) - np.uint64(1) << start
            field, onto = (value.astype(np.uint64) for value in x[:2])
            return field << start & ones | onto & ~ones, mask, ""
        if operation == "lop3":
            table = int(sources[3], 0)
            result = np.zeros_like(x[0])
            for index in range(8):
                if table >> index & 1:
                    terms = [v if index >> 2 - k & 1 else ~v for k, v in enumerate(x[:3])]
                    result |= terms[0] & terms[1] & terms[2]
            return result, mask, ""
        if operation == "prmt":
            selector = self.bits(sources[2], 32).astype(np.uint64)
            joined = x[0].astype(np.uint64) | x[1].astype(np.uint64) << np.uint64(32)
            result = np.zeros(self.lanes, np.uint64)
            for index in range(4):
                chosen = selector >> np.uint64(4 * index) & np.uint64(15)
                byte = joined >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
                sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
                byte = np.where(chosen & np.uint64(8), sign, byte)
                result |= byte << np.uint64(8 * index)
            return result.astype(np.uint32), mask, ""
        if operation == "shf":
            amount = self.bits(sources[2], 32).astype(np.uint64) & np.uint64(31)
            joined = x[0].astype(np.uint64) | x[1].astype(np.uint64) << np.uint64(32)
            if "l" in modes:
                return (joined << amount >> np.uint64(32)).astype(np.uint32), mask, ""
            return (joined >> amount).astype(np.uint32), mask, ""
        functions = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "not": np.invert,
            "neg": np.negative,
            "abs": np.abs,
            "min": np.minimum,
            "max": np.maximum,
            "mad": lambda a, b, c: a * b + c,
            "popc": np.bitwise_count if hasattr(np, "bitwise_count") else None,
        }
        if functions.get(operation) is None or any(m in ("cc", "sat") for m in modes):
            raise UnsupportedError(one.text)
        return functions[operation](*x), mask, as_signed


def _of_16_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind.startswith("bf16"):
        return _from_bf16(bits)
    return bits.view(np.float16).astype(np.float32)


def run(
    kernel: Kernel,
    memory: Memory,
    arguments: Sequence[int | float | bytes],
    grid: tuple[int, ...],
    threads: int | tuple[int, ...],
    *,
    blocks: Sequence[int] | None = None,
    dynamic_shared: int = 0,
    errors: Mapping[str, float] | None = None,
) -> Traffic:
    """Run a kernel's blocks, and say what they moved.

    Args:
        kernel: from :func:`parse`.
        memory: holds what the arguments point to.
        arguments: one for each parameter: an int, a float for an f32 or f64, the bytes of a struct.
        grid: programs along x, y, z.
        threads: of a block, or how many along x, y, z.
        blocks: numbers of those to run, along x first; all by default.
        dynamic_shared: bytes beside those that the kernel declares.
        errors: relative errors of the approximations, as ``{"ex2": 2**-22}``.
    """
    full = (*grid, 1, 1)[:3]
    count = full[0] * full[1] * full[2]
    numbers = np.arange(count) if blocks is None else np.asarray(blocks)
    places = np.stack(
        [numbers % full[0], numbers // full[0] % full[1], numbers // (full[0] * full[1])], 1
    )
    shape = threads if isinstance(threads, tuple) else (threads,)
    block = (*shape, 1, 1)[:3]
    machine = _Machine(kernel, memory, places, full, block, dynamic_shared, dict(errors or {}))
    packed = b""
    for (name, size, elements), value in zip(kernel.parameters, arguments, strict=True):
        step = size if not elements else 8
        packed += b"\0" * (-len(packed) % step)
        machine.offsets[name] = len(packed)
        if isinstance(value, bytes):
            packed += value
        elif isinstance(value, float):
            packed += np.array(value, {4: np.float32, 8: np.float64}[size]).tobytes()
        else:
            packed += int(value & (1 << 8 * size) - 1).to_bytes(size, "little")
    machine.parameters = packed
    machine.run()
    return Traffic(machine.read, machine.written, machine.instructions)
