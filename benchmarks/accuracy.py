"""How exact is it? Errors against float64, of each backend and of PyTorch.

    python -m benchmarks.accuracy [--quick] [--part operations|penalty] [--compare FOLDER]
    TRITON_INTERPRET=1 python -m benchmarks.accuracy   (the GPU kernels too, under the interpreter)
    python -m benchmarks.accuracy --device cuda        (what runs where there is a GPU)

Operations (computed): errors in ulp, the spacing of the type at the exact result, over every
result of an order. For the activations the oracle is the formula in float64, the inputs are every
number of a 16-bit type in [−10, 10] or random float32 numbers there, and in 16-bit types an error
counts from 4e-7 times the cotangents on: what one float32 rounding leaves near a root of f′ or f″.
For layer_norm and attention the oracle is eager PyTorch in float64. Near a zero of the result an
ulp is arbitrarily small: the third figure takes it no smaller than at the root mean square of the
results. Triton's interpreter truncates where a GPU rounds to bfloat16: up to 1 ulp there is its
doing.

Penalty (computed): relative error of the weight gradient of the input-gradient penalty alone, of a
small ViT, against eager PyTorch in float64, for double backpropagation and for finite differences
at the best step of a scan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gn_kernels
from benchmarks import common, operations
from benchmarks.common import Row, Table
from benchmarks.operations import ORDERS, Cotangents, Operation, Shape, through_autograd
from benchmarks.step_cost import use_fused_attention, use_math_attention
from gn_kernels.activation import ACTIVATIONS
from gn_kernels.backend import BACKENDS, choose, installed
from gn_kernels.penalty import gradient_norm
from gn_kernels.swap import swap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RANGE = 10.0
_FLOAT32_ROUNDING = 4e-7
_SHAPES = {"layer_norm": Shape(2, 197, 384, 6), "attention": Shape(1, 197, 128, 2)}
_SWIN = Shape(1, 196, 128, 4, 49)


# -- Operations ----------------------------------------------------------------------------------


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """One ulp of ``dtype`` at the size of each float64 number: that of its binade, or subnormal."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=limits.smallest_normal))
    return torch.ldexp(torch.full_like(exact, limits.eps), exponent - 1)


def errors(
    actual: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    allowances: Sequence[Tensor | float],
) -> Row:
    """Over all results: errors in ulp beyond the allowances, and ‖error‖/‖exact‖.

    ``max_ulp_rms`` takes the ulp of results below their root mean square at that.
    """
    ulps, of_rms, squares, exact_squares = [], 0.0, 0.0, 0.0
    for result, truth, allowance in zip(actual, exact, allowances, strict=True):
        if result is None or truth is None:
            continue
        truth = truth.detach()
        difference = (result.detach().double() - truth).abs()
        beyond = (difference - allowance).clamp(min=0)
        ulps.append((beyond / spacing(truth, result.dtype)).flatten())
        rms = truth.square().mean().sqrt()
        unit = spacing(truth.abs().clamp(min=rms), result.dtype)
        of_rms = max(of_rms, float((beyond / unit).max()))
        squares += float(difference.square().sum())
        exact_squares += float(truth.square().sum())
    every = torch.cat(ulps)
    return {
        "max_ulp": float(every.max()),
        "mean_ulp": float(every.mean()),
        "max_ulp_rms": of_rms,
        "relative": math.sqrt(squares / exact_squares),
    }


def make_case(name: str, dtype: torch.dtype, points: int, device: str = "cpu") -> Operation:
    """The operation on the inputs that its accuracy is judged by."""
    if name == "attention with bias":
        return operations.make_operation("attention", _SWIN, dtype, device)
    shape = _SHAPES.get(name, Shape(1, 1, 1, 1))
    operation = operations.make_operation(name, shape, dtype, device)
    if operation.family != "activation":
        return operation
    if dtype == torch.float32:
        x = torch.empty(points).uniform_(-RANGE, RANGE, generator=torch.Generator().manual_seed(0))
    else:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = every[every.abs() <= RANGE]
        x = x.repeat(math.ceil(points / x.numel()))  # each number with several cotangents
    return operation._replace(inputs=(x.to(device).requires_grad_(),))


def exact_results(
    operation: Operation, cotangents: Cotangents
) -> dict[str, tuple[Tensor | None, ...]]:
    """In float64: the formula of an activation, else eager PyTorch."""
    if operation.family != "activation":
        return operations.expected_results(operation, cotangents)
    row = ACTIVATIONS[operation.name]
    x, grad, v = (
        one.detach().double() for one in (*operation.inputs, cotangents.grad, *cotangents.second)
    )
    return {
        "forward": (row.value(x),),
        "backward": (grad * row.first(x),),
        "double backward": (v * row.first(x), v * grad * row.second(x)),
    }


def allowances(operation: Operation, cotangents: Cotangents) -> dict[str, tuple[Tensor, ...]]:
    """What 16-bit results of an activation may be off by beside their own rounding."""
    grad, v = (one.detach().double().abs() for one in (cotangents.grad, *cotangents.second[:1]))
    one = torch.ones_like(grad)
    return {
        order: tuple(_FLOAT32_ROUNDING * product for product in products)
        for order, products in (
            ("forward", (one,)),
            ("backward", (grad,)),
            ("double backward", (v, v * grad)),
        )
    }


def backends(device: str = "cpu") -> list[str]:
    """Those that can serve tensors on the device here."""
    return [
        name
        for name in BACKENDS
        if choose(device, torch.float32, installed(), requested=name).backend is not None
    ]


_INTERPRETED = "gn_kernels, triton (interpreter)"
_BITS = "Triton's interpreter multiplies matrices of bfloat16 as the integers that hold their bits"


def _title(backend: str) -> str:
    interpreted = backend == "triton" and installed().triton_interpreter
    return _INTERPRETED if interpreted else f"gn_kernels, {backend}"


def _multiplies_bits(name: str, dtype: torch.dtype) -> bool:
    return name.startswith("attention") and dtype == torch.bfloat16


def operation_rows(names: Sequence[str], points: int, device: str = "cpu") -> Iterator[Row]:
    """A row for each operation, type, order and provider."""
    for name in names:
        for dtype in DTYPES:
            operation = make_case(name, dtype, points, device)
            cotangents = operations.make_cotangents(operation)
            exact = exact_results(operation, cotangents)
            half_activation = operation.family == "activation" and dtype != torch.float32
            allowed = allowances(operation, cotangents) if half_activation else {}
            for provider, function, context in _providers(operation):
                about = {
                    "kind": "computed",
                    "operation": name,
                    "dtype": operations.dtype_name(dtype),
                    "device": device,
                    "provider": provider,
                }
                if provider == _INTERPRETED and _multiplies_bits(name, dtype):
                    yield about | {"order": "", "note": _BITS}
                    continue
                try:
                    with context:
                        runs = through_autograd(function, operation, cotangents)
                        results = {order: runs[order]() for order in ORDERS[:3]}
                except Exception as error:  # whatever a provider raises is its result
                    yield about | {"order": "", "error": common.one_line(error)}
                    continue
                for order, actual in results.items():
                    some = allowed.get(order, (0.0,) * len(actual))
                    row = about | {"order": order} | errors(actual, exact[order], some)
                    if not math.isfinite(row["relative"]) and provider != "eager":
                        row["error"] = "not finite where float64 is"
                    yield row


def _providers(
    operation: Operation,
) -> Iterator[tuple[str, Callable[..., Tensor], AbstractContextManager[None]]]:
    for backend in backends(operation.inputs[0].device.type):
        yield _title(backend), operation.ours, gn_kernels.use_backend(backend)
    yield "eager", operation.eager, nullcontext()


# -- Penalty -------------------------------------------------------------------------------------

_STEPS = [2.0**-i for i in range(21)]  # of the finite differences, in pixels


def small_vit() -> nn.Module:
    """A ViT of width 64 with 3 blocks for 32 px."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=3,
        num_heads=2,
        num_classes=10,
    )
    for parameter in model.parameters():  # as far from linear as a trained one
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def penalty_gradient(
    model: nn.Module, images: Tensor, labels: Tensor, norm: str, step: float | None = None
) -> Tensor:
    """Weight gradient of the penalty by double backpropagation, or by differences with a step."""
    images = images.detach().requires_grad_()
    loss = cross_entropy(model(images).to(_at_least_float32(images.dtype)), labels)
    if step is None:
        penalty = gradient_norm(loss, images, norm)
    else:
        (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
        gradient = gradient.to(_at_least_float32(gradient.dtype))
        direction = gradient.sign()
        if norm == "l2":
            direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        moved = (images + step * direction).detach().to(images.dtype)
        difference = cross_entropy(model(moved).to(loss.dtype), labels) - loss
        penalty = difference / step
    gradients = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).double().flatten()
            for parameter, gradient in zip(model.parameters(), gradients, strict=True)
        ]
    )


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def penalty_rows(samples: int, device: str = "cpu") -> Iterator[Row]:
    """A row for each norm, type and way to the weight gradient."""
    stock = small_vit().to(device)
    use_math_attention(stock)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(samples, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(10, (samples,), generator=generator).to(device)
    for norm in ("l1", "l2"):
        for dtype in (torch.float32, torch.bfloat16):
            # The rounded weights and images are the problem; how it is computed is the question.
            rounded = copy.deepcopy(stock).to(dtype)
            inputs = images.to(dtype)
            exact = penalty_gradient(copy.deepcopy(rounded).double(), inputs.double(), labels, norm)

            def error(gradient: Callable[[], Tensor], exact: Tensor = exact) -> float:
                return float((gradient() - exact).norm() / exact.norm())

            about = {
                "kind": "computed",
                "operation": f"penalty, {norm}",
                "dtype": operations.dtype_name(dtype),
                "device": device,
                "order": "weight gradient",
            }
            eager = partial(penalty_gradient, rounded, inputs, labels, norm)
            yield about | {"provider": "double backpropagation, eager", "relative": error(eager)}
            for backend in backends(device):
                ours = copy.deepcopy(rounded)
                use_fused_attention(ours)
                swap(ours)
                row = about | {"provider": f"double backpropagation, {_title(backend)}"}
                if _title(backend) == _INTERPRETED and dtype == torch.bfloat16:
                    yield row | {"note": _BITS}
                    continue
                try:
                    with gn_kernels.use_backend(backend):
                        gradient = partial(penalty_gradient, ours, inputs, labels, norm)
                        yield row | {"relative": error(gradient)}
                except Exception as failure:  # whatever a provider raises is its result
                    yield row | {"error": common.one_line(failure)}
            best, step = min((error(partial(eager, step=step)), step) for step in _STEPS)
            yield (
                about
                | {"provider": "finite differences, eager", "relative": best}
                | {"note": f"best of steps 1 to 2^-20: {step:g}"}
            )


# -- The command ---------------------------------------------------------------------------------

OPERATION_COLUMNS = {
    "operation": "operation",
    "dtype": "dtype",
    "order": "order",
    "provider": "provider",
    "largest ulp": "max_ulp",
    "mean ulp": "mean_ulp",
    "largest ulp, at least of the RMS": "max_ulp_rms",
    "‖error‖/‖exact‖": "relative",
    "note": "note",
    "failed": "error",
}
PENALTY_COLUMNS = {
    "penalty": "operation",
    "dtype": "dtype",
    "provider": "provider",
    "‖error‖/‖exact‖": "relative",
    "note": "note",
    "failed": "error",
}


def _interval(row: Row) -> tuple[float, float] | None:
    # Nothing random but what another version of a library rounds otherwise.
    if "gn_kernels" not in row["provider"] or row.get("relative") in (None, ""):
        return None
    return float(row["relative"]) * 0.9, float(row["relative"]) * 1.1


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("accuracy", __doc__)
    parser.add_argument("--part", choices=("operations", "penalty"), help="only one of the two")
    parser.add_argument(
        "--family", choices=[*operations.NAMES, "attention with bias"], action="append"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    where = common.environment(common.command_line("accuracy", argv))
    tables = []
    key = ("operation", "dtype", "device", "order", "provider")
    if arguments.part != "penalty":
        names = arguments.family or [*operations.NAMES, "attention with bias"]
        points = 2**14 if arguments.quick else 2**20
        rows = list(operation_rows(names, points, arguments.device))
        print(common.markdown(rows, OPERATION_COLUMNS), end="\n\n")
        tables.append(Table("accuracy", [row | where for row in rows], key, _interval))
    if arguments.part != "operations":
        rows = list(penalty_rows(4 if arguments.quick else 16, arguments.device))
        print(common.markdown(rows, PENALTY_COLUMNS), end="\n\n")
        tables.append(Table("accuracy_penalty", [row | where for row in rows], key, _interval))
    return common.finish(tables, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
