"""The data sets: images in [0, 1] with their labels, in a fixed training and test part."""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gn_kernels.training.settings import InputError, Settings

if TYPE_CHECKING:
    from PIL.Image import Image

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
PHOTOGRAPHS = "/usr/share/backgrounds/mate/nature"
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

    def picture(self, index: int) -> tuple[Image, int]:
        """One image as it is stored, for augmentation, and its label."""

    def all_labels(self) -> Tensor:
        """Of every image, in order, without reading the images."""


class TensorSplit:
    """Images in memory, kept as uint8 in steps of 1/``levels``.

    Raises:
        InputError: a pixel is above ``levels``, so outside [0, 1], or a label below 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, levels: int) -> None:
        self.images, self.labels, self.levels = images, labels, levels
        if images.numel() and images.max() > levels:
            raise InputError(
                f"images must be in [0, 1], but a pixel is {int(images.max())}/{levels}"
            )
        if labels.numel() and labels.min() < 0:
            raise InputError(f"labels must be at least 0, but one is {int(labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.images[indices].float() / self.levels, self.labels[indices]

    def picture(self, index: int) -> tuple[Image, int]:
        from torchvision.transforms.functional import to_pil_image

        image = self.images[index]
        if self.levels != 255:
            image = (image.float() * (255 / self.levels)).round().to(torch.uint8)
        return to_pil_image(image), int(self.labels[index])

    def all_labels(self) -> Tensor:
        return self.labels


class FolderSplit:
    """Some of the images of a ``torchvision.datasets.ImageFolder``, read when they are needed.

    Args:
        folder: without a transform.
        indices: which of its images.
        transform: from a picture to (C, H, W) in [0, 1].
    """

    def __init__(self, folder: Any, indices: Tensor, transform: Any) -> None:
        self.folder, self.indices, self.transform = folder, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        samples = [self.picture(int(index)) for index in indices]
        return torch.stack([self.transform(image) for image, _ in samples]), torch.tensor(
            [label for _, label in samples]
        )

    def picture(self, index: int) -> tuple[Image, int]:
        path, label = self.folder.samples[int(self.indices[index])]
        try:
            return self.folder.loader(path), label
        # What PIL raises depends on the format and on where the file is broken.
        except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"the image {path} can't be read: {reason}") from error

    def all_labels(self) -> Tensor:
        return torch.tensor(self.folder.targets)[self.indices]


class Part:
    """Some of the images of a split."""

    def __init__(self, split: Split, indices: Tensor) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.split.batch(self.indices[indices])

    def picture(self, index: int) -> tuple[Image, int]:
        return self.split.picture(int(self.indices[index]))

    def all_labels(self) -> Tensor:
        return self.split.all_labels()[self.indices]


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
        data = _fashion_mnist(
            _existing_folder(
                settings.data or FASHION_MNIST,
                "install it with `apt-get install dataset-fashion-mnist`, or name a folder with "
                "its four IDX files: --data DIR",
            )
        )
    elif settings.dataset == "cifar10":
        data = _cifar10(_existing_folder(settings.data or "data", _CIFAR_ADVICE))
    elif settings.dataset == "patches":
        photographs = _existing_folder(
            settings.data or PHOTOGRAPHS,
            "get photographs with `apt-get install mate-backgrounds`, or name a folder of your "
            "own: --data DIR",
        )
        data = _patches(photographs, settings.image_size)
    else:
        if settings.data is None:
            raise InputError("--dataset folder needs --data, a folder with class subfolders")
        data = _image_folder(_existing_folder(settings.data), settings)
    if settings.test_list is not None and settings.dataset != "folder":
        raise InputError("test_list names images of a folder: it needs --dataset folder")
    data = _chosen(data, settings)
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


def _chosen(data: Dataset, settings: Settings) -> Dataset:
    """What of the data ``train_images`` and ``validate`` choose."""
    count = len(data.train)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, held_out = data.test, 0
    if settings.validate:
        held_out = count // 10
        test = Part(data.train, order[count - held_out :])
    wanted = settings.train_images or count - held_out
    if wanted > count - held_out:
        raise InputError(
            f"train_images is {wanted}, but {data.name} has {count - held_out} training images"
        )
    train = data.train if wanted == count else Part(data.train, order[:wanted])
    return dataclasses.replace(data, train=train, test=test)


_CIFAR_ADVICE = (
    'download it with `python -c "from torchvision.datasets import CIFAR10; '
    "CIFAR10('data', download=True)\"`, or name the folder that holds cifar-10-batches-py: --data "
    "DIR"
)


def _existing_folder(path: str, advice: str = "") -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"the data folder {str(path)!r} does not exist{': ' + advice if advice else ''}"
        )
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


# What NumPy pickles arrays with, in modules that are named differently from version to version, and
# what Python 3 writes bytes with for Python 2.
_ARRAY_PARTS: dict[str, Any] = {
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "_reconstruct": np.zeros(0).__reduce__()[0],
    "encode": codecs.encode,
}


class _Arrays(pickle.Unpickler):
    """Of dictionaries, lists, numbers, text and NumPy arrays; no other code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in _ARRAY_PARTS:
            return _ARRAY_PARTS[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _cifar10(folder: Path) -> Dataset:
    """The ten classes of 32×32 colour images: 50,000 and 10,000.

    Source: Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html, whose python version this
    reads: pickled dictionaries of uint8 rows, red before green before blue.
    """
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    names = ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"])
    splits = []
    for part in names:
        batches = [_cifar_batch(folder / name) for name in part]
        images = torch.cat([images for images, _ in batches])
        splits.append(TensorSplit(images, torch.cat([labels for _, labels in batches]), 255))
    classes = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    return _in_memory("cifar10", splits[0], splits[1], classes)


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing: {_CIFAR_ADVICE}")
    try:
        content = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        images = torch.from_numpy(content["data"].copy()).reshape(-1, 3, 32, 32)
        labels = torch.tensor(content["labels"])
        if images.dtype != torch.uint8 or len(images) != len(labels) or labels.max() > 9:
            raise ValueError("it does not hold images and as many labels of ten classes")
    # Whatever bytes are there, the unpickler tries to make sense of them.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or not of CIFAR-10: {reason}") from error
    return images, labels


# The photographs' width after scaling, the side of a block, and of a patch before it is scaled.
_PHOTO, _BLOCK, _PATCH = 1024, 128, 64
_PATCHES_PER_PHOTO = {"train": 400, "test": 80}


def _patches(folder: Path, image_size: int) -> Dataset:
    """Colour patches, labelled with the photograph that they were cut from.

    Each photograph is scaled to 1,024 pixels across and divided into blocks of 128×128 like a
    checkerboard: training patches lie wholly in blocks of one colour, test patches in those of the
    other, so that they share no pixel. 400 and 80 patches of 64×64 a photograph, at random
    positions, the same always, scaled to ``image_size``.
    """
    from PIL import Image

    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
    )
    if len(paths) < 2:
        raise InputError(f"{folder} must hold two photographs at least, but holds {len(paths)}")
    generator = np.random.default_rng(_SPLIT_SEED)
    images: dict[str, list[Any]] = {"train": [], "test": []}
    for path in paths:
        try:
            with Image.open(path) as file:
                photo = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"the photograph {path} can't be read: {error}") from error
        photo = photo.resize(
            (_PHOTO, round(_PHOTO * photo.height / photo.width)), Image.Resampling.BOX
        )
        rows, columns = photo.height // _BLOCK, photo.width // _BLOCK
        if rows < 1:
            raise InputError(f"the photograph {path} is too flat to cut blocks from")
        for part, parity in (("train", 0), ("test", 1)):
            blocks = [
                (row, column)
                for row in range(rows)
                for column in range(columns)
                if (row + column) % 2 == parity
            ]
            for _ in range(_PATCHES_PER_PHOTO[part]):
                row, column = blocks[generator.integers(len(blocks))]
                dx, dy = generator.integers(_BLOCK - _PATCH + 1, size=2)
                left, top = _BLOCK * column + int(dx), _BLOCK * row + int(dy)
                patch = photo.crop((left, top, left + _PATCH, top + _PATCH))
                patch = patch.resize((image_size, image_size), Image.Resampling.BOX)
                images[part].append(np.asarray(patch))
    splits = []
    for part, number in _PATCHES_PER_PHOTO.items():
        pixels = torch.from_numpy(np.stack(images[part])).permute(0, 3, 1, 2).contiguous()
        labels = torch.arange(len(paths)).repeat_interleave(number)
        splits.append(TensorSplit(pixels, labels, 255))
    return _in_memory("patches", splits[0], splits[1], tuple(path.stem for path in paths))


def _image_folder(folder: Path, settings: Settings) -> Dataset:
    """Class subfolders: split 4 to 1, or as the folder's own train/ and val/ (or test/) say."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.Resize(
                round(settings.image_size / settings.crop_ratio),
                transforms.InterpolationMode(settings.interpolation),
            ),
            transforms.CenterCrop(settings.image_size),
            transforms.ToTensor(),
        ]
    )
    held_out = [folder / name for name in ("val", "test") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and held_out:
        parts = [_class_folders(part) for part in (folder / "train", held_out[0])]
        if parts[0].classes != parts[1].classes:
            raise InputError(f"{folder / 'train'} and {held_out[0]} have different classes")
        train, test = (FolderSplit(part, torch.arange(len(part)), transform) for part in parts)
    else:
        parts = [_class_folders(folder)]
        labels = torch.tensor(parts[0].targets)
        try:
            train, test = (
                FolderSplit(parts[0], part, transform)
                for part in _stratified(labels, max(len(labels) // 5, len(parts[0].classes)))
            )
        except ValueError as error:
            raise InputError(f"{folder} can't be split into training and test: {error}") from error
    if settings.test_list is not None:
        test.indices = _listed(test, Path(settings.test_list))
    classes = tuple(parts[0].classes)
    return Dataset(str(folder), train, test, classes, _IMAGENET_MEAN, _IMAGENET_STD)


def _listed(split: FolderSplit, path: Path) -> Tensor:
    """Indices of the images that a file lists: a path, or its end, in each line's first column."""
    try:
        lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the list of test images {path} can't be read: {error}") from error
    known = {}
    for index in split.indices.tolist():
        image = Path(split.folder.samples[index][0])
        known[image.name] = known[f"{image.parent.name}/{image.name}"] = index
    try:
        chosen = [known["/".join(Path(line).parts[-2:])] for line in lines]
    except KeyError as error:
        raise InputError(
            f"{path} lists {error.args[0]}, which is not among the test images of "
            f"{split.folder.root}"
        ) from error
    if not chosen:
        raise InputError(f"{path} lists no image")
    return torch.tensor(chosen)


def _class_folders(folder: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder))
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
