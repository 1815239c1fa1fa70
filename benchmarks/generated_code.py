"""What the GPU kernels compile to: registers, spills, access widths, instructions per element.

    python -m benchmarks.generated_code [--target sm_90] [--dtype bfloat16] [--kind gelu]
                                        [--json FILE]

Needs no GPU: Triton brings the compilers of both vendors. A family lists calls of its own public
functions; every kernel that they launch is caught and compiled with the very arguments, options and
specialisation of that launch, for each target.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that launches one kernel."""

    family: str
    kind: str
    order: str
    dtype: torch.dtype
    call: Callable[[], object]
    block: str  # the kernel's argument that says how many elements a program computes


@dataclasses.dataclass(frozen=True)
class GeneratedCode:
    """What one kernel compiled to. Widths and instructions are those of the main path."""

    family: str
    kind: str
    order: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    load_bits: list[int]
    store_bits: list[int]
    instructions_per_element: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of assembly: where it may go next, and its access to global memory, if any."""

    labels: tuple[str, ...]
    target: str | None = None
    falls_through: bool = True
    ends: bool = False
    access: tuple[str, int] | None = None  # ("load" or "store", bits)


def activation_cases() -> Iterator[Case]:
    """Every specialisation of the activation kernels."""
    from gn_kernels.activation import triton_kernels as kernels

    for dtype in DTYPES:
        x = torch.empty(5, dtype=dtype)
        for kind in kernels.KINDS:
            for order, call in (
                ("forward", lambda x=x, kind=kind: kernels.forward(x, kind)),
                ("backward", lambda x=x, kind=kind: kernels.backward(x, x, kind)),
                (
                    "double_backward",
                    lambda x=x, kind=kind: kernels.double_backward(x, x, x, kind, [True, True]),
                ),
                (
                    "double_backward, of x alone",
                    lambda x=x, kind=kind: kernels.double_backward(x, x, x, kind, [False, True]),
                ),
            ):
                yield Case("activation", kind, order, dtype, call, "BLOCK")


FAMILIES = {"activation": activation_cases}


def compile_call(call: Callable[[], object], target: GPUTarget) -> tuple[Any, dict[str, Any]]:
    """The kernel that ``call`` launches, compiled for ``target``, and the launch's arguments."""
    launches = []

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    hip = "7.0" if target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(torch.version, "hip", hip):
        call()
    ((kernel, args, kwargs),) = launches

    # As the launcher does: a pair (type, specialisation) for each argument of the kernel.
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialisation, options = bind(*args, **kwargs)
    types = {p.name: s[0] for p, s in zip(kernel.params, specialisation, strict=True)}
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={name: arguments[name] for name, t in types.items() if t == "constexpr"},
        attrs={
            (p.num,): backend.parse_attr(s[1])
            for p, s in zip(kernel.params, specialisation, strict=True)
            if s[0] != "constexpr" and isinstance(s[1], str)
        },
    )
    return triton.compile(source, target=target, options=options), arguments


def measure(case: Case, target_name: str) -> GeneratedCode:
    """Compile one case for one target and read its assembly."""
    target = TARGETS[target_name]
    compiled, arguments = compile_call(case.call, target)
    threads = compiled.metadata.num_warps * target.warp_size
    if target.backend == "cuda":
        resources, code = _read_cubin(compiled.asm["cubin"])
    else:
        resources, code = _read_amdgcn(compiled.asm["amdgcn"])
    path = main_path(code)
    return GeneratedCode(
        case.family,
        case.kind,
        case.order,
        str(case.dtype).removeprefix("torch."),
        target_name,
        *resources,
        load_bits=_widths(path, "load"),
        store_bits=_widths(path, "store"),
        instructions_per_element=len(path) * threads / arguments[case.block],
    )


def _widths(path: list[Instruction], kind: str) -> list[int]:
    return sorted({i.access[1] for i in path if i.access and i.access[0] == kind})


def main_path(code: list[Instruction]) -> list[Instruction]:
    """The way from entry to exit that whole blocks take.

    It has some of the kernel's widest accesses to global memory, which masked tails have not; of
    these ways, the one with the fewest narrow accesses, then the shortest. Every loop counts once.
    """
    place = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
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
            return _way_to(state, before, code)
        following = [at + 1] if instruction.falls_through else []
        if instruction.target is not None:
            following.append(place[instruction.target])
        wide = instruction.access is not None and instruction.access[1] == widest
        narrow += instruction.access is not None and not wide
        for successor in following:
            heapq.heappush(queue, (narrow, steps + 1, (successor, made or wide), state))
    raise ValueError("the kernel has no exit after its widest access")


def _way_to(state: Any, before: dict[Any, Any], code: list[Instruction]) -> list[Instruction]:
    way = []
    while state in before:
        way.append(code[state[0]])
        state = before[state]
    return way[::-1]


def _read_cubin(cubin: bytes) -> tuple[tuple[int, int, int], list[Instruction]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tools = Path(nvidia.__file__).with_name("bin")
        usage = _output([tools / "cuobjdump", "-res-usage", file])
        listing = _output([tools / "nvdisasm", "-c", file])
    found = dict(re.findall(r"(REG|SHARED):(\d+)", usage))
    code = []
    labels: tuple[str, ...] = ()
    for line in listing.splitlines():
        if label := re.match(r"(\S+):$", line):
            labels += (label[1],)
        elif parts := re.match(r"\s+/\*\w+\*/\s+(@\S+ )?\s*([A-Z]\S*)(.*);", line):
            guard, name, operands = parts.groups()
            operation = name.split(".")[0]
            target = re.search(r"`\((\S+)\)", operands) if operation == "BRA" else None
            # A condition is a guard in front or an operand before the label.
            always = guard is None and (target is None or operands.lstrip().startswith("`"))
            code.append(
                Instruction(
                    labels,
                    target[1] if target else None,
                    falls_through=operation not in ("BRA", "EXIT", "RET") or not always,
                    ends=operation == "EXIT",
                    access=_sass_access(operation, name),
                )
            )
            labels = ()
    spills = len(re.findall(r"\b(?:LDL|STL)\b", listing))
    return (int(found["REG"]), spills, int(found["SHARED"])), code


def _sass_access(operation: str, name: str) -> tuple[str, int] | None:
    if operation not in ("LDG", "STG"):
        return None
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
    return ("load" if operation == "LDG" else "store", int(width[1]) if width else 32)


def _amd_bits(width: str) -> int:
    # CDNA names widths, from byte to dwordx4; RDNA ends in the number of bits.
    named = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    return named.get(width) or int(re.search(r"\d+$", width)[0])


def _read_amdgcn(assembly: str) -> tuple[tuple[int, int, int], list[Instruction]]:
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
            branches = re.match(r"s_c?branch", name)
            access = re.match(
                r"(?:global|buffer|flat)_(load|store)_(?:[us](?=byte|short))?(\w+?)(?:_d16\w*)?$",
                name,
            )
            code.append(
                Instruction(
                    labels,
                    operands.strip() if branches else None,
                    falls_through=name not in ("s_branch", "s_endpgm"),
                    ends=name == "s_endpgm",
                    access=(access[1], _amd_bits(access[2])) if access else None,
                )
            )
            labels = ()
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    resources = number("vgpr_count"), spills, number("group_segment_fixed_size")
    return resources, code


def _output(command: list[str | Path]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measurements(
    families: list[str], targets: list[str], select: Callable[[Case], bool] = lambda case: True
) -> Iterator[GeneratedCode]:
    """Compile and measure the cases that ``select`` accepts."""
    for family in families:
        for case in filter(select, FAMILIES[family]()):
            for target in targets:
                yield measure(case, target)


def table(rows: list[GeneratedCode]) -> str:
    """The rows as plain text."""
    head = ("kind", "order", "dtype", "target", "registers", "spills", "shared", "load", "store")
    cells = [
        (*head, "instructions"),
        *(
            (
                *(row.kind, row.order, row.dtype, row.target),
                *map(str, (row.registers, row.spills, row.shared_bytes)),
                "/".join(map(str, row.load_bits)),
                "/".join(map(str, row.store_bits)),
                f"{row.instructions_per_element:.1f}",
            )
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES])
    parser.add_argument("--kind")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 runs kernels in Python: nothing is compiled")
    rows = list(
        measurements(
            options.family or list(FAMILIES),
            options.target or list(TARGETS),
            lambda case: (
                options.dtype in (None, str(case.dtype).removeprefix("torch."))
                and options.kind in (None, case.kind)
            ),
        )
    )
    print(table(rows))
    if options.json:
        report = {"triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
