"""Figures of numbers, and how all figures look. Colours are those of Okabe and Ito, which colour-blind readers can tell apart.

Blue is better than the reference, vermillion worse, grey not shown to differ; markers say the same without colour.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from softseg_dist.report.measures import Agreement, ReliabilityTable
from softseg_dist.report.paired_tests import Comparison, Effect
from softseg_dist.report.scores import RULES
from softseg_dist.report.tables import Summary
from softseg_dist.words import interval, number, p_value, verdict

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
    "text.parse_math": False,  # names and titles are the user's
    "svg.hashsalt": "softseg",  # the same numbers give the same file
}
LOOK = {"better": (BETTER, "o", BETTER), "worse": (WORSE, "s", WORSE), "not shown": (UNSHOWN, "o", "white")}
MOST = 12  # candidates in a figure, besides the reference
MARKS = dict(zip(RULES, "so^", strict=True))
TICKS = (0, 0.5, 1), ("0", "0.5", "1")  # short, so that those of neighbouring panels do not touch


def png(figure: Figure) -> bytes:
    """The figure at 160 dots per inch."""
    return _written(figure, "png", metadata={"Software": None}, dpi=160)


def svg(figure: Figure) -> bytes:
    """The figure as lines and text."""
    return _written(figure, "svg", metadata={"Date": None})


def _written(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, facecolor="white", **options)
    return buffer.getvalue()


@contextmanager
def new_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Iterator[Figure]:
    """An empty figure of `width` x `height` inches in our style; its layout is solved once, when the block ends."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    """`count` axes in rows of `columns`, which share their axes; the rest of the last row stays empty."""
    axes = list(figure.subplots(math.ceil(count / columns) or 1, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return axes[:count]


def shown(summary: Summary) -> list[str]:
    """The candidates that figures show: the `MOST` highest ranked, and the reference, in order of rank."""
    ranked = [s.name for s in summary.ranking if s.rank is not None]
    return [name for i, name in enumerate(ranked) if i < MOST or name == summary.reference]


def forest_figure(summary: Summary) -> Figure:
    """Differences with 95 % intervals: main effects, if there are any, above the candidates minus the reference."""
    names = set(shown(summary))
    groups: dict[str, Sequence[tuple[str, Comparison | Effect]]] = {}
    if summary.effects:
        groups["Main effects, averaged over all other factors"] = [(f"{e.level} − {e.base}", e) for e in summary.effects]
    groups[f"Candidates minus {summary.reference}"] = [(c.candidate, c) for c in summary.comparisons if c.candidate in names]
    heights = [len(entries) + 0.9 for entries in groups.values()]
    with new_figure(9, 0.32 * sum(heights) + 0.9) as figure:
        grid = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 0.62))
        for (axis, beside), (title, entries) in zip(grid, groups.items(), strict=True):
            axis.sharex(grid[-1, 0])
            axis.tick_params(axis="x", labelbottom=axis is grid[-1, 0])
            _forest(axis, beside, title, entries, summary.objective.sign)
        better = "higher" if summary.objective.sign > 0 else "lower"
        of = f"{summary.objective.title} (test, own grid; {better} is better)"
        grid[-1, 0].set_xlabel(f"difference in {of}, with 95 % interval")
    return figure


def _forest(axis: Axes, beside: Axes, title: str, entries: Sequence[tuple[str, Comparison | Effect]], sign: int) -> None:
    """Differences with their intervals, and the same in numbers in an invisible axis beside them."""
    beside.text(0.02, -0.85, "difference (95 % interval)", va="center", color=QUIET)
    beside.text(0.98, -0.85, "p, Holm", va="center", ha="right", color=QUIET)
    for y, (_, entry) in enumerate(entries):
        test = entry.crossed
        colour, marker, fill = LOOK[verdict(test.mean, entry.p_holm, sign)]
        if math.isfinite(test.low):
            axis.plot([test.low, test.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(test.mean, y, marker, color=colour, markerfacecolor=fill, markersize=6.5)
        reach = "not tested" if math.isnan(test.p) else interval(test.low, test.high, signed=True)
        beside.text(0.02, y, f"{number(test.mean, signed=True)}  ({reach})", va="center", color=INK)
        beside.text(0.98, y, p_value(entry.p_holm), va="center", ha="right", color=INK)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(entries)), [name for name, _ in entries], color=INK)
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")
    axis.set_title(title, color=QUIET)
    beside.set(ylim=axis.get_ylim(), xlim=(0, 1))
    beside.set_axis_off()


def curve_figure(summary: Summary) -> Figure:
    """Mean Dice on test against the threshold; on each curve a mark at each rule's mean threshold."""
    names = [name for name in shown(summary) if name in summary.curves]
    colours = dict(zip((name for name in names if name != summary.reference), itertools.cycle(COLOURS), strict=False))
    colours[summary.reference] = QUIET
    standings = {s.name: s for s in summary.ranking}
    with new_figure(8.6, max(3.4, 0.2 * len(names) + 1.2)) as figure:
        axis = figure.subplots()
        for i, name in enumerate(names):
            curve = summary.curves[name]
            style = "-" if name == summary.reference or i < len(COLOURS) else "--"
            width = 2.4 if name == summary.reference else 1.4
            axis.plot(summary.curve_thresholds, curve, style, color=colours[name], linewidth=width, label=name)
            for rule, tau in standings[name].thresholds.items():
                at = tau, np.interp(tau, summary.curve_thresholds, curve)
                axis.plot(*at, MARKS[rule], color=colours[name], markersize=6, markeredgecolor="white", markeredgewidth=0.6)
        for rule in summary.used_rules:
            axis.plot([], [], MARKS[rule], color=INK, markersize=5, linestyle="none", label=RULES[rule])
        axis.axvline(0.5, color=QUIET, linewidth=0.8, linestyle=":")
        axis.set(xlabel="threshold", ylabel="mean Dice (test, own grid)", xlim=(0, 1))
        axis.grid()
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def learning_figure(summary: Summary, histories: Mapping[tuple[str, str], pd.DataFrame]) -> Figure | None:
    """Small multiples of the objective on validation by epoch, one thin line per fit; None without any history."""
    known = {key: history for key, history in histories.items() if summary.objective.name in history}
    fitted = {name for name, _ in known}
    names = [name for name in shown(summary) if name in fitted]
    if not names:
        return None
    columns = min(4, len(names))
    with new_figure(2.3 * columns, 1.65 * math.ceil(len(names) / columns) + 0.3) as figure:
        for axis, name in zip(panels(figure, len(names), columns), names, strict=True):
            for history in [history for (candidate, _), history in known.items() if candidate == name]:
                validated = history.dropna(subset=[summary.objective.name])
                axis.plot(validated["epoch"], validated[summary.objective.name], color=BETTER, linewidth=0.8, alpha=0.6)
            axis.set_title(name, fontsize=8, color=INK)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.grid()
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel(f"{summary.objective.title} (validation, prepared grid)", fontsize=9)
    return figure


def broken(name: str) -> str:
    """A long name in two lines."""
    return name.replace("-", "-\n", 1) if len(name) > 18 else name


def reliability_figure(summary: Summary, names: Sequence[str]) -> Figure:
    """One panel per candidate: mean reference against mean prediction in each bin, over bars of the bins' shares of the voxels."""
    tables = [summary.measures.reliability[name] for name in names]
    columns = min(5, len(tables))
    height = 1.95 * math.ceil(len(tables) / columns) + 0.35
    with new_figure(1.85 * columns + 0.4, height, "compressed") as figure:
        axes = panels(figure, len(tables), columns)
        for axis, table in zip(axes, tables, strict=True):
            _reliability(axis, table, QUIET if table.name == summary.reference else BETTER)
        for axis in axes[-columns:]:
            axis.tick_params(axis="x", labelbottom=True)
        figure.supxlabel("mean prediction in the bin", fontsize=9)
        figure.supylabel("mean reference", fontsize=9)
    return figure


def _reliability(axis: Axes, table: ReliabilityTable, colour: str) -> None:
    width = 1 / len(table.edges)
    axis.bar(table.edges, table.shares, width, align="edge", color=GRID, edgecolor="white", linewidth=0.5)
    axis.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=0.8)
    axis.plot(table.predicted, table.observed, "o-", color=colour, markersize=3, linewidth=1.3)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xticks(*TICKS)
    axis.set_yticks(*TICKS)
    axis.set_title(broken(table.name), fontsize=7.5, color=INK)
    axis.text(0.04, 0.96, f"ECE {number(table.ece)}", transform=axis.transAxes, va="top", fontsize=7.5, color=INK)


def agreement_figure(summary: Summary, names: Sequence[str]) -> Figure:
    """Bland-Altman: a row per class, a column per candidate; difference of volumes against their mean, one point per subject."""
    found = [summary.measures.agreements[name] for name in names]
    rows, columns = len(found[0]), len(found)
    with new_figure(4.4 * columns, 2.6 * rows + 0.3) as figure:
        axes = figure.subplots(rows, columns, sharex="row", sharey="row", squeeze=False)
        for k in range(rows):
            for axis, of_candidate in zip(axes[k], found, strict=True):
                _agreement(axis, of_candidate[k], several=rows > 1)
        figure.supxlabel("mean of predicted and reference volume of a subject (mm³)", fontsize=9)
        figure.supylabel("predicted minus reference (mm³)", fontsize=9)
    return figure


def _agreement(axis: Axes, agreement: Agreement, several: bool) -> None:
    true, predicted = np.array(agreement.true_mm3), np.array(agreement.predicted_mm3)
    limits = agreement.limits
    axis.plot((true + predicted) / 2, predicted - true, "o", color=BETTER, markersize=4, alpha=0.75, markeredgewidth=0)
    axis.axhline(0, color=QUIET, linewidth=0.8)
    axis.axhline(limits.bias, color=INK, linewidth=1.3)
    for limit in (limits.low, limits.high):
        if math.isfinite(limit):
            axis.axhline(limit, color=INK, linewidth=1, linestyle="--")
    title = f"{agreement.name}, class {agreement.class_name}" if several else agreement.name
    axis.set_title(f"{title}\nbias {number(limits.bias, 1, signed=True)} mm³, n = {limits.n}", fontsize=8.5, color=INK)
    axis.margins(0.08, 0.15)
    axis.grid()
