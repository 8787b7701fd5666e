"""The figures of a report. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.

Blue is better than the reference, vermillion worse, grey not shown to differ; markers say the same without colour.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from softseg_dist.report.effects import Effect
from softseg_dist.report.tables import Comparison, Summary
from softseg_dist.report.words import interval, number, p_value, verdict

MOST = 12  # candidates in a figure, besides the reference
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


@dataclass(frozen=True)
class Overlay:
    """One slice to look at. `label` says which it is ("best", "median", "worst"), `score` is the case's objective.

    `image`, `truth` and `prediction` are [X Y] in canonical order (x to the right, y up); truth and prediction in
    [0, 1], of one class, whose name goes into `class_name` if there are several. `spacing_mm` is the size of a
    pixel along X and Y.
    """

    case: str
    label: str
    image: npt.NDArray[np.floating]
    truth: npt.NDArray[np.floating]
    prediction: npt.NDArray[np.floating]
    score: float
    spacing_mm: tuple[float, float]
    class_name: str = ""


def png(figure: Figure) -> bytes:
    """The figure at 160 dots per inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def data_uri(figure: Figure, vector: bool = True) -> str:
    """The figure as the source of an <img>: SVG for lines and text, PNG for images."""
    if not vector:
        return "data:image/png;base64," + base64.b64encode(png(figure)).decode()
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _laid_out(figure: Figure) -> Figure:
    """Solve the layout once, not again for every file that the figure goes to."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def shown(summary: Summary) -> list[str]:
    """The candidates that figures show: the `MOST` highest ranked, and the reference, in order of rank."""
    ranked = [s.name for s in summary.ranking if s.rank is not None]
    return [name for i, name in enumerate(ranked) if i < MOST or name == summary.reference]


def forest_figure(summary: Summary) -> Figure:
    """Differences with 95 % intervals: main effects, if there are any, above the candidates less the reference."""
    names = set(shown(summary))
    rows = [c for c in summary.comparisons if c.candidate in names]
    groups: list[tuple[str, list[tuple[str, Comparison | Effect]]]] = []
    if summary.effects:
        effects: list[tuple[str, Comparison | Effect]] = [(f"{e.level} − {e.base}", e) for e in summary.effects]
        groups.append(("Main effects, averaged over all other factors", effects))
    groups.append((f"Candidates less {summary.reference}", [(c.candidate, c) for c in rows]))
    heights = [len(entries) + 0.9 for _, entries in groups]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.32 * sum(heights) + 0.9), layout="constrained")
        grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 0.62))
        for (axis, beside), (title, entries) in zip(grid, groups, strict=True):
            axis.sharex(grid[-1, 0])
            axis.tick_params(axis="x", labelbottom=axis is grid[-1, 0])
            _forest(axis, title, entries, summary.sign)
            _forest_words(beside, entries, axis.get_ylim())
        better = "higher is better" if summary.sign > 0 else "lower is better"
        grid[-1, 0].set_xlabel(f"difference in {summary.objective_title} ({better}), with 95 % interval")
        return _laid_out(figure)


def _forest(axis: Axes, title: str, entries: Sequence[tuple[str, Comparison | Effect]], sign: int) -> None:
    for y, (_, entry) in enumerate(entries):
        test = entry.crossed
        colour, marker, fill = LOOK[verdict(test.mean, entry.p_holm, sign)]
        if math.isfinite(test.low):
            axis.plot([test.low, test.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(test.mean, y, marker, color=colour, markerfacecolor=fill, markersize=6.5)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(entries)), [name for name, _ in entries], color=INK)
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.set_title(title, color=QUIET)


def _forest_words(axis: Axes, entries: Sequence[tuple[str, Comparison | Effect]], heights: tuple[float, float]) -> None:
    """The same in numbers, in an invisible axis at the right."""
    lines: list[tuple[str, str, float, str]] = [("difference (95 % interval)", "p, Holm", -0.85, QUIET)]
    for y, (_, entry) in enumerate(entries):
        test = entry.crossed
        reach = interval(test.low, test.high, signed=True) if math.isfinite(test.low) else "not tested"
        lines.append((f"{number(test.mean, signed=True)}  ({reach})", p_value(entry.p_holm), y, INK))
    for difference, p, height, colour in lines:
        axis.text(0.02, height, difference, va="center", color=colour)
        axis.text(0.98, height, p, va="center", ha="right", color=colour)
    axis.set(ylim=heights, xlim=(0, 1))
    axis.set_axis_off()


def paired_figure(summary: Summary) -> Figure:
    """One panel per candidate: box plots of the means of the splits, the reference beside it, each split joined by a line."""
    names = set(shown(summary))
    panels = [c for c in summary.comparisons if c.candidate in names]
    columns = min(7, max(len(panels), 1))
    rows = max(1, math.ceil(len(panels) / columns))
    standings = {s.name: s for s in summary.ranking}
    label = "control" if summary.reference == summary.control else "reference"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(1.32 * columns, 2.6), 2.9 * rows + 0.2), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axis, comparison in zip(axes.flat, panels, strict=False):
            one, other = standings[comparison.reference].by_split, standings[comparison.candidate].by_split
            _pairs(axis, label, one, other, summary.sign)
            axis.set_title(comparison.candidate.replace("-", "-\n", 2), fontsize=8, color=INK)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        figure.supylabel(f"mean {summary.objective_title} of a split", fontsize=9)
        return _laid_out(figure)


def _pairs(axis: Axes, label: str, reference: Mapping[int, float], candidate: Mapping[int, float], sign: int) -> None:
    both = sorted(set(reference) & set(candidate))
    boxes = axis.boxplot(
        [[reference[j] for j in both], [candidate[j] for j in both]],
        positions=[0, 1],
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": INK, "linewidth": 1.4},
    )
    for box, colour in zip(boxes["boxes"], ("#e9e9e9", "#d6e6f2"), strict=True):
        box.set(facecolor=colour, edgecolor=QUIET, linewidth=0.7)
    for line in (*boxes["whiskers"], *boxes["caps"]):
        line.set(color=QUIET, linewidth=0.7)
    for j in both:
        better = sign * (candidate[j] - reference[j]) > 0
        colour, style = (BETTER, "-") if better else (WORSE, "--")
        axis.plot([0, 1], [reference[j], candidate[j]], style, marker="o", color=colour, markersize=3, linewidth=0.9)
    axis.set_xticks([0, 1], [label, "this"], fontsize=7.5)
    axis.set_xlim(-0.45, 1.45)
    axis.grid(axis="y")


def curve_figure(summary: Summary) -> Figure:
    """Mean Dice on test against the threshold; on each curve the mean thresholds that validation chose."""
    names = [name for name in shown(summary) if name in summary.curves]
    colours = _colours(names, summary.reference)
    standings = {s.name: s for s in summary.ranking}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, max(3.4, 0.2 * len(names) + 1.2)), layout="constrained")
        axis = figure.subplots()
        for i, name in enumerate(names):
            curve = summary.curves[name]
            style = "-" if name == summary.reference or i < len(COLOURS) else "--"
            width = 2.4 if name == summary.reference else 1.4
            axis.plot(summary.curve_thresholds, curve, style, color=colours[name], linewidth=width, label=name)
            for rule, marker in (("grid", "o"), ("dice_optimal", "^")):
                tau = standings[name].thresholds.get(rule)
                if tau is not None:
                    height = np.interp(tau, summary.curve_thresholds, curve)
                    axis.plot(tau, height, marker, color=colours[name], markersize=5, markeredgecolor="white")
        axis.plot([], [], "o", color=INK, markersize=5, label="chosen by grid")
        axis.plot([], [], "^", color=INK, markersize=5, label="Dice-optimal")
        axis.axvline(0.5, color=QUIET, linewidth=0.8, linestyle=":")
        axis.set(xlabel="threshold", ylabel="mean Dice on test", xlim=(0, 1))
        axis.grid()
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
        return _laid_out(figure)


def learning_figure(summary: Summary, histories: Mapping[tuple[str, int], pd.DataFrame]) -> Figure | None:
    """Small multiples of the objective on validation by epoch, one thin line per split; None without any history."""
    by_name: dict[str, list[pd.DataFrame]] = {}
    for (name, _), history in histories.items():
        if summary.objective in history and name in shown(summary):
            by_name.setdefault(name, []).append(history)
    names = [name for name in shown(summary) if name in by_name]
    if not names:
        return None
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * columns, 1.65 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(axes.flat, names, strict=False):
            for history in by_name[name]:
                axis.plot(history["epoch"], history[summary.objective], color=BETTER, linewidth=0.8, alpha=0.6)
            axis.set_title(name, fontsize=8, color=INK)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.grid()
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel(f"validation {summary.objective_title}", fontsize=9)
        return _laid_out(figure)


def overlay_figure(overlays: Sequence[Overlay]) -> Figure:
    """A row per case: image, then, enlarged, soft truth, prediction and signed error (prediction less truth)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.98 * len(overlays) + 0.75), layout="constrained")
        grid = figure.add_gridspec(len(overlays) + 1, 4, height_ratios=[1.0] * len(overlays) + [0.05])
        axes = np.array([[figure.add_subplot(grid[i, j]) for j in range(4)] for i in range(len(overlays))])
        for row, overlay in zip(axes, overlays, strict=True):
            soft, error = _overlay_row(row, overlay)
        for axis, title in zip(axes[0], ("image", "soft truth", "prediction", "prediction − truth"), strict=True):
            axis.set_title(title, color=INK, loc="center")
        figure.colorbar(soft, cax=figure.add_subplot(grid[-1, 1:3]), orientation="horizontal")
        figure.colorbar(error, cax=figure.add_subplot(grid[-1, 3]), orientation="horizontal")
        return _laid_out(figure)


def _overlay_row(row: npt.NDArray[Any], overlay: Overlay) -> tuple[Any, Any]:
    zoom = _zoom(overlay)
    (x0, x1), (y0, y1) = ((s.start, s.stop) for s in zoom)
    ratio = overlay.spacing_mm[1] / overlay.spacing_mm[0]
    low, high = np.percentile(overlay.image, [1, 99])
    image: dict[str, Any] = {"cmap": "gray", "vmin": low, "vmax": high, "origin": "lower", "aspect": ratio}
    row[0].imshow(overlay.image.T, **image)
    row[0].add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor="#F0E442", linewidth=1))
    words = (overlay.label, overlay.case, overlay.class_name, f"score {number(overlay.score)}")
    row[0].set_ylabel("\n".join(word for word in words if word), rotation=0, ha="right", va="center", color=INK)
    soft: dict[str, Any] = {"cmap": "viridis", "norm": Normalize(0, 1)}
    error: dict[str, Any] = {"cmap": "PuOr_r", "norm": Normalize(-1, 1)}
    layers = ((overlay.truth, soft), (overlay.prediction, soft), (overlay.prediction - overlay.truth, error))
    for axis, (values, look) in zip(row[1:], layers, strict=True):
        seen = np.clip(3 * np.abs(values[zoom].T), 0, 0.9)  # what is near 0 lets the image through
        axis.imshow(overlay.image[zoom].T, **image)
        axis.imshow(values[zoom].T, origin="lower", aspect=ratio, alpha=seen, interpolation="nearest", **look)
    for axis in row:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return ScalarMappable(**soft), ScalarMappable(**error)


def _zoom(overlay: Overlay) -> tuple[slice, slice]:
    """The box of what is to be seen, with a margin of half its size, inside the image; the whole image if nothing is."""
    seen = (overlay.truth > 0.02) | (overlay.prediction >= 0.5)
    if not seen.any():
        return slice(0, seen.shape[0]), slice(0, seen.shape[1])
    edges = [(int(w.min()), int(w.max()) + 1) for w in np.nonzero(seen)]
    side = max(12, round(1.6 * max(high - low for low, high in edges)))
    starts = [(low + high - side) // 2 for low, high in edges]
    box = [slice(max(0, s), min(size, s + side)) for s, size in zip(starts, seen.shape, strict=True)]
    return box[0], box[1]


def _colours(names: Iterable[str], reference: str) -> dict[str, str]:
    others = [name for name in names if name != reference]
    return {reference: QUIET} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
