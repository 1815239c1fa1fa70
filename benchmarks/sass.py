"""The way that a thread takes through SASS, given what its kernel was launched with.

A kernel over rows has code for rows in vectors and not, in one chunk and in several, with and
without each tensor. Which of it runs depends on the arguments alone: the integer instructions are
carried out, and whatever else writes a register leaves a number there that is not known. Where a
branch depends on such a number, so on the data, the way goes on that has fewer instructions to the
exit: slow cases of divisions lie on the other.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import re
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.assembly import Instruction

# Where in bank 0 of the constants the parameters begin, and the sizes of block and grid.
_PARAMETERS = {
    "sm_80": (0x160, 0x0, 0xC),
    "sm_90": (0x210, 0x0, 0xC),
    "sm_100": (0x380, 0x360, 0x370),
}
_BITS, _WIDE = (1 << 32) - 1, (1 << 64) - 1
_LONGEST = 1_000_000

Number = int | None  # of 32 bits; None is not known
Truth = bool | None


class Way(NamedTuple):
    """Places of instructions: those that a thread passes, and of these what it does not skip."""

    passed: list[int]
    executed: list[int]


def constants(
    target: str, arguments: Sequence[Any], grid: Sequence[int], block: Sequence[int]
) -> dict[int, int]:
    """Bank 0, of arguments as ctypes has them: its bytes, by address."""
    start, *sizes = _PARAMETERS[target]
    packed = b""
    for argument in arguments:
        packed += bytes(-len(packed) % ctypes.alignment(argument)) + bytes(argument)
    bank = dict(enumerate(packed, start))
    for at, size in zip(sizes, (block, grid), strict=True):
        bank |= dict(enumerate(struct.pack("<3I", *(*size, 1, 1)[:3]), at))
    return bank


def follow(
    code: Sequence[Instruction], bank: Mapping[int, int], thread: tuple[int, int] = (0, 0)
) -> Way:
    """The way of one thread, x and y, of the first block."""
    return _Thread(code, bank, thread).run()


class _Decoded(NamedTuple):
    guard: str
    name: str
    parts: frozenset[str]
    results: tuple[str, ...]
    sources: tuple[str, ...]
    is_wide: bool  # its result has two words


@functools.cache
def _decode(text: str) -> _Decoded:
    found = re.match(r"(?:@(!?\w+)\s+)?([\w.]+)\s*(.*)", text)
    assert found, text
    guard, opcode, rest = found.groups()
    name, *parts = opcode.split(".")
    operands = [one.strip().removesuffix(".reuse") for one in rest.split(",") if one.strip()]
    # Results come first: predicates, or a register and then predicates.
    is_register = [not _is_predicate(one) for one in operands] + [True, True]
    count = is_register.index(True) or is_register.index(True, 1)
    if name in ("LOP3", "ULOP3", "SHFL") and not is_register[0]:
        count += 1  # predicates, then a register
    elif name in ("ISETP", "UISETP", "PLOP3", "UPLOP3"):
        count = 2
    elif name in ("P2R", "UP2UR", "BRA", "CALL"):
        count = int("2" in name)
    if name == "R2P" and not parts:  # the bits of a mask, each to the predicate of its number
        operands = [*(f"P{bit}" for bit in _bits(operands[2])), operands[1]]
        count = len(operands) - 1
    wide = (
        {"64", "WIDE"} & {*parts}
        or {"F64", "S64", "U64"} & {*parts[:1]}  # of a conversion, the type of the result
        or re.fullmatch(r"D(ADD|MUL|FMA|MNMX)|CS2R", name)
    )
    return _Decoded(
        *(guard or "PT", name, frozenset(parts)),
        *(tuple(operands[:count]), tuple(operands[count:]), bool(wide)),
    )


def _bits(mask: str) -> list[int]:
    return [bit for bit in range(32) if int(mask, 0) >> bit & 1]


class _Operand(NamedTuple):
    """A number, an address in bank 0 or a register; none of them is not known."""

    number: int | None = None
    address: int | None = None
    register: str | None = None
    sign: str = ""


@functools.cache
def _operand(text: str) -> _Operand:
    if text[0] in "-~":
        return _operand(text[1:])._replace(sign=text[0])
    if found := re.fullmatch(r"c\[0x0\]\[(0x\w+)\]", text):
        return _Operand(address=int(found[1], 16))
    text = text.removesuffix(".64")
    if text in ("RZ", "URZ", "SRZ"):
        return _Operand(number=0)
    if re.fullmatch(r"U?R\d+", text):
        return _Operand(register=text)
    try:
        return _Operand(number=int(text, 0))
    except ValueError:
        return _Operand()


@functools.cache
def _next(register: str) -> str:
    letters = register.rstrip("0123456789")
    return f"{letters}{int(register[len(letters) :]) + 1}"


@functools.cache
def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P[T\d]", operand) is not None


_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt,
    "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> bits - 1 else x


def _both(a: Truth, b: Truth) -> Truth:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def _invert(a: Truth) -> Truth:
    return None if a is None else not a


class _Thread:
    def __init__(
        self, code: Sequence[Instruction], bank: Mapping[int, int], thread: tuple[int, int]
    ) -> None:
        self.code, self.bank = code, bank
        self.place = {label: at for at, one in enumerate(code) for label in one.labels}
        self.special = {f"SR_CTAID.{axis}": 0 for axis in "XYZ"}
        self.special |= {"SR_TID.X": thread[0], "SR_TID.Y": thread[1], "SR_CgaCtaId": 0}
        self.constants: dict[tuple[int, int], Number] = {}
        self.registers: dict[str, Number] = {}
        self.truths: dict[str, Truth] = {}
        self.to_exit = self._to_exit()

    def _to_exit(self) -> dict[int, int]:
        before: dict[int, list[int]] = {}
        for at, one in enumerate(self.code):
            following = [at + 1] if one.falls_through else []
            following += [self.place[one.target]] if one.target else []
            for successor in following:
                before.setdefault(successor, []).append(at)
        distance = {at: 0 for at, one in enumerate(self.code) if one.ends}
        queue = deque(distance)
        while queue:
            at = queue.popleft()
            for earlier in before.get(at, ()):
                if earlier not in distance:
                    distance[earlier] = distance[at] + 1
                    queue.append(earlier)
        return distance

    def run(self) -> Way:
        way, at = Way([], []), 0
        while len(way.passed) < _LONGEST:
            one, decoded = self.code[at], _decode(self.code[at].text)
            way.passed.append(at)
            goes = self.truth(decoded.guard)
            if goes is not False:
                way.executed.append(at)
            if one.ends:
                if goes is None:
                    raise ValueError(f"{one.text}: depends on the data")
                if goes:
                    return way
            elif one.target is not None:
                goes = _both(goes, self.condition(decoded))
                there = self.place[one.target]
                if goes is None and there <= at:
                    raise ValueError(f"{one.text}: a loop depends on the data")
                if goes is None:
                    far = len(self.code)
                    goes = self.to_exit.get(there, far) < self.to_exit.get(at + 1, far)
                if goes:
                    at = there
                    continue
            elif not one.falls_through:
                raise ValueError(f"{one.text}: where it leads is not known")
            elif goes is not False:
                self.execute(decoded, goes is None)
            at += 1
        raise ValueError("the way has no end")

    def condition(self, decoded: _Decoded) -> Truth:
        """That of a branch beside its guard."""
        if "DIV" in decoded.parts:  # where the threads of a warp are not together
            return False
        return self.truth(decoded.sources[0]) if len(decoded.sources) > 1 else True

    # Operands

    def truth(self, name: str) -> Truth:
        if name[0] == "!":
            return _invert(self.truth(name[1:]))
        return True if name in ("PT", "UPT") else self.truths.get(name)

    def read(self, text: str, wide: bool = False) -> Number:
        """A register or constant; of two words if it is wide."""
        operand = _operand(text)
        value = operand.number
        if operand.register is not None:
            value = self.registers.get(operand.register)
            if wide and value is not None:
                high = self.registers.get(_next(operand.register))
                value = None if high is None else high << 32 | value
        elif operand.address is not None:
            value = self.constant(operand.address, 8 if wide else 4)
        if value is None:
            return None
        if operand.sign:
            value = -value if operand.sign == "-" else ~value
        return value & (_WIDE if wide else _BITS)

    def constant(self, at: int, size: int) -> Number:
        if (at, size) not in self.constants:
            found = [self.bank.get(at + k) for k in range(size)]
            known = None not in found
            self.constants[at, size] = int.from_bytes(bytes(found), "little") if known else None  # type: ignore[arg-type]
        return self.constants[at, size]

    def write(self, target: str, value: Number, words: int = 1) -> None:
        if target in ("RZ", "URZ"):
            return
        for _ in range(words):
            self.registers[target] = None if value is None else value & _BITS
            value = None if value is None else value >> 32
            target = _next(target)

    def decide(self, targets: Sequence[str], truth: Truth) -> None:
        for one in targets:
            if one not in ("PT", "UPT"):
                self.truths[one] = truth

    # Instructions

    def execute(self, one: _Decoded, perhaps: bool) -> None:
        """Carry out; where it is not known whether that happens, forget what it writes."""
        function = _FUNCTIONS.get(one.name)
        if function is None and not re.fullmatch(_OF_DATA, one.name):
            raise ValueError(f"{one.name} is not known")
        if function is None or perhaps:
            self.forget(one)
        elif not function(self, one):
            if all(self.is_known(source) for source in one.sources):
                raise ValueError(f"{one} is not known")
            self.forget(one)

    def is_known(self, source: str) -> bool:
        if _is_predicate(source):
            return self.truth(source) is not None
        return self.read(source) is not None

    def forget(self, one: _Decoded) -> None:
        words = 4 if "128" in one.parts else 2 if one.is_wide else 1
        for result in one.results:
            if _is_predicate(result):
                self.decide([result], None)
            elif _operand(result).register:
                self.write(result, None, words)

    def total(self, one: _Decoded, terms: Sequence[Number], bits: int = 32) -> bool:
        """Write a sum, and its carries where predicates take them: two of three terms."""
        if None in terms:
            return False
        total = sum(terms)  # type: ignore[arg-type]
        self.write(one.results[0], total, bits // 32)
        for k, target in enumerate(one.results[1:]):
            self.decide([target], total >> bits > k)
        return True

    def carry(self, one: _Decoded, place: int) -> Number:
        if "X" not in one.parts:
            return 0
        truth = self.truth(one.sources[place])
        return None if truth is None else int(truth)

    def move(self, one: _Decoded) -> bool:
        self.write(one.results[0], self.read(one.sources[0]))
        return True

    def special_register(self, one: _Decoded) -> bool:
        self.write(one.results[0], self.special.get(one.sources[0]))
        return True

    def zeros(self, one: _Decoded) -> bool:
        self.write(one.results[0], 0 if one.sources == ("SRZ",) else None, 2)
        return True

    def load_constant(self, one: _Decoded) -> bool:
        is_byte, is_signed = bool(one.parts & {"U8", "S8"}), "S8" in one.parts
        size = 1 if is_byte else 16 if "128" in one.parts else 8 if one.is_wide else 4
        address = _operand(one.sources[0]).address
        if address is None:
            return False
        value = self.constant(address, size)
        if is_signed and value is not None:
            value = _signed(value, 8)
        self.write(one.results[0], value, max(size // 4, 1))
        return True

    def multiply_add(self, one: _Decoded) -> bool:
        is_high = "HI" in one.parts
        a, b = self.read(one.sources[0]), self.read(one.sources[1])
        c = self.read(one.sources[2], one.is_wide or is_high)
        carry = self.carry(one, 3)
        if a is None or b is None or c is None:
            return False
        if (one.is_wide or is_high) and "U32" not in one.parts:
            a, b = _signed(a), _signed(b)
        if is_high:
            self.write(one.results[0], (a * b & _WIDE) + c >> 32)
            return True
        bits = 64 if one.is_wide else 32
        return self.total(one, (a * b & (1 << bits) - 1, c, carry), bits)

    def add(self, one: _Decoded) -> bool:
        terms = [self.read(source, one.is_wide) for source in one.sources[:3]]
        carries = [self.carry(one, place) for place in range(3, len(one.sources))]
        return self.total(one, (*terms, *carries), 64 if one.is_wide else 32)

    def add_two(self, one: _Decoded) -> bool:
        return self.total(one, [self.read(source) for source in one.sources[:2]])

    def shift_add(self, one: _Decoded) -> bool:
        a, b = self.read(one.sources[0]), self.read(one.sources[1])
        high: Number = 0
        if "SX32" in one.parts and a is not None:
            high = _BITS if a >> 31 else 0
        elif "HI" in one.parts:
            high = self.read(one.sources[2])
        has_high = "HI" in one.parts and "SX32" not in one.parts
        shift = self.read(one.sources[2 + has_high])
        if a is None or high is None or shift is None:
            return False
        moved = (high << 32 | a) << shift >> (32 if "HI" in one.parts else 0)
        return self.total(one, (moved & _BITS, b, self.carry(one, 3 + has_high)))

    def shift(self, one: _Decoded) -> bool:
        low, by, high = (self.read(source) for source in one.sources)
        if low is None or by is None or high is None:
            return False
        value = high << 32 | low
        if "L" in one.parts:
            value <<= by
        else:
            value = (_signed(value, 64) if one.parts & {"S32", "S64"} else value) >> by
        self.write(one.results[0], value >> 32 if "HI" in one.parts else value)
        return True

    def logic(self, one: _Decoded) -> bool:
        terms = [self.read(source) for source in one.sources[:3]]
        if None in terms:
            return False
        table, value = int(one.sources[3], 0), 0
        for index in range(8):
            if table >> index & 1:
                a, b, c = (v if index >> 2 - k & 1 else ~v for k, v in enumerate(terms))  # type: ignore[operator]
                value |= a & b & c & _BITS
        *predicates, register = one.results
        self.write(register, value)
        if predicates:
            joined = self.truth(one.sources[4])
            self.decide(predicates, True if value or joined else joined)
        return True

    def select(self, one: _Decoded) -> bool:
        which = self.truth(one.sources[2])
        if which is None:
            return False
        self.write(one.results[0], self.read(one.sources[0 if which else 1]))
        return True

    def extreme(self, one: _Decoded) -> bool:
        a, b = (self.read(source) for source in one.sources[:2])
        least = self.truth(one.sources[2])
        if a is None or b is None or least is None:
            return False
        key = int if "U32" in one.parts else _signed
        self.write(one.results[0], (min if least else max)(a, b, key=key))
        return True

    def permute(self, one: _Decoded) -> bool:
        a, chosen, b = (self.read(source) for source in one.sources)
        if a is None or chosen is None or b is None or one.parts:
            return False
        value = 0
        for k in range(4):
            select = chosen >> 4 * k & 15
            byte = (b << 32 | a) >> 8 * (select & 7) & 255
            value |= (255 * (byte >> 7) if select & 8 else byte) << 8 * k
        self.write(one.results[0], value)
        return True

    def halves(self, one: _Decoded) -> bool:
        # A way to write a constant: 0 times 0, and two halves of it as fp16.
        if [source.lstrip("-") for source in one.sources[:2]] != ["RZ", "RZ"]:
            return False
        numbers = [float(source.replace("QNAN", "nan")) for source in one.sources[2:4]]
        high, low = struct.unpack("<2H", struct.pack("<2e", *numbers))
        self.write(one.results[0], high << 16 | low)
        return True

    def compare(self, one: _Decoded) -> bool:
        x, y = (self.read(source) for source in one.sources[:2])
        how = next(iter(one.parts & _COMPARE.keys()))
        truth: Truth = None
        if x is not None and y is not None:
            if "EX" in one.parts and x == y:  # of two upper words: the lower ones decide
                truth = self.truth(one.sources[3])
            elif "U32" in one.parts:
                truth = _COMPARE[how](x, y)
            else:
                truth = _COMPARE[how](_signed(x), _signed(y))
        other = self.truth(one.sources[2])
        for target, value in zip(one.results, (truth, _invert(truth)), strict=True):
            if "OR" in one.parts:
                self.decide([target], _invert(_both(_invert(value), _invert(other))))
            else:
                self.decide([target], _both(value, other))
        return True

    def logic_of_predicates(self, one: _Decoded) -> bool:
        terms = [self.truth(source) for source in one.sources[:3]]
        for target, table in zip(one.results, one.sources[3:], strict=True):
            possible = {
                bool(int(table, 0) >> index & 1)
                for index in range(8)
                if all(v is None or v == bool(index >> 2 - k & 1) for k, v in enumerate(terms))
            }
            self.decide([target], possible.pop() if len(possible) == 1 else None)
        return True

    def predicates_to_register(self, one: _Decoded) -> bool:
        kind = one.sources[0].removesuffix("R")  # PR or UPR
        truths = {bit: self.truth(f"{kind}{bit}") for bit in _bits(one.sources[2])}
        value = sum(1 << bit for bit, truth in truths.items() if truth)
        self.write(one.results[0], None if None in truths.values() else value)
        return True

    def register_to_predicates(self, one: _Decoded) -> bool:
        value = self.read(one.sources[0])
        for target in one.results:
            self.decide([target], None if value is None else bool(value >> int(target[-1]) & 1))
        return True


# What computes with data, moves them or waits; what it writes is not known.
_OF_DATA = (
    r"[DFH](ADD|MUL|FMA|SETP|SEL|MNMX|CHK)[23]?|MUFU|[FI]2[FI]P?|F2FP|U?LD[GSL]|ST[GSL]|SHFL|"
    r"BAR|BSSY|BSYNC|CALL|NOP|WARPSYNC|ENDCOLLECTIVE|VIADDMNMX"
)
_FUNCTIONS: dict[str, Callable[[_Thread, _Decoded], bool]] = {
    "MOV": _Thread.move,
    "R2UR": _Thread.move,
    "S2R": _Thread.special_register,
    "S2UR": _Thread.special_register,
    "CS2R": _Thread.zeros,
    "LDC": _Thread.load_constant,
    "LDCU": _Thread.load_constant,
    "IMAD": _Thread.multiply_add,
    "IADD3": _Thread.add,
    "VIADD": _Thread.add_two,
    "LEA": _Thread.shift_add,
    "SHF": _Thread.shift,
    "LOP3": _Thread.logic,
    "SEL": _Thread.select,
    "VIMNMX": _Thread.extreme,
    "IMNMX": _Thread.extreme,
    "PRMT": _Thread.permute,
    "HFMA2": _Thread.halves,
    "ISETP": _Thread.compare,
    "PLOP3": _Thread.logic_of_predicates,
    "P2R": _Thread.predicates_to_register,
    "P2UR": _Thread.predicates_to_register,
    "R2P": _Thread.register_to_predicates,
}
_FUNCTIONS |= {f"U{name}": function for name, function in _FUNCTIONS.items()}
