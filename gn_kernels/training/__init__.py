"""Training with a penalty on the input gradient: data, recipe, loop and checkpoints."""

from gn_kernels.training.data import Dataset, load
from gn_kernels.training.loop import Training, compare_steps
from gn_kernels.training.recipe import METHODS, InputError, Losses, Settings

__all__ = [
    "METHODS",
    "Dataset",
    "InputError",
    "Losses",
    "Settings",
    "Training",
    "compare_steps",
    "load",
]
