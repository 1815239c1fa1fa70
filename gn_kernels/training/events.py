"""Progress as TensorBoard events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gn_kernels.training.settings import InputError

if TYPE_CHECKING:
    from gn_kernels.training.loop import Progress


@contextlib.contextmanager
def events(folder: Path) -> Iterator[Callable[[Progress], None]]:
    """An observer of :meth:`gn_kernels.training.Training.run` that writes each step's figures.

    A run that is continued writes another file into the folder; TensorBoard shows both as one.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard needs TensorBoard, which is not installed: pip install tensorboard"
        ) from error
    with SummaryWriter(str(folder)) as writer:

        def observe(progress: Progress) -> None:
            for name in ("loss", "penalty", "step_ms", "images_per_second"):
                writer.add_scalar(name, getattr(progress, name), progress.step)

        yield observe
