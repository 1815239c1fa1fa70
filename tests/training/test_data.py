"""The data sets, and what is said of missing and damaged ones."""

import dataclasses
import gzip
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from gn_kernels import training
from gn_kernels.training import InputError, Settings, load
from gn_kernels.training.data import TensorSplit


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


def _cifar(folder, names=None, count=20):
    generator = np.random.default_rng(0)
    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    for name in names or [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": images, "labels": [i % 10 for i in range(count)], "batch_label": name}
        (inner / name).write_bytes(pickle.dumps(content, protocol=2))
    return inner


def _cifar_settings(folder):
    return Settings(dataset="cifar10", data=str(folder), image_size=32, patch_size=4, batch_size=10)


def test_cifar10_reads_torchvisions_files(tmp_path):
    inner = _cifar(tmp_path)
    for folder in (tmp_path, inner):
        data = load(_cifar_settings(folder))
        assert (len(data.train), len(data.test), len(data.mean)) == (100, 20, 3)
    images, labels = data.train.batch(torch.tensor([23]))
    with (inner / "data_batch_2").open("rb") as file:
        row = pickle.load(file)["data"][3]
    # Rows of red, then green, then blue, as torchvision's own reader has it.
    np.testing.assert_array_equal((images[0] * 255).round().numpy(), row.reshape(3, 32, 32))
    assert labels.tolist() == [3]


class _Code:
    def __reduce__(self):
        return os.putenv, ("gn_kernels_ran", "1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nonsense", "damaged"),
        (pickle.dumps({"data": _Code(), "labels": [1]}), "holds a posix.putenv"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "as many labels"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "ten classes"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "hold images"),
        (pickle.dumps({"data": np.zeros((1, 30), np.uint8), "labels": [1]}), "damaged"),
    ],
)
def test_a_damaged_cifar_file_is_named_and_no_code_runs(tmp_path, content, words):
    damaged = _cifar(tmp_path) / "data_batch_3"
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        load(_cifar_settings(tmp_path))
    assert str(damaged) in str(error.value)
    assert "\n" not in str(error.value)
    assert "gn_kernels_ran" not in os.environ


@pytest.mark.parametrize(
    ("dataset", "where", "command"),
    [
        ("fashion-mnist", "FASHION_MNIST", "apt-get install dataset-fashion-mnist"),
        ("patches", "PHOTOGRAPHS", "apt-get install mate-backgrounds"),
        ("cifar10", None, "CIFAR10('data', download=True)"),
    ],
)
def test_missing_data_is_answered_with_the_command_that_gets_it(
    dataset, where, command, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    if where:
        monkeypatch.setattr(training.data, where, "/no/such/folder")
    with pytest.raises(InputError, match=re.escape(command)):
        load(Settings(dataset=dataset, image_size=32, patch_size=4))


def _gradient_photo(path, width, height, channel):
    pixels = np.zeros((height, width, 3), np.uint8)
    rows, columns = np.mgrid[:height, :width] // 128
    pixels[..., channel] = 100 + 100 * ((rows + columns) % 2)
    Image.fromarray(pixels).save(path)


def test_patches_for_training_and_test_share_no_pixel(tmp_path):
    # White squares are for the test, grey ones for training: no patch may have both.
    for channel, name in enumerate(("red", "green", "blue")):
        _gradient_photo(tmp_path / f"{name}.png", 1024, 256 + 128 * channel, channel)
    data = load(Settings(dataset="patches", data=str(tmp_path), image_size=16, patch_size=4))
    assert (len(data.train), len(data.test)) == (1200, 240)
    assert data.classes == ("blue", "green", "red")
    for split, value in ((data.train, 100), (data.test, 200)):
        images, labels = split.batch(_indices(split))
        expected = torch.zeros(len(split), 3)
        expected[torch.arange(len(split)), 2 - labels] = value
        torch.testing.assert_close(images * 255, expected[:, :, None, None].expand_as(images))


def test_patches_are_the_same_every_time_and_need_photographs(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        noise = generator.integers(0, 256, (300, 600, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    settings = Settings(dataset="patches", data=str(tmp_path), image_size=8, patch_size=2)
    first, second = (load(settings).train.batch(torch.arange(800))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 700
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"a\.png can't be read"):
        load(settings)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="two photographs"):
        load(settings)


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


def test_the_centre_crop_keeps_the_ratio_of_the_resized_image(tmp_path):
    # A frame of white around black: at 0.875 of 32 pixels the outer 2 of 256/224 · 28 are gone.
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for index in range(10):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste("black", (4, 4, 60, 60))
            picture.save(tmp_path / name / f"{index}.png")
    options = {"dataset": "folder", "data": str(tmp_path), "image_size": 28, "batch_size": 4}
    options |= {"patch_size": 4, "interpolation": "bicubic"}
    cropped = load(Settings(**options, crop_ratio=0.875)).test.batch(torch.tensor([0]))[0]
    whole = load(Settings(**options)).test.batch(torch.tensor([0]))[0]
    assert cropped.shape == whole.shape == (1, 3, 28, 28)
    assert cropped.max() < 0.3
    assert whole.max() > 0.9


@pytest.mark.parametrize("damage", [b"nonsense", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path, damage):
    _paint(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    settings = Settings(dataset="folder", data=str(tmp_path), image_size=16, batch_size=4)
    with pytest.raises(InputError, match=r"\.png can't be read") as error:
        load(settings)
    assert "\n" not in str(error.value)


def test_a_list_chooses_the_test_images(tmp_path):
    _paint(tmp_path / "train")
    _paint(tmp_path / "val")
    listed = tmp_path / "val.txt"
    listed.write_text("dogs/3.png 1\nval/cats/7.png\n\n")
    settings = Settings(
        dataset="folder",
        data=str(tmp_path),
        image_size=16,
        batch_size=4,
        test_list=str(listed),
    )
    images, labels = load(settings).test.batch(torch.tensor([0, 1]))
    assert labels.tolist() == [1, 0]
    torch.testing.assert_close(images[:, 1, 0, 0] * 255, torch.tensor([30.0, 70.0]))
    listed.write_text("dogs/33.png\n")
    with pytest.raises(InputError, match=r"dogs/33.png, which is not among"):
        load(settings)


def test_pixels_and_labels_out_of_range_are_refused():
    images = torch.full((2, 1, 2, 2), 17, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"\[0, 1\], but a pixel is 17/16"):
        TensorSplit(images, torch.tensor([0, 1]), 16)
    with pytest.raises(InputError, match="labels must be at least 0"):
        TensorSplit(images, torch.tensor([0, -1]), 255)


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


def test_train_images_are_chosen_once_and_validation_images_are_no_training_images(idx_folder):
    whole = load(_fashion(idx_folder)).train.batch(torch.arange(40))[0]

    def chosen(**options):
        data = load(dataclasses.replace(_fashion(idx_folder), **options))
        return [
            {
                int((whole == image).flatten(1).all(1).nonzero())
                for image in split.batch(_indices(split))[0]
            }
            for split in (data.train, data.test)
            if len(split) != 20  # the test images
        ]

    (ten,) = chosen(train_images=10)
    (twelve,) = chosen(train_images=12)
    assert len(ten) == 10
    assert ten < twelve
    train, held_out = chosen(validate=True)
    assert (len(train), len(held_out)) == (36, 4)
    assert not train & held_out
    assert chosen(validate=True, train_images=12) == [twelve, held_out]
    with pytest.raises(InputError, match="train_images is 37, but fashion-mnist has 36"):
        chosen(validate=True, train_images=37)
