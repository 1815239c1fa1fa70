"""Writes benchmarks/README.md and its figures from the CSV files, and nothing by hand.

python -m benchmarks.report [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Row, markdown, read

README = Path(__file__).with_name("README.md")

# Written out: the report needs neither torch's models nor the package.
_OURS, _EAGER, _COPY = "gn_kernels", "eager", "copy"
_INDUCTOR = ("inductor, formula", "inductor, autograd")
_MACHINES = {
    "A100": "1.8 TB/s, 205 TFLOP/s",
    "H100": "3.0 TB/s, 650 TFLOP/s",
    "B200": "7.2 TB/s, 1,480 TFLOP/s",
}

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
run, which makes them exit with 1 where this run is worse than that one beyond the noise of both.
Each row of their CSV names the processor, the versions, the commit and the command.

Every table says what its figures are:

* **measured**: seconds on the machine that is named. Providers take turns in one process, after a
  warm-up; median, 20th and 80th percentile. Nothing here was measured on a GPU.
* **counted**: on meta tensors; exact, and the same on every machine.
* **modelled**: from the counts, with assumptions that stand beside the table. No measurement.
* **computed**: errors against float64.
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
    lines = dict.fromkeys(
        f"`{row['command']}`, {row['date']}, commit {_text(row['commit'])}; {row['cpu']}, "
        f"{_text(row['threads'])} threads, load {_text(row['load'])} at the start; "
        f"GPU: {row['gpu']}; torch {row['torch']}, triton {row['triton']}, timm {row['timm']}, "
        f"gn_kernels {row['gn_kernels']}, Python {row['python']}."
        for row in rows
    )
    return "\n".join(f"Made by {line}" for line in lines) + "\n"


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


def _operations(rows: list[Row]) -> str:
    table = []
    index = ("operation", "dimensions", "dtype", "order")
    for key, group in _grouped(rows, *index).items():
        by_name = {row["provider"]: row for row in group}
        times = {name: row.get("median_ms") for name, row in by_name.items()}
        line: Row = dict(zip(index, key, strict=True)) | times
        ours = by_name.get(_OURS, {})
        if ours.get("median_ms"):
            line["spread"] = f"{ours['p20_ms']:.3g} to {ours['p80_ms']:.3g}"
            line["over eager"] = ours.get("speedup")
            line["over copy"] = ours.get("versus_copy")
            inductor = [times[name] for name in _INDUCTOR if times.get(name)]
            if inductor:
                line["over inductor"] = min(inductor) / ours["median_ms"]
        table.append(line)
    known = (_OURS, _EAGER, *_INDUCTOR, _COPY)
    others = dict.fromkeys(
        row["provider"] for row in rows if row["provider"] not in known and row.get("median_ms")
    )
    columns = {
        "operation": "operation",
        "tensor": "dimensions",
        "dtype": "dtype",
        "order": "order",
        "gn_kernels ms": _OURS,
        "20 % to 80 %": "spread",
        "eager ms": _EAGER,
        "Inductor, formula ms": _INDUCTOR[0],
        "Inductor, autograd ms": _INDUCTOR[1],
        "copy ms": _COPY,
        **{f"{name} ms": name for name in others},
        "eager ÷ ours": "over eager",
        "Inductor ÷ ours": "over inductor",
        "ours ÷ copy": "over copy",
    }
    return f"""\
## One operation (measured)

Forward is y = f(x); backward is `autograd.grad(y, x, grad, create_graph=True)`; double backward
differentiates that with respect to grad, x and the parameters; cycle is the three in sequence.
*Inductor* is `torch.compile` of each order as a function of its own, without autograd, since a
compiled module can't be differentiated twice: of the formulas of gn_kernels, and of what autograd
makes of PyTorch's operation. Ratios take the faster of the two. *copy* is `clone()` of as many
bytes as the order has to move. Results were checked against eager float64 before any time was
taken.

![Speed of the second order](results/operations.svg)

{markdown(table, columns)}

{_behind(rows)}
{_absent(rows)}"""


def _behind(rows: Iterable[Row]) -> str:
    """Where a peer is faster by more than the spread of both."""
    found = []
    index = ("operation", "dimensions", "dtype", "order")
    for key, group in _grouped(rows, *index).items():
        by_name = {row["provider"]: row for row in group if row.get("median_ms")}
        ours = by_name.get(_OURS)
        for name in (_EAGER, *_INDUCTOR):
            peer = by_name.get(name)
            if ours and peer and peer["p80_ms"] < ours["p20_ms"]:
                ratio = peer["median_ms"] / ours["median_ms"]
                found.append(f"* {' '.join(key)}: {name} takes {ratio:.2f} of our time")
    if not found:
        return "Nowhere is eager PyTorch or Inductor faster by more than the spread of both.\n"
    return (
        "Where eager PyTorch or Inductor is faster, by more than the spread of both. At 64 "
        "elements the time is that of the call: of the autograd Function, which is Python, and of "
        "the dispatcher; compiled functions have no autograd around them.\n\n"
        + "\n".join(found)
        + "\n"
    )


def _absent(rows: Iterable[Row]) -> str:
    notes = dict.fromkeys(
        f"* {row['operation']}, {row['provider']}: {row['note'] or row['error']}"
        for row in rows
        if row.get("note") or row.get("error")
    )
    return "Without a figure:\n\n" + "\n".join(notes) + "\n" if notes else ""


# -- A training step -----------------------------------------------------------------------------


def _seconds(rows: list[Row]) -> str:
    parts = []
    for (model, batch), group in _grouped(rows, "model", "batch").items():
        ratios = _pivot(group, ("provider",), "activation", "relative")
        times = _pivot(group, ("provider",), "activation", "median_ms")
        kinds = list(dict.fromkeys(row["activation"] for row in group))
        table = [
            {"provider": ratio["provider"]}
            | {f"{kind} ms": time.get(kind) for kind in kinds}
            | {f"{kind} ÷ natural": ratio.get(kind) for kind in kinds}
            for ratio, time in zip(ratios, times, strict=True)
        ]
        columns = {"step": "provider"} | {key: key for key in table[0] if key != "provider"}
        parts.append(f"{model}, batch {_text(batch)}, float32:\n\n{markdown(table, columns)}\n")
    headline = []
    for (activation,), group in _grouped(rows, "activation").items():
        median = {row["provider"]: row["median_ms"] for row in group if row.get("median_ms")}
        mine, peers = median.get("gradient-norm, gn_kernels"), []
        for peer in ("PGD-3 of the reference", "PGD-3, lean"):
            if mine and median.get(peer):
                peers.append(f"{mine / median[peer]:.2f} of {peer}")
        if peers:
            headline.append(f"* {activation}: a gradient-norm step takes {', '.join(peers)}")
    stated = "\n".join(headline)
    return f"""\
## A training step (measured)

Forward and backward, without optimiser and data loading. *natural* uses plain attention, as every
step that is differentiated twice in eager PyTorch must. Gradient-norm with `torch.compile` compiles
the whole step, which takes 30 to 60 s once. Finite differences is (ℓ(x + h·sign ∇ℓ) − ℓ(x))/h with
first derivatives only; it computes something else (see the last table). Weight gradients were
checked against the eager step before any time was taken.

![A training step in natural steps](results/step_seconds.svg)

{"".join(parts)}
{stated}

The paper states 0.60 for gradient-norm ÷ PGD-3.

{_absent_steps(rows)}"""


def _absent_steps(rows: Iterable[Row]) -> str:
    return _absent(row | {"operation": row["activation"], "note": ""} for row in rows)


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
    for name in _MACHINES:
        modelled |= {f"{name} ms": f"{name}_model_ms", f"{name} ÷ natural": f"{name}_model_ratio"}
    modelled["H100 ÷ natural, products at FLOP rate"] = "H100_flop_bound_ratio"
    assumed = "; ".join(f"{name}: {figures}" for name, figures in _MACHINES.items())
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

The same steps under a roofline model (modelled): each call takes the longer of its bytes at the
memory's rate and its FLOP at the rate of the matrix units; no launch costs, no overlap. Assumed is
90 % of the memory bandwidth and 66 % of the dense bf16 rate that the vendor states: {assumed}. The
last column lets matrix products and attention take the time of their FLOP alone.

{markdown(rows, modelled)}
"""


# -- Accuracy ------------------------------------------------------------------------------------


def _accuracy(rows: list[Row]) -> str:
    index = ("operation", "dtype", "order")
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
A correctly rounded result has 0.50. Near a zero of the result an ulp is as small as one likes; and
eager float32 activations have no correct digit in the tail.

![Largest error at second order](results/accuracy.svg)

{markdown(table, columns)}
"""


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
it is passed; an element of attention is one score. Issue ÷ memory (modelled) is the time to issue
them, four warps a clock and multiprocessor, over the time to move every tensor once at the memory's
rate: above 1 a kernel is bound by instructions, tensor cores apart.
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
    axes = figure.subplots(1, 2, sharey=True)
    for ax, order in zip(axes, ("double backward", "cycle"), strict=True):
        groups: list[str] = []
        series: dict[str, list[float | None]] = {_OURS: [], "Inductor (faster of two)": []}
        chosen = (row for row in rows if row["order"] == order)
        for key, group in _grouped(chosen, "operation", "dimensions", "dtype").items():
            speedup = {row["provider"]: row.get("speedup") or None for row in group}
            groups.append(f"{key[0]} {key[2]}\n{key[1]}")
            series[_OURS].append(speedup.get(_OURS))
            inductor = [speedup[name] for name in _INDUCTOR if speedup.get(name)]
            series["Inductor (faster of two)"].append(max(inductor) if inductor else None)
        _bars(ax, groups, series, f"{order}: times as fast as eager PyTorch")
        ax.axvline(1, color="black", linewidth=0.8, zorder=0)
    _legend(figure, axes[0])


def _draw_seconds(figure: Any, rows: list[Row]) -> None:
    steps = list(dict.fromkeys(row["provider"] for row in rows))
    series = {
        activation: [
            next((row["relative"] or None for row in group if row["provider"] == step), None)
            for step in steps
        ]
        for (activation,), group in _grouped(rows, "activation").items()
    }
    axes = figure.subplots()
    _bars(axes, steps, series, "natural steps (measured)")
    _legend(figure, axes)


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
