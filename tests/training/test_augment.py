"""Reading, augmenting and mixing depend on the seed, the epoch and the image alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from gn_kernels.training import InputError, Settings, load
from gn_kernels.training.augment import Reader, mixer
from gn_kernels.training.data import Dataset, TensorSplit

EVERYTHING = {
    "train_crop": "resized",
    "flip": 0.5,
    "colour_jitter": 0.4,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
}


def _plan(number):
    # Three batches of four images an epoch.
    return torch.arange(4) + 4 * (number % 3), number // 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (path / name).mkdir()
        for index in range(10):
            noise = generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((60, 48)).save(path / name / f"{index}.png")
    return path


def _reader(folder, **options):
    settings = Settings(
        **{
            "dataset": "folder",
            "data": str(folder),
            "image_size": 16,
            "batch_size": 4,
            "patch_size": 4,
            **options,
        }
    )
    return Reader(load(settings), settings, _plan, 9)


def test_workers_and_restarts_change_nothing(folder):
    here = _reader(folder, **EVERYTHING)
    expected = [here(number)[0] for number in range(9)]
    there = _reader(folder, **EVERYTHING, workers=2)
    for number in (0, 1, 2, 3, 7, 8, 4, 5):
        assert torch.equal(there(number)[0], expected[number])
    # The same images in another epoch, and with another seed.
    assert not torch.equal(expected[0], expected[3])
    other = _reader(folder, **EVERYTHING, seed=1)
    assert not torch.equal(expected[0], other(0)[0])


def test_the_global_generators_stay_as_they_are(folder):
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    _reader(folder, **EVERYTHING)(0)
    _reader(folder, **EVERYTHING, workers=1)(0)
    assert states == [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("option", [*EVERYTHING.items(), ("train_crop", "padded")])
def test_each_augmentation_changes_images_and_keeps_them_in_range(folder, option):
    plain, augmented = _reader(folder), _reader(folder, **dict([option]))
    both = [(plain(number)[0], augmented(number)[0]) for number in range(9)]
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in both)
    assert all(b.min() >= 0 and b.max() <= 1 and b.shape == a.shape for a, b in both)


def test_flips_are_flips(folder):
    plain, flipped = _reader(folder), _reader(folder, flip=1.0)
    torch.testing.assert_close(flipped(0)[0], plain(0)[0].flip(-1), rtol=0, atol=1e-6)


def test_grey_images_in_memory_are_augmented_as_well():
    settings = Settings(**EVERYTHING)
    images, labels = Reader(load(settings), settings, _plan, 9)(0)
    plain = Reader(load(Settings()), Settings(), _plan, 9)(0)
    assert images.shape == plain[0].shape
    assert torch.equal(labels, plain[1])
    assert not torch.allclose(images, plain[0], atol=0.1)


def test_an_unreadable_image_is_one_sentence_from_a_worker_too(folder, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.new("RGB", (16, 16)).save(tmp_path / name / f"{index}.png")
    readers = [_reader(tmp_path, workers=workers) for workers in (0, 1)]
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"nonsense")
    for reader in readers:
        with pytest.raises(InputError, match=r"\.png can't be read") as error:
            reader(0)
        assert "\n" not in str(error.value)


def test_images_outside_of_0_to_1_are_refused():
    class Bytes(TensorSplit):
        def batch(self, indices):
            return self.images[indices].float(), self.labels[indices]

    split = Bytes(torch.full((12, 1, 4, 4), 200, dtype=torch.uint8), torch.zeros(12).long(), 255)
    data = Dataset("bytes", split, split, ("one",), (0.5,), (0.5,))
    with pytest.raises(InputError, match=r"in \[0, 1\], but a training batch is in \[200, 200\]"):
        Reader(data, Settings(), _plan, 3)(0)


def test_a_misspelt_randaugment_is_named(folder):
    with pytest.raises(InputError, match="not in timm's notation"):
        _reader(folder, rand_augment="rant-m9")


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_are_what_the_images_are_mixed_of(kind):
    # Black and white images: the mean of a mixed one is its share of white.
    images = torch.zeros(6, 1, 8, 8)
    images[3:] = 1
    mix = mixer(Settings(**{kind: 1.0}, label_smoothing=0.1), 4)
    np.random.seed(0)
    mixed, targets = mix(images.clone(), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert 0.01 < mixed[0].mean() < 0.99
    white = mixed.mean((1, 2, 3))
    # Smoothing takes 0.1 of each label and gives every class a quarter of that.
    torch.testing.assert_close(targets[:, 1], 0.9 * white + 0.025)
    torch.testing.assert_close(targets[:, 0], 0.9 * (1 - white) + 0.025)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_without_mixing_the_batch_is_the_same_object():
    images, labels = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])
    same = mixer(Settings(), 3)(images, labels)
    assert same[0] is images
    assert same[1] is labels


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(InputError, match="even number"):
        mixer(Settings(mixup=0.2), 3)(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2]))
