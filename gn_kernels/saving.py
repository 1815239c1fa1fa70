"""Recompute in the backward passes what is cheap, instead of saving it.

A step with a gradient penalty saves two passes' worth of tensors, and in a Vision Transformer a
third of them are outputs of the activations and of LayerNorm, kept for the linear layers' weight
gradients. One pass over memory makes them again from tensors that are saved anyway.

Inside :func:`recompute`, the families of this package note on the storage of each output how it
came about: a *recipe*. ``torch.autograd.graph.saved_tensors_hooks`` then save the recipe where a
node of the graph would save the tensor, in the forward pass and in a backward pass that creates a
graph alike. Whatever has no recipe is saved as always.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Saved(NamedTuple):
    """A tensor as it is, and the version that hooks would otherwise no longer check."""

    tensor: Tensor
    version: int


class _Recipe:
    """How to make a storage's content again."""

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> None:
        self.compute = compute
        self.inputs: list[Any] = [None if x is None else x.detach() for x in inputs]
        self.packed = False
        self.kept: Tensor | None = None

    def pack(self) -> _Recipe:
        # Not before: an input that has a recipe itself is held while nobody needs that.
        if not self.packed:
            self.inputs = [None if x is None else _pack(x) for x in self.inputs]
            self.packed = True
        return self

    def run(self) -> Tensor:
        inputs = [x.input_of_another() if isinstance(x, _View) else _plain(x) for x in self.inputs]
        return self.compute(*inputs)


class _Product(_Recipe):
    """The input gradient of a linear layer, made again from what its own node saves."""

    def __init__(self, node: Any) -> None:
        super().__init__(lambda: torch.mm(node._saved_self, node._saved_mat2), ())


class _View(NamedTuple):
    """A tensor over the content of a recipe."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype
    device: torch.device

    def unpack(self) -> Tensor:
        if _is_left_factor_of_unused_product(self.size):
            # NaN, should PyTorch ever read it all the same
            return torch.full((), math.nan, dtype=self.dtype, device=self.device).expand(self.size)
        made, self.recipe.kept = self.recipe.kept, None
        return self._of(self.recipe.run() if made is None else made)

    def input_of_another(self) -> Tensor:
        # A product is asked for twice in a row: by the linear layer before the activation, whose
        # saved gradient is made from it, and by the activation itself, next in the graph.
        if self.recipe.kept is None:
            made = self.recipe.run()
            if isinstance(self.recipe, _Product):
                self.recipe.kept = made
            return self._of(made)
        return self._of(self.recipe.kept)

    def _of(self, made: Tensor) -> Tensor:
        return made.as_strided(self.size, self.stride, self.offset)


def _pack(tensor: Tensor) -> _Saved | _View:
    noted = getattr(tensor.untyped_storage(), "_gn_kernels_recipe", None)
    if noted is not None:
        recipe, version = noted
        if tensor._version == version:
            geometry = (tensor.size(), tensor.stride(), tensor.storage_offset())
            return _View(recipe.pack(), *geometry, tensor.dtype, tensor.device)
    return _Saved(tensor.detach(), tensor._version)


def _plain(saved: _Saved | None) -> Tensor | None:
    if saved is None:
        return None
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "a tensor needed for gradient computation was modified in place after it had been "
            f"saved: shape {tuple(saved.tensor.shape)}, version {saved.tensor._version} instead of "
            f"{saved.version}"
        )
    return saved.tensor


def _unpack(saved: _Saved | _View) -> Tensor:
    if isinstance(saved, _View):
        with torch.no_grad():
            return saved.unpack()
    tensor = _plain(saved)
    assert tensor is not None
    return tensor


def will_run(node: Any) -> bool:
    """Whether the backward pass that is under way uses the gradient that goes to ``node``."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # its refusal of a leaf whose gradient autograd.grad asks for
        return True


_PRODUCTS = {"AddmmBackward0": ("mat1", "mat2"), "MmBackward0": ("self", "mat2")}


def _is_left_factor_of_unused_product(size: torch.Size) -> bool:
    # Whether a linear layer unpacks its input without a use for it: every node unpacks all that it
    # saved, and a pass that asks for the gradient of the images alone gives weights none.
    node: Any = torch._C._current_autograd_node()
    name = None if node is None else node.name()
    if name not in _PRODUCTS:
        return False
    left, right = (getattr(node, f"_saved_{factor}_sym_sizes") for factor in _PRODUCTS[name])
    if tuple(size) != tuple(left) or tuple(left) == tuple(right):
        return False
    return not will_run(node.next_functions[-1][0])


_HOOKS = (_pack, _unpack)


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    r"""Save less between the passes; make it again when it is needed.

    Enter it around the loss and its penalty; the last ``backward()`` may be outside::

        with gn_kernels.recompute():
            loss = cross_entropy(model(images), labels)
            penalty = gradient_norm(loss, images)
        (0.8 * loss + 1.2 * 4 / 255 * penalty).backward()

    What is made again instead of saved: outputs and input gradients of the activations and of
    LayerNorm, and the input gradient of a linear layer that is wider at its input than at its
    output (an MLP's second), at the cost of one matrix product. Results are the same bit for bit.

    A swapped ViT-B/16, batch 64, bfloat16, then holds 4.9 GB at its peak instead of 7.7, and 10.2
    in eager PyTorch, and moves a ninth more bytes (counted:
    ``python -m benchmarks.step_cost --part count``).

    Tensors are saved through ``torch.autograd.graph.saved_tensors_hooks``; hooks entered inside
    (checkpointing, ``save_on_cpu``) take precedence. While compiling it has no effect: compilers
    decide themselves.

    Raises:
        RuntimeError: in a backward pass, where a saved tensor was modified in place meanwhile.
    """
    if torch.compiler.is_compiling():
        yield
        return
    with saved_tensors_hooks(*_HOOKS):
        yield


def is_active() -> bool:
    """Whether tensors that are saved now go through :func:`recompute`'s hooks.

    The autograd engine hands them on to its own threads.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0] is _pack


def note(
    output: Tensor | None, compute: Callable[..., Tensor], inputs: Sequence[Tensor | None]
) -> None:
    """Note that ``compute(*inputs)`` makes ``output``, in the same layout, at any time."""
    if output is not None:
        _attach(output, _Recipe(compute, inputs))


def note_product(gradient: Tensor) -> None:
    """Note how a linear layer's input gradient comes about, if it is cheaper to make than to keep.

    The product of (rows, n) and (n, m) takes 2·n operations for each number that is not kept.
    """
    node: Any = gradient.grad_fn
    while node is not None and node.name() in ("ViewBackward0", "UnsafeViewBackward0"):
        node = node.next_functions[0][0]
    if node is None or node.name() != "MmBackward0":
        return
    rows, inner = node._saved_self_sym_sizes
    width = node._saved_mat2_sym_sizes[1]
    saves_both = all(edge is not None for edge, _ in node.next_functions)
    whole = gradient.untyped_storage().nbytes() == rows * width * gradient.element_size()
    if inner < width and saves_both and whole:
        _attach(gradient, _Product(node))


def _attach(tensor: Tensor, recipe: _Recipe) -> None:
    tensor.untyped_storage()._gn_kernels_recipe = (  # type: ignore[attr-defined]
        recipe,
        tensor._version,
    )
