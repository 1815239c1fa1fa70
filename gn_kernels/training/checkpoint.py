"""Checkpoints that survive an interruption: written beside the last one, then renamed.

A checkpoint of one process is a file, made by ``torch.save``; one of several processes is a folder,
made by ``torch.distributed.checkpoint``, to which each process writes its part. Either is read by
any number of processes. The last two are kept: where the last one is damaged, the one before it is
read. No code runs that a checkpoint may hold.

In memory a checkpoint is a dictionary of plain values, and under ``"tensors"`` a dictionary of
tensors whose names begin with a section: ``model:blocks.0.norm1.weight``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import pickle
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.tensor import DTensor, distribute_tensor

from gn_kernels.training import distribution
from gn_kernels.training.settings import InputError

FORMAT = "gn_kernels training checkpoint 2"
# One process's only: the optimiser's state goes by position there.
FORMAT_1 = "gn_kernels training checkpoint 1"
_VALUES = "run.json"


class _DamagedError(InputError):
    """The checkpoint before this one may be whole."""


def exists(path: Path) -> bool:
    """Whether there is a checkpoint, or the one before it."""
    return path.exists() or previous(path).exists()


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at ``path`` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def discard(path: Path) -> None:
    """Remove the checkpoint at ``path`` and the one before it, which belong to another run."""
    if distribution.rank() == 0:
        _remove(previous(path))
        _remove(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint: a file, or a folder if the run has several processes, which all call.

    It is complete on the disk under another name before it takes the place of the last one, which
    becomes the previous one.

    Raises:
        InputError: it can't be written. The last one is as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if distribution.size() == 1:
            _write_file(partial, state)
            _rotate(partial, path)
        else:
            _write_folder(partial, path, state)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        if not isinstance(error, (OSError, RuntimeError, CheckpointException)):
            raise
        raise InputError(
            f"the checkpoint {path} can't be written ({_reason(error)}); the last one is kept"
        ) from error


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read the last whole checkpoint; the log says if that is the one before the last.

    Of a folder this reads the values alone; :func:`fill` reads the tensors.

    Raises:
        InputError: there is none, it is damaged or cut short, or it is something else.
    """
    if distribution.size() == 1:
        return _load_or_previous(path, device)[1]
    # One process chooses, so that all continue from the same one.
    chosen: tuple[Path | None, str] = (None, "")
    if distribution.rank() == 0:
        try:
            chosen = _load_or_previous(path, device)[0], ""
        except InputError as error:
            chosen = None, str(error)
    whole, reason = distribution.from_first(chosen)
    if whole is None:
        raise InputError(reason)
    return _load(whole, device)


def sizes(state: dict[str, Any], section: str) -> dict[str, list[int]]:
    """The shapes of a section's tensors, by their names without the section."""
    if "folder" in state:
        shapes = state["shapes"]
    else:
        shapes = {name: list(tensor.shape) for name, tensor in state["tensors"].items()}
    start = f"{section}:"
    return {name[len(start) :]: shape for name, shape in shapes.items() if name.startswith(start)}


def fill(state: dict[str, Any], section: str, into: dict[str, Tensor]) -> None:
    """Copy a section of a checkpoint into the tensors of the same names, sharded or not.

    Raises:
        InputError: names or shapes differ. Nothing was copied then.
    """
    theirs = sizes(state, section)
    ours = {name: list(tensor.shape) for name, tensor in into.items()}
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"the checkpoint's {section} does not fit: {name} has shape {theirs.get(name)} "
                f"there and {ours.get(name)} here"
            )
    targets = {f"{section}:{name}": tensor.detach() for name, tensor in into.items()}
    if "folder" in state:
        with warnings.catch_warnings():
            # What it warns of, that this is a single process, is what we tell it.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_sharded(
                targets,
                storage_reader=_Reader(state["folder"]),
                no_dist=distribution.size() == 1,
            )
        return
    for name, target in targets.items():
        source = state["tensors"][name]
        if isinstance(target, DTensor):
            # Each process has the whole tensor already.
            source = distribute_tensor(
                source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(source)


def _write_file(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def _write_folder(partial: Path, path: Path, state: dict[str, Any]) -> None:
    values = {name: value for name, value in state.items() if name != "tensors"}
    tensors: dict[str, Tensor] = state["tensors"]
    if distribution.rank() == 0:
        _remove(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    save_sharded(dict(tensors), storage_writer=FileSystemWriter(partial))
    parts: list[dict[str, list[int]]] = [{}] * distribution.size()
    mine = partial.glob(f"__{distribution.rank()}_*")
    dist.all_gather_object(parts, {file.name: _fingerprint(file) for file in mine})
    reason = None
    if distribution.rank() == 0:
        try:
            files = {".metadata": _fingerprint(partial / ".metadata")}
            for part in parts:
                files |= part
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            content = {"format": FORMAT, **values, "shapes": shapes, "files": files}
            with (partial / _VALUES).open("w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(partial)
            _rotate(partial, path)
        except OSError as error:
            reason = _reason(error)
    reason = distribution.from_first(reason)
    if reason is not None:
        raise RuntimeError(reason)


def _rotate(partial: Path, path: Path) -> None:
    if path.exists():
        _remove(previous(path))
        os.replace(path, previous(path))
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: a renaming is not before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(error).splitlines()[0]


def _load_or_previous(path: Path, device: str) -> tuple[Path, dict[str, Any]]:
    try:
        return path, _load(path, device)
    except _DamagedError as error:
        before = previous(path)
        if not before.exists():
            raise
        state = _load(before, device)
        logging.getLogger("gn_kernels").warning(
            "%s; the one before it is used, of step %s", error, state.get("step")
        )
        return before, state


def _load(path: Path, device: str) -> dict[str, Any]:
    if not path.exists():
        raise _DamagedError(f"there is no checkpoint {path}")
    return _load_folder(path) if path.is_dir() else _load_file(path, device)


def _load_file(path: Path, device: str) -> dict[str, Any]:
    try:
        # torch.load does not compare the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise _DamagedError(f"checkpoint {path} is damaged: {damaged} has a wrong checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path} holds something other than tensors and plain values, and is not "
            "loaded: it could run code"
        ) from error
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise _DamagedError(f"checkpoint {path} is damaged or cut short: {reason}") from error
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, FORMAT_1):
        raise InputError(f"{path} is not a {FORMAT}")
    if state["format"] == FORMAT_1:
        weights = {f"model:{name}": tensor for name, tensor in state.pop("model").items()}
        state["tensors"] = {**weights, "record:": state.pop("record")}
    return state


def _load_folder(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _VALUES).read_text())
    except (OSError, ValueError) as error:
        raise _DamagedError(f"checkpoint {folder} is damaged or cut short: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{folder} is not a {FORMAT}")
    for name, fingerprint in state["files"].items():
        file = folder / name
        if not file.is_file() or _fingerprint(file) != fingerprint:
            raise _DamagedError(
                f"checkpoint {folder} is damaged or cut short: {name} is not as it was"
            )
    _Reader(folder).read_metadata()
    return {**state, "folder": folder}


def _fingerprint(file: Path) -> list[int]:
    """Length and CRC-32."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [file.stat().st_size, checksum]


class _Reader(FileSystemReader):
    """Of PyTorch's format, whose table of contents is a pickle: only of what it is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as stream:
                metadata = _Contents(stream).load()
        except pickle.UnpicklingError as error:
            raise InputError(
                f"checkpoint {path.parent} holds something other than tensors, and is not loaded: "
                "it could run code"
            ) from error
        if not isinstance(metadata, Metadata) or any(
            not isinstance(entry, TensorStorageMetadata)
            for entry in metadata.state_dict_metadata.values()
        ):
            raise InputError(f"checkpoint {path.parent} holds something other than tensors")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Contents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = (
            module == "torch.distributed.checkpoint.metadata"
            or (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
            or (module, name) == ("torch", "Size")
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
            or (module, name) == ("torch.serialization", "_get_layout")
            or (module in ("pathlib", "pathlib._local") and name in pathlib.__all__)
        )
        if not allowed or "." in name:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)
