"""What does a training step cost? Seconds on this machine, and a count for whole models.

    python -m benchmarks.step_cost [--quick] [--part seconds|count] [--compare FOLDER]

Seconds (measured): a ViT of width 384 with 4 blocks, 224 px, batch 8, float32. A step is forward
and backward; no optimiser, no data loading.

Count (counted on meta tensors, nothing runs): timm's models as they are, batch 64, bfloat16
parameters: bytes, kernel calls, FLOP, memory; and a roofline model of their time (modelled).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.common import Row, Table
from gn_kernels.counting import MACHINES, Counter
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
BASELINE = "natural"

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
    Method("gradient-norm, eager", gradnorm, use_math_attention),
    Method("gradient-norm, gn_kernels", gradnorm, swap),
    Method("gradient-norm, gn_kernels, recompute", recomputing_gradnorm, swap),
    Method("finite differences", finite_differences, use_math_attention),
    Method("finite differences, gn_kernels", finite_differences, swap),
    Method("PGD-3 of the reference", pgd_reference, use_math_attention),
    Method("PGD-3, lean", pgd_lean, use_math_attention),
    Method("PGD-3, lean, gn_kernels", pgd_lean, swap),
)
COMPILED = "gradient-norm, torch.compile"


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


# -- Seconds -------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What is measured: timm's ViT-S with fewer blocks."""

    width: int
    blocks: int
    pixels: int
    batch: int
    rounds: int


FULL = Size(width=384, blocks=4, pixels=224, batch=8, rounds=7)
QUICK = Size(width=192, blocks=2, pixels=112, batch=2, rounds=5)


def make_vit(size: Size, activation: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_small_patch16_224",
        img_size=size.pixels,
        embed_dim=size.width,
        depth=size.blocks,
        num_heads=size.width // 64,
        act_layer=activation,
    )


def make_steps(
    size: Size, activation: str, methods: Sequence[Method], with_compile: bool, device: str
) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """A step for each method, on a model of its own with the same weights; weight gradients."""
    torch.manual_seed(1)
    images = torch.rand(size.batch, 3, size.pixels, size.pixels, device=device)
    labels = torch.randint(1000, (size.batch,), device=device)

    def step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        loss(images, labels).backward()
        return {
            name: value.grad for name, value in model.named_parameters() if value.grad is not None
        }

    steps = {}
    for method in methods:
        model = make_vit(size, activation).to(device)
        method.prepare(model)
        steps[method.name] = partial(step, model, partial(method.loss, model))
    if with_compile:
        model = make_vit(size, activation).to(device)
        use_math_attention(model)
        steps[COMPILED] = partial(step, model, compiled_gradnorm(model))
    return steps


# Which eager method a step must agree with, and the relative difference of all weight gradients
# that the order of float32 sums explains (1e-6 seen), or a finite step (1e-3 to 1e-2).
_REFERENCE = {
    STOCK.name: (BASELINE, 1e-4),
    "natural, gn_kernels": (BASELINE, 1e-4),
    "gradient-norm, gn_kernels": ("gradient-norm, eager", 1e-4),
    "gradient-norm, gn_kernels, recompute": ("gradient-norm, eager", 1e-4),
    COMPILED: ("gradient-norm, eager", 1e-4),
    "finite differences": ("gradient-norm, eager", 0.1),
    "finite differences, gn_kernels": ("gradient-norm, eager", 0.1),
}


def check_steps(steps: dict[str, Callable[[], dict[str, Tensor]]]) -> dict[str, str]:
    """What is wrong with a step, for those whose weight gradients are not the eager ones."""
    wrong = {}
    for name, step in steps.items():
        try:
            gradients = step()
            if name in _REFERENCE:
                reference, tolerance = _REFERENCE[name]
                error = relative_error(gradients, steps[reference]())
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


def measure(size: Size, activations: Sequence[str], with_compile: bool, device: str) -> list[Row]:
    """Check every step, then time those that are right."""
    rows = []
    for activation in activations:
        steps = make_steps(size, activation, METHODS, with_compile, device)
        wrong = check_steps(steps)
        if BASELINE in wrong:
            raise RuntimeError(f"the natural step fails: {wrong[BASELINE]}")
        timings = common.interleave(
            {name: step for name, step in steps.items() if name not in wrong}, size.rounds, device
        )
        stock = timings.get(STOCK.name)
        for name in steps:
            row: Row = {
                "kind": "measured",
                "model": f"ViT width {size.width}, {size.blocks} blocks, {size.pixels} px",
                "batch": size.batch,
                "dtype": "float32",
                "activation": activation,
                "provider": name,
                "error": wrong.get(name, ""),
            }
            if name in timings:
                row |= common.milliseconds(timings[name])
                row |= common.relative(timings[name], timings[BASELINE])
                if stock:
                    row["versus_stock"] = timings[name].median / stock.median
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
    "activation": "activation",
    "step": "provider",
    "ms": "median_ms",
    "20 %": "p20_ms",
    "80 %": "p80_ms",
    "÷ natural": "relative",
    "÷ natural, fused attention": "versus_stock",
    "failed": "error",
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
    parser.add_argument("--device", default="cpu", help="of the seconds: cpu or cuda")
    arguments = parser.parse_args(argv)
    where = common.environment(common.command_line("step_cost", argv))
    quick, tables = arguments.quick, []
    if arguments.part != "count":
        activations = arguments.activation or (ACTIVATIONS[:1] if quick else ACTIVATIONS)
        # Compilation takes longer than a quick run may.
        rows = measure(QUICK if quick else FULL, activations, not quick, arguments.device)
        print(common.markdown(rows, SECONDS_COLUMNS), end="\n\n")
        tables.append(
            Table(
                "step_seconds",
                [row | where for row in rows],
                ("model", "batch", "dtype", "activation", "provider"),
                common.measured_interval,
            )
        )
    if arguments.part != "seconds":
        methods = [method for method in METHODS if method.counted]
        models = arguments.model or (MODELS[:1] if quick else MODELS)
        rows = count_rows(models, methods, COUNTED_BATCH)
        print(common.markdown(rows, COUNT_COLUMNS), end="\n\n")
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
