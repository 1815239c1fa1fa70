"""What does a training step cost? Seconds on this machine, and a count for whole models.

    python -m benchmarks.step_cost [--quick] [--part seconds|count] [--size S] [--compare FOLDER]

Seconds (measured): timm's models in a size that fits, on a CPU fewer blocks and images and float32,
on a GPU whole, batch 64, bfloat16 parameters. A step is forward and backward; no optimiser, no data
loading. DropPath is off: it would train the methods on different networks.

Count (counted on meta tensors, nothing runs): timm's models as they are, batch 64, bfloat16
parameters: bytes, kernel calls, FLOP, memory; and a roofline model of their time (modelled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.common import Row, Table
from gn_kernels.counting import ASSUMPTIONS, MACHINES, Counter
from gn_kernels.penalty import gradient_norm
from gn_kernels.saving import recompute
from gn_kernels.swap import swap

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
MODELS = (
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
)
COUNTED_BATCH = 64
BASELINE, EAGER = "natural", "gradient-norm, eager"
COMPILED = "gradient-norm, torch.compile"

# The paper's: λ_CE·CE + λ_GN·ε·‖∇CE‖₁, PGD of three steps from a uniform start.
_WEIGHT_CE, _WEIGHT_PENALTY = 0.8, 1.2 * 4 / 255
_EPS, _ATTACK_STEPS = 4 / 255, 3
_STEP = 8 / 255 / 3

# In units of a pixel; about where float32 has its least error (benchmarks.accuracy).
_DIFFERENCE = 1e-4

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model(images), labels)


def gradnorm(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Double backpropagation."""
    images = images.detach().requires_grad_()
    loss = cross_entropy(model(images), labels)
    return _WEIGHT_CE * loss + _WEIGHT_PENALTY * gradient_norm(loss, images)


def recomputing_gradnorm(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The same, with what is cheap made again instead of saved."""
    with recompute():
        return gradnorm(model, images, labels)


def finite_differences(
    model: nn.Module, images: Tensor, labels: Tensor, step: float = _DIFFERENCE
) -> Tensor:
    r"""The same penalty as (ℓ(x + h·sign ∇ℓ) − ℓ(x))/h, with first derivatives only.

    Source: Finlay and Oberman, https://arxiv.org/abs/1905.11468.
    """
    images = images.detach().requires_grad_()
    loss = cross_entropy(model(images), labels)
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    moved = cross_entropy(model(images.detach() + step * gradient.sign()), labels)
    # Of the batch mean: a sample's gradient has 1/B in it, and so has the difference.
    return _WEIGHT_CE * loss + _WEIGHT_PENALTY * (moved - loss) / step


def pgd_reference(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """As the paper's code attacks: with parameter gradients, and one forward pass too many."""
    attacked = _start(images)
    for _ in range(_ATTACK_STEPS):
        attacked.requires_grad_()
        cross_entropy(model(attacked), labels).backward()
        attacked = _attack_step(images, attacked, attacked.grad)
    with torch.no_grad():
        model(attacked)
    model.zero_grad()
    return natural(model, attacked, labels)


def pgd_lean(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The same attack with input gradients only."""
    attacked = _start(images)
    for _ in range(_ATTACK_STEPS):
        attacked.requires_grad_()
        loss = cross_entropy(model(attacked), labels)
        (gradient,) = torch.autograd.grad(loss, attacked)
        attacked = _attack_step(images, attacked, gradient)
    return natural(model, attacked, labels)


def _start(images: Tensor) -> Tensor:
    return (images + torch.empty_like(images).uniform_(-_EPS, _EPS)).clamp_(0, 1)


def _attack_step(images: Tensor, attacked: Tensor, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    moved = attacked.detach() + _STEP * gradient.sign()
    return (images + (moved - images).clamp_(-_EPS, _EPS)).clamp_(0, 1)


class Method(NamedTuple):
    """A way to train; ``prepare`` changes timm's model in place."""

    name: str
    loss: Loss
    prepare: Callable[[nn.Module], object]
    counted: bool = True


def use_math_attention(model: nn.Module) -> None:
    """timm's plain attention: its fused one has no second derivative."""
    _set_fused_attention(model, False)


def use_fused_attention(model: nn.Module) -> None:
    """PyTorch's, for one derivative. On meta tensors it falls back to plain operations."""
    _set_fused_attention(model, True)


def _set_fused_attention(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


NATURAL = Method(BASELINE, natural, use_math_attention)
STOCK = Method("natural, fused attention", natural, use_fused_attention, counted=False)
METHODS = (
    NATURAL,
    STOCK,
    Method("natural, gn_kernels", natural, swap),
    Method(EAGER, gradnorm, use_math_attention),
    Method("gradient-norm, gn_kernels", gradnorm, swap),
    Method("gradient-norm, gn_kernels, recompute", recomputing_gradnorm, swap),
    Method("finite differences", finite_differences, use_math_attention),
    Method("finite differences, gn_kernels", finite_differences, swap),
    Method("PGD-3 of the reference", pgd_reference, use_math_attention),
    Method("PGD-3, lean", pgd_lean, use_math_attention),
    Method("PGD-3, lean, gn_kernels", pgd_lean, swap),
)


def compiled_gradnorm(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The whole penalised loss as one compiled graph; ``backward()`` runs the compiled second one.

    ``torch.compile(model)`` alone can't be differentiated twice.
    """
    parameters = dict(model.named_parameters())

    def penalised(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        def loss_of(images: Tensor) -> Tensor:
            return cross_entropy(functional_call(model, parameters, (images,)), labels)

        gradient, loss = grad_and_value(loss_of)(images)
        # gradient_norm's value: B times the gradient of the mean, the mean of the L1 norms
        return _WEIGHT_CE * loss + _WEIGHT_PENALTY * gradient.abs().sum()

    torch.compiler.reset()
    compiled = torch.compile(penalised, fullgraph=True, dynamic=False)
    return lambda images, labels: compiled(parameters, images, labels)


def check_compiled(step: Callable[[], object]) -> None:
    """Run the first step; raise where it ran eagerly, which some ways of asking do silently."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    step()
    graphs = (counters["stats"]["unique_graphs"], counters["aot_autograd"]["ok"])
    if graphs != (1, 1):
        raise RuntimeError(
            f"torch.compile made {graphs[0]} graphs and differentiated {graphs[1]} of them, not 1"
        )


# -- Seconds -------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What is measured: a model of timm, with what is changed of it."""

    name: str
    options: Mapping[str, Any]
    pixels: int
    batch: int
    rounds: int = 7

    @property
    def title(self) -> str:
        changed = ", ".join(
            f"{name}={'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self.options.items()
        )
        return f"{self.name}{f' ({changed})' if changed else ''}"


_BLOCKS = {"depths": (1, 1, 2, 1)}
SIZES = {
    "vit-s-4": Size(MODELS[0], {"depth": 4}, 224, batch=8),
    "vit-b-2": Size(MODELS[1], {"depth": 2}, 224, batch=4),
    "swin-t-5": Size(MODELS[2], _BLOCKS, 224, batch=4),
    "swin-b-5": Size(MODELS[3], _BLOCKS, 224, batch=2),
    "vit-s": Size(MODELS[0], {}, 224, COUNTED_BATCH),
    "vit-b": Size(MODELS[1], {}, 224, COUNTED_BATCH),
    "swin-t": Size(MODELS[2], {}, 224, COUNTED_BATCH),
    "swin-b": Size(MODELS[3], {}, 224, COUNTED_BATCH),
}
# What runs where nothing else is asked for.
DEFAULTS = {
    "cpu": {"vit-s-4": ACTIVATIONS}
    | dict.fromkeys(("vit-b-2", "swin-t-5", "swin-b-5"), ACTIVATIONS[:1]),
    "cuda": {"vit-s": ACTIVATIONS} | dict.fromkeys(("vit-b", "swin-t", "swin-b"), ACTIVATIONS[:1]),
}
QUICK = Size(
    MODELS[0], {"depth": 2, "embed_dim": 192, "num_heads": 3}, pixels=112, batch=2, rounds=5
)


def make_model(size: Size, activation: str) -> nn.Module:
    torch.manual_seed(0)
    options = dict(size.options)
    if not size.name.startswith("swin"):
        options["act_layer"] = activation
    elif activation != "gelu":
        raise SystemExit(f"timm's Swin has gelu only: leave --activation {activation} to the ViTs")
    return timm.create_model(size.name, img_size=size.pixels, drop_path_rate=0.0, **options)


def make_steps(
    size: Size,
    activation: str,
    methods: Sequence[Method],
    with_compile: bool,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """A step for each method, on a model of its own with the same weights; weight gradients."""
    torch.manual_seed(1)
    images = torch.rand(size.batch, 3, size.pixels, size.pixels).to(device, dtype)
    labels = torch.randint(1000, (size.batch,), device=device)

    def step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        loss(images, labels).backward()
        return {
            name: value.grad for name, value in model.named_parameters() if value.grad is not None
        }

    steps = {}
    for method in methods:
        model = make_model(size, activation).to(device, dtype)
        method.prepare(model)
        steps[method.name] = partial(step, model, partial(method.loss, model))
    if with_compile:
        model = make_model(size, activation).to(device, dtype)
        use_math_attention(model)
        steps[COMPILED] = partial(step, model, compiled_gradnorm(model))
    return steps


# Which eager method a step must agree with, and the relative difference of all weight gradients
# that the order of float32 sums explains (1e-6 seen), or a finite step (1e-3 to 1e-2), or the signs
# of gradients about 0, which an attack turns into whole steps. Eager PyTorch in bfloat16 is itself
# 1e-2 from the truth; a penalty that is dropped differs by more than 0.5.
_SAME, _ATTACKED, _DIFFERENCES = 1e-4, 0.05, 0.1
_HALF_PRECISION = 0.1
_REFERENCE = {
    STOCK.name: (BASELINE, _SAME),
    "natural, gn_kernels": (BASELINE, _SAME),
    "gradient-norm, gn_kernels": (EAGER, _SAME),
    "gradient-norm, gn_kernels, recompute": (EAGER, _SAME),
    COMPILED: (EAGER, _SAME),
    "finite differences": (EAGER, _DIFFERENCES),
    "finite differences, gn_kernels": (EAGER, _DIFFERENCES),
    "PGD-3, lean": ("PGD-3 of the reference", _SAME),
    "PGD-3, lean, gn_kernels": ("PGD-3 of the reference", _ATTACKED),
}


def check_steps(
    steps: dict[str, Callable[[], dict[str, Tensor]]], dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """What is wrong with a step, for those whose weight gradients are not the eager ones."""
    wrong = {}
    kept: dict[str, dict[str, Tensor]] = {}
    for name, step in steps.items():
        torch.manual_seed(2)  # an attack starts at random
        try:
            if name == COMPILED:
                check_compiled(step)
            gradients = step()
            if name in (BASELINE, EAGER, "PGD-3 of the reference"):
                kept[name] = {key: value.clone() for key, value in gradients.items()}
            if name in _REFERENCE:
                reference, tolerance = _REFERENCE[name]
                if dtype != torch.float32:
                    if name.startswith(("finite", "PGD")):
                        continue  # in 16 bits neither step nor sign is the same
                    tolerance = _HALF_PRECISION
                error = relative_error(gradients, kept[reference])
                if not error <= tolerance:
                    wrong[name] = f"weight gradients differ by {error:.1e} from {reference}"
        except Exception as error:  # whatever a peer raises is its result
            wrong[name] = common.one_line(error)
    return wrong


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """‖actual − expected‖/‖expected‖ over all parameters; infinite where one is missing."""
    if actual.keys() != expected.keys():
        return float("inf")
    difference = sum(
        float((actual[name].double() - expected[name].double()).square().sum()) for name in expected
    )
    return (difference / sum(float(v.double().square().sum()) for v in expected.values())) ** 0.5


def measure(
    size: Size,
    activations: Sequence[str],
    with_compile: bool,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Check every step, then time those that are right."""
    rows = []
    for activation in activations:
        steps = make_steps(size, activation, METHODS, with_compile, device, dtype)
        wrong = check_steps(steps, dtype)
        if BASELINE in wrong:
            raise RuntimeError(f"the natural step fails: {wrong[BASELINE]}")
        right = {name: step for name, step in steps.items() if name not in wrong}
        timings = common.interleave(right, size.rounds, device)
        stock = timings.get(STOCK.name)
        for name in [*steps, *([] if with_compile else [COMPILED])]:
            row: Row = {
                "kind": "measured",
                "model": size.title,
                "pixels": size.pixels,
                "batch": size.batch,
                "dtype": str(dtype).removeprefix("torch."),
                "device": device,
                "activation": activation,
                "provider": name,
                "error": wrong.get(name, ""),
                "note": "" if name in steps else "not asked for: compiling takes a minute",
            }
            if name in timings:
                row |= common.milliseconds(timings[name])
                row |= common.relative(timings[name], timings[BASELINE])
                if stock:
                    row["versus_stock"] = timings[name].median / stock.median
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    right[name]()
                    row["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
            rows.append(row)
    return rows


# -- Count ---------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """One step of a model on meta tensors."""

    counter: Counter
    saved: int  # bytes alive when the last backward pass begins
    peak: int


def count(method: Method, name: str, batch: int = COUNTED_BATCH, **options: Any) -> Counted:
    """Run one step of timm's model on meta tensors, with bfloat16 parameters, in training mode."""
    with torch.device("meta"):
        model = timm.create_model(name, **options).to(torch.bfloat16).train()
        images = torch.empty(batch, *model.default_cfg["input_size"], dtype=torch.bfloat16)
        labels = torch.zeros(batch, dtype=torch.long)
    method.prepare(model)
    with Counter() as counter:
        loss = method.loss(model, images, labels)
        saved = counter.live
        loss.backward()
    return Counted(counter, saved, counter.peak)


def count_rows(models: Sequence[str], methods: Sequence[Method], batch: int) -> list[Row]:
    """A row for each model and method: counted, and modelled."""
    rows = []
    for name in models:
        baseline: Counted | None = None
        for method in methods:
            row: Row = {
                "kind": "counted",
                "model": name,
                "batch": batch,
                "dtype": "bfloat16",
                "provider": method.name,
                "error": "",
            }
            rows.append(row)
            try:
                counted = count(method, name, batch)
            except Exception as error:  # whatever a method raises is its result
                row["error"] = common.one_line(error)
                continue
            counter, baseline = counted.counter, baseline or counted
            row |= {
                "gigabytes": counter.bytes / 1e9,
                "calls": len(counter.ops),
                "teraflop": counter.flop / 1e12,
                "flop_ratio": counter.flop / baseline.counter.flop,
                "saved_gigabytes": counted.saved / 1e9,
                "peak_gigabytes": counted.peak / 1e9,
            }
            for machine in MACHINES:
                seconds = counter.seconds(machine)
                row[f"{machine.name}_model_ms"] = seconds * 1e3
                row[f"{machine.name}_model_ratio"] = seconds / baseline.counter.seconds(machine)
                row[f"{machine.name}_flop_bound_ratio"] = counter.seconds_without_product_bytes(
                    machine
                ) / baseline.counter.seconds_without_product_bytes(machine)
    return rows


def _counted_interval(row: Row) -> tuple[float, float] | None:
    # A count has no noise: 0.1 % covers what the CSV rounds.
    if "gn_kernels" not in row["provider"] or not row.get("gigabytes"):
        return None
    return float(row["gigabytes"]) * 0.999, float(row["gigabytes"]) * 1.001


SECONDS_COLUMNS = {
    "model": "model",
    "activation": "activation",
    "step": "provider",
    "ms": "median_ms",
    "20 %": "p20_ms",
    "80 %": "p80_ms",
    "÷ natural": "relative",
    "÷ natural, fused attention": "versus_stock",
    "failed": "error",
    "note": "note",
}
COUNT_COLUMNS = {
    "model": "model",
    "step": "provider",
    "GB": "gigabytes",
    "calls": "calls",
    "TFLOP": "teraflop",
    "FLOP ÷ natural": "flop_ratio",
    "saved GB": "saved_gigabytes",
    "peak GB": "peak_gigabytes",
    **{f"{machine.name} ms": f"{machine.name}_model_ms" for machine in MACHINES},
    **{f"{machine.name} ÷": f"{machine.name}_model_ratio" for machine in MACHINES},
    "H100 ÷, products by FLOP": "H100_flop_bound_ratio",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("step_cost", __doc__)
    parser.add_argument("--part", choices=("seconds", "count"), help="only one of the two")
    parser.add_argument("--activation", choices=ACTIVATIONS, action="append")
    parser.add_argument("--model", choices=MODELS, action="append", help="what is counted")
    parser.add_argument("--size", choices=SIZES, action="append", help="what is measured")
    parser.add_argument("--rounds", type=common.samples, help="samples of each step")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled step")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the seconds: cpu or cuda",
    )
    arguments = parser.parse_args(argv)
    where = common.environment(common.command_line("step_cost", argv))
    quick, tables = arguments.quick, []
    if arguments.part != "count":
        device = arguments.device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        sizes: list[tuple[Size, Sequence[str]]] = [(QUICK, ACTIVATIONS[:1])]
        if arguments.size or not quick:
            defaults = DEFAULTS[device]
            sizes = [
                (SIZES[name], defaults.get(name, ACTIVATIONS[:1]))
                for name in arguments.size or defaults
            ]
        # Compilation takes longer than a quick run may.
        with_compile = not (quick or arguments.no_compile)
        rows: list[Row] = []
        for size, activations in sizes:
            size = size._replace(rounds=arguments.rounds or size.rounds)
            activations = arguments.activation or activations
            some = measure(size, activations, with_compile, device, dtype)
            print(common.markdown(some, SECONDS_COLUMNS), end="\n\n", flush=True)
            rows += some
        tables.append(
            Table(
                "step_seconds",
                [row | where for row in rows],
                ("model", "pixels", "batch", "dtype", "device", "activation", "provider"),
                common.measured_interval,
            )
        )
    if arguments.part != "seconds":
        methods = [method for method in METHODS if method.counted]
        models = arguments.model or (MODELS[:1] if quick else MODELS)
        rows = count_rows(models, methods, COUNTED_BATCH)
        print(common.markdown(rows, COUNT_COLUMNS), end="\n\n")
        print(f"Modelled (ms, ÷ natural): {ASSUMPTIONS}.", end="\n\n")
        tables.append(
            Table(
                "step_count",
                [row | where for row in rows],
                ("model", "batch", "dtype", "provider"),
                _counted_interval,
            )
        )
    return common.finish(tables, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
