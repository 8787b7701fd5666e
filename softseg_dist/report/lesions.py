"""Lesion by lesion: which are found, by their size, and how many of those found do not exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.statistics import LEVEL, NAN
from softseg_dist.report.scores import rows_at_rule
from softseg_dist.training.task import FitResult

RULE = "grid"
SIZES = {"lt20": "below 20 voxels", "20to100": "20 to 100 voxels", "gt100": "above 100 voxels", "": "all"}
DRAWS = 1000


@dataclass(frozen=True)
class Rate:
    """`count` of `total` lesions, pooled over cases, classes and splits; the 95 % interval resamples subjects."""

    count: int
    total: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Lesions:
    """One candidate at the threshold that each fit chose on its grid.

    `sensitivity` by size of the true lesion: lesions found of those that there are. `false_discovery`: predicted lesions
    that meet no true one, of all predicted.
    """

    name: str
    sensitivity: dict[str, Rate]
    false_discovery: Rate
    num_subjects: int
    num_cases: int


def lesions_of(test: pd.DataFrame, fits: Iterable[FitResult], seed: int) -> dict[str, Lesions]:
    """The pooled counts of every candidate that has them, by name; `seed` is that of the intervals."""
    fits = tuple(fits)
    pairs = {size: _counts(size) for size in SIZES} | {"false": ("lesions_false", "lesions_predicted")}
    wanted = dict.fromkeys(metric for pair in pairs.values() for metric in pair)
    tables = {metric: rows_at_rule(test, fits, metric, RULE) for metric in wanted}
    counts = {
        metric: rows.groupby(["candidate", "subject"], observed=True)["value"].sum() for metric, rows in tables.items()
    }
    cases = tables["lesions_true"].groupby("candidate", observed=True)
    found = {}
    for name, part in cases:
        sums = {metric: series[name].sort_index().to_numpy(np.float64) for metric, series in counts.items()}
        rates = {
            key: _rate(sums[count], sums[total], seed_of("lesions", seed)) for key, (count, total) in pairs.items()
        }
        false = rates.pop("false")
        num_cases = len(part[["split", "case"]].drop_duplicates())
        found[str(name)] = Lesions(str(name), rates, false, int(part["subject"].nunique()), num_cases)
    return found


def _counts(size: str) -> tuple[str, str]:
    end = f"_{size}" if size else ""
    return f"lesions_found{end}", f"lesions_true{end}"


def _rate(counts: npt.NDArray[np.float64], totals: npt.NDArray[np.float64], seed: int) -> Rate:
    """The ratio of the sums over subjects; its interval from draws of as many subjects, those without any lesion left out."""
    num = len(totals)
    count, total = float(counts.sum()), float(totals.sum())
    if not total:
        return Rate(0, 0, NAN, NAN, NAN)
    drawn = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), DRAWS)
    over, under = drawn @ counts, drawn @ totals
    low, high = np.quantile(over[under > 0] / under[under > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    known = num > 1
    return Rate(int(count), int(total), count / total, float(low) if known else NAN, float(high) if known else NAN)
