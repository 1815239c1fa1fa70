"""A checkpoint is whole or refused, and never runs code."""

import os
import pickle

import pytest
import torch

from gn_kernels.training import InputError, checkpoint


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "weight": torch.arange(1000.0)})
    return path


def test_round_trip(path):
    state = checkpoint.load(path)
    assert state["step"] == 1
    assert torch.equal(state["weight"], torch.arange(1000.0))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_last_one_whole(path, monkeypatch, where):
    content = path.read_bytes()
    write = torch.save

    def fail(*arguments):
        if where == "torch.save":
            write({"step": 2}, arguments[1])
            arguments[1].truncate(100)
        raise OSError("no space left on device")

    module, name = {
        "torch.save": (torch, "save"),
        "os.fsync": (os, "fsync"),
        "os.replace": (os, "replace"),
    }[where]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert checkpoint.load(path)["step"] == 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_is_on_the_disk_before_it_takes_its_name(path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (order.append(name), original(*a))
        )
    checkpoint.save(path, {"step": 2})
    assert order == ["fsync", "replace", "fsync"]


def _flip_a_weight(path):
    content = bytearray(path.read_bytes())
    position = content.index(torch.arange(1000.0).numpy().tobytes()) + 2001
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
