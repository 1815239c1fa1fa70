"""Writes benchmarks/README.md and its figures from the CSV files, and nothing by hand.

python -m benchmarks.report [--results FOLDER]
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row, markdown, read
from gn_kernels.counting import ASSUMPTIONS, MACHINES

README = Path(__file__).with_name("README.md")

# Written out: the report needs neither timm's models nor the package.
_OURS, _EAGER, _COPY = "gn_kernels", "eager", "copy"
_ALONE = "gn_kernels, no autograd"
_SMALL = 1000  # elements: fewer cost their call
_INDUCTOR = ("inductor, formula", "inductor, autograd")
_INTRODUCTION = """\
# Benchmarks

This page is written by `python -m benchmarks.report` from the CSV files in `results/`.

| question | command |
|---|---|
| How fast is one operation? | `python -m benchmarks.operations`, or `pytest benchmarks` |
| What does a training step cost? | `python -m benchmarks.step_cost` |
| How exact is it? | `python -m benchmarks.accuracy` |
| What do the GPU kernels compile to? | `python -m benchmarks.generated_code` |

The first three take `--quick`, `--output DIR`, and `--compare DIR` with the folder of an earlier
run, which makes them exit with 1 where this run is worse than that one beyond the noise of both:
where the 20th to 80th percentile of ours ÷ baseline lies wholly above the earlier one's. Each row
of their CSV names the processor, the GPU, the versions, the commit and the command; a run replaces
its own rows in the folder and leaves the others. On a machine with a GPU the same commands measure
the GPU.

Every table says what its figures are:

* **measured**: seconds on the machine that is named. Providers take turns in one process, after a
  warm-up; median, 20th and 80th percentile. Results were checked first, and what is wrong in one
  order has no time in any.
* **counted**: on meta tensors; exact, and the same on every machine.
* **modelled**: from the counts, with assumptions that stand beside the table. No measurement.
* **computed**: errors against float64.

What to hold against the measured figures:

* *Memory.* Every provider allocates its results. glibc takes large blocks from the kernel and gives
  them back, so that each call writes to fresh pages, which costs as much as the arithmetic; the
  *copy* pays the same. `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000` in front of the
  command keeps the pages; the rows with *reused* memory were measured so.
* *Cache.* Calls repeat on the same tensors. Where they fit into the processor's last cache (its
  size is in each row), they are read from it, by every provider and by the copy.
* *The copy* reads and writes half of its bytes each; a double backward of an activation reads three
  tensors and writes two, which is less work for the memory: ours ÷ copy may be below 1.
* *Threads.* All providers use PyTorch's, as many as the row says. In 16 bits matrix products may
  run on the processor's matrix unit (AMX), which is in the row too; our CPU attention computes in
  float32.
* *Denormals* are not flushed. Inputs are normal random numbers (of activations with deviation 2),
  and hardly any result is one.
* *Compiled peers* are checked to be compiled: one graph for each order, and for a whole step one
  graph that was differentiated. Inductor's default mode, static shapes.
"""


def render(results: Path) -> str:
    """The page."""
    parts = [_INTRODUCTION]
    for name, section in _SECTIONS.items():
        if (results / f"{name}.csv").exists():
            rows = read(name, results)
            if rows:
                parts.append(section(rows))
                if "command" in rows[0]:
                    parts.append(_made_by(rows))
    return "\n".join(parts)


def _made_by(rows: Sequence[Row]) -> str:
    """The commands, and under each machine and set of versions the commits that ran them."""
    parts = []
    where = ("cpu", "threads", "gpu", "torch", "triton", "timm", "gn_kernels", "python")
    for machine, group in _grouped(rows, *where).items():
        said = dict(zip(where, map(_text, machine), strict=True))
        commands = dict.fromkeys(
            f"`{row['command']}` ({row['date']}, commit {_text(row['commit'])}, "
            f"load {_text(row['load'])} at the start)"
            for row in group
        )
        parts.append(
            f"Made on {said['cpu']}, {said['threads']} threads; GPU: {said['gpu']}; torch "
            f"{said['torch']}, triton {said['triton']}, timm {said['timm']}, gn_kernels "
            f"{said['gn_kernels']}, Python {said['python']}, by\n\n"
            + "\n".join(f"* {command}" for command in commands)
        )
    return "\n\n".join(parts) + "\n"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _pivot(rows: Iterable[Row], index: Sequence[str], column: str, value: str) -> list[Row]:
    """One row for each ``index``, with the ``value`` of each ``column`` in a cell of its own."""
    return [
        dict(zip(index, key, strict=True)) | {row[column]: row.get(value, "") for row in group}
        for key, group in _grouped(rows, *index).items()
    ]


# -- One operation -------------------------------------------------------------------------------


_ORDERS = ("forward", "backward", "double backward", "cycle")
_CASE = ("device", "memory", "operation", "dimensions", "dtype")


def _cases(rows: Iterable[Row]) -> list[Row]:
    """A line for each case and order: every provider's time, and ours beside theirs."""
    table = []
    for key, group in sorted(_grouped(rows, *_CASE).items(), key=lambda item: _rank(item[0])):
        for order in _ORDERS:
            by_name = {row["provider"]: row for row in group if row["order"] == order}
            if not by_name:
                continue
            times = {name: row.get("median_ms") for name, row in by_name.items()}
            line: Row = dict(zip(_CASE, key, strict=True)) | {"order": order} | times
            ours = by_name.get(_OURS, {})
            if ours.get("median_ms"):
                line["spread"] = f"{ours['p20_ms']:.3g} to {ours['p80_ms']:.3g}"
                line["over eager"] = ours.get("speedup")
                line["over copy"] = ours.get("versus_copy")
                inductor = [times[name] for name in _INDUCTOR if times.get(name)]
                if inductor:
                    line["over inductor"] = min(inductor) / ours["median_ms"]
            table.append(line)
    return table


def _rank(case: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operations together, fresh memory before reused, large before small."""
    device, memory, operation, dimensions, dtype = case
    size = 1
    for length in str(dimensions).split("×"):
        size *= int(length)
    families = ("gelu", "gelu_tanh", "silu", "quick_gelu", "layer_norm", "attention")
    return device, memory, families.index(operation), size < 1000, dtype != "float32", -size


def _operations(rows: list[Row]) -> str:
    for row in rows:
        row.setdefault("device", "cpu")
        row.setdefault("memory", "fresh")
    known = (_OURS, _ALONE, _EAGER, *_INDUCTOR, _COPY)
    parts = []
    for (device, memory), group in _grouped(rows, "device", "memory").items():
        others = dict.fromkeys(
            row["provider"] for row in group if row["provider"] not in known and row["median_ms"]
        )
        columns = {
            "operation": "operation",
            "tensor": "dimensions",
            "dtype": "dtype",
            "order": "order",
            "gn_kernels ms": _OURS,
            "20 % to 80 %": "spread",
            "without autograd ms": _ALONE,
            "eager ms": _EAGER,
            "Inductor, formula ms": _INDUCTOR[0],
            "Inductor, autograd ms": _INDUCTOR[1],
            "copy ms": _COPY,
            **{f"{name} ms": name for name in others},
            "eager ÷ ours": "over eager",
            "Inductor ÷ ours": "over inductor",
            "ours ÷ copy": "over copy",
        }
        parts.append(
            f"### {device.upper()}, {memory} memory\n\n{markdown(_cases(group), columns)}\n"
        )
    tables = "\n".join(parts)
    return f"""\
## One operation (measured)

Forward is y = f(x); backward is `autograd.grad(y, x, grad, create_graph=True)`; double backward
differentiates that with respect to grad, x and the parameters; cycle is the three in sequence.
*Without autograd* are the same kernels, called as the autograd Functions call them. *Inductor* is
`torch.compile` of each order as a function of its own, without autograd, since a compiled module
can't be differentiated twice: of the formulas of gn_kernels, and of what autograd makes of
PyTorch's operation. Ratios take the faster of the two. *copy* is `clone()` of as many bytes as the
order has to move. Results were checked against eager float64 before any time was taken.

![Speed of the second order](results/operations.svg)

{tables}
{_behind(rows)}
{_absent(rows)}"""


def _behind(rows: Iterable[Row]) -> str:
    """Where a peer is faster by more than the spread of both, and why."""
    rows = list(rows)
    found: dict[str, list[str]] = {}
    for key, group in sorted(
        _grouped(rows, *_CASE, "order").items(),
        key=lambda item: (*_rank(item[0][:-1]), _ORDERS.index(item[0][-1])),
    ):
        by_name = {row["provider"]: row for row in group if row.get("median_ms")}
        ours = by_name.get(_OURS)
        for name, peer in by_name.items():
            if name in (_OURS, _ALONE, _COPY) or ours is None:
                continue
            if peer["p80_ms"] < ours["p20_ms"]:
                ratio = peer["median_ms"] / ours["median_ms"]
                _, memory, *case = key
                about = " ".join(case) + (", reused memory" if memory == "reused" else "")
                call = _time_of_a_call(rows, ours)
                reason = _reason(ours, peer, by_name.get(_ALONE), call)
                found.setdefault(reason, []).append(
                    f"{about}: {name} takes {ratio:.2f} of our time"
                )
    if not found:
        return "Nowhere is a peer faster by more than the spread of both.\n"
    return (
        "Where a peer is faster, by more than the spread of both, and why:\n\n"
        + "\n".join(
            f"* {reason}\n" + "\n".join(f"  * {line}" for line in lines)
            for reason, lines in found.items()
        )
        + "\n"
    )


def _size(case: Row) -> int:
    return math.prod(int(length) for length in str(case["dimensions"]).split("×"))


def _time_of_a_call(rows: Iterable[Row], ours: Row) -> float:
    """Of the kernel without autograd, on a tensor so small that the call is all; 0 if unknown."""
    like = {name: ours[name] for name in ("operation", "order", "device", "memory")}
    return min(
        (
            row["median_ms"]
            for row in rows
            if row["provider"] == _ALONE
            and row.get("median_ms")
            and _size(row) < _SMALL
            and like.items() <= row.items()
        ),
        default=0.0,
    )


def _reason(ours: Row, peer: Row, alone: Row | None, call: float) -> str:
    """What is known of a case in which a peer is ahead."""
    if _size(ours) < _SMALL:
        return (
            "A tensor this small costs its call: an autograd Function in Python and the "
            "dispatcher. Compiled functions have no autograd around them."
        )
    if alone and alone["p20_ms"] <= peer["p80_ms"]:
        return (
            "The kernel itself, called without autograd, is ahead of the peer or level with it: "
            "what is lost is the call of an autograd Function in Python."
        )
    if alone and alone["p20_ms"] - call <= peer["p80_ms"]:
        return (
            "Less the time of a call from Python, that of the smallest tensor above, the kernel is "
            "ahead of the peer or level with it."
        )
    return "No reason is known."


def _absent(rows: Iterable[Row]) -> str:
    notes = dict.fromkeys(
        f"* {row['operation']}, {row['provider']}: {row['note'] or row['error']}"
        for row in rows
        if row.get("note") or row.get("error")
    )
    return "Without a figure:\n\n" + "\n".join(notes) + "\n" if notes else ""


# -- A training step -----------------------------------------------------------------------------


_STOCK = "natural, fused attention"
_MINE = "gradient-norm, gn_kernels"
_PGD = ("PGD-3 of the reference", "PGD-3, lean")


def _headline(rows: Sequence[Row], value: str) -> list[str]:
    """Of each model: our gradient-norm step over what it is judged by."""
    lines = []
    for key, group in _grouped(rows, *_model(rows)).items():
        cost = {row["provider"]: row[value] for row in group if row.get(value)}
        judges = ("natural", _STOCK, "natural, gn_kernels", *_PGD)
        ratios = [
            f"{cost[_MINE] / cost[peer]:.2f} of {peer}"
            for peer in judges
            if _MINE in cost and peer in cost
        ]
        if ratios:
            lines.append(f"* {', '.join(map(_text, key))}: {', '.join(ratios)}")
    return lines


def _model(rows: Sequence[Row]) -> tuple[str, ...]:
    return ("model", "activation") if "activation" in rows[0] else ("model",)


def _seconds(rows: list[Row]) -> str:
    parts = []
    for row in rows:
        row.setdefault("device", "cpu")
    groups = _grouped(rows, "device", "model", "pixels", "batch", "dtype")
    for (device, model, pixels, batch, dtype), group in groups.items():
        ratios = _pivot(group, ("provider",), "activation", "relative")
        stock = _pivot(group, ("provider",), "activation", "versus_stock")
        times = _pivot(group, ("provider",), "activation", "median_ms")
        kinds = list(dict.fromkeys(row["activation"] for row in group))
        table = [
            {"provider": ratio["provider"]}
            | {f"{kind} ms": time.get(kind) for kind in kinds}
            | {f"{kind} ÷ natural": ratio.get(kind) for kind in kinds}
            | {f"{kind} ÷ fused": over.get(kind) for kind in kinds}
            for ratio, over, time in zip(ratios, stock, times, strict=True)
        ]
        columns = {"step": "provider"} | {key: key for key in table[0] if key != "provider"}
        parts.append(
            f"{model}, {_text(pixels)} px, batch {_text(batch)}, {dtype}, {device.upper()}:\n\n"
            f"{markdown(table, columns)}\n"
        )
    tables = "\n".join(parts)
    headline = "\n".join(_headline(rows, "median_ms"))
    return f"""\
## A training step (measured)

Forward and backward, without optimiser and data loading. *natural* uses plain attention, as every
step that is differentiated twice in eager PyTorch must; *natural, fused attention* is timm's own
step with PyTorch's `scaled_dot_product_attention`, and *÷ fused* divides by that. Gradient-norm
with `torch.compile` compiles the whole step, once; that time is not in the table. Finite
differences is (ℓ(x + h·sign ∇ℓ) − ℓ(x))/h with first derivatives only; it computes something else
(see the last table). Weight gradients were checked before any time was taken: those of a
gradient-norm step against the eager one's, those of an attack against the reference's.

![A training step in natural steps](results/step_seconds.svg)

{tables}
Our gradient-norm step takes

{headline}

The paper states 0.60 for gradient-norm ÷ PGD-3. The FLOP of the matrix products alone set 2.04
natural steps for ViT-B.

{_absent_steps(rows)}"""


def _absent_steps(rows: Iterable[Row]) -> str:
    return _absent(
        row | {"operation": f"{row['model']}, {row['activation']}", "note": row.get("note", "")}
        for row in rows
    )


def _count(rows: list[Row]) -> str:
    columns = {
        "model": "model",
        "step": "provider",
        "GB moved": "gigabytes",
        "calls": "calls",
        "TFLOP": "teraflop",
        "FLOP ÷ natural": "flop_ratio",
        "saved GB": "saved_gigabytes",
        "peak GB": "peak_gigabytes",
    }
    modelled = {"model": "model", "step": "provider"}
    for name, *_ in MACHINES:
        modelled |= {f"{name} ms": f"{name}_model_ms", f"{name} ÷ natural": f"{name}_model_ratio"}
    modelled["H100 ÷ natural, products at FLOP rate"] = "H100_flop_bound_ratio"
    headline = "\n".join(_headline(rows, "H100_model_ms"))
    return f"""\
## A training step of a whole model (counted)

timm's models, batch {_text(rows[0]["batch"])}, bfloat16 parameters, training mode, on meta tensors.
Every call of an operation counts with the bytes of its inputs and outputs; views and allocations
are free; a kernel of gn_kernels is one call. *saved* is alive when the last backward pass begins,
*peak* at most, both without parameters and images. FLOP are those of matrix products, convolutions
and attention, what our attention recomputes included. *natural* is counted with plain attention:
PyTorch's fused attention does not run on meta tensors; *natural, gn_kernels* stands for a step with
fused operations.

![Bytes and memory of a step](results/step_count.svg)

{markdown(rows, columns)}

`torch.compile` is not counted: what it fuses is decided in code that it makes for a device.

The same steps under a roofline model (modelled):
{textwrap.fill(ASSUMPTIONS, 99)}.
The last column lets matrix products and attention take the time of their FLOP alone.

{markdown(rows, modelled)}

On the modelled H100 our gradient-norm step takes

{headline}

The FLOP of the matrix products alone set 2.04 natural steps for ViT-B; the paper states 0.60 for
gradient-norm ÷ PGD-3. A ratio to *natural* below 2.04 is one to an eager step, whose own
element-wise operations are not fused: *natural, gn_kernels* is the fair one for the fused limit.
"""


# -- Accuracy ------------------------------------------------------------------------------------


def _accuracy(rows: list[Row]) -> str:
    index = ("operation", "dtype", "order")
    absent = _absent(row | {"operation": f"{row['operation']}, {row['dtype']}"} for row in rows)
    rows = [row for row in rows if row["order"]]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    largest = _pivot(rows, index, "provider", "max_ulp_rms")
    raw = _pivot(rows, index, "provider", "max_ulp")
    mean = _pivot(rows, index, "provider", "mean_ulp")
    table = [
        {key: line[key] for key in index}
        | {f"{name}: largest": of_raw.get(name) for name in providers}
        | {f"{name}: of RMS": line.get(name) for name in providers}
        | {f"{name}: mean": of_mean.get(name) for name in providers}
        for line, of_raw, of_mean in zip(largest, raw, mean, strict=True)
    ]
    columns = {key: key for key in table[0]}
    return f"""\
## Accuracy (computed)

Errors in ulp, the spacing of the type at the exact result: the largest, the largest where an ulp is
taken no smaller than at the root mean square of the results, and the mean. Activations: against the
formula in float64 for |x| ≤ 10; in 16-bit types beyond 4e-7 times the cotangents, what one float32
rounding leaves near a root of f′ or f″. layer_norm and attention: against eager PyTorch in float64.
A correctly rounded result has 0.50. float64 has no row: it is the yardstick. Triton's interpreter
truncates where a GPU rounds to bfloat16: up to 1 ulp there is its doing. Near a zero of the result
an ulp is as small as one likes; and eager float32 activations have no correct digit in the tail.

![Largest error at second order](results/accuracy.svg)

{markdown(table, columns)}

{absent}"""


def _accuracy_penalty(rows: list[Row]) -> str:
    columns = {
        "penalty": "operation",
        "dtype": "dtype",
        "provider": "provider",
        "‖error‖/‖exact‖": "relative",
        "note": "note",
    }
    return f"""\
## The penalty's weight gradient (computed)

Of a small ViT, the penalty alone, against eager PyTorch in float64 on the same rounded weights and
images.

{markdown(rows, columns)}
"""


# -- Generated code ------------------------------------------------------------------------------


def _generated_code(rows: list[Row]) -> str:
    targets = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
    rows = [row for row in rows if row["dtype"] == "bfloat16"]
    index = ("compiler", "family", "subject", "order", "kernel")
    table = []
    for key, group in _grouped(rows, *index).items():
        line: Row = dict(zip(index, key, strict=True))
        for row in group:
            line[f"{row['target']} registers"] = row["registers"]
            line[f"{row['target']} spills"] = row["spills"]
            line[f"{row['target']} instructions"] = row["instructions"]
            if row["target"] in targets:
                line[targets[row["target"]]] = row["issue_over_memory"]
        table.append(line)
    columns = {"family": "family", "subject": "subject", "order": "order", "kernel": "kernel"}
    for target in dict.fromkeys(row["target"] for row in rows):
        columns[f"registers, {target}"] = f"{target} registers"
        columns[f"spills, {target}"] = f"{target} spills"
        columns[f"instructions, {target}"] = f"{target} instructions"
    columns |= {f"issue ÷ memory, {name}": name for name in targets.values()}
    compilers = ", ".join(dict.fromkeys(str(row["compiler"]) for row in rows))
    return f"""\
## Generated code (counted)

Kernels for bfloat16 of {compilers}, at the sizes of a ViT-B or a stage of Swin-B, batch 64; no GPU
is needed. Instructions per element are those of the way that whole blocks take, a loop as often as
it is passed; an element of attention, and of the softmax that the attention in CUDA C++ leaves to
kernels, is one score. Issue ÷ memory (modelled) is the time to issue them, four warps a clock and
multiprocessor, over the time to move every tensor once at the memory's rate: above 1 a kernel is
bound by instructions, tensor cores apart.
`python -m benchmarks.generated_code` prints widths, shared memory, the instructions of each pipe
and the other types; with `--check` it exits with 1 where a kernel got worse by more than 5 % than
in [generated_code.csv](results/generated_code.csv).

{markdown(table, columns)}
"""


_SECTIONS: Mapping[str, Callable[[list[Row]], str]] = {
    "operations": _operations,
    "step_seconds": _seconds,
    "step_count": _count,
    "accuracy": _accuracy,
    "accuracy_penalty": _accuracy_penalty,
    "generated_code": _generated_code,
}


# -- Figures -------------------------------------------------------------------------------------

# Okabe and Ito's palette, on an opaque white ground: legible on a light and on a dark page.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def _bars(
    axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str
) -> None:
    """Horizontal bars with their values, the first group on top."""
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [j + (i - (len(series) - 1) / 2) * height for j in range(len(groups))]
        bars = axes.barh(at, [v or 0 for v in values], height, label=name, color=_COLOURS[i])
        texts = [common.number(v) if v else "" for v in values]
        axes.bar_label(bars, texts, padding=2, fontsize=7)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False
    )


def _draw_operations(figure: Any, rows: list[Row]) -> None:
    lines = [line for line in _cases(rows) if line["memory"] == "fresh"]
    figure.set_size_inches(10, 1.5 + 0.25 * len(lines) / len(_ORDERS) * 2)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, order in zip(axes, ("double backward", "cycle"), strict=True):
        chosen = [line for line in lines if line["order"] == order]
        groups = [f"{one['operation']} {one['dtype']}\n{one['dimensions']}" for one in chosen]
        inductor = "Inductor (faster of two)"
        series: dict[str, list[float | None]] = {
            _OURS: [one.get("over eager") or None for one in chosen],
            inductor: [
                one["over eager"] / one["over inductor"] if one.get("over inductor") else None
                for one in chosen
            ],
        }
        _bars(ax, groups, series, f"{order}: times as fast as eager PyTorch")
        ax.axvline(1, color="black", linewidth=0.8, zorder=0)
    _legend(figure, axes[0])


def _draw_seconds(figure: Any, rows: list[Row]) -> None:
    steps = list(dict.fromkeys(row["provider"] for row in rows))

    def of(chosen: Iterable[Row], key: str) -> dict[str, list[float | None]]:
        return {
            name: [
                next((row["relative"] or None for row in group if row["provider"] == step), None)
                for step in steps
            ]
            for (name,), group in _grouped(chosen, key).items()
        }

    first, *_ = _grouped(rows, "model", "activation")
    panels = {
        first[0]: of((row for row in rows if row["model"] == first[0]), "activation"),
        first[1]: of((row for row in rows if row["activation"] == first[1]), "model"),
    }
    figure.set_size_inches(12, 8)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, series) in zip(axes, panels.items(), strict=True):
        _bars(ax, steps, series, f"{title}: natural steps (measured)")
        ax.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_count(figure: Any, rows: list[Row]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    chosen = [row for row in rows if "base" in row["model"]] or rows
    steps = list(dict.fromkeys(row["provider"] for row in chosen))
    for ax, (key, label) in zip(
        axes,
        {"gigabytes": "GB moved (counted)", "peak_gigabytes": "peak GB (counted)"}.items(),
        strict=True,
    ):
        series = {
            model: [
                next((row[key] for row in group if row["provider"] == step), None) for step in steps
            ]
            for (model,), group in _grouped(chosen, "model").items()
        }
        _bars(ax, steps, series, label)
    _legend(figure, axes[0])


def _draw_accuracy(figure: Any, rows: list[Row]) -> None:
    chosen = [
        row for row in rows if row["order"] == "double backward" and row["dtype"] != "float32"
    ]
    index = list(_grouped(chosen, "operation", "dtype"))
    series = {
        provider: [
            next(
                (row["max_ulp_rms"] for row in group if (row["operation"], row["dtype"]) == one),
                None,
            )
            for one in index
        ]
        for (provider,), group in _grouped(chosen, "provider").items()
    }
    label = "largest error of the double backward, in ulp at least of the RMS"
    axes = figure.subplots()
    _bars(axes, [" ".join(one) for one in index], series, label)
    _legend(figure, axes)


_FIGURES: Mapping[str, Callable[[Any, list[Row]], None]] = {
    "operations": _draw_operations,
    "step_seconds": _draw_seconds,
    "step_count": _draw_count,
    "accuracy": _draw_accuracy,
}


def draw(results: Path) -> None:
    """Each figure beside its CSV, as PNG and SVG."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "gn_kernels"
    from matplotlib.figure import Figure

    for name, paint in _FIGURES.items():
        if not (results / f"{name}.csv").exists():
            continue
        rows = read(name, results)
        figure = Figure(figsize=(10, 6.5), layout="constrained", facecolor="white")
        paint(figure, rows)
        figure.savefig(results / f"{name}.png", dpi=150)
        figure.savefig(results / f"{name}.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder of the CSV")
    parser.add_argument("--readme", type=Path, default=README, help="the page to write")
    arguments = parser.parse_args(argv)
    draw(arguments.results)
    arguments.readme.write_text(render(arguments.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
