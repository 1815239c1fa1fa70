"""The costs of a step: every method with both kinds of kernels, and the counts that are known."""

import pytest

from gn_kernels.reproduce.cost import REFERENCE, measure
from gn_kernels.reproduce.matrix import METHODS, Run
from gn_kernels.training import Settings
from tests.training.conftest import TINY


def test_flop_ratios_and_memory(tmp_path):
    settings = Settings(**{**TINY, "embed_dim": 32, "batch_size": 16}, activation="gelu")
    turns = []
    result = measure(Run("gradnorm", settings, (), 1, 1), 2, tmp_path, turns.append)
    assert [(stage.done, stage.total) for stage in turns] == [(1, 3), (2, 3), (3, 3)]
    rows = {(row["method"], row["kernels"]): row for row in result["steps"]}
    assert rows.keys() == {(m, k) for m in (*METHODS, REFERENCE) for k in ("gn_kernels", "PyTorch")}
    natural = rows["natural", "PyTorch"]
    # Of a Vision Transformer of any size, since its first layer is a small part.
    for method, ratio in (("gradnorm", 2.05), ("pgd-3", 3.05), (REFERENCE, 4.34)):
        assert rows[method, "PyTorch"]["flop"] / natural["flop"] == pytest.approx(ratio, rel=0.05)
    for row in rows.values():
        assert 0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"]
        assert 0 < row["saved_bytes"] <= row["peak_bytes"]
    # PGD's passes come one after the other; a penalty keeps those of two.
    assert rows["pgd-3", "PyTorch"]["saved_bytes"] == natural["saved_bytes"]
    assert rows["gradnorm", "PyTorch"]["saved_bytes"] > 1.7 * natural["saved_bytes"]
    # Our attention computes its scores again instead of keeping them.
    assert rows["gradnorm", "gn_kernels"]["flop"] > rows["gradnorm", "PyTorch"]["flop"]
