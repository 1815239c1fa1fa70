"""A checkpoint is whole or refused, and never runs code."""

import errno
import os
import pickle
import subprocess
import sys

import pytest
import torch

from gn_kernels.training import InputError, checkpoint
from tests.training.conftest import environment


def _state(step):
    return {"step": step, "tensors": {"model:weight": torch.arange(1000.0) + step}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, _state(1))
    return path


def test_round_trip(path):
    state = checkpoint.load(path)
    assert state["step"] == 1
    weight = torch.zeros(1000)
    checkpoint.fill(state, "model", {"weight": weight})
    assert torch.equal(weight, torch.arange(1000.0) + 1)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_last_one_whole(path, monkeypatch, where):
    content = path.read_bytes()
    write = torch.save

    def fail(*arguments):
        if where == "torch.save":
            write({"step": 2}, arguments[1])
            arguments[1].truncate(100)
        raise OSError(errno.ENOSPC, "No space left on device")

    module, name = {
        "torch.save": (torch, "save"),
        "os.fsync": (os, "fsync"),
        "os.replace": (os, "replace"),
    }[where]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(InputError, match=r"No space left on device.*the last one is kept"):
        checkpoint.save(path, _state(2))
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert checkpoint.load(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


_FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from gn_kernels.training import InputError, checkpoint
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    checkpoint.save(path, {"step": 2, "tensors": {"model:weight": torch.zeros(5000)}})
except InputError as error:
    print(error)
"""


def test_a_full_disk_while_writing_leaves_the_last_one_whole(path):
    # A process's limit on the size of files stands for the disk: write() fails the same way.
    command = [sys.executable, "-c", _FULL_DISK, str(path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "can't be written (File too large); the last one is kept" in done.stdout
    assert checkpoint.load(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_takes_its_name(path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (order.append(name), original(*a))
        )
    checkpoint.save(path, _state(2))
    assert order == ["fsync", "replace", "replace", "fsync"]


def test_the_last_two_are_kept(path):
    for step in (2, 3):
        checkpoint.save(path, _state(step))
    before = checkpoint.previous(path)
    assert sorted(path.parent.iterdir()) == sorted([path, before])
    assert (checkpoint.load(path)["step"], checkpoint.load(before)["step"]) == (3, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: _flip_a_weight(path, 2),
        # As a kill between the two renamings leaves it.
        lambda path: path.unlink(),
    ],
)
def test_where_the_last_one_is_damaged_the_one_before_it_is_used(path, caplog, damage):
    checkpoint.save(path, _state(2))
    damage(path)
    assert checkpoint.exists(path)
    assert checkpoint.load(path)["step"] == 1
    assert "the one before it is used, of step 1" in caplog.text


def test_code_in_the_last_one_is_not_passed_over(path):
    checkpoint.save(path, _state(2))
    torch.save({"format": _Code()}, path)
    with pytest.raises(InputError, match="it could run code"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(2)}, r"weight has shape \[1000\] there and \[2\] here"),
        ({}, r"weight has shape \[1000\] there and None here"),
        ({"weight": torch.zeros(1000), "bias": torch.zeros(1)}, "bias has shape None there"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_left(path, tensors, words):
    with pytest.raises(InputError, match=words):
        checkpoint.fill(checkpoint.load(path), "model", tensors)
    assert all(not tensor.any() for tensor in tensors.values())


def _flip_a_weight(path, step=1):
    content = bytearray(path.read_bytes())
    position = content.index((torch.arange(1000.0) + step).numpy().tobytes()) + 2001
    content[position] ^= 0x40
    path.write_bytes(content)


class _Code:
    def __reduce__(self):
        return os.putenv, ("gn_kernels_ran", "1")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "damaged or cut short"),
        (lambda path: path.write_bytes(b""), "damaged or cut short"),
        (lambda path: path.write_bytes(b"nonsense"), "damaged or cut short"),
        (_flip_a_weight, "wrong checksum"),
        (lambda path: path.write_bytes(pickle.dumps({"step": 1})), "damaged or cut short"),
        (lambda path: torch.save({"step": 1}, path), "is not a gn_kernels"),
        (lambda path: torch.save([1], path), "is not a gn_kernels"),
        (lambda path: torch.save({"format": _Code()}, path), "other than"),
        (lambda path: path.unlink(), "no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(path, damage, words):
    damage(path)
    with pytest.raises(InputError, match=words) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
