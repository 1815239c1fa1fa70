"""Reads what GPU compilers wrote: instructions by pipe, accesses to global memory, resources.

NVIDIA's SASS through cuobjdump and nvdisasm, which the Triton wheel brings; AMD's assembly as text.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# What an instruction keeps busy. NVIDIA's FMA pipe multiplies integers too; "mufu" is the unit of
# approximations and conversions, AMD's transcendental unit; "control" has branches, barriers, and
# the scalar unit, which computes once for a warp what is the same in all its threads.
PIPES = ("fma", "alu", "mufu", "fp64", "tensor", "memory", "control")

_SASS = (
    ("fp64", r"D(ADD|MUL|FMA|SETP|MNMX)"),
    ("tensor", r"[HIBDQ]G?MMA|WARPGROUP\w*|UTC\w*MMA|UTCBAR"),
    ("control", r"LDGDEPBAR|BPT"),
    ("memory", r"U?(LD|ST|ATOM|RED|SHFL|CCTL|MEMBAR|TMA|TC(CP|SHIFT)|BLKCP)\w*|SYNCS|FENCE"),
    ("mufu", r"MUFU|F2F|F2I|I2F|I2I|FRND|POPC|FLO|BREV"),
    ("fma", r"F(FMA|MUL|ADD|SWZADD)(2|32I)?|H(FMA|MUL|ADD)2(_32I)?|IMAD|IMUL|IDP"),
    ("control", r"U\w+|BRA|BRX|JMP|EXIT|CALL|RET|BAR|BSSY|BSYNC|BREAK|BMOV|NOP|WARPSYNC|DEPBAR"),
    ("control", r"S2R|S2UR|CS2R|R2UR|YIELD|NANOSLEEP|ELECT|ENDCOLLECTIVE|ACQBULK|ERRBAR|PREEXIT"),
    ("alu", r".*"),
)
_AMD = (
    ("tensor", r"v_s?mfma\w*"),
    ("memory", r"(global|buffer|flat|scratch|ds)_\w+"),
    ("control", r"s_\w+"),
    ("mufu", r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_(f16|f32|f64)\w*"),
    ("fp64", r"v_\w+_f64\w*"),
    ("fma", r"v_(pk_)?(fma|fmac|fmamk|fmaak|mul|mac|mad|add|sub|subrev)(_legacy)?_f(16|32)\w*"),
    ("alu", r".*"),
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of assembly: where it may go next, and its access to global memory, if any."""

    labels: tuple[str, ...]
    target: str | None = None
    falls_through: bool = True
    ends: bool = False
    access: tuple[str, int] | None = None  # ("load" or "store", bits)
    pipe: str = "alu"
    text: str = ""  # of NVIDIA's


class Kernel(NamedTuple):
    """One compiled kernel."""

    name: str
    registers: int
    spills: int  # accesses to local memory; registers on AMD, scalar ones too: to vector lanes
    shared_bytes: int
    code: list[Instruction]


# -- Ways through the code -----------------------------------------------------------------------


def main_path(code: Sequence[Instruction]) -> list[int]:
    """The way from entry to exit that whole blocks take, where tails have a branch of their own.

    It has some of the kernel's widest accesses to global memory, which tails have not; of these
    ways, the one with the fewest narrow accesses, then the shortest. Every loop is passed once.
    """
    place = _places(code)
    widest = max(instruction.access[1] for instruction in code if instruction.access)
    # A state says where, and whether one of the widest accesses was made by then.
    before: dict[Any, Any] = {}
    queue: list[tuple[int, int, tuple[int, bool], Any]] = [(0, 0, (0, False), (-1, False))]
    while queue:
        narrow, steps, state, previous = heapq.heappop(queue)
        if state in before:
            continue
        before[state] = previous
        at, made = state
        instruction = code[at]
        if instruction.ends and made:
            way = []
            while state in before:
                way.append(state[0])
                state = before[state]
            return way[::-1]
        following = [at + 1] if instruction.falls_through else []
        if instruction.target is not None:
            following.append(place[instruction.target])
        wide = instruction.access is not None and instruction.access[1] == widest
        narrow += instruction.access is not None and not wide
        for successor in following:
            heapq.heappush(queue, (narrow, steps + 1, (successor, made or wide), state))
    raise ValueError("the kernel has no exit after its widest access")


def listing(code: Sequence[Instruction]) -> list[int]:
    """All up to the last exit, where masks are predicates and no branch skips anything of note.

    What compilers put behind it is rare: waits that are not over yet, slow cases of a division.
    """
    ends = [at for at, one in enumerate(code) if one.ends and not one.falls_through]
    if not ends:
        raise ValueError("the kernel has no exit")
    return list(range(ends[-1] + 1))


def main_loop(code: Sequence[Instruction], way: Sequence[int]) -> range:
    """The longest loop on a way, from where its end jumps back to; empty where nothing does."""
    place = _places(code)
    targets = ((at, code[at].target) for at in way)
    loops = (
        range(place[target], at + 1)
        for at, target in targets
        if target is not None and place[target] < at
    )
    return max(loops, key=len, default=range(0))


def by_pipe(code: Sequence[Instruction], way: Sequence[int], trips: float) -> dict[str, float]:
    """Instructions of each pipe that one thread executes on a way, the main loop ``trips`` times"""
    loop = main_loop(code, way)
    counts: Counter[str] = Counter()
    for at in way:
        counts[code[at].pipe] += trips if at in loop else 1
    return {pipe: counts[pipe] for pipe in PIPES}


def widths(code: Sequence[Instruction], way: Sequence[int], kind: str) -> list[int]:
    """Bits of the accesses of a ``kind`` on a way, in its order."""
    accesses = (code[at].access for at in way)
    return [access[1] for access in accesses if access and access[0] == kind]


def _places(code: Sequence[Instruction]) -> dict[str, int]:
    return {label: at for at, instruction in enumerate(code) for label in instruction.labels}


# -- NVIDIA --------------------------------------------------------------------------------------


def read_cubin(cubin: bytes) -> list[Kernel]:
    """The kernels of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tools = _nvidia_tools()
        usage = _output([tools / "cuobjdump", "-res-usage", file])
        listing = _output([tools / "nvdisasm", "-c", file])
    resources = {
        name: dict(re.findall(r"(REG|SHARED):(\d+)", figures))
        for name, figures in re.findall(r"Function (\S+):\s*\n(.*)", usage)
    }
    kernels = []
    for section in re.split(r"^\s*\.section\s+", listing, flags=re.MULTILINE)[1:]:
        name = re.match(r"\.text\.([^\s,]+)", section)
        if name is not None and name[1] in resources:
            found = resources[name[1]]
            spills = len(re.findall(r"\b(?:LDL|STL)\b", section))
            code = list(_sass(section))
            kernels.append(Kernel(name[1], int(found["REG"]), spills, int(found["SHARED"]), code))
    return kernels


@functools.cache
def _nvidia_tools() -> Path:
    from triton.backends.nvidia import compiler

    return Path(compiler.__file__).with_name("bin")


_JUMPS = ("BRA", "CALL")


def _sass(listing: str) -> Iterator[Instruction]:
    labels: tuple[str, ...] = ()
    for line in listing.splitlines():
        if label := re.match(r"(\S+):$", line):
            labels += (label[1],)
        elif parts := re.match(r"\s+/\*\w+\*/\s+(@\S+ )?\s*([A-Z]\S*)(.*);", line):
            guard, name, operands = parts.groups()
            operation = name.split(".")[0]
            # nvcc leaves a loop by a call of its exit.
            target = re.search(r"`\((\.L\S+)\)", operands) if operation in _JUMPS else None
            # A condition is a guard in front or an operand before the label.
            always = guard is None and (target is None or operands.lstrip().startswith("`"))
            yield Instruction(
                labels,
                target[1] if target else None,
                falls_through=not always or not (target or operation in ("EXIT", "RET")),
                ends=operation == "EXIT",
                access=_sass_access(operation, name),
                pipe=_pipe(operation, _SASS),
                text=f"{guard or ''}{name}{operands}".rstrip(),
            )
            labels = ()


def _sass_access(operation: str, name: str) -> tuple[str, int] | None:
    if operation not in ("LDG", "STG", "LDGSTS"):
        return None
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return ("store" if operation == "STG" else "load", int(width[1]) if width else 32)


# -- AMD -----------------------------------------------------------------------------------------


def read_amdgcn(assembly: str) -> Kernel:
    """The one kernel of an assembly file."""

    def number(key: str) -> int:
        (value,) = re.findall(rf"\.{key}:\s+(\d+)", assembly)
        return int(value)

    code = []
    labels: tuple[str, ...] = ()
    for line in assembly[: assembly.index(".Lfunc_end0")].splitlines():
        if label := re.match(r"(\S+):", line):
            labels += (label[1],)
        elif parts := re.match(r"\s+([a-z]\w+)\s*([^;]*)", line):
            name, operands = parts.groups()
            access = re.match(
                r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:[us](?=byte|short))?(\w+?)(?:_d16\w*)?$",
                name,
            )
            code.append(
                Instruction(
                    labels,
                    operands.strip() if re.match(r"s_c?branch", name) else None,
                    falls_through=name not in ("s_branch", "s_endpgm"),
                    ends=name == "s_endpgm",
                    access=(access[1], _amd_bits(access[2])) if access else None,
                    pipe=_pipe(name, _AMD),
                )
            )
            labels = ()
    (name,) = re.findall(r"^\s*\.name:\s+(\S+)\n\s*\.private_segment", assembly, re.MULTILINE)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return Kernel(name, number("vgpr_count"), spills, number("group_segment_fixed_size"), code)


def _amd_bits(width: str) -> int:
    # CDNA names widths, from byte to dwordx4; RDNA ends in the number of bits.
    named = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    bits = re.search(r"\d+$", width)
    return named[width] if width in named else int(bits[0]) if bits else 0


@functools.cache
def _pipe(operation: str, table: tuple[tuple[str, str], ...]) -> str:
    return next(pipe for pipe, pattern in table if re.fullmatch(pattern, operation))


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
