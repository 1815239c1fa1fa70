from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import gn_kernels
from gn_kernels import backend
from gn_kernels.backend import Installed, choose

EVERYTHING = Installed(triton=None, native=None, triton_interpreter=False, native_cuda=None)
NOTHING = Installed("no Triton", "no compiler", False, "no nvcc")


@pytest.mark.parametrize(
    ("device", "installed", "requested", "expected"),
    [
        ("cuda", EVERYTHING, None, "triton"),
        ("cpu", EVERYTHING, None, "native"),
        ("mps", EVERYTHING, None, "reference"),
        ("cuda", NOTHING, None, "reference"),
        ("cpu", NOTHING, None, "reference"),
        ("cuda", EVERYTHING, "reference", "reference"),
        ("cuda", EVERYTHING, "native", "native"),
        ("cuda", EVERYTHING._replace(triton="no Triton"), None, "native"),
        ("cuda", EVERYTHING._replace(native_cuda="no nvcc"), "native", None),
        ("mps", EVERYTHING, "native", None),
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
    assert choice == ("reference", (("triton", "no Triton"), ("native", "no nvcc")))
    own = choose("cpu", torch.float32, EVERYTHING, unsupported=(("native", "rows too long"),))
    assert own == ("reference", (("native", "rows too long"),))


def test_small_gpu_tensors_prefer_native_where_it_is():
    def choice(installed, **options):
        return choose("cuda", torch.float32, installed, small=True, **options)

    assert choice(EVERYTHING) == ("native", ())
    assert choice(EVERYTHING._replace(native_cuda="no nvcc")) == ("triton", ())
    assert choice(EVERYTHING, unsupported=(("native", "rows too long"),)) == ("triton", ())
    assert choice(EVERYTHING, requested="triton") == ("triton", ())
    assert not backend.is_small(torch.empty(1))


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((8, 0), "sm_80 sm_90 sm_100+PTX", True),
        ((8, 9), "sm_80 sm_90 sm_100+PTX", True),
        ((7, 5), "sm_80 sm_90 sm_100+PTX", False),
        ((12, 0), "sm_80 sm_90 sm_100+PTX", True),
        ((12, 0), "sm_80 sm_90 sm_100", False),
        ((8, 0), "sm_86+PTX", False),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a+PTX", False),
    ],
)
def test_which_gpus_run_what_was_built(capability, built, expected):
    assert backend.runs_on(capability, built) is expected


def test_a_gpu_too_old_for_the_cuda_kernels(monkeypatch):
    backend.select.cache_clear()
    backend._refusal_of_gpus.cache_clear()
    monkeypatch.setattr(backend, "installed", lambda: EVERYTHING)
    monkeypatch.setattr(backend, "_build_details", lambda: {"CUDA architectures": "sm_80+PTX"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    try:
        assert backend.select("cuda", torch.float32, None, small=True) == "triton"
        with pytest.raises(RuntimeError, match=r"T4 is sm_75: set TORCH_CUDA_ARCH_LIST=7\.5"):
            backend.select("cuda", torch.float32, "native")
    finally:
        backend.select.cache_clear()
        backend._refusal_of_gpus.cache_clear()


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
