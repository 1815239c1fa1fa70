"""Triton's interpreter runs programs one after the other: few and large ones are fast."""

import pytest


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    try:
        from gn_kernels.attention import triton_kernels
    except ImportError:  # no Triton, no such tests
        return
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 3)
    large = triton_kernels.Tiling(queries=64, keys=32, warps=4, stages=1)
    monkeypatch.setattr(triton_kernels, "tiling", lambda *_: large)
