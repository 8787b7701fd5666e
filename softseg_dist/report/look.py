"""How figures look. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.

Blue is better than the reference, vermillion worse, grey not shown to differ; markers say the same without colour.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, GRID = "#1a1a1a", "#6b6b6b", "#e4e4e4"
BETTER, WORSE, UNSHOWN = "#0072B2", "#D55E00", "#7a7a7a"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
STYLE: Any = {  # the stubs of matplotlib spell every key as a literal
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "softseg",  # the same numbers give the same file
}
LOOK = {"better": (BETTER, "o", BETTER), "worse": (WORSE, "s", WORSE), "not shown": (UNSHOWN, "o", "white")}


def png(figure: Figure) -> bytes:
    """The figure at 160 dots per inch."""
    return _written(figure, "png", metadata={"Software": None}, dpi=160)


def data_uri(figure: Figure, vector: bool = True) -> str:
    """The figure as the source of an <img>: SVG for lines and text, PNG for images."""
    kind, content = ("svg+xml", _written(figure, "svg", metadata={"Date": None})) if vector else ("png", png(figure))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _written(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, facecolor="white", **options)
    return buffer.getvalue()


@contextmanager
def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Iterator[Figure]:
    """An empty figure of `width` x `height` inches in our style.

    Its layout is solved once, when the block ends, and not again for every file that the figure is written to.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def panels(figure: Figure, count: int, columns: int, *, sharex: bool = False) -> list[Axes]:
    """`count` axes in rows of `columns`, which share their y axis; the rest of the last row stays empty."""
    axes = list(figure.subplots(math.ceil(count / columns) or 1, columns, sharex=sharex, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return axes[:count]
