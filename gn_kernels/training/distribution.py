"""More than one process, on torch.distributed: what then differs from one process is here.

``torchrun`` starts the processes. All of them take the same steps: the images of step k are the
same whatever the number of processes, each takes its share, and gradients are averages over all.
With one process every function here does nothing, at no cost.

A draw that belongs to the images (a random start, a sampled class) is made for the images of all
processes at once, from generators in the same state everywhere, and each process keeps the rows of
its share: so it too is the same whatever the number of processes. What a model draws itself
(dropout, stochastic depth) is not.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gn_kernels.training.settings import InputError, Settings

# Of one collective operation. A process that dies is noticed at once, by torchrun or by the closed
# connection; a machine that vanishes, or a process that hangs, after this.
PATIENCE = datetime.timedelta(minutes=5)


class PeerLostError(InputError):
    """Another process of the run ended or can't be reached."""


def size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other processes if ``torchrun`` started this one, and part from them at the end."""
    if "RANK" not in os.environ:
        yield
        return
    # With a GPU, NCCL carries what is on it, and gloo what is not.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check(settings: Settings) -> None:
    """Compare the settings with what ``torchrun`` started, and choose this process's GPU.

    Raises:
        InputError: they do not go together, or there are fewer GPUs than processes.
    """
    if settings.distributed == "none":
        if size() > 1:
            raise InputError(
                f"torchrun started {size()} processes, each of which would train a model of its "
                "own: add --distributed ddp, or fsdp2 for a model that does not fit on one GPU"
            )
        return
    if not dist.is_initialized():
        raise InputError(
            f"--distributed {settings.distributed} needs processes: start it with torchrun "
            "--nproc-per-node N -m gn_kernels.cli train ..., or add --distributed none"
        )
    if settings.distributed == "fsdp2" and settings.precision == "float16":
        raise InputError(
            "--distributed fsdp2 does not go with --precision float16, whose scaler would see one "
            "shard of the gradients only: use bfloat16"
        )
    if settings.device == "cuda":
        gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > gpus:
            raise InputError(
                f"torchrun started {here} processes on this machine, which has {gpus} "
                f"GPU{'s' * (gpus != 1)}: start at most one a GPU (--nproc-per-node {max(gpus, 1)})"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def check_agreement(values: Mapping[str, Any]) -> None:
    """Compare what must be the same in all processes.

    Raises:
        InputError: in every process alike, if a value differs; it names the first.
    """
    if size() == 1:
        return
    everywhere: list[Mapping[str, Any] | None] = [None] * size()
    dist.all_gather_object(everywhere, values)
    first = everywhere[0]
    assert first is not None
    for other, theirs in enumerate(everywhere):
        assert theirs is not None
        for name, value in first.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"the processes disagree on {name}: {value!r} in process 0, "
                    f"{theirs.get(name)!r} in process {other}; start all with the same options, "
                    "files and versions"
                )


def from_first(value: Any) -> Any:
    """What process 0 gave, in every process."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def share(count: int) -> slice | Tensor:
    """Which of a batch's ``count`` images this process takes.

    It is one slice of the batch's first half and its mirror image in the second: mixup mixes image
    i with image count − 1 − i, which so are in the same process.
    """
    processes, mine = size(), rank()
    if processes == 1:
        return slice(None)
    each = count // processes
    if each % 2:
        return torch.arange(mine * each, (mine + 1) * each)
    first = torch.arange(mine * each // 2, (mine + 1) * each // 2)
    return torch.cat([first, count - 1 - first.flip(0)])


def rand_like(x: Tensor) -> Tensor:
    """``torch.rand_like``, the rows of this process among those of all processes."""
    if size() == 1:
        return torch.rand_like(x)
    everywhere = torch.rand((len(x) * size(), *x.shape[1:]), dtype=x.dtype, device=x.device)
    return everywhere[share(len(everywhere))]


def mean(x: Tensor) -> Tensor:
    """The mean of ``x`` over all processes, differentiable; each holds as many elements."""
    if size() == 1:
        return x.mean()
    # Its backward sums the processes' gradients: each has a loss that depends on every x.
    total: Tensor = _AllReduce.apply(x.mean())
    return total / size()


class _AllReduce(torch.autograd.Function):
    """Sum over the processes, of the value and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def gathered(*values: float) -> list[list[float]]:
    """The values of every process, in float64."""
    if size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everywhere = torch.empty(size(), len(values), dtype=torch.float64)
    dist.all_gather(list(everywhere.unbind()), mine)
    return everywhere.tolist()


def average_(tensors: Iterable[Tensor]) -> None:
    """Average each tensor over all processes, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor.div_(size()))


def wrap(model: nn.Module, settings: Settings) -> nn.Module:
    """What a method is called with: the model for DDP or, itself changed, for FSDP2."""
    if settings.distributed == "fsdp2":
        return _sharded(model, settings)
    if settings.distributed == "ddp":
        # Buffers: a method may call the model twice before the backward pass, and a broadcast in
        # between would change what the first call saved.
        with warnings.catch_warnings():
            # Of a new name for broadcast_buffers, which earlier versions do not know.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)
    return model


def _sharded(model: nn.Module, settings: Settings) -> nn.Module:
    mesh = init_device_mesh(settings.device, (size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The gradient inside a method is a backward pass after which the parameters are still
            # needed: the loop shards them again when the step is over.
            module.set_reshard_after_backward(False, recurse=False)
            # Whole parameters take over, for good, whether they need a gradient when they are
            # first gathered; a method's first pass may be an attack, where they do not.
            module.unshard()
            module.reshard()
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that stand in a row of their like: a transformer's, ResNet's blocks."""
    rows = [
        list(module.children())
        for module in model.modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
    ]
    found = [
        block
        for row in rows
        for block in row
        if [type(other) for other in row].count(type(block)) > 1
        and next(block.children(), None) is not None
        and next(block.parameters(), None) is not None
    ]
    return [
        block
        for block in found
        if not any(inner is other for inner in list(block.modules())[1:] for other in found)
    ]


def end_of_backward(model: nn.Module) -> None:
    """Shard FSDP2's parameters again, so that ``parameters()`` are those of the optimiser."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def averaging(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
    """Around a method and its backward pass: the last of a step's averages over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor with the shards of all processes; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def lost_peers_named(step: int) -> Iterator[None]:
    """Turn the errors of a collective operation into :class:`PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not _is_of_connection(error):
            raise
        raise PeerLostError(
            f"process {rank()} of {size()} stops at step {step}: another process has ended or "
            f"can't be reached ({str(error).splitlines()[0][:200]})"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection", "timed out")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)
