"""Distances between surfaces, at the threshold that each fit chose on its grid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from softseg_dist.report.scores import Scores, mean_of, rows_at_rule, tables_of, undefined
from softseg_dist.training.task import FitResult

RULE = "grid"
METRICS = ("hd95_mm", "asd_mm", "surface_dice_1mm")


@dataclass(frozen=True)
class Surfaces:
    """Means over subjects and splits of one candidate. Of `values` (case, class, split) `undefined` have no surface to measure."""

    name: str
    hd95_mm: float
    asd_mm: float
    surface_dice_1mm: float
    undefined: int
    values: int


def surfaces_of(test: pd.DataFrame, fits: Iterable[FitResult]) -> dict[str, Surfaces]:
    """The means of every candidate that has them, by name."""
    fits = tuple(fits)
    rows = {metric: rows_at_rule(test, fits, metric, RULE) for metric in METRICS}
    scores: dict[str, Scores] = {metric: tables_of(part, test) for metric, part in rows.items()}
    counted = undefined(rows[METRICS[0]])
    means = {name: [mean_of(scores[metric].of(name)) for metric in METRICS] for name in counted}
    return {name: Surfaces(name, hd95, asd, dice, *counted[name]) for name, (hd95, asd, dice) in means.items()}
