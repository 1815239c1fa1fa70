"""What a run would take, from meta tensors: memory, FLOP and hours, without data or a GPU."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import distributions

from gn_kernels.counting import MACHINES, Counter, Machine
from gn_kernels.training import data as datasets
from gn_kernels.training.loop import lay_out, set_mode
from gn_kernels.training.model import build, prepare
from gn_kernels.training.recipe import METHODS
from gn_kernels.training.settings import InputError, Settings

# Training images, classes and channels of what need not be here for an estimate.
_KNOWN = {
    "digits": (1_437, 10, 1),
    "fashion-mnist": (60_000, 10, 1),
    "cifar10": (50_000, 10, 3),
    "patches": (4_800, 12, 3),
    "folder": (1_281_167, 1_000, 3),
}


class Estimate(NamedTuple):
    """Of one of ``gpus`` equal processes, unless it says otherwise.

    Attributes:
        images_per_part: images of a process in one forward pass.
        memory_gb: weights, gradients, the optimiser's and the average's state, and the largest
            sum of tensors alive in a step, in 1e9 bytes.
        teraflop_per_step: of all processes together.
        hours: of the whole run, by machine.
    """

    data: str
    parameters: int
    gpus: int
    images_per_part: int
    steps: int
    memory_gb: float
    teraflop_per_step: float
    hours: dict[str, float]
    assumptions: str


def estimate(settings: Settings, gpus: int = 1) -> Estimate:
    """Count one step of the settings' method at the end of its ramp, on meta tensors.

    Hours are a roofline model: every call takes the longer of its bytes at 90 % of the memory
    bandwidth and its FLOP at 66 % of the dense bf16 rate, half of that in float32 (TF32).
    Communication, data loading and idle time are left out, so a real run takes longer.

    Raises:
        InputError: the batch can't be divided among the GPUs, or the model can't be made.
    """
    images, data, described = _data(settings)
    parts = gpus * settings.accumulate_steps
    if settings.batch_size % parts:
        raise InputError(
            f"batch_size {settings.batch_size} must be a multiple of the {parts} parts it is "
            f"divided into ({gpus} GPUs, {settings.accumulate_steps} accumulated steps)"
        )
    each = settings.batch_size // parts
    half = settings.precision != "float32"
    dtype = getattr(torch, settings.precision)
    bare = dataclasses.replace(settings, device="cpu", pretrained=False, weights=None)
    with torch.device("meta"):
        model = build(bare, data)
    prepare(model, bare)
    lay_out(model, bare)
    model.to(dtype)
    set_mode(model, bare)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = (each, len(data.mean), settings.image_size, settings.image_size)
    checked = distributions.Distribution._validate_args
    # Their checks look at values, which meta tensors do not have.
    distributions.Distribution.set_default_validate_args(False)
    try:
        with torch.device("meta"), Counter() as counter:
            batch = torch.empty(shape, dtype=dtype)
            targets = torch.empty(each, dtype=torch.long)
            losses = METHODS[settings.method](model, batch, targets, settings.epochs - 1, bare)
            losses.total.backward()
    finally:
        distributions.Distribution.set_default_validate_args(checked)
    # Float32 weights, two moments of AdamW (one momentum of SGD), perhaps an average.
    copies = 1 + (2 if settings.optimizer == "adamw" else 1) + (settings.ema_decay > 0)
    shards = gpus if settings.distributed == "fsdp2" else 1
    memory = (4 * copies * parameters) / shards + counter.peak
    if half:
        memory += 2 * parameters
    steps = settings.epochs * (images // settings.batch_size)
    hours = {}
    for machine in MACHINES:
        if machine.name in ("A100", "H100"):
            rate = machine.flop_s if half else machine.flop_s / 2
            seconds = counter.seconds(Machine(machine.name, machine.bytes_s, rate))
            hours[machine.name] = steps * settings.accumulate_steps * seconds / 3600
    return Estimate(
        described,
        parameters,
        gpus,
        each,
        steps,
        memory / 1e9,
        counter.flop * parts / 1e12,
        hours,
        "modelled, not measured: each call takes the longer of its bytes at 90 % of the memory "
        f"bandwidth and its FLOP at 66 % of the dense {'bf16' if half else 'TF32'} rate; without "
        "communication, data loading and optimiser steps",
    )


def _data(settings: Settings) -> tuple[int, datasets.Dataset, str]:
    try:
        data = datasets.load(settings)
        return len(data.train), data, data.name
    except InputError:
        images, classes, channels = _KNOWN[settings.dataset]
        nothing = datasets.TensorSplit(
            torch.empty(0, channels, 1, 1, dtype=torch.uint8), torch.empty(0).long(), 255
        )
        names = tuple(str(index) for index in range(classes))
        stand_in = datasets.Dataset(
            settings.dataset, nothing, nothing, names, (0.5,) * channels, (0.25,) * channels
        )
        size = f"{images:,} images of {classes:,} classes"
        what = "ImageNet-1k" if settings.dataset == "folder" else settings.dataset
        return images, stand_in, f"{what}, not read: {size} assumed"
