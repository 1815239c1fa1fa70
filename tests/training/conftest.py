"""A run that takes a second: the digits, four patches, one narrow block."""

import os
import sys

import pytest
import torch

from gn_kernels.training import Settings, Training, load, recipe

TINY = {
    "patch_size": 4,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "epochs": 3,
    "warmup_epochs": 0.5,
    "batch_size": 200,
    "attack_steps": 2,
    "restarts": 1,
}


def environment(**variables):
    """Of a process that imports what this one does."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


@pytest.fixture
def settings():
    return Settings(**TINY)


@pytest.fixture
def training(settings):
    return Training(settings, load(settings))


@pytest.fixture
def noisy(monkeypatch):
    """gradnorm at randomly moved images: a method that draws from the global generator."""
    original = recipe.METHODS["gradnorm"]

    def method(model, images, targets, epoch, settings, scale=1.0):
        moved = (images + 0.05 * torch.randn_like(images)).clamp(0, 1)
        return original(model, moved, targets, epoch, settings, scale)

    monkeypatch.setitem(recipe.METHODS, "gradnorm", method)
