from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import gn_kernels
from gn_kernels import backend
from gn_kernels.backend import Installed, choose

EVERYTHING = Installed(triton=None, native=None, triton_interpreter=False)
NOTHING = Installed("no Triton", "no compiler", False)


@pytest.mark.parametrize(
    ("device", "installed", "requested", "expected"),
    [
        ("cuda", EVERYTHING, None, "triton"),
        ("cpu", EVERYTHING, None, "native"),
        ("mps", EVERYTHING, None, "reference"),
        ("cuda", NOTHING, None, "reference"),
        ("cpu", NOTHING, None, "reference"),
        ("cuda", EVERYTHING, "reference", "reference"),
        ("cuda", EVERYTHING, "native", None),
        ("cpu", EVERYTHING, "triton", None),
        ("cpu", EVERYTHING._replace(triton_interpreter=True), "triton", "triton"),
        ("cpu", EVERYTHING._replace(triton_interpreter=True), None, "native"),
        ("cpu", NOTHING, "native", None),
    ],
)
def test_choice(device, installed, requested, expected):
    choice = choose(device, torch.float32, installed, requested)
    assert choice.backend == expected
    assert expected is not None or choice.refusals


def test_refusals_are_reported():
    choice = choose("cuda", torch.float32, NOTHING)
    assert choice == ("reference", (("triton", "no Triton"),))
    own = choose("cpu", torch.float32, EVERYTHING, unsupported=(("native", "rows too long"),))
    assert own == ("reference", (("native", "rows too long"),))


def test_unknown_dtypes_are_refused():
    assert choose("cpu", torch.int32, EVERYTHING).backend is None


def test_asked_for_by_name_it_raises_with_the_reason(monkeypatch):
    backend.select.cache_clear()
    monkeypatch.setattr(backend, "installed", lambda: NOTHING)
    try:
        with gn_kernels.use_backend("native"), pytest.raises(RuntimeError, match="no compiler"):
            gn_kernels.gelu(torch.ones(1))
    finally:
        backend.select.cache_clear()


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    backend.select.cache_clear()
    monkeypatch.setattr(backend, "installed", lambda: NOTHING)
    try:
        with caplog.at_level(logging.WARNING, "gn_kernels"):
            for _ in range(3):
                gn_kernels.gelu(torch.ones(1))
        assert len(caplog.messages) == 1
        assert "no compiler" in caplog.text
    finally:
        backend.select.cache_clear()


def test_use_backend_restores_and_nests():
    assert backend.requested() is None
    with gn_kernels.use_backend("reference"):
        with gn_kernels.use_backend(None):
            assert backend.requested() is None
        with pytest.raises(ZeroDivisionError), gn_kernels.use_backend("native"):
            _ = 1 / 0
        assert backend.requested() == "reference"
    assert backend.requested() is None


def test_use_backend_rejects_unknown_names():
    with pytest.raises(ValueError, match="name must be one of"), gn_kernels.use_backend("cuda"):
        pass


def test_info_names_every_backend():
    lines = gn_kernels.info()
    assert {"torch", *backend.BACKENDS} <= lines.keys()


def imported(statements: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running ``statements``."""
    code = (
        f"import sys, torch\n{statements}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_is_light():
    # No device, no extra, no C++ library; Triton only through torch's own counter of FLOP.
    with_counter = imported("import torch.utils.flop_counter")
    assert imported("import gn_kernels") - with_counter == {"gn_kernels"}


def test_works_without_triton():
    code = "sys.modules['triton'] = None; import gn_kernels; gn_kernels.gelu(torch.ones(3))"
    assert "gn_kernels" in imported(code)
