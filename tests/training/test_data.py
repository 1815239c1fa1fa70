"""The data sets, and what is said of missing and damaged ones."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gn_kernels.training import InputError, Settings, load


def _indices(split):
    return torch.arange(len(split))


def test_digits_are_split_the_same_way_always_and_in_proportion():
    from sklearn.datasets import load_digits

    data, again = load(Settings(seed=1)), load(Settings(seed=2))
    assert (len(data.train), len(data.test)) == (1437, 360)
    images, labels = data.test.batch(_indices(data.test))
    torch.testing.assert_close(again.test.batch(_indices(again.test))[0], images, rtol=0, atol=0)
    # Each class within one image of a fifth.
    share = torch.bincount(labels) - 0.2 * torch.bincount(torch.tensor(load_digits().target))
    assert share.abs().max() < 1
    train, _ = data.train.batch(_indices(data.train))
    assert train.min() == 0
    assert train.max() == 1
    # All the images, each of them once.
    everything = torch.cat([train, images]).flatten(1)
    expected = torch.tensor(load_digits().data / 16).float()
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, expected.tolist()))
    # float32 pixels, float64 sums.
    assert data.mean[0] == pytest.approx(train.double().mean().item(), rel=1e-12)
    assert data.std[0] == pytest.approx(train.double().std(correction=0).item(), rel=1e-12)


@pytest.fixture
def idx_folder(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        name = tmp_path / f"{part}-images-idx3-ubyte.gz"
        name.write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">BBBBI", 0, 0, 8, 1, count)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return tmp_path


def _fashion(folder):
    return Settings(dataset="fashion-mnist", data=str(folder), image_size=28, batch_size=10)


def test_fashion_mnist_reads_idx_files_compressed_or_not(idx_folder):
    data = load(_fashion(idx_folder))
    assert (len(data.train), len(data.test), len(data.classes)) == (40, 20, 10)
    images, labels = data.train.batch(torch.tensor([3, 1]))
    expected = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)[[3, 1]]
    np.testing.assert_array_equal((images * 255).round().numpy()[:, 0], expected)
    assert labels.tolist() == [3, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "train-images-idx3-ubyte.gz").unlink(),
        lambda folder: (folder / "train-images-idx3-ubyte.gz").write_bytes(b"nonsense"),
        lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0"),
        lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(
            struct.pack(">BBBBI", 0, 0, 8, 1, 3) + b"\0\1\2"
        ),
    ],
)
def test_damaged_idx_files_are_named(idx_folder, damage):
    damage(idx_folder)
    with pytest.raises(InputError, match=str(idx_folder)):
        load(_fashion(idx_folder))


def _paint(folder, sides=(20, 30)):
    for number, name in enumerate(("cats", "dogs", "newts")):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            colour = (20 * number, 10 * index, 200)
            Image.new("RGB", sides, colour).save(folder / name / f"{index}.png")


def test_folder_is_split_resized_and_read_on_demand(tmp_path):
    _paint(tmp_path)
    settings = Settings(dataset="folder", data=str(tmp_path), image_size=16, batch_size=4)
    data = load(settings)
    assert data.classes == ("cats", "dogs", "newts")
    assert (len(data.train), len(data.test)) == (24, 6)
    images, labels = data.test.batch(torch.tensor([0, 5]))
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images[:, 0, 0, 0] * 255, 20.0 * labels)
    assert torch.bincount(data.test.all_labels()).tolist() == [2, 2, 2]


def test_folder_keeps_its_own_split(tmp_path):
    _paint(tmp_path / "train")
    _paint(tmp_path / "val")
    settings = Settings(dataset="folder", data=str(tmp_path), image_size=16, batch_size=4)
    data = load(settings)
    assert (len(data.train), len(data.test)) == (30, 30)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "folder"}, "needs --data"),
        ({"dataset": "folder", "data": "/no/such/folder"}, "does not exist"),
        ({"dataset": "fashion-mnist", "data": "/no/such/folder"}, "does not exist"),
        ({"data": "/tmp"}, "need no --data"),
        ({"image_size": 16}, "8x8"),
        ({"batch_size": 5000}, "batch size"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_sentence(changes, words):
    with pytest.raises(InputError, match=words) as error:
        load(Settings(**changes))
    assert "\n" not in str(error.value)


def test_empty_folder_and_single_images(tmp_path):
    with pytest.raises(InputError, match="subfolder"):
        load(Settings(dataset="folder", data=str(tmp_path)))
    (tmp_path / "cats").mkdir()
    (tmp_path / "dogs").mkdir()
    for name in ("cats", "dogs"):
        Image.new("RGB", (8, 8)).save(tmp_path / name / "only.png")
    with pytest.raises(InputError, match="split"):
        load(Settings(dataset="folder", data=str(tmp_path)))
