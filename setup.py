"""Builds the C++ part by CMake. Everything else about the package stands in pyproject.toml.

GN_KERNELS_BUILD=auto  build what is possible here; install without the rest (the default)
                =cpu   build the CPU kernels, or fail
                =cuda  build the CPU and the CUDA kernels, or fail; a CPU build of torch will do
                =none  don't

`auto` builds the CUDA kernels where torch is a CUDA build and nvcc is there, GPU or not.
gn_kernels/_build_report.txt says what happened and why, on a line for each of the two. torch must
be installed already; it is found by its folder, never imported, so that an isolated build (plain
`pip install .`) finds the torch of the environment it installs into. `python -m build` builds in an
environment that knows of no other: give it --no-isolation, or torch's folder in GN_KERNELS_TORCH.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
SAID_BY_CMAKELISTS = r"^CMake Error at .*\(message\):\n((?:  .*\n|\n(?=  ))+)"
CHOICES = ("auto", "cpu", "cuda", "none")


class BuildError(Exception):
    """Why something was not built."""


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str  # the CUDA version that it was built for, or ""


class CMakeBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("GN_KERNELS_BUILD", "auto")
        if wanted not in CHOICES:
            choices = ", ".join(CHOICES)
            raise SystemExit(f"GN_KERNELS_BUILD must be one of {choices}, but got {wanted!r}")
        in_place = self.inplace or self.editable_mode
        output = (ROOT if in_place else Path(self.build_lib).resolve()) / "gn_kernels"
        output.mkdir(parents=True, exist_ok=True)
        for stale in (*output.glob("_native.so"), *output.glob("_build_info.*.so")):
            stale.unlink()
        report = {"cpu": "GN_KERNELS_BUILD=none"}
        if wanted != "none":
            report = self.build(wanted, output)
        lines = [f"{part}: {' '.join(what.split())}" for part, what in report.items()]
        (output / "_build_report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def build(self, wanted: str, output: Path) -> dict[str, str]:
        """Build, and tell what happened to each part; SystemExit where it had to succeed."""
        try:
            torch = find_torch()
        except BuildError as error:
            return refuse("cpu", wanted in ("cpu", "cuda"), error)
        built = f"built with torch {torch.version}"
        report = {"cuda": "GN_KERNELS_BUILD=cpu"}
        if wanted == "auto" and not torch.cuda:
            report = {"cuda": f"torch {torch.version} is no CUDA build"}
        elif wanted != "cpu":
            try:
                self.cmake(torch, output, cuda=True)
                return {"cpu": built, "cuda": built}
            except (BuildError, OSError) as error:
                report = refuse("cuda", wanted == "cuda", error)
        try:
            self.cmake(torch, output, cuda=False)
        except (BuildError, OSError) as error:
            return refuse("cpu", wanted == "cpu", error)
        return {"cpu": built, **report}

    def cmake(self, torch: Torch, output: Path, *, cuda: bool) -> None:
        build = Path(self.build_temp).resolve()
        configure = [find_tool("cmake"), "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", "-DBUILD_TESTING=OFF"]
        configure += [f"-DGN_KERNELS_TORCH={torch.folder}", f"-DGN_KERNELS_OUTPUT={output}"]
        if cuda:
            configure += ["-DGN_KERNELS_CUDA=ON", f"-DGN_KERNELS_TORCH_CUDA={torch.cuda}"]
        if importlib.util.find_spec("pybind11"):
            import pybind11

            configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        run(configure)
        run([configure[0], "--build", build])

    # The files are not setuptools' extensions: it must neither expect nor copy them.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def refuse(part: str, asked: bool, error: Exception) -> dict[str, str]:
    if asked:
        raise SystemExit(f"gn_kernels: the {part} kernels can't be built: {error}") from error
    return {part: str(error)}


def find_torch() -> Torch:
    """The torch to build for, without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    folders += [Path(spec.origin).parent] if spec and spec.origin else []
    if named := os.environ.get("GN_KERNELS_TORCH"):
        folders = [Path(named)]
    for folder in folders:
        if (folder / "version.py").exists():
            text = (folder / "version.py").read_text(encoding="utf-8")
            version = re.search(r"__version__ = '([^']+)'", text)[1]
            cuda = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
            if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
                oldest = ".".join(map(str, OLDEST_TORCH))
                raise BuildError(f"torch {version} is older than {oldest}; install a newer one")
            return Torch(folder, version, cuda[1] if cuda else "")
    raise BuildError(
        "torch is not installed; install it first, then install gn_kernels again (a build in an "
        "environment of its own, as `python -m build` makes, needs --no-isolation, or torch's "
        "folder in GN_KERNELS_TORCH)"
    )


def find_tool(name: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise BuildError(f"{name} is not installed")
    return tool


def run(command: list) -> None:
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sys.stdout.write(result.stdout)
    if result.returncode:
        said = re.search(SAID_BY_CMAKELISTS, result.stdout, re.MULTILINE)
        if said:
            raise BuildError(said[1])
        last = "\n".join(result.stdout.strip().splitlines()[-20:])
        raise BuildError(f"{Path(command[0]).name} failed:\n{last}")


# One extension, so that setuptools runs build_ext and marks the wheel as built for this platform.
setup(
    ext_modules=[Extension("gn_kernels._build_info", [])],
    cmdclass={"build_ext": CMakeBuild},
)
