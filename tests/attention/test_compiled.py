"""The attention kernels compile for each GPU and, in bfloat16, keep to the registers of an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ORDERS = {
    "_forward",
    "_backward_delta",
    "_backward_queries",
    "_backward_keys",
    "_double_statistics",
    "_double_queries",
    "_double_keys",
}


def compiled(*arguments: str) -> dict[str, dict[str, int]]:
    # In a process of its own: whether kernels are interpreted is settled where they are decorated.
    output = subprocess.run(
        [sys.executable, "-m", "tests.attention.compiled", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    return {row.pop("kernel"): row for row in rows}


@pytest.mark.parametrize("size", [32, 64, 128])
def test_nothing_spills_on_an_h100(size):
    kernels = compiled("sm_90", "bfloat16", str(size))
    assert kernels.keys() == ORDERS
    for name, row in kernels.items():
        assert row["spilled"] == 0, (name, row)
        assert row["shared"] < 100 * 1024, (name, row)  # so that consumer GPUs run it too
        assert (row["tensor_core_products"] > 0) == (name != "_backward_delta")


def test_nothing_spills_for_the_windows_of_swin():
    kernels = compiled("sm_90", "bfloat16", "32", "bias")
    assert kernels.keys() == ORDERS | {"_backward_bias", "_double_bias"}
    assert not any(row["spilled"] for row in kernels.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("sm_80", "float16", "80"),
        ("sm_90", "float32", "24"),
        ("sm_100", "bfloat16", "64", "bias"),
        ("gfx942", "bfloat16", "64", "bias"),
    ],
)
def test_every_target_compiles(arguments):
    kernels = compiled(*arguments)
    limit = 64 if arguments[0] == "gfx942" else 160  # KiB that a program may have
    assert all(row["shared"] <= limit * 1024 for row in kernels.values())
