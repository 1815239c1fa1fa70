"""Measurements that take hours: what is done stands in a file, and a second run goes on there."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FORMAT = "gn_kernels measurement 1"


class Progress:
    """Partial results on disk, tied to what they are results of.

    Args:
        path: of the file; None keeps nothing.
        identity: all that decides the results: a file of another identity is refused. Plain
            values.

    Attributes:
        content: the partial results, tensors and plain values; empty at first.

    Raises:
        ValueError: the file is of another measurement, or not readable.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.content: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            theirs, content = state["identity"], state["content"]
            known = state["format"] == _FORMAT
        except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise ValueError(
                f"{path} is damaged: delete it to begin the measurement anew"
            ) from error
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(f"{path} is no measurement: choose another file for the results")
        differing = [name for name in identity if identity[name] != theirs.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} holds an unfinished measurement with another {name} "
                f"({theirs.get(name)}, now {identity[name]}): delete it to begin anew, or choose "
                "another file for the results"
            )
        self.content = content

    def save(self) -> None:
        """Write ``content``; the file is whole at any moment."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".new")
        state = {"format": _FORMAT, "identity": self.identity, "content": self.content}
        # Through a file of Python's: torch's own says less of a missing folder or a full disk.
        with partial.open("wb") as file:
            torch.save(state, file)
        os.replace(partial, self.path)


class Stage(NamedTuple):
    """Where a measurement is, for its observer: ``done`` of ``total`` images of one stage."""

    name: str
    done: int
    total: int
    note: str = ""


def digest(values: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names and values, 16 hex digits of it: of ``model.state_dict().items()``, say."""
    found = hashlib.sha256()
    for name, value in values:
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous()
        found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def generator(seed: int, position: int) -> torch.Generator:
    """For the batch at ``position``: what is drawn does not depend on where a run was resumed."""
    # torch's CPU generator looks at the lower 32 bits of its seed only.
    return torch.Generator().manual_seed((1_000_003 * (seed + 1) + position) % 2**32)
