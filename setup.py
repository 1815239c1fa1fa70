"""Builds the C++ part by CMake. Everything else about the package stands in pyproject.toml.

GN_KERNELS_BUILD=auto  build it where that is possible; install without it where not (the default)
                =cpu   build it, or fail
                =none  don't

gn_kernels/_build_report.txt says what happened and why. torch must be installed already; it is
found by its folder, never imported, so that an isolated build (plain `pip install .`) finds the
torch of the environment it installs into.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


class BuildError(Exception):
    """Why there is no C++ part."""


class CMakeBuild(build_ext):
    def run(self) -> None:
        wanted = os.environ.get("GN_KERNELS_BUILD", "auto")
        if wanted not in ("auto", "cpu", "none"):
            raise SystemExit(f"GN_KERNELS_BUILD must be auto, cpu or none, but got {wanted!r}")
        in_place = self.inplace or self.editable_mode
        output = (ROOT if in_place else Path(self.build_lib).resolve()) / "gn_kernels"
        output.mkdir(parents=True, exist_ok=True)
        for stale in (*output.glob("_native.so"), *output.glob("_build_info.*.so")):
            stale.unlink()
        try:
            if wanted == "none":
                raise BuildError("GN_KERNELS_BUILD=none")
            report = f"ok: built with torch {self.cmake(output)}"
        except (BuildError, OSError) as error:
            if wanted == "cpu":
                raise SystemExit(f"gn_kernels: the C++ part can't be built: {error}") from error
            report = str(error)
        (output / "_build_report.txt").write_text(report + "\n", encoding="utf-8")

    def cmake(self, output: Path) -> str:
        torch, version = find_torch()
        build = Path(self.build_temp).resolve()
        configure = [find_tool("cmake"), "--fresh", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", "-DBUILD_TESTING=OFF"]
        configure += [f"-DGN_KERNELS_TORCH={torch}", f"-DGN_KERNELS_OUTPUT={output}"]
        if importlib.util.find_spec("pybind11"):
            import pybind11

            configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        run(configure)
        run([configure[0], "--build", build])
        return version

    # The files are not setuptools' extensions: it must neither expect nor copy them.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def find_torch() -> tuple[Path, str]:
    """torch's folder and version, without importing it."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    folders += [Path(spec.origin).parent] if spec and spec.origin else []
    for folder in folders:
        if (folder / "version.py").exists():
            version = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())[1]
            if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
                oldest = ".".join(map(str, OLDEST_TORCH))
                raise BuildError(f"torch {version} is older than {oldest}")
            return folder, version
    raise BuildError("torch is not installed; install it first, then install gn_kernels again")


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
        last = "\n".join(result.stdout.strip().splitlines()[-20:])
        raise BuildError(f"{Path(command[0]).name} failed:\n{last}")


# One extension, so that setuptools runs build_ext and marks the wheel as built for this platform.
setup(
    ext_modules=[Extension("gn_kernels._build_info", [])],
    cmdclass={"build_ext": CMakeBuild},
)
