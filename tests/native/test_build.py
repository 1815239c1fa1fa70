"""setup.py where something is missing, broken or does not fit: it says which, and what to set."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
from setuptools.dist import Distribution

ROOT = Path(__file__).parents[2]
TOOLS = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
needs_cmake = pytest.mark.skipif(
    not all(shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja", "c++")),
    reason="needs cmake, ninja and a C++ compiler",
)


@pytest.fixture
def setup(monkeypatch):
    """The names of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def build(setup, monkeypatch, wanted, *, torch_cuda="13.0", cuda=None, cpu=None):
    """The report of a build whose parts fail for the given reasons, and which parts were tried."""
    command = setup["CMakeBuild"](Distribution())
    tried = []

    def cmake(torch, output, *, cuda: bool, reasons=(cpu, cuda)):
        tried.append("cuda" if cuda else "cpu")
        if reasons[cuda]:
            raise setup["BuildError"](reasons[cuda])

    monkeypatch.setattr(command, "cmake", cmake)
    torch = setup["Torch"](ROOT, "2.14.1", torch_cuda)
    monkeypatch.setitem(command.build.__func__.__globals__, "find_torch", lambda: torch)
    return command.build(wanted, ROOT), tried


def test_auto_builds_cuda_for_a_cuda_torch_and_falls_back(setup, monkeypatch):
    built = "built with torch 2.14.1"
    assert build(setup, monkeypatch, "auto") == ({"cpu": built, "cuda": built}, ["cuda"])
    report, tried = build(setup, monkeypatch, "auto", cuda="nvcc was not found")
    assert (report, tried) == ({"cpu": built, "cuda": "nvcc was not found"}, ["cuda", "cpu"])
    report, tried = build(setup, monkeypatch, "auto", cuda="no nvcc", cpu="no compiler")
    assert (report, tried) == ({"cpu": "no compiler"}, ["cuda", "cpu"])
    report, tried = build(setup, monkeypatch, "auto", torch_cuda="")
    assert tried == ["cpu"]
    assert "no CUDA build" in report["cuda"]


def test_what_is_asked_for_is_built_or_fails(setup, monkeypatch):
    _, tried = build(setup, monkeypatch, "cpu")
    assert tried == ["cpu"]
    _, tried = build(setup, monkeypatch, "cuda", torch_cuda="")  # its headers are enough
    assert tried == ["cuda"]
    with pytest.raises(SystemExit, match="the cuda kernels can't be built: nvcc was not found"):
        build(setup, monkeypatch, "cuda", cuda="nvcc was not found")
    with pytest.raises(SystemExit, match="the cpu kernels can't be built: no compiler"):
        build(setup, monkeypatch, "cpu", cpu="no compiler")


def fake_nvcc(folder: Path, version: str = "13.0") -> Path:
    """An nvcc that tells its version and architectures, and otherwise fails."""
    nvcc = folder / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"--version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;\n"
        "--list-gpu-code) echo sm_75; echo sm_80; echo sm_90 ;;\n"
        "*) echo 'the compiler is broken' >&2; exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def configure(folder: Path, *options: str, **environment: str) -> str:
    """What CMake says when it can't configure the CUDA kernels."""
    cmake, ninja = (shutil.which(tool, path=TOOLS) for tool in ("cmake", "ninja"))
    command = [cmake, "--fresh", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DGN_KERNELS_CUDA=ON", "-DBUILD_TESTING=OFF"]
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ""} | environment
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    return " ".join(done.stderr.split())


@needs_cmake
@pytest.mark.slow
def test_faults_of_the_toolkit(tmp_path):
    said = configure(tmp_path, CUDACXX=str(tmp_path / "missing"))
    assert "nvcc was not found: install the CUDA toolkit, or set CUDACXX" in said
    old = str(fake_nvcc(tmp_path, "12.4"))
    said = configure(tmp_path, "-DGN_KERNELS_TORCH_CUDA=13.0", CUDACXX=old)
    assert "is of CUDA 12.4, but torch was built for CUDA 13.0: set CUDACXX to an nvcc" in said
    nvcc = str(fake_nvcc(tmp_path))
    for archs, expected in (
        ("9.9", "names 9.9, which"),
        ("9.9", "it knows 7.5, 8.0, 9.0"),
        ("fast", "names 'fast', which is no architecture: set it to compute capabilities"),
        ("7.0;7.5", "names nothing from 8.0 on"),
    ):
        assert expected in configure(tmp_path, CUDACXX=nvcc, TORCH_CUDA_ARCH_LIST=archs)
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    assert "nvcc is broken: set CUDACXX to one that works" in configure(tmp_path, CUDACXX=nvcc)


@needs_cmake
@pytest.mark.slow
def test_a_compiler_that_fails_is_named_when_cuda_was_asked_for(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    environment = {"GN_KERNELS_BUILD": "cuda", "CUDACXX": str(fake_nvcc(tmp_path))}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "the cuda kernels can't be built" in done.stderr
    said = " ".join(done.stderr.split())
    assert "can't compile: the compiler is broken; set CUDACXX" in said


def test_an_unknown_choice_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"GN_KERNELS_BUILD": "gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "GN_KERNELS_BUILD must be one of auto, cpu, cuda, none, but got 'gpu'" in done.stderr
