"""The objective by site, and overlap rater by rater beside what the raters reach among themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from softseg_dist.numerics.crossed_test import CrossedTest, crossed_test
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.scores import ScoreTables, mean_of, rows_at_rule, soft_scores, tables_of
from softseg_dist.training.task import FitResult

RULE = ("grid", "fixed")  # the threshold that each fit chose on validation; 0.5 where there was none
NO_RATER = ("mean", "truth", "raters")  # references that are not one of the raters


@dataclass(frozen=True)
class Site:
    """The objective of two candidates on the subjects of one site. `crossed` is the paired difference, `one` minus `other`."""

    site: str
    num_subjects: int
    num_scores: int
    one: float
    other: float
    crossed: CrossedTest


@dataclass(frozen=True)
class AgainstRaters:
    """One candidate: Dice against each rater at the threshold chosen on the grid, and GED² against all; NaN if not recorded."""

    name: str
    dice: dict[str, float]
    ged2: float


@dataclass(frozen=True)
class Raters:
    """All raters. `inter_rater` is their mean Dice in pairs: over `num_subjects` the mean, and as `low` and `high` the quartiles.

    The values are NaN if no case has two raters.
    """

    names: tuple[str, ...]
    inter_rater: float
    low: float
    high: float
    num_subjects: int
    candidates: dict[str, AgainstRaters]


def by_site(scores: ScoreTables, site_of: Mapping[str, str], one: str, other: str) -> tuple[Site, ...]:
    """One row per site, by name; () unless the tested subjects come from two sites or more."""
    sites = np.array([site_of.get(subject, "") for subject in scores.subjects])
    if len(set(sites.tolist())) < 2:
        return ()
    found = []
    for site in sorted(set(sites.tolist())):
        here = sites == site
        scored, means = ~np.isnan(scores.of(one)[here]), (mean_of(scores.of(one)[here]), mean_of(scores.of(other)[here]))
        difference = crossed_test(scores.difference(one, other)[here])
        found.append(Site(site, int(scored.any(axis=1).sum()), int(scored.sum()), *means, difference))
    return tuple(found)


def raters_of(test: pd.DataFrame, fits: Sequence[FitResult], candidates: Sequence[str]) -> Raters | None:
    """None unless cases were measured against two raters or more."""
    names = tuple(sorted(str(r) for r in test["reference"].unique() if r not in NO_RATER))
    if len(names) < 2:
        return None
    dice = {rater: tables_of(rows_at_rule(test, fits, "dice", RULE, reference=rater), test) for rater in names}
    ged2 = soft_scores(test, "ged2", reference="raters")
    rows = {}
    for name in candidates:
        of_rater = {rater: mean_of(scores.of(name)) for rater, scores in dice.items()}
        rows[name] = AgainstRaters(name, of_rater, mean_of(ged2.of(name)))
    return Raters(names, *_inter_rater(test), rows)


def _inter_rater(test: pd.DataFrame) -> tuple[float, float, float, int]:
    """It is the same for all candidates and splits, so each subject counts once, with the mean over its cases and classes."""
    rows = test[(test["metric"] == "inter_rater_dice") & test["value"].notna()]
    of_case = rows.groupby(["subject", "case", "class"], observed=True)["value"].mean()
    subjects = of_case.groupby(["subject", "case"], observed=True).mean().groupby("subject", observed=True).mean()
    if subjects.empty:
        return NAN, NAN, NAN, 0
    low, high = np.quantile(subjects, [0.25, 0.75])
    return float(subjects.mean()), float(low), float(high), len(subjects)
