"""Compile what the public functions of the layer_norm kernels launch, and say what it takes.

    TRITON_INTERPRET=0 python -m tests.layer_norm.compiled TARGET DTYPE ROW_LENGTH...

No GPU is needed. Prints one line of JSON for each kernel and set of arguments.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from benchmarks.generated_code import TARGETS, _read_amdgcn, _read_cubin, compile_call
from gn_kernels.layer_norm import triton_kernels


def call_everything(dtype: torch.dtype, row_length: int) -> None:
    """Each order as a training step with a penalty calls it, and with everything there is."""
    x, row = torch.empty(64, row_length, dtype=dtype), torch.empty(row_length)
    if dtype == torch.float64:
        row = row.double()
    statistics = (row.new_empty(64), row.new_empty(64))
    triton_kernels.forward(x, row_length, row, row, 1e-6)
    triton_kernels.forward(x, row_length, None, None, 1e-6)
    for mask in ([True, False, False], [True, True, True]):
        triton_kernels.backward(x, x, row_length, row, row, *statistics, mask)
    for u in (None, row):
        triton_kernels.double_backward(
            x, u, u, x, x, row_length, row, *statistics, [True, True, True]
        )


def compiled(target_name: str, dtype: torch.dtype, row_length: int):
    """For each launch, what the kernel that it compiles takes."""
    launches = []
    target = TARGETS[target_name]

    def catch(self, *args, grid, warmup, **kwargs):
        launches.append(lambda: self.run(*args, grid=grid, warmup=warmup, **kwargs))

    hip = "7.0" if target.backend == "hip" else None
    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(torch.version, "hip", hip):
        call_everything(dtype, row_length)
    for launch in launches:
        code, arguments = compile_call(launch, target)
        if target.backend == "cuda":
            (registers, spills, _), instructions = _read_cubin(code.asm["cubin"])
        else:
            (registers, spills, _), instructions = _read_amdgcn(code.asm["amdgcn"])
        accesses = [one.access for one in instructions if one.access]
        yield {
            "kernel": code.metadata.name,
            "row_length": row_length,
            "tile": [arguments.get("ROWS"), arguments["BLOCK"]],
            "warps": code.metadata.num_warps,
            "registers": registers,
            "spills": spills,
            "loads": [bits for kind, bits in accesses if kind == "load"],
            "stores": [bits for kind, bits in accesses if kind == "store"],
        }


if __name__ == "__main__":
    for length in map(int, sys.argv[3:]):
        for row in compiled(sys.argv[1], getattr(torch, sys.argv[2]), length):
            print(json.dumps(row), flush=True)
