"""Which kernels run: one pure function that chooses, and what it looks at.

``triton`` serves GPU tensors, ``native`` (the C++ of ``csrc/``) CPU tensors, ``reference`` (the
formulas in plain PyTorch) everything. A backend that is asked for by name runs or raises with its
reasons; one that is chosen automatically may fall back, and says so once in the log.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from gn_kernels.version import __version__

BACKENDS = ("triton", "native", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What each kind of device prefers, best first. Any other device has the formulas.
_PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("native", "reference")}

_LIBRARY = Path(__file__).with_name("_native.so")
_BUILD_REPORT = Path(__file__).with_name("_build_report.txt")

_log = logging.getLogger("gn_kernels")

# Process-wide rather than thread-local: autograd runs the backward kernels of GPU tensors on
# threads of its own, which see neither thread-locals nor context variables of the caller.
_requested: str | None = None


class Installed(NamedTuple):
    """Why each optional backend can't run in this process; None where it can."""

    triton: str | None
    native: str | None
    triton_interpreter: bool


class Choice(NamedTuple):
    """The backend that runs, or None, and why those that were considered before it don't."""

    backend: str | None
    refusals: tuple[tuple[str, str], ...]


def choose(
    device: str,
    dtype: torch.dtype,
    installed: Installed,
    requested: str | None = None,
    unsupported: tuple[tuple[str, str], ...] = (),
) -> Choice:
    """Choose the backend of one call, from its arguments alone.

    Args:
        device: type of the tensors' device, such as ``"cuda"``.
        dtype: their dtype.
        installed: what this process has.
        requested: a backend asked for by name, or None for the best that can run.
        unsupported: pairs (backend, reason) that the calling family refuses by itself.

    Returns:
        The choice. ``backend`` is None only where ``requested`` can't run.
    """
    own = dict(unsupported)
    refusals: list[tuple[str, str]] = []
    for backend in (requested,) if requested else _PREFERENCE.get(device, ("reference",)):
        reason = own.get(backend) or _refusal(backend, device, dtype, installed)
        if reason is None:
            return Choice(backend, tuple(refusals))
        refusals.append((backend, reason))
    return Choice(None, tuple(refusals))


def _refusal(backend: str, device: str, dtype: torch.dtype, installed: Installed) -> str | None:
    if dtype not in DTYPES:
        return f"it computes float16, bfloat16, float32 and float64, not {dtype}"
    if backend == "triton":
        if installed.triton is not None:
            return installed.triton
        if device == "cuda" or (device == "cpu" and installed.triton_interpreter):
            return None
        return f"it needs a GPU tensor (or TRITON_INTERPRET=1), not one on {device!r}"
    if backend == "native":
        if installed.native is not None:
            return installed.native
        return None if device == "cpu" else f"it needs a CPU tensor, not one on {device!r}"
    return None


@functools.cache
def select(
    device: str,
    dtype: torch.dtype,
    requested: str | None,
    unsupported: tuple[tuple[str, str], ...] = (),
) -> str:
    """:func:`choose` for this process: the name, or RuntimeError with the reasons.

    Cached, so that the log names a fallback once and a call costs one look-up.
    """
    choice = choose(device, dtype, installed(), requested, unsupported)
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in choice.refusals)
    if choice.backend is None:
        raise RuntimeError(
            f"backend {requested!r} was asked for by name and can't run this call: {reasons}"
        )
    if choice.refusals:
        _log.warning("%s tensors of %s run on %r: %s", device, dtype, choice.backend, reasons)
    return choice.backend


def requested() -> str | None:
    """The backend that :func:`use_backend` asks for now, or None."""
    return _requested


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every kernel of gn_kernels on the backend ``name``, within the context.

    It holds for the whole process, since autograd runs backward kernels on its own threads.

    Args:
        name: ``"triton"``, ``"native"``, ``"reference"``, or None for the automatic choice.

    Raises:
        ValueError: ``name`` is none of them.
        RuntimeError: from a call inside the context that the backend can't serve.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name must be one of {BACKENDS} or None, but got {name!r}")
    global _requested
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


@functools.cache
def installed() -> Installed:
    """Look once for the optional backends; loads the C++ library, imports no Triton."""
    triton = None
    if importlib.util.find_spec("triton") is None:
        triton = "Triton is not installed (pip install triton)"
    return Installed(triton, _load_native(), os.environ.get("TRITON_INTERPRET") == "1")


def _load_native() -> str | None:
    if not _LIBRARY.exists():
        report = _BUILD_REPORT.read_text().strip() if _BUILD_REPORT.exists() else ""
        return f"the C++ kernels were not built{': ' + report if report else ''}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} can't be loaded with torch {torch.__version__}: {error}"
    return None


def info() -> dict[str, str]:
    """What is there and why the rest is not, as the lines that ``gn-kernels info`` prints."""
    here = installed()
    lines = {
        "gn_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": here.triton or f"available{_triton_version()}",
        "native": here.native or f"available ({_native_details()})",
        "reference": "available",
    }
    for device in ("cuda", "cpu"):
        choice = choose(device, torch.float32, here, _requested)
        lines[f"{device} tensors run on"] = choice.backend or f"nothing: {choice.refusals[0][1]}"
    return lines


def _triton_version() -> str:
    suffix = ", under its interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    try:
        return f" ({version('triton')}{suffix})"
    except PackageNotFoundError:
        return suffix


def _native_details() -> str:
    try:
        build = importlib.import_module("gn_kernels._build_info")
    except ImportError as error:
        return f"no details: {error}"
    return ", ".join(f"{key} {value}" for key, value in build.describe().items())
