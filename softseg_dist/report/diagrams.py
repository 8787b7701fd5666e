"""Figures of what is measured beside the objective: calibration, volumes, two objectives at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softseg_dist.report.look import BETTER, GRID, INK, QUIET, new_figure, panels
from softseg_dist.report.measures import Agreement, ReliabilityTable
from softseg_dist.report.search_tables import Pareto
from softseg_dist.report.tables import Summary
from softseg_dist.words import direction, number

TICKS = (0, 0.5, 1), ("0", "0.5", "1")  # short, so that those of neighbouring panels do not touch
MOST_LABELLED = 12  # points with their names beside


def reliability_figure(summary: Summary, names: Sequence[str]) -> Figure:
    """One panel per candidate: mean reference against mean prediction in each bin, over bars of the bins' shares of the voxels."""
    tables = [summary.measures.reliability[name] for name in names]
    columns = min(5, len(tables))
    height = 1.95 * math.ceil(len(tables) / columns) + 0.35
    with new_figure(1.85 * columns + 0.4, height, "compressed") as figure:
        axes = panels(figure, len(tables), columns, sharex=True)
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
    axis.set_title(table.name.replace("-", "-\n", 1) if len(table.name) > 18 else table.name, fontsize=7.5, color=INK)
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


def pareto_figure(summary: Summary, pareto: Pareto) -> Figure:
    """Every candidate in two objectives; those that no other dominates are joined and labelled."""
    front = [point for point in pareto.points if point.front]
    rest = [point for point in pareto.points if not point.front]
    with new_figure(7, 4.2) as figure:
        axis = figure.subplots()
        axis.plot([p.first for p in rest], [p.second for p in rest], "o", color=QUIET, markerfacecolor="white", markersize=5)
        axis.plot([p.first for p in front], [p.second for p in front], "o-", color=BETTER, markersize=6, linewidth=1)
        for point in (p for p in pareto.points if p.name == summary.reference):
            axis.plot(point.first, point.second, "s", color=INK, markerfacecolor="none", markersize=10)
        for i, point in enumerate(pareto.points):
            if (point.front and i < MOST_LABELLED) or point.name == summary.reference:
                axis.annotate(point.name, (point.first, point.second), (4, 5), textcoords="offset points", fontsize=7.5)
        axis.set_xlabel(f"{summary.objective_title} ({direction(summary.sign)})")
        axis.set_ylabel(f"{pareto.title} ({direction(pareto.sign)})")
        axis.margins(0.12)
        axis.grid()
    return figure
