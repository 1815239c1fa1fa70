"""Figures of the report, as SVG that takes the colour of the page's text, or of the theme."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: Any = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), _TEXT),
        **dict.fromkeys(("xtick.color", "ytick.color"), _TEXT),
        "svg.fonttype": "none",
        "svg.hashsalt": "gn_kernels",
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        height = 0.3 * max(len(rows) for _, rows in panels) + 1.1
        canvas = Canvas(figsize=(2.8 * len(panels), height), layout="constrained")
        axes = canvas.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axis, (heading, rows) in zip(axes, panels, strict=True):
            for position, (_, values) in enumerate(rows):
                mean = sum(values) / len(values)
                axis.barh(position, mean, height=0.55, color=_DOT, alpha=0.3)
                axis.plot(values, [position] * len(values), "o", color=_DOT, markersize=4)
            axis.set_yticks(range(len(rows)), [label for label, _ in rows])
            axis.set_ylim(max(len(rows) for _, rows in panels) - 0.5, -0.5)
            axis.set_xlim(0, most)
            axis.set_title(heading, fontsize=10)
            axis.set_xlabel(unit)
            axis.patch.set_alpha(0)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue().replace(_TEXT, "currentColor")
    return Figure(name, title, svg[svg.index("<svg") :])
