"""The kernels compile for each GPU, and for the widths of ViTs as well as can be on an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Tensors of x's size that a kernel reads and writes.
TILES = {
    "_forward_kernel": (1, 1),
    "_backward_kernel": (2, 1),
    "_double_backward_kernel": (3, 2),
}


def compiled(*arguments: str) -> list[dict]:
    # In a process of its own: in this one, kernels are interpreted.
    output = subprocess.run(
        [sys.executable, "-m", "tests.layer_norm.compiled", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def check(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == {*TILES, "_column_sums_kernel"}
    for row in rows:
        assert row["spills"] == 0, row
        reads, writes = TILES.get(row["kernel"], (0, 0))
        assert row["loads"].count(128) >= reads, row
        assert row["stores"].count(128) >= writes, row


def test_sm_90_bf16():
    check(compiled("sm_90", "bfloat16", "384"))


@pytest.mark.slow
def test_every_width_of_a_vit():
    check(compiled("sm_90", "bfloat16", "192", "768", "1024", "1536"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("sm_80", "float16", "384"),
        ("sm_90", "float32", "768"),
        ("sm_100", "bfloat16", "1024"),
        ("gfx942", "bfloat16", "384", "1024"),
    ],
    ids="-".join,
)
def test_every_target(arguments):
    check(compiled(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_odd_and_long_rows_compile(target, dtype):
    assert len(compiled(target, dtype, "1", "197", "8192", "65536")) == 4 * 9
