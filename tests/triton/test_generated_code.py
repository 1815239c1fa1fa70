"""What the kernels compile to, for GPUs that need not be there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.generated_code import Instruction, main_path

ROOT = Path(__file__).parents[2]
KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu")
DTYPES = ("float16", "bfloat16", "float32", "float64")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ORDERS = ("forward", "backward", "double_backward", "double_backward, of x alone")

# Instructions per element, bf16, sm_90, of good forms; a tenth more is left to the compiler. The
# memory of an H100 leaves time for 35 in a forward.
INSTRUCTIONS = {
    "gelu": (22.0, 26.1, 33.5),
    "gelu_tanh": (15.5, 23.0, 34.9),
    "silu": (11.9, 17.0, 25.6),
    "quick_gelu": (12.9, 18.0, 26.6),
}


@functools.cache
def generated(folder: Path, *options: str) -> list[dict]:
    # In a process of its own: in this one, kernels are interpreted.
    file = folder / "code.json"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.generated_code", *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of activation kernels for one target and dtype."""

    def get(target: str, dtype: str, *options: str) -> list[dict]:
        folder = tmp_path_factory.getbasetemp()
        family = ("--family", "activation", "--target", target, "--dtype", dtype)
        return generated(folder, *family, *options)

    return get


def check(rows: list[dict], kinds: tuple[str, ...] = KINDS) -> None:
    assert [(r["kind"], r["order"]) for r in rows] == [(k, o) for k in kinds for o in ORDERS]
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared_bytes"] == 0, row
        assert row["load_bits"] == row["store_bits"] == [128], row


def test_sm_90_bf16(rows):
    here = rows("sm_90", "bfloat16")
    check(here)
    for row in here:
        counts = dict(zip(ORDERS, INSTRUCTIONS[row["kind"]], strict=False))
        counts[ORDERS[3]] = counts[ORDERS[2]]
        assert row["instructions_per_element"] <= 1.1 * counts[row["order"]], row


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_90"])
def test_the_other_targets(rows, target):
    check(rows(target, "bfloat16", "--kind", "gelu"), ("gelu",))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_everything(rows, target, dtype):
    check(rows(target, dtype))


def test_the_main_path_is_the_one_of_whole_blocks():
    code = [
        Instruction((), target="tail"),
        Instruction((), access=("load", 128)),
        Instruction((), access=("load", 32)),  # a narrow access that belongs to it
        Instruction((), target="slow"),
        Instruction(("back",), access=("store", 128)),
        Instruction((), falls_through=False, ends=True),
        Instruction(("tail",), target="end"),  # a tail may skip its accesses
        Instruction((), access=("load", 16)),
        Instruction(("end",), falls_through=False, ends=True),
        Instruction(("slow",), target="back", falls_through=False),
    ]
    assert main_path(code) == code[:6]
