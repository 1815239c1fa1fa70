"""How fast is one operation? Every order of derivative, beside its peers, in one process.

    python -m benchmarks.operations [--family F] [--shape S] [--dtype D] [--quick] [--compare DIR]
    python -m benchmarks.operations --shape all --dtype all   (the whole grid: hours on two cores)
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m benchmarks.operations …
        (results on memory that is used again, instead of pages that the kernel must clear)

Orders, as a penalty on the input gradient runs them:

* forward: y = f(x);
* backward: autograd.grad(y, x, grad, create_graph=True), grad with a graph of its own;
* double backward: autograd.grad of that with respect to grad, x and the parameters;
* cycle: the three in sequence.

Providers: gn_kernels through its public functions, and its kernels without autograd; eager PyTorch;
Inductor, which can't be differentiated twice and so gets each order as a function without autograd,
once the formulas of gn_kernels and once what autograd makes of PyTorch's own operation; a copy that
moves the bytes an order must move at least; and peers that have one derivative only.

What a provider computes is checked against eager PyTorch in float64 first, in every order. One
that is wrong in one order gets no time in any.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gn_kernels
from benchmarks import common
from benchmarks.common import Row, Table
from gn_kernels.activation import ACTIVATIONS
from gn_kernels.activation.formula import FORMULA as ACTIVATION_FORMULA
from gn_kernels.activation.op import KERNELS as ACTIVATION_KERNELS
from gn_kernels.attention.formula import FORMULA as ATTENTION_FORMULA
from gn_kernels.attention.op import KERNELS as ATTENTION_KERNELS
from gn_kernels.autograd import Orders
from gn_kernels.layer_norm.formula import FORMULA as LAYER_NORM_FORMULA
from gn_kernels.layer_norm.op import KERNELS as LAYER_NORM_KERNELS

ORDERS = ("forward", "backward", "double backward", "cycle")
OURS, EAGER, COPY = "gn_kernels", "eager", "copy"
KERNELS_ALONE = "gn_kernels, no autograd"
INDUCTOR, INDUCTOR_AUTOGRAD = "inductor, formula", "inductor, autograd"

Run = Callable[[], tuple[Tensor | None, ...]]

# ‖actual − expected‖/‖expected‖ that tells a wrong derivative from rounding: eager PyTorch, which
# rounds after each of up to 88 operations, stays below a third of it.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


class Shape(NamedTuple):
    """Images, tokens of an image, and the width and heads of a block."""

    batch: int
    tokens: int
    width: int
    heads: int
    window: int | None = None  # tokens of a Swin window


# Width and heads of timm's models, and of the four stages of its Swins at 224 px.
_VITS = {"vit-ti": (192, 3), "vit-s": (384, 6), "vit-b": (768, 12), "vit-l": (1024, 16)}
_SWINS = {"swin-t": (96, 3), "swin-b": (128, 4)}
SHAPES = {
    **{
        f"{name}-{batch}": Shape(batch, 197, width, heads)
        for batch in (8, 64)
        for name, (width, heads) in _VITS.items()
    },
    **{
        f"{name}-stage{i + 1}-{batch}": Shape(batch, 3136 >> 2 * i, width << i, heads << i, 49)
        for batch in (8, 64)
        for name, (width, heads) in _SWINS.items()
        for i in range(4)
    },
    "64-elements": Shape(1, 1, 16, 1),
}
# What runs where nothing else is asked for, by family. On a GPU whole batches: smaller tensors
# would stay in its cache.
DEFAULTS = {
    "activation": (
        ("vit-b-8", torch.float32),
        ("vit-s-64", torch.bfloat16),
        ("64-elements", torch.float32),
    ),
    "layer_norm": (
        ("vit-s-8", torch.float32),
        ("vit-s-64", torch.bfloat16),
        ("swin-b-stage1-8", torch.float32),
        ("64-elements", torch.float32),
    ),
    "attention": (
        ("vit-s-8", torch.float32),
        ("swin-b-stage3-8", torch.float32),
        ("vit-s-8", torch.bfloat16),
        ("swin-b-stage3-8", torch.bfloat16),
        ("64-elements", torch.float32),
    ),
}
_GPU_DEFAULTS = tuple(
    (shape, dtype)
    for shape in ("vit-s-64", "vit-b-64", "vit-l-64", "swin-b-stage1-64", "swin-b-stage3-64")
    for dtype in (torch.bfloat16, torch.float32)
)


class Operation(NamedTuple):
    """What is timed, on inputs that require gradients.

    Attributes:
        first: which of the inputs the first backward pass differentiates, as a penalty does.
        first_order: peers with one derivative only, or why one is absent.
    """

    name: str
    family: str
    inputs: tuple[Tensor, ...]
    first: tuple[int, ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    kernels: Orders
    formula: Orders
    options: tuple[Any, ...]
    first_order: dict[str, Callable[..., Tensor] | str]


# -- The operations ------------------------------------------------------------------------------

PYTORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
NAMES = {**dict.fromkeys(ACTIVATIONS, "activation"), "layer_norm": "layer_norm"} | {
    "attention": "attention"
}


def make_operation(name: str, shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Operation:
    """The operation ``name`` on random inputs of a shape."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*sizes, generator=generator) * scale
        return values.to(device, dtype).requires_grad_()

    make = {"activation": _activation, "layer_norm": _layer_norm, "attention": _attention}
    return make[NAMES[name]](name, shape, random)


def _activation(kind: str, shape: Shape, random: Callable[..., Tensor]) -> Operation:
    x = random(shape.batch * shape.tokens, 4 * shape.width, scale=2.0)
    return Operation(
        name=kind,
        family="activation",
        inputs=(x,),
        first=(0,),
        ours=partial(gn_kernels.activation, kind=kind),
        eager=PYTORCH_ACTIVATIONS.get(kind, ACTIVATIONS[kind].value),
        kernels=ACTIVATION_KERNELS,
        formula=ACTIVATION_FORMULA,
        options=(kind,),
        first_order={"liger": "it has gated activations only"},
    )


def _layer_norm(name: str, shape: Shape, random: Callable[..., Tensor]) -> Operation:
    row = (shape.width,)
    x = random(shape.batch, shape.tokens, shape.width)
    inputs = (x, random(*row), random(*row))
    return Operation(
        name=name,
        family=name,
        inputs=inputs,
        first=(0,),
        ours=lambda x, weight, bias: gn_kernels.layer_norm(x, row, weight, bias),
        eager=lambda x, weight, bias: F.layer_norm(x, row, weight, bias),
        kernels=LAYER_NORM_KERNELS,
        formula=LAYER_NORM_FORMULA,
        options=(row, 1e-5),
        first_order={
            "liger": _peer(x, "liger_kernel.transformers.functional", _liger_layer_norm),
            "apex": _peer(x, "apex.normalization.fused_layer_norm", _apex_layer_norm),
        },
    )


def _peer(
    x: Tensor, module: str, make: Callable[[Any], Callable[..., Tensor]]
) -> Callable[..., Tensor] | str:
    """A function of another library that serves x, or why there is none."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if not x.is_cuda:
        return f"{package} needs a GPU"
    try:
        return make(importlib.import_module(module))
    except ImportError as error:
        return common.one_line(error)


def _liger_layer_norm(liger: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias: liger.liger_layer_norm(x, weight, bias, 1e-5)


def _apex_layer_norm(apex: Any) -> Callable[..., Tensor]:
    return lambda x, weight, bias: apex.fused_layer_norm_affine(x, weight, bias, bias.shape, 1e-5)


def _flash_attention(flash_attn: Any) -> Callable[..., Tensor]:
    def attention(*qkv: Tensor) -> Tensor:  # it wants heads beside their elements
        result: Tensor = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in qkv))
        return result.transpose(1, 2)

    return attention


def _attention(name: str, shape: Shape, random: Callable[..., Tensor]) -> Operation:
    size = shape.width // shape.heads
    length = shape.window or shape.tokens
    sequences = shape.batch * shape.tokens // length
    inputs = [random(sequences, shape.heads, length, size) for _ in range(3)]
    if shape.window:  # the relative position bias, which is learned
        inputs.append(random(1, shape.heads, length, length))
    scale = size**-0.5
    flash = _peer(inputs[0], "flash_attn", _flash_attention)
    if shape.window or inputs[0].dtype not in (torch.float16, torch.bfloat16):
        flash = "it takes 16-bit numbers and no bias"

    def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = (q * scale) @ k.mT
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    return Operation(
        name=name,
        family=name,
        inputs=tuple(inputs),
        first=(0, 1, 2),
        ours=gn_kernels.attention,
        eager=eager,
        kernels=ATTENTION_KERNELS,
        formula=ATTENTION_FORMULA,
        options=(scale,),
        first_order={
            "F.scaled_dot_product_attention": F.scaled_dot_product_attention,
            "flash_attn": flash,
        },
    )


# -- The providers -------------------------------------------------------------------------------


class Cotangents(NamedTuple):
    """What is multiplied with the result, and with the gradients of the first inputs."""

    grad: Tensor
    second: tuple[Tensor, ...]


def make_cotangents(operation: Operation) -> Cotangents:
    generator = torch.Generator().manual_seed(1)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    with torch.no_grad():
        result = operation.eager(*operation.inputs)
    second = tuple(like(operation.inputs[i]) for i in operation.first)
    return Cotangents(like(result).requires_grad_(), second)


def through_autograd(
    function: Callable[..., Tensor], operation: Operation, cotangents: Cotangents
) -> dict[str, Run]:
    """The orders of a function that can be differentiated twice."""
    inputs, (grad, second) = operation.inputs, cotangents
    first = [inputs[i] for i in operation.first]

    def forward() -> tuple[Tensor]:
        return (function(*inputs),)

    def backward_of(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, first, grad, create_graph=True)

    def double_of(gradients: tuple[Tensor, ...], keep: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            gradients, (grad, *inputs), second, retain_graph=keep, allow_unused=True
        )

    y = function(*inputs)
    gradients = backward_of(y)
    return {
        "forward": forward,
        "backward": lambda: backward_of(y),
        "double backward": lambda: double_of(gradients, keep=True),
        "cycle": lambda: double_of(backward_of(function(*inputs)), keep=False),
    }


def _first_order(
    function: Callable[..., Tensor], operation: Operation, cotangents: Cotangents
) -> dict[str, Run]:
    inputs, grad = operation.inputs, cotangents.grad.detach()
    first = [inputs[i] for i in operation.first]
    y = function(*inputs)
    return {
        "forward": lambda: (function(*inputs),),
        "backward": lambda: torch.autograd.grad(y, first, grad, retain_graph=True),
    }


class _Functions(NamedTuple):
    """The three orders as functions of tensors, without autograd."""

    forward: Callable[..., tuple[Tensor | None, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]  # of grad, inputs
    double: Callable[..., tuple[Tensor | None, ...]]  # of cotangents, grad, inputs


def _functions(orders: Orders, operation: Operation) -> _Functions:
    # An absent input is None; attention's bias is one.
    arity = {"activation": 1, "layer_norm": 3, "attention": 4}[operation.family]
    absent = (None,) * (arity - len(operation.inputs))
    wanted = tuple(i in operation.first for i in range(arity))
    wanted_then = (True, *(i < len(operation.inputs) for i in range(arity)))
    options = operation.options
    detached = (*(one.detach() for one in operation.inputs), *absent)
    residuals = orders.forward(detached, options)[1:]

    def forward(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        return orders.forward((*inputs, *absent), options)[:1]

    def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = orders.backward(wanted, grad, (*inputs, *absent), residuals, options)
        return tuple(gradients[i] for i in operation.first)

    def double(
        second: tuple[Tensor, ...], grad: Tensor, *inputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        given = iter(second)
        each = tuple(next(given) if asked else None for asked in wanted)
        results = orders.double_backward(
            wanted_then, each, grad, (*inputs, *absent), residuals, options
        )
        return results[: 1 + len(inputs)]

    return _Functions(forward, backward, double)


def _runs(functions: _Functions, operation: Operation, cotangents: Cotangents) -> dict[str, Run]:
    inputs = tuple(one.detach() for one in operation.inputs)
    grad, second = cotangents.grad.detach(), cotangents.second
    runs: dict[str, Run] = {
        "forward": lambda: functions.forward(*inputs),
        "backward": lambda: functions.backward(grad, *inputs),
        "double backward": lambda: functions.double(second, grad, *inputs),
    }

    def cycle() -> tuple[Tensor | None, ...]:
        # Both results live on, as under autograd.
        kept = (runs["forward"](), runs["backward"]())
        return runs["double backward"]() if kept else ()

    return runs | {"cycle": cycle}


def _compiled_autograd(operation: Operation, cotangents: Cotangents) -> dict[str, Run]:
    eager, first = operation.eager, operation.first

    def forward(*inputs: Tensor) -> tuple[Tensor]:
        return (eager(*inputs),)

    def backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.func.vjp(eager, *inputs)[1](grad)
        return tuple(gradients[i] for i in first)

    def double(second: tuple[Tensor, ...], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(backward, grad, *inputs)[1](second)

    return _compiled(_Functions(forward, backward, double), operation, cotangents)


def _compiled(
    functions: _Functions, operation: Operation, cotangents: Cotangents
) -> dict[str, Run]:
    compiled = [torch.compile(one, fullgraph=True, dynamic=False) for one in functions]
    runs = _runs(_Functions(*compiled), operation, cotangents)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for order in ORDERS[:3]:
        runs[order]()
    # torch.compile has ways to run eagerly without a word, TORCHDYNAMO_DISABLE=1 for one.
    if graphs["unique_graphs"] != before + len(compiled):
        raise RuntimeError("torch.compile did not compile each order to one graph")
    return runs


def moved_bytes(operation: Operation, cotangents: Cotangents) -> dict[str, int]:
    """What each order can't do without: it reads its arguments and writes its results, once."""

    def size(*tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    inputs, (grad, second) = size(*operation.inputs), cotangents
    result = {
        "forward": inputs + size(grad),
        "backward": inputs + size(grad, *second),
        "double backward": 2 * (inputs + size(grad)) + size(*second),
    }
    return result | {"cycle": sum(result.values())}


def _copies(operation: Operation, cotangents: Cotangents) -> dict[str, Run]:
    moved = moved_bytes(operation, cotangents)
    sources = {
        order: torch.zeros(moved[order] // 2, dtype=torch.uint8, device=cotangents.grad.device)
        for order in ORDERS[:3]
    }
    # It allocates its result, as an operation does.
    runs: dict[str, Run] = {
        order: lambda source=source: (source.clone(),) for order, source in sources.items()
    }
    return runs | {"cycle": lambda: tuple(source.clone() for source in sources.values())}


def make_providers(
    operation: Operation, cotangents: Cotangents, chosen: Sequence[str] | None = None
) -> tuple[dict[str, dict[str, Run]], dict[str, str]]:
    """The orders of each provider that is chosen (default: all); and why the others have none."""
    torch.compiler.reset()
    makers: dict[str, Callable[[], dict[str, Run]]] = {
        OURS: lambda: through_autograd(operation.ours, operation, cotangents),
        KERNELS_ALONE: lambda: _runs(
            _functions(operation.kernels, operation), operation, cotangents
        ),
        EAGER: lambda: through_autograd(operation.eager, operation, cotangents),
        INDUCTOR: lambda: _compiled(
            _functions(operation.formula, operation), operation, cotangents
        ),
        INDUCTOR_AUTOGRAD: lambda: _compiled_autograd(operation, cotangents),
        COPY: lambda: _copies(operation, cotangents),
    }
    absent = {}
    for name, function in operation.first_order.items():
        if isinstance(function, str):
            absent[name] = f"absent: {function}"
        else:
            makers[name] = partial(_first_order, function, operation, cotangents)
    providers = {}
    for name, make in makers.items():
        if chosen is None or name in chosen:
            try:
                providers[name] = make()
            except Exception as error:  # whatever a provider raises is its result
                absent[name] = common.one_line(error)
    return providers, absent


# -- The check -----------------------------------------------------------------------------------


def expected_results(
    operation: Operation, cotangents: Cotangents
) -> dict[str, tuple[Tensor | None, ...]]:
    """Eager PyTorch in float64, on the same numbers."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    exact = operation._replace(inputs=tuple(map(wide, operation.inputs)))
    grad, second = cotangents
    runs = through_autograd(exact.eager, exact, Cotangents(wide(grad), tuple(map(wide, second))))
    results = {order: tuple(_detached(runs[order]())) for order in ORDERS[:3]}
    return results | {"cycle": results["double backward"]}


def _detached(results: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if one is None else one.detach() for one in results]


def mistake(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float
) -> str:
    """What is wrong with a provider's results; empty where nothing is."""
    if len(actual) != len(expected):
        return f"{len(actual)} results instead of {len(expected)}"
    for i, (result, exact) in enumerate(zip(actual, expected, strict=True)):
        if exact is None:
            continue
        if result is None or result.shape != exact.shape:
            return f"result {i} is {'missing' if result is None else 'of another shape'}"
        error = torch.linalg.vector_norm(result.detach().double() - exact)
        norm = torch.linalg.vector_norm(exact)
        if not float(error) <= tolerance * float(norm):
            return f"result {i} is wrong by {float(error / norm):.1e} of its norm"
    return ""


# -- The table -----------------------------------------------------------------------------------


def measure(operation: Operation, rounds: int, chosen: Sequence[str] | None = None) -> list[Row]:
    """Check every provider and order, then time those that are right, interleaved."""
    cotangents = make_cotangents(operation)
    expected = expected_results(operation, cotangents)
    providers, absent = make_providers(operation, cotangents, chosen)
    tolerance = TOLERANCE[operation.inputs[0].dtype]
    device = operation.inputs[0].device.type
    errors = {
        name: {
            order: _mistake_of(run, expected[order], tolerance)
            for order, run in runs.items()
            if name != COPY
        }
        for name, runs in providers.items()
    }
    right = {name: runs for name, runs in providers.items() if not any(errors[name].values())}
    rows = []
    for order in ORDERS:
        timed = {name: runs[order] for name, runs in right.items() if order in runs}
        timings = common.interleave(timed, rounds, device)
        for name in sorted((*providers, *absent), key=(OURS, EAGER, *absent, *providers).index):
            if name in providers and order not in providers[name]:
                continue  # a peer with one derivative
            error = errors.get(name, {}).get(order, "")
            if not error and name in providers and name not in right:
                error = "wrong in another order"
            row: Row = {"order": order, "provider": name, "error": error, "note": ""}
            if name in absent:
                row["error" if name == OURS else "note"] = absent[name]
            if name in timings:
                row |= common.milliseconds(timings[name])
                if EAGER in timings:
                    row |= common.relative(timings[name], timings[EAGER])
                    row["speedup"] = timings[EAGER].median / timings[name].median
                if COPY in timings:
                    row["versus_copy"] = timings[name].median / timings[COPY].median
            rows.append(row)
    return rows


def _mistake_of(run: Run, expected: Sequence[Tensor | None], tolerance: float) -> str:
    try:
        return mistake(run(), expected, tolerance)
    except Exception as error:  # whatever a provider raises is its result
        return common.one_line(error)


def cases(
    families: Sequence[str] | None,
    shapes: Sequence[str] | None,
    dtypes: Sequence[torch.dtype] | None,
    device: str = "cpu",
) -> list[tuple[str, str, torch.dtype]]:
    """(operation, shape, dtype) of what is asked for; the device's defaults where nothing is."""
    result = []
    for name, family in NAMES.items():
        if families is None or name in families or family in families:
            some = DEFAULTS[family] if device == "cpu" else _GPU_DEFAULTS
            if shapes is not None and dtypes is not None:
                some = tuple((shape, dtype) for shape in shapes for dtype in dtypes)
            elif shapes is not None:
                types = dict.fromkeys(dtype for _, dtype in some)
                some = tuple(
                    (shape, dtype)
                    for shape in shapes
                    for dtype in ([d for s, d in some if s == shape] or types)
                )
            elif dtypes is not None:
                names = dict.fromkeys(shape for shape, _ in some)
                some = tuple(
                    (shape, dtype)
                    for dtype in dtypes
                    for shape in ([s for s, d in some if d == dtype] or names)
                )
            result += [(name, shape, dtype) for shape, dtype in some]
    return result


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


COLUMNS = {
    "operation": "operation",
    "shape": "dimensions",
    "dtype": "dtype",
    "order": "order",
    "provider": "provider",
    "ms": "median_ms",
    "20 %": "p20_ms",
    "80 %": "p80_ms",
    "eager ÷ it": "speedup",
    "÷ copy": "versus_copy",
    "failed": "error",
    "note": "note",
}
QUICK = ("vit-ti-8", (torch.float32,), ("gelu", "layer_norm", "attention"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("operations", __doc__)
    families = sorted({*NAMES, *NAMES.values()})
    parser.add_argument("--family", choices=families, action="append")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], action="append")
    parser.add_argument("--dtype", choices=[*common.DTYPES, "all"], action="append")
    parser.add_argument("--rounds", type=common.samples, help="samples of each provider")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    where = common.environment(common.command_line("operations", argv))
    shapes, dtypes, names = arguments.shape, arguments.dtype, arguments.family
    shapes = list(SHAPES) if shapes and "all" in shapes else shapes
    dtypes = list(common.DTYPES) if dtypes and "all" in dtypes else dtypes
    dtypes = dtypes and [common.DTYPES[name] for name in dtypes]
    chosen = None
    if arguments.quick:
        shapes, dtypes, names = shapes or [QUICK[0]], dtypes or QUICK[1], names or QUICK[2]
        chosen = (OURS, EAGER, INDUCTOR, COPY)  # a compilation takes seconds
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    rows: list[Row] = []
    for name, shape, dtype in cases(names, shapes, dtypes, arguments.device):
        operation = make_operation(name, SHAPES[shape], dtype, arguments.device)
        about = {
            "kind": "measured",
            "operation": name,
            "shape": shape,
            "dimensions": "×".join(map(str, operation.inputs[0].shape)),
            "dtype": dtype_name(dtype),
            "device": arguments.device,
            "memory": "reused" if common.kept_pages() else "fresh",
        }
        some = [about | row | where for row in measure(operation, rounds, chosen)]
        print(common.markdown(some, COLUMNS), end="\n\n", flush=True)
        rows += some
    table = Table(
        "operations",
        rows,
        ("operation", "shape", "dtype", "device", "memory", "order", "provider"),
        common.measured_interval,
    )
    return common.finish([table], arguments)


if __name__ == "__main__":
    raise SystemExit(main())
