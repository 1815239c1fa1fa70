"""Triton's interpreter runs programs one after the other: few and large ones are fast."""

import pytest


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    try:
        from gn_kernels.layer_norm import triton_kernels
    except ImportError:  # no Triton, no such tests
        return
    monkeypatch.setattr(triton_kernels, "_COLUMNS", 4096)
