"""Prints what Triton compiles for sm_90, as JSON: a line for each kernel that a call launches.

TRITON_INTERPRET=0 python -m tests.ptx.triton_ptx activation DTYPE
TRITON_INTERPRET=0 python -m tests.ptx.triton_ptx layer_norm DTYPE ROWS LENGTH
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks import generated_code
from benchmarks.generated_code import Case, Launch
from gn_kernels.layer_norm import triton_kernels

PROGRAMS = 3  # that walk over the tiles of a small layer_norm


def layer_norm(subject: str, dtype: torch.dtype) -> Iterator[tuple[str, object]]:
    """Every order, of as many rows as the subject says."""
    rows, length = map(int, subject.split("x"))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    v, grad, x = (torch.empty(rows, length, dtype=dtype, device="meta") for _ in range(3))
    weight, bias, u, t = (torch.empty(length, dtype=wide, device="meta") for _ in range(4))
    row = [torch.empty(rows, dtype=wide, device="meta") for _ in range(2)]
    every = [True, True, True]
    yield "forward", lambda: triton_kernels.forward(x, length, weight, bias, 1e-5)
    yield "backward", lambda: triton_kernels.backward(grad, x, length, weight, bias, *row, every)
    yield (
        "double_backward",
        lambda: triton_kernels.double_backward(v, u, t, grad, x, length, weight, *row, every),
    )


def describe(launch: Launch) -> dict:
    """What a test needs to run it."""
    compiled, arguments = generated_code.compile_launch(launch, generated_code.TARGETS["sm_90"])
    constant = {launch.kernel.arg_names[i] for (i,) in compiled.src.constants}
    return {
        "order": launch.order,
        "kernel": launch.kernel.__name__,
        "parameters": [
            (name, None if isinstance(value, Tensor) else value)
            for name, value in arguments.items()
            if name not in constant and name in launch.kernel.arg_names
        ],
        "grid": launch.grid,
        "threads": compiled.metadata.num_warps * 32,
        "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
    }


def main() -> None:
    family, dtype, *sizes = sys.argv[1:]
    subjects = generated_code.FAMILIES["activation"].subjects(dtype)[0]
    if family == "layer_norm":
        subjects = ["x".join(sizes)]
        own = generated_code.FAMILIES[family]._replace(calls=layer_norm)
        generated_code.FAMILIES[family] = own
    for subject in subjects:
        # The gate's launches take as many programs as a large GPU has room for.
        small = generated_code.MACHINES["sm_90"]._replace(multiprocessors=1)
        with (
            mock.patch.object(triton_kernels, "_WALKERS", PROGRAMS),
            mock.patch.dict(generated_code.MACHINES, {"sm_90": small}),
        ):
            launches = generated_code.launches(Case(family, subject, dtype, "sm_90"))
        for launch in launches:
            print(json.dumps({"subject": subject, **describe(launch)}), flush=True)


if __name__ == "__main__":
    main()
