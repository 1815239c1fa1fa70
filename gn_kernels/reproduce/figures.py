"""Figures of the report, as SVG that takes the colour of the page's text, or of the theme."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

# Drawn in this colour, and then replaced by the page's own.
_TEXT = "#010203"
_DOT = "#2f81f7"  # 3.4 to 1 against white, 5 to 1 against the dark page


# For a file of its own, as a page in Markdown shows it.
_THEME = (
    "<style>svg { color: #1b1f24 } "
    "@media (prefers-color-scheme: dark) { svg { color: #e6e9ec } }</style>"
)


class Figure(NamedTuple):
    """A name for files, a title, and the SVG to put below it."""

    name: str
    title: str
    svg: str

    def alone(self) -> str:
        """The SVG for a file of its own, which knows no page."""
        start = self.svg.index(">", self.svg.index("<svg")) + 1
        return f"{self.svg[:start]}\n {_THEME}{self.svg[start:]}"


def dots(
    name: str,
    title: str,
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float]]]]],
    unit: str,
    most: float | None,
) -> Figure:
    """Panels of named rows, a dot for each value, a bar for their mean, from 0 to ``most``."""
    most_rows = max(len(rows) for _, rows in panels)

    def draw(canvas: Canvas) -> None:
        axes = canvas.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axis, (heading, rows) in zip(axes, panels, strict=True):
            for position, (_, values) in enumerate(rows):
                mean = sum(values) / len(values)
                axis.barh(position, mean, height=0.55, color=_DOT, alpha=0.3)
                axis.plot(values, [position] * len(values), "o", color=_DOT, markersize=4)
            axis.set_yticks(range(len(rows)), [label for label, _ in rows])
            axis.set_ylim(most_rows - 0.5, -0.5)
            axis.set_xlim(0, most)
            axis.set_title(heading, fontsize=10)
            axis.set_xlabel(unit)

    return Figure(name, title, _svg(2.8 * len(panels), 0.3 * most_rows + 1.1, draw))


def trade_off(
    name: str,
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    units: tuple[str, str],
) -> Figure:
    """Named groups of points in a plane: a dot for each, a ring with the name at their mean."""

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for label, points in groups:
            xs, ys = zip(*points, strict=True)
            mean = (sum(xs) / len(xs), sum(ys) / len(ys))
            axis.plot(xs, ys, "o", color=_DOT, alpha=0.4, markersize=4)
            axis.plot(*mean, "o", color=_DOT, markersize=8, fillstyle="none")
            axis.annotate(label, mean, (7, 4), textcoords="offset points")
        axis.margins(0.15)
        axis.set_xlabel(units[0])
        axis.set_ylabel(units[1])

    return Figure(name, title, _svg(6.0, 4.0, draw))


def _svg(width: float, height: float, draw: Callable[[Canvas], None]) -> str:
    """What ``draw`` puts on a canvas of so many inches."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _TEXT),
        **dict.fromkeys(("xtick.color", "ytick.color"), _TEXT),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "gn_kernels",
        "font.size": 10,
    }
    file = io.StringIO()
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue().replace(_TEXT, "currentColor")
    return svg[svg.index("<svg") :]
