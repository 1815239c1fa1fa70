"""Which kernels run: one pure function that chooses, and what it looks at.

``triton`` serves GPU tensors, ``native`` (the C++ and CUDA C++ of ``csrc/``) CPU tensors and, where
Triton is missing or a tensor is small, those on NVIDIA's GPUs; ``reference`` (the formulas in plain
PyTorch) serves everything. A backend that is asked for by name runs or raises with its
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
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from gn_kernels.version import __version__

BACKENDS = ("triton", "native", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What each kind of device prefers, best first. Any other device has the formulas.
_PREFERENCE = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}

# GPU tensors up to this many elements prefer the native kernels, which a C++ function launches, to
# Triton's, whose launcher in Python takes longer. 2²⁰ elements of 16 bits are 2 MiB a tensor, 4 to
# 10 MiB moved: 1 to 3 µs of an H100's memory and twice that of an A100's, less than either launch:
# up to here a step waits for the host and not for the kernel. Reasoned; not measured on a GPU.
SMALL_ON_GPU = 1 << 20

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
    native_cuda: str | None


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
    small: bool = False,
) -> Choice:
    """Choose the backend of one call, from its arguments alone.

    Args:
        device: type of the tensors' device, such as ``"cuda"``.
        dtype: their dtype.
        installed: what this process has.
        requested: a backend asked for by name, or None for the best that can run.
        unsupported: pairs (backend, reason) that the calling family refuses by itself.
        small: whether launching costs more than computing, see :func:`is_small`.

    Returns:
        The choice. ``backend`` is None only where ``requested`` can't run.
    """
    own = dict(unsupported)
    refusals: list[tuple[str, str]] = []
    preferred = _PREFERENCE.get(device, ("reference",))
    if small and device == "cuda":
        native = own.get("native") or _refusal("native", device, dtype, installed)
        preferred = preferred if native else ("native", *preferred)
    for backend in (requested,) if requested else preferred:
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
        if device == "cuda":
            return installed.native_cuda
        if installed.native is not None:
            return installed.native
        return None if device == "cpu" else f"it needs a CPU or CUDA tensor, not one on {device!r}"
    return None


def is_small(x: torch.Tensor) -> bool:
    """Whether x is a GPU tensor on which Triton's launch would cost more than the kernel."""
    return x.is_cuda and x.numel() <= SMALL_ON_GPU


@functools.cache
def select(
    device: str,
    dtype: torch.dtype,
    requested: str | None,
    unsupported: tuple[tuple[str, str], ...] = (),
    small: bool = False,
) -> str:
    """:func:`choose` for this process: the name, or RuntimeError with the reasons.

    Cached, so that the log names a fallback once and a call costs one look-up.
    """
    here = installed()
    if device == "cuda" and here.native_cuda is None:
        here = here._replace(native_cuda=_refusal_of_gpus())
    choice = choose(device, dtype, here, requested, unsupported, small)
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
    native = _load_native()
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    return Installed(triton, native, interpreter, native or _missing_cuda())


def _load_native() -> str | None:
    if not _LIBRARY.exists():
        return f"the C++ kernels were not built{_reported('cpu')}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} can't be loaded with torch {torch.__version__}: {error}"
    return None


def _missing_cuda() -> str | None:
    # Looks at no device: whether there is a GPU is no question before there is a tensor on it.
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(
        "gn_kernels::activation_forward.native", "CUDA"
    ):
        return f"the CUDA kernels were not built{_reported('cuda')}"
    return None


def _reported(part: str) -> str:
    # What the build says about a part, as ": reason".
    lines = _BUILD_REPORT.read_text(encoding="utf-8") if _BUILD_REPORT.exists() else ""
    said = re.search(rf"^{part}: (.*)", lines, re.MULTILINE)
    return f": {said[1]}" if said else ""


@functools.cache
def _refusal_of_gpus() -> str | None:
    built = _build_details().get("CUDA architectures", "")
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if built and not runs_on(capability, built):
            major, minor = capability
            return (
                f"the CUDA kernels were built for {built}, and {torch.cuda.get_device_name(device)}"
                f" is sm_{major}{minor}: set TORCH_CUDA_ARCH_LIST={major}.{minor} and install"
                " gn_kernels again"
            )
    return None


def runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether a GPU runs code for ``built``, such as ``"sm_80 sm_90+PTX"``.

    Machine code runs on the GPUs of its major version from its minor version on, PTX on all later
    ones; both of an architecture with a suffix, such as sm_90a, on that one alone.
    """
    for major, minor, suffix, ptx in re.findall(r"sm_(\d+)(\d)([a-z]?)(\+PTX)?", built):
        code = int(major), int(minor)
        if code == capability:
            return True
        same_major = capability[0] == code[0]
        if not suffix and code < capability and (ptx or same_major):
            return True
    return False


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
        "native for CUDA": here.native_cuda or f"available ({_cuda_details()})",
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


def _build_details() -> dict[str, str]:
    try:
        build = importlib.import_module("gn_kernels._build_info")
    except ImportError as error:
        return {"no details": str(error)}
    return dict(build.describe())


def _native_details() -> str:
    details = _build_details().items()
    return ", ".join(f"{key} {value}" for key, value in details if not key.startswith("CUDA"))


def _cuda_details() -> str:
    details = _build_details()
    return f"CUDA {details.get('CUDA', '?')}, {details.get('CUDA architectures', '?')}"
