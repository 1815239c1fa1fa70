"""The data sets: images in [0, 1] with their labels, in a fixed training and test part."""

from __future__ import annotations

import dataclasses
import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gn_kernels.training.settings import InputError, Settings

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
_FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Of the split alone, so that runs with different seeds are tested on the same images.
_SPLIT_SEED = 0


class Split(Protocol):
    """A part of a data set."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1], float32, and labels (B,), int64."""

    def all_labels(self) -> Tensor:
        """Of every image, in order, without reading the images."""


class TensorSplit:
    """Images in memory, kept as uint8 in steps of 1/``levels``."""

    def __init__(self, images: Tensor, labels: Tensor, levels: int) -> None:
        self.images, self.labels, self.levels = images, labels, levels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices].float() / self.levels, self.labels[indices]

    def all_labels(self) -> Tensor:
        return self.labels


class FolderSplit:
    """Some of the images of a ``torchvision.datasets.ImageFolder``, read when they are needed."""

    def __init__(self, folder: Any, indices: Tensor) -> None:
        self.folder, self.indices = folder, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        try:
            samples = [self.folder[int(index)] for index in self.indices[indices]]
        except OSError as error:
            raise InputError(f"an image of {self.folder.root} can't be read: {error}") from error
        return torch.stack([image for image, _ in samples]), torch.tensor(
            [label for _, label in samples]
        )

    def all_labels(self) -> Tensor:
        return torch.tensor(self.folder.targets)[self.indices]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set and what a model must know of it.

    ``mean`` and ``std`` are of the training pixels, one for each channel.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def summary(self) -> dict[str, Any]:
        """Sizes and class names, as reports and checkpoints hold them."""
        return {
            "name": self.name,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "channels": len(self.mean),
            "classes": list(self.classes),
        }


def load(settings: Settings) -> Dataset:
    """The data set that the settings name.

    Raises:
        InputError: it is missing, damaged, or of another size than the model.
    """
    if settings.dataset == "digits":
        if settings.data is not None:
            raise InputError(
                "the digits come with scikit-learn and need no --data; add --dataset folder or "
                "--dataset fashion-mnist to train on a folder"
            )
        data = _digits()
    elif settings.dataset == "fashion-mnist":
        data = _fashion_mnist(_existing_folder(settings.data or FASHION_MNIST))
    else:
        if settings.data is None:
            raise InputError("--dataset folder needs --data, a folder with class subfolders")
        data = _image_folder(_existing_folder(settings.data), settings.image_size)
    side = data.test.batch(torch.tensor([0]))[0].shape[-1]
    if side != settings.image_size:
        raise InputError(
            f"{data.name} has images of {side}x{side}, but image_size is {settings.image_size}"
        )
    if len(data.train) < settings.batch_size:
        raise InputError(
            f"{data.name} has {len(data.train)} training images, fewer than the batch size "
            f"{settings.batch_size}"
        )
    return data


def _existing_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"the data folder {str(path)!r} does not exist")
    return folder


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8×8 in 17 grey levels: 1,437 and 360."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    kept, held_out = _stratified(labels, 360)
    return _in_memory(
        "digits",
        TensorSplit(images[kept], labels[kept], 16),
        TensorSplit(images[held_out], labels[held_out], 16),
        tuple(str(name) for name in bunch.target_names),
    )


def _fashion_mnist(folder: Path) -> Dataset:
    splits = [
        TensorSplit(
            _idx(folder, f"{part}-images-idx3-ubyte").unsqueeze(1),
            _idx(folder, f"{part}-labels-idx1-ubyte").long(),
            255,
        )
        for part in ("train", "t10k")
    ]
    for split in splits:
        if len(split.images) != len(split.labels) or len(split.labels) == 0:
            raise InputError(f"{folder} holds unequal numbers of images and labels, or none")
        if split.images.dim() != 4 or split.labels.max() >= len(_FASHION_CLASSES):
            raise InputError(
                f"{folder} does not hold grey images of {len(_FASHION_CLASSES)} classes"
            )
    return _in_memory("fashion-mnist", splits[0], splits[1], _FASHION_CLASSES)


def _idx(folder: Path, name: str) -> Tensor:
    """Read an IDX file of unsigned bytes, compressed or not.

    Format: two zero bytes, 8 for unsigned byte, the number of dimensions, each dimension as a
    big-endian uint32, then the elements. Source: http://yann.lecun.com/exdb/mnist/.
    """
    paths = [path for path in (folder / f"{name}.gz", folder / name) if path.is_file()]
    if not paths:
        raise InputError(f"{folder} has no file {name} or {name}.gz")
    try:
        content = paths[0].read_bytes()
        content = gzip.decompress(content) if paths[0].suffix == ".gz" else content
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        start = 4 + 4 * len(shape)
        if content[:3] != b"\0\0\x08" or len(content) != start + math.prod(shape):
            raise ValueError("not an IDX file of unsigned bytes, or cut short")
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise InputError(f"{paths[0]} is damaged: {error}") from error
    array = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(array.copy())


def _in_memory(
    name: str, train: TensorSplit, test: TensorSplit, classes: tuple[str, ...]
) -> Dataset:
    mean, std = [], []
    for channel in train.images.unbind(1):
        # Of the 256 possible values: in float64 without a copy of the data set.
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        value = torch.arange(256).double() / train.levels
        mean.append(float(share @ value))
        std.append(float(share @ (value - mean[-1]) ** 2) ** 0.5)
    return Dataset(name, train, test, classes, tuple(mean), tuple(std))


def _image_folder(folder: Path, image_size: int) -> Dataset:
    """Class subfolders: split 4 to 1, or as the folder's own train/ and val/ (or test/) say."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
        ]
    )
    held_out = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and held_out:
        parts = [_class_folders(part, transform) for part in (folder / "train", held_out[0])]
        if parts[0].classes != parts[1].classes:
            raise InputError(f"{folder / 'train'} and {held_out[0]} have different classes")
        train, test = (FolderSplit(part, torch.arange(len(part))) for part in parts)
    else:
        parts = [_class_folders(folder, transform)]
        labels = torch.tensor(parts[0].targets)
        try:
            train, test = (
                FolderSplit(parts[0], part)
                for part in _stratified(labels, max(len(labels) // 5, len(parts[0].classes)))
            )
        except ValueError as error:
            raise InputError(f"{folder} can't be split into training and test: {error}") from error
    classes = tuple(parts[0].classes)
    return Dataset(str(folder), train, test, classes, _IMAGENET_MEAN, _IMAGENET_STD)


def _class_folders(folder: Path, transform: Any) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform)
    except (FileNotFoundError, RuntimeError) as error:
        raise InputError(
            f"{folder} must hold a subfolder of images for each class: {str(error).splitlines()[0]}"
        ) from error


def _stratified(labels: Tensor, test_size: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and test part, each with the classes in the whole's proportions."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=_SPLIT_SEED
    )
    return torch.from_numpy(train), torch.from_numpy(test)
