"""Pictures of analyses, of one model or several: numbers come from elsewhere.

The background is transparent and every colour stands out from white and from near-black alike, so
that a figure reads on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gn_kernels.robustness.analyses import Options, Result
from gn_kernels.robustness.attacks import _attacked
from gn_kernels.robustness.differentiate import input_gradients

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of luminance about 0.19, halfway between white and near-black by contrast: 4.3 to either.
INK = "#797979"
COLOURS = ("#3585cc", "#d2622a", "#1d9470", "#a768bd", "#a87b00", "#c0567f")

Results = Mapping[str, Result]


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    settings: dict[Any, Any] = {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": INK,
        "grid.alpha": 0.25,
        "lines.linewidth": 2,
        "font.size": 10,
    }
    with matplotlib.rc_context(settings):
        yield


def analysis_figure(path: Path, name: str, results: Results, options: Options) -> None:
    """Draw one analysis of several models into a PNG.

    Args:
        path: of the PNG.
        name: of the analysis, among ``DRAWINGS``.
        results: of each model, by its label.
        options: that the analysis had.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(layout="constrained")
        DRAWINGS[name](figure, results, options)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if len(results) > 1:
            figure.legend(handles, labels, loc="outside upper center", ncols=len(results))
        else:
            figure.suptitle(next(iter(results)), fontsize=11)
        figure.savefig(path, dpi=150)


def _gradients(figure: Figure, results: Results, options: Options) -> None:
    channels = len(next(iter(results.values())).summary["channel_shares"])
    panels = _panels(figure, 3 if channels == 1 else 4)
    _histogram(
        panels[0],
        {label: result.columns["l1"] for label, result in results.items()},
        "L1 norm of an image's gradient",
    )
    kinds = ("mean_l1", "mean_l1_robust", "mean_l1_vulnerable")
    _bars(
        panels[1],
        ("all", "robust", "vulnerable"),
        {label: [r.summary[kind] for kind in kinds] for label, r in results.items()},
    )
    panels[1].set_yscale("log")
    panels[1].set_ylabel("mean L1 norm")
    for (label, result), colour in zip(results.items(), COLOURS, strict=False):
        counts = torch.tensor(result.summary["pixel_counts"], dtype=torch.float64).sum(0)
        edges = result.summary["pixel_log10_edges"]
        panels[2].stairs((counts / counts.sum()).tolist(), edges, color=colour, label=label, lw=2)
    panels[2].set_xlabel("log₁₀ |∂CE/∂pixel|")
    panels[2].set_ylabel("share of the pixels")
    if channels > 1:
        names = ("R", "G", "B") if channels == 3 else tuple(map(str, range(channels)))
        shares = {label: r.summary["channel_shares"] for label, r in results.items()}
        _bars(panels[3], names, shares)
        panels[3].axhline(1 / channels, color=INK, linestyle=":", linewidth=1.2)
        panels[3].set_ylabel("share of the L1 norm")


def _linearity(figure: Figure, results: Results, options: Options) -> None:
    errors = {label: result.columns["error"] for label, result in results.items()}
    _histogram(_panels(figure, 1)[0], errors, "squared error of linear interpolation")


def _curvature(figure: Figure, results: Results, options: Options) -> None:
    panels = _panels(figure, 2)
    for axes, column, name in (
        (panels[0], "curvature", "curvature |λ|/‖∇CE‖₂"),
        (panels[1], "eigenvalue", "largest eigenvalue |λ| of the Hessian"),
    ):
        _histogram(axes, {label: r.columns[column] for label, r in results.items()}, name)


def _interpolation(figure: Figure, results: Results, options: Options) -> None:
    for axes, name, text in zip(
        _panels(figure, 3),
        ("mean_loss", "mean_l1", "mean_curvature"),
        ("mean cross-entropy", "mean L1 norm of its gradient", "mean curvature"),
        strict=True,
    ):
        for (label, result), colour in zip(results.items(), COLOURS, strict=False):
            axes.plot(result.summary["eps_255"], result.summary[name], color=colour, label=label)
        axes.axvline(options.eps_255, color=INK, linestyle=":", linewidth=1.2)
        axes.set_yscale("log")
        axes.set_xlabel("distance towards the PGD-5 point, 1/255")
        axes.set_ylabel(text)


def _curve(figure: Figure, results: Results, options: Options) -> None:
    _accuracies(_panels(figure, 1)[0], results, "eps_255", "ε of PGD, 1/255")


def _frequency(figure: Figure, results: Results, options: Options) -> None:
    _accuracies(_panels(figure, 1)[0], results, "radii", "radius of the low-pass filter, periods")


def _accuracies(axes: Axes, results: Results, abscissa: str, text: str) -> None:
    for (label, result), colour in zip(results.items(), COLOURS, strict=False):
        summary = result.summary
        axes.plot(summary[abscissa], summary["accuracy"], color=colour, label=label)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(text)
    axes.set_ylabel("accuracy")


def _edges(figure: Figure, results: Results, options: Options) -> None:
    axes = _panels(figure, 1)[0]
    bins = torch.linspace(-1, 1, 41).tolist()
    for (label, result), colour in zip(results.items(), COLOURS, strict=False):
        found = result.columns["correlation"]
        values = found[torch.isfinite(found)].tolist()
        axes.hist(values, bins, color=colour, label=label, histtype="step", linewidth=2)
        if result.summary["mean"] is not None:
            axes.axvline(result.summary["mean"], color=colour, linestyle=":", linewidth=1.2)
    axes.set_xlabel("correlation of log contour energy and log |∇CE|")
    axes.set_ylabel("images")


DRAWINGS: dict[str, Callable[[Any, Results, Options], None]] = {
    "gradients": _gradients,
    "linearity": _linearity,
    "curvature": _curvature,
    "interpolation": _interpolation,
    "curve": _curve,
    "frequency": _frequency,
    "edges": _edges,
}


def _panels(figure: Figure, count: int) -> list[Axes]:
    figure.set_size_inches(max(5.5, 3.7 * count), 3.6)
    return list(figure.subplots(1, count, squeeze=False)[0])


def _histogram(axes: Axes, values: Mapping[str, Tensor], text: str) -> None:
    """Of log₁₀, with shared bins; the dotted lines are the medians."""
    logarithms = {label: found[found > 0].double().log10() for label, found in values.items()}
    everything = torch.cat(list(logarithms.values()))
    low, high = (everything.min(), everything.max()) if len(everything) else (0, 1)
    bins = torch.linspace(float(low) - 0.1, float(high) + 0.1, 41).tolist()
    for (label, found), colour in zip(logarithms.items(), COLOURS, strict=False):
        axes.hist(found.tolist(), bins, color=colour, label=label, histtype="step", linewidth=2)
        if len(found):
            axes.axvline(found.median().item(), color=colour, linestyle=":", linewidth=1.2)
    axes.set_xlabel(f"log₁₀ {text}")
    axes.set_ylabel("images")


def _bars(axes: Axes, names: Sequence[str], values: Mapping[str, Sequence[float | None]]) -> None:
    width = 0.8 / len(values)
    for index, ((label, heights), colour) in enumerate(zip(values.items(), COLOURS, strict=False)):
        at = [place + (index - (len(values) - 1) / 2) * width for place in range(len(names))]
        shown = [height or 0.0 for height in heights]  # None: there are no such images
        axes.bar(at, shown, 0.9 * width, color=colour, label=label)
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")


def symmetric_scale(gradient: Tensor) -> Tensor:
    """½ + ½·g/q, clamped to [0, 1]; q is the 99% quantile of the image's |g|. Zero becomes ½."""
    quantile = gradient.abs().flatten(1).quantile(0.99, dim=1).clamp(min=torch.finfo().tiny)
    return (0.5 + 0.5 * gradient / quantile.view(-1, *[1] * (gradient.ndim - 1))).clamp(0, 1)


def gradient_figure(
    path: Path,
    models: Mapping[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    classes: Sequence[str],
) -> None:
    """Draw images above their input gradients, each scaled by :func:`symmetric_scale`.

    Args:
        path: of the PNG.
        models: pixels in [0, 1] to logits, by their label; a row of gradients for each.
        images: (N, 1 or 3, H, W) in [0, 1]; about ten are legible.
        labels: (N,).
        classes: names of the classes.
    """
    from matplotlib.figure import Figure

    count, grey = len(labels), images.shape[1] == 1
    with _style():
        figure = Figure(
            figsize=(max(1.25 * count, 6) + 0.9, 1.9 + 1.5 * len(models)), layout="constrained"
        )
        axes = figure.subplots(1 + len(models), count, squeeze=False)
        for axis in axes.flat:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
        for column in range(count):
            shown = images[column].permute(1, 2, 0).cpu().numpy()
            axes[0, column].imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1)
            axes[0, column].set_title(classes[int(labels[column])], fontsize=10)
        axes[0, 0].set_ylabel("test image", fontsize=10)
        for row, (label, model) in enumerate(models.items(), 1):
            drawn = _gradient_row(axes[row], model, images, labels, classes)
            axes[row, 0].set_ylabel(f"{label}\ninput gradient", fontsize=10)
        if grey:
            bar = figure.colorbar(drawn, ax=axes[1:, :], ticks=[0, 0.5, 1], fraction=0.02, pad=0.01)
            bar.ax.set_yticklabels(["−q", "0", "+q"])
        figure.supxlabel(
            "Gradient of the cross-entropy with respect to the pixels, each scaled by the 99% "
            "quantile q of its magnitude.",
            fontsize=9,
        )
        figure.savefig(path, dpi=150)


def _gradient_row(
    axes: Any, model: nn.Module, images: Tensor, labels: Tensor, classes: Sequence[str]
) -> Any:
    with _attacked(model):
        gradients, _, logits = input_gradients(model, images, labels)
    norms = gradients.abs().flatten(1).sum(1).tolist()
    scaled = symmetric_scale(gradients).permute(0, 2, 3, 1).cpu().numpy()
    for column, axis in enumerate(axes):
        drawn = axis.imshow(
            scaled[column], cmap="RdBu_r" if images.shape[1] == 1 else None, vmin=0, vmax=1
        )
        guess = int(logits[column].argmax())
        wrong = "" if guess == labels[column] else f"\ntaken for {classes[guess]}"
        axis.set_xlabel(
            f"‖∇‖₁ = {norms[column]:.3g}{wrong}",
            fontsize=9,
            color=COLOURS[1] if wrong else INK,
        )
    return drawn
