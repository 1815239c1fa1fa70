"""How an operation with three orders of kernels becomes differentiable, once for every family.

A family brings its three orders twice, with one signature: as *kernels*, opaque to autograd, and
as *formula*, plain PyTorch that can be differentiated any number of times::

    forward(inputs, options)                                     -> (output, *residuals)
    backward(wanted, grad, inputs, residuals, options)           -> a gradient for each input
    double_backward(wanted, cotangents, grad, inputs, residuals, options)
                                                                 -> a gradient for grad, each input

Residuals are what a kernel keeps for later beside its inputs (row statistics). They are functions
of the inputs, and the kernels return total derivatives with respect to the inputs. The formula
recomputes them: it returns none and ignores those it is given.

In plain eager mode the kernels run, chained by three ``torch.autograd.Function``s; the third and
higher derivatives are autograd's, of the formula. While compiling, under a ``torch.func``
transform or under forward-mode differentiation the formula runs: there a chain of Functions is an
error at best and a silently wrong second derivative at worst.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from gn_kernels import saving

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Orders:
    """Forward, backward and double backward of one operation, in the module's signature."""

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., Gradients]
    double_backward: Callable[..., Gradients]


def must_be_transparent() -> bool:
    """Whether opaque kernels would be wrong here: compiling, functorch or forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def differentiable(
    name: str, arity: int, kernels: Orders, formula: Orders, *, cheap: bool
) -> tuple[type[Function], Callable[..., Tensor]]:
    """Attach autograd to a family.

    Args:
        name: of the Function, as ``grad_fn`` prints it.
        arity: how many of the arguments are inputs (tensors, or None for an absent one); those
            that follow are options.
        kernels: the opaque orders.
        formula: the transparent orders.
        cheap: whether :func:`gn_kernels.recompute` may run the first two orders once more
            instead of saving what they return: they make one pass over memory.

    Returns:
        The autograd Function over the kernels, for plain eager mode, and the function that is
        right in every mode. Both take the inputs, then the options.
    """

    def first_of_backward(wanted: Sequence[bool], options: Any) -> Callable[..., Tensor]:
        # The gradient of the first input alone: what the layer before saves.
        alone = tuple(asked and index == 0 for index, asked in enumerate(wanted))

        def compute(grad: Tensor, *saved: Any) -> Tensor:
            grads = kernels.backward(alone, grad, saved[:arity], saved[arity:], options)
            return cast(Tensor, grads[0])

        return compute

    class ForwardRule(Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            inputs, options = arguments[:arity], arguments[arity:]
            output, *residuals = kernels.forward(inputs, options)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs, *residuals)
            ctx.options = options
            if cheap and saving.is_active():
                saving.note(output, lambda *x: kernels.forward(x, options)[0], inputs)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
            (grad,) = grads
            absent = (None,) * len(ctx.options)
            if grad is None:
                return (None,) * arity + absent
            wanted, saved = ctx.needs_input_grad[:arity], ctx.saved_tensors
            inputs, residuals = saved[:arity], saved[arity:]
            if must_be_transparent():
                grads = formula.backward(wanted, grad, inputs, (), ctx.options)
            elif torch.is_grad_enabled():
                if cheap and saving.is_active():
                    saving.note_product(grad)
                wanted = _asked_for(ctx, inputs, wanted)
                grads = Backward.apply(wanted, ctx.options, grad, *saved)
            else:
                grads = kernels.backward(wanted, grad, inputs, residuals, ctx.options)
            return *grads, *absent

    class BackwardRule(Function):
        @staticmethod
        def forward(ctx: Any, wanted: Any, options: Any, grad: Tensor, *saved: Any) -> Gradients:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(grad, *saved)
            ctx.options = options
            grads = kernels.backward(wanted, grad, saved[:arity], saved[arity:], options)
            if cheap and saving.is_active():
                saving.note(grads[0], first_of_backward(wanted, options), (grad, *saved))
            return grads

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors
            grad, inputs, residuals = saved[0], saved[1 : arity + 1], saved[arity + 1 :]
            absent = (None,) * len(residuals)
            if all(cotangent is None for cotangent in cotangents):
                return (None,) * (3 + arity) + absent
            wanted, options = ctx.needs_input_grad[2 : 3 + arity], ctx.options
            if must_be_transparent():
                grads = formula.double_backward(wanted, cotangents, grad, inputs, (), options)
            elif torch.is_grad_enabled():
                grads = DoubleBackward.apply(wanted, options, *cotangents, *saved)
            else:
                grads = kernels.double_backward(
                    wanted, cotangents, grad, inputs, residuals, options
                )
            return None, None, *grads, *absent

    class DoubleBackwardRule(Function):
        @staticmethod
        def forward(ctx: Any, wanted: Any, options: Any, *tensors: Any) -> Gradients:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors[: 2 * arity + 1])
            ctx.wanted, ctx.options, ctx.absent = wanted, options, len(tensors) - 2 * arity - 1
            cotangents, grad, saved = tensors[:arity], tensors[arity], tensors[arity + 1 :]
            return kernels.double_backward(
                wanted, cotangents, grad, saved[:arity], saved[arity:], options
            )

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
            def second_order(*tensors: Tensor | None) -> Gradients:
                return formula.double_backward(
                    ctx.wanted,
                    tensors[:arity],
                    tensors[arity],
                    tensors[arity + 1 :],
                    (),
                    ctx.options,
                )

            grads = vector_jacobian_product(second_order, ctx.saved_tensors, cotangents)
            return None, None, *grads, *(None,) * ctx.absent

    # A Function's node is named after its class when the class is made.
    Forward = _named(name, ForwardRule)
    Backward = _named(f"{name}FirstOrder", BackwardRule)
    DoubleBackward = _named(f"{name}SecondOrder", DoubleBackwardRule)

    def apply(*arguments: Any) -> Tensor:
        if must_be_transparent():
            return formula.forward(arguments[:arity], arguments[arity:])[0]
        return cast(Tensor, Forward.apply(*arguments))

    return Forward, apply


def _asked_for(
    ctx: Any, inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[bool, ...]:
    """Which gradients this backward pass uses.

    ``needs_input_grad`` says which inputs require one: the parameters too, while a penalty asks
    for the gradient of the images alone. The first input counts as used.
    """
    nodes = iter(ctx.next_functions)  # of the tensors among the inputs
    used = []
    for index, (value, asked) in enumerate(zip(inputs, wanted, strict=True)):
        node = None if value is None else next(nodes)[0]
        used.append(asked and (index == 0 or saving.will_run(node)))
    return tuple(used)


def _named(name: str, rule: type[Function]) -> type[Function]:
    metaclass: Any = type(rule)
    return cast(type[Function], metaclass(name, (rule,), {}))


def vector_jacobian_product(
    function: Callable[..., Gradients],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> Gradients:
    """Autograd's own derivative of ``function`` at ``inputs``, inside a backward pass.

    Differentiable in turn with respect to ``inputs`` and ``cotangents`` where grad mode is on,
    that is, under ``create_graph=True``.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of the inputs: gradients stop at them, while the graph of the result goes on.
        views = tuple(
            value
            if value is None or not value.requires_grad
            else value.view_as(value)
            if create_graph
            else value.detach().requires_grad_()
            for value in inputs
        )
        outputs = function(*views)
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if output is not None and cotangent is not None and output.requires_grad
        ]
        sources = [view for view in views if view is not None and view.requires_grad]
        if not pairs or not sources:
            return (None,) * len(views)
        results = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                sources,
                [cotangent for _, cotangent in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return tuple(
        next(results) if view is not None and view.requires_grad else None for view in views
    )


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def register_raw_op(
    library: torch.library.Library,
    name: str,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Implement the raw op ``gn_kernels::{name}``, which refuses to be differentiated.

    Without a rule of its own an op would stop the gradient with no more than a warning.

    Args:
        library: where its schema is defined.
        name: of the op.
        check: of its arguments, before ``kernel`` and ``fake``.
        kernel: chooses a backend and runs it.
        fake: the shapes of its results, for meta and fake tensors.

    Returns:
        A function for the inside of an autograd Function, whose arguments are known to fit: the
        function that users call has checked the inputs, and autograd checks the gradients. It
        calls the op where a dispatch mode or a tensor subclass may watch, and its kernel at once
        where none does: the way through the dispatcher and back to Python takes as long as the
        Function itself, and the checks as long again.
    """
    overload = getattr(torch.ops.gn_kernels, name).default

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call_checked(*arguments: Any) -> Any:
            check(*arguments)
            return function(*arguments)

        return call_checked

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    class RawKernel(Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return below_autograd(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"gn_kernels::{name} is a raw kernel and has no derivative; differentiate through "
                "the functions of gn_kernels or the modules of gn_kernels.nn instead"
            )

    def autograd_rule(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        ):
            return RawKernel.apply(*arguments)
        return below_autograd(*arguments)

    library.impl(name, checked(kernel), "CompositeExplicitAutograd")
    library.impl(name, autograd_rule, "Autograd")
    torch.library.register_fake(f"gn_kernels::{name}", checked(fake), lib=library)

    def call(*arguments: Any) -> Any:
        watched = torch._C._len_torch_dispatch_stack() or any(
            isinstance(argument, Tensor) and type(argument) not in _PLAIN_TENSORS
            for argument in arguments
        )
        return (overload if watched else kernel)(*arguments)

    return call
