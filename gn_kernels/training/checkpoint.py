"""Checkpoints that survive an interruption: written beside the last one, then renamed."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from gn_kernels.training.recipe import InputError

_FORMAT = "gn_kernels training checkpoint 1"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``, tensors and plain Python values, so that ``path`` is whole at any moment.

    The file is complete on the disk under another name before it takes the place of the last one.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    # The renaming itself is on the disk only once the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; runs no code that the file may hold.

    Raises:
        InputError: there is none, it is damaged or cut short, or it is something else.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        # torch.load does not compare the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"checkpoint {path} is damaged: {damaged} has a wrong checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path} holds something other than tensors and plain values, and is not "
            "loaded: it could run code"
        ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged or cut short: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise InputError(f"{path} is not a {_FORMAT}")
    return state
