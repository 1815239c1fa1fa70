"""What every test shares: the interpreter for Triton, one thread, a fixed seed."""

import os

# Read when a kernel is decorated, so before anything imports Triton. GPU kernels then run on CPU
# tensors; nothing else in the suite asks for the triton backend.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def backends() -> list[str]:
    """Those that serve CPU tensors here, for parametrisation."""
    from gn_kernels.backend import BACKENDS, choose, installed

    return [
        name
        for name in BACKENDS
        if choose("cpu", torch.float32, installed(), requested=name).backend
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends())
