"""Training batches: read in order, augmented, mixed; the same whoever reads them.

What happens to an image depends on the seed, the epoch and the image alone, and not on the process
that reads it, on the batch it is in, or on where the run was interrupted.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gn_kernels.training.data import Dataset, Split
from gn_kernels.training.settings import InputError, Settings

if TYPE_CHECKING:
    from PIL.Image import Image


class Reader:
    """Training images and labels by the number of the batch; in worker processes if asked to.

    Args:
        data: whose training part is read.
        settings: the augmentation, ``workers`` and ``seed``.
        plan: from a batch's number to the indices of its images and their epoch; a function that
            holds no reference to the reader's owner, so that the workers end when they are let go.
        count: how many batches there are.
    """

    def __init__(
        self,
        data: Dataset,
        settings: Settings,
        plan: Callable[[int], tuple[Tensor, int]],
        count: int,
    ) -> None:
        self._source = _Source(data.train, settings, _transform(settings, data), plan)
        self._workers, self._count, self._next = settings.workers, count, -1
        self._batches: Iterator[Any] = iter(())

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch ``number``. Asked for in order, they are read ahead by the workers.

        Raises:
            InputError: an image can't be read, or is not in [0, 1].
        """
        if self._workers == 0:
            images, labels = self._source.read(number)
        else:
            if number != self._next:
                # The old workers end at once only if the new ones have not inherited their pipes.
                self._batches = iter(())
                self._batches = iter(self._loader(number))
            batch = next(self._batches)
            self._next = number + 1
            if isinstance(batch, InputError):
                raise batch
            images, labels = batch
        low, high = (float(x) for x in torch.aminmax(images))
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"images must be in [0, 1], but a training batch is in [{low:g}, {high:g}]"
            )
        return images, labels

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            self._source,
            sampler=range(start, self._count),
            batch_size=None,
            num_workers=self._workers,
            prefetch_factor=4,
            # Its own: it would draw from the run's otherwise, whenever reading starts anew.
            generator=torch.Generator(),
        )


class _Source(torch.utils.data.Dataset[Any]):
    """From a batch's number to the batch; what the worker processes get a copy of."""

    def __init__(
        self,
        split: Split,
        settings: Settings,
        transform: Callable[[Image], Tensor] | None,
        plan: Callable[[int], tuple[Tensor, int]],
    ) -> None:
        self.split, self.settings, self.transform, self.plan = split, settings, transform, plan

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        indices, epoch = self.plan(number)
        if self.transform is None:
            return self.split.batch(indices)
        images, labels = [], []
        for index in indices.tolist():
            picture, label = self.split.picture(index)
            with _seeded(zlib.crc32(f"{self.settings.seed} {epoch} {index}".encode())):
                images.append(self.transform(picture))
            labels.append(label)
        return torch.stack(images), torch.tensor(labels)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | InputError:
        try:
            return self.read(number)
        except InputError as error:
            # Raised here it would arrive with a worker's traceback in its message.
            return error


def mixer(settings: Settings, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """mixup and cutmix in place, one of them drawn for each batch; labels become probabilities.

    timm's, which draws from NumPy's global generator. Without either the batch stays as it is.

    Raises:
        InputError: the batch is of an odd number of images, which can't be mixed in pairs.

    Source: Zhang et al., https://arxiv.org/abs/1710.09412; Yun et al.,
    https://arxiv.org/abs/1905.04899.
    """
    if settings.mixup == 0 and settings.cutmix == 0:
        return lambda images, labels: (images, labels)
    from timm.data.mixup import Mixup

    mix = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.label_smoothing,
        num_classes=classes,
    )

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % 2:
            raise InputError(
                f"mixup and cutmix need an even number of images in each part, but there are "
                f"{len(images)}"
            )
        images, targets = mix(images, labels)
        return images, targets

    return mixed


def _transform(settings: Settings, data: Dataset) -> Callable[[Image], Tensor] | None:
    """From a picture to an augmented image; None if nothing is to be done to it."""
    active = (
        settings.train_crop != "none"
        or settings.flip > 0
        or settings.colour_jitter > 0
        or settings.rand_augment is not None
        or settings.random_erasing > 0
    )
    if not active:
        return None
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision import transforms

    grey = len(data.mean) == 1
    mean = data.mean * 3 if grey else data.mean
    std = data.std * 3 if grey else data.std
    size, interpolation = settings.image_size, settings.interpolation
    try:
        resized, colours, to_tensor = transforms_imagenet_train(
            size,
            hflip=settings.flip,
            color_jitter=(settings.colour_jitter,) * 3,
            auto_augment=settings.rand_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=settings.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"rand_augment {settings.rand_augment!r} is not in timm's notation, as "
            "rand-m9-mstd0.5-inc1"
        ) from error
    mode = transforms.InterpolationMode(interpolation)
    whole: list[Any] = [
        transforms.Resize(round(size / settings.crop_ratio), mode),
        transforms.CenterCrop(size),
    ]
    if settings.train_crop == "padded":
        whole.append(transforms.RandomCrop(size, padding=size // 8, padding_mode="reflect"))
    whole.append(transforms.RandomHorizontalFlip(settings.flip))
    crop = resized if settings.train_crop == "resized" else transforms.Compose(whole)
    centre, spread = (torch.tensor(x).reshape(-1, 1, 1) for x in (mean, std))

    def transform(picture: Image) -> Tensor:
        # timm's colours are for colour pictures.
        image = to_tensor(colours(crop(picture.convert("RGB"))))
        # Erasing fills in noise around 0, of the normalised image; pixels stay in [0, 1].
        pixels: Tensor = (image * spread + centre).clamp(0, 1)
        return pixels[:1] if grey else pixels

    return transform


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators at ``seed``; afterwards as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
