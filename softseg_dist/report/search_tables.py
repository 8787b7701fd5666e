"""What a search did: which parameters mattered, which candidates are best in two objectives, which were stopped early or tuned.

The importance of a parameter is a plain measure, not a model: all candidates that the search proposed are grouped by the
parameter's value (a number by its tertiles) and eta^2 = (H - k + 1) / (n - k) is the share of the variance of their ranks
that lies between the k groups, minus what chance alone would give (H is the statistic of Kruskal and Wallis 1952, doi
10.1080/01621459.1952.10483441). 0: no more than chance; 1: the parameter decides the rank. A search looks more often where it
found good candidates, and parameters vary together: it describes this search, it tests nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from softseg_dist.numerics.metrics import Row, row_of
from softseg_dist.numerics.statistics import NAN
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.report.fits import Tuned, tuned_of
from softseg_dist.report.ranking import level
from softseg_dist.report.run_folder import RecordedCandidate, RunData
from softseg_dist.report.scores import ScoreTables, soft_scores

FEW = 6  # candidates; fewer give no importance
NUM_GROUPS = 3  # of the values of a number


@dataclass(frozen=True)
class Importance:
    """One parameter over the `num_candidates` proposed candidates that have it and a score.

    `share` is eta^2 of their ranks, `correlation` Spearman's (positive: larger is better; NaN for a choice), `best` the group with
    the best mean rank, `groups` how many there are.
    """

    parameter: str
    num_candidates: int
    share: float
    correlation: float
    best: str
    groups: int


@dataclass(frozen=True)
class Point:
    """A candidate in two objectives. `front`: no other is at least as good in both and better in one."""

    name: str
    first: float
    second: float
    front: bool


@dataclass(frozen=True)
class Pareto:
    """All candidates by the objective and by a `metric` beside it; of means, so that neighbours need not differ."""

    metric: str
    title: str
    sign: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Searched:
    """What there is of a search: (), None and {} where a study has none of it. `raced` says why candidates were given up."""

    importances: tuple[Importance, ...]
    pareto: Pareto | None
    raced: dict[str, RaceRecord]
    tuned: tuple[Tuned, ...]


def searched_of(run: RunData, test: pd.DataFrame, scores: ScoreTables, reference: str) -> Searched:
    """All of it; `scores` are of the objective, on test."""
    sign, second = row_of(run.study["objective"]).sign, run.study.get("second_objective")
    beside = row_of(second) if second else None
    return Searched(
        importances=importances(run.candidates, scores, reference, sign),
        pareto=pareto_of(scores, soft_scores(test, beside.name), sign, beside, reference) if beside else None,
        raced={c.name: c.raced for c in run.candidates if c.raced},
        tuned=tuned_of(run, sign),
    )


def importances(candidates: Sequence[RecordedCandidate], scores: ScoreTables, reference: str, sign: int) -> tuple[Importance, ...]:
    """One entry per parameter of the search, the most important first; () if fewer than `FEW` candidates have it."""
    values = {c.name: sign * level(scores, c.name, reference) for c in candidates if c.proposed}
    known = [c for c in candidates if c.proposed and not math.isnan(values[c.name])]
    found = []
    for parameter in dict.fromkeys(name for c in known for name in c.params):
        having = [c for c in known if parameter in c.params]
        settings = [c.params[parameter] for c in having]
        if len(having) >= FEW and len(set(map(str, settings))) > 1:
            found.append(_importance(parameter, settings, np.array([values[c.name] for c in having])))
    return tuple(sorted(found, key=lambda i: (-i.share, i.parameter)))


def _importance(parameter: str, settings: Sequence[Any], values: npt.NDArray[np.float64]) -> Importance:
    ranks = stats.rankdata(values)
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in settings)
    groups = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in settings]
    if numbers and len(set(settings)) > NUM_GROUPS:
        groups = _tertiles(settings)
    parts = {group: ranks[[g == group for g in groups]] for group in dict.fromkeys(groups)}
    k, n, varied = len(parts), len(ranks), np.ptp(values) > 0
    share = correlation = NAN
    if 2 <= k < n and varied:
        share = max(0.0, (float(stats.kruskal(*parts.values()).statistic) - k + 1) / (n - k))
    if numbers and varied:
        correlation = float(stats.spearmanr(np.array(settings, dtype=np.float64), values).statistic)
    return Importance(parameter, n, share, correlation, max(parts, key=lambda group: float(parts[group].mean())), k)


def _tertiles(settings: Sequence[float]) -> list[str]:
    """The third of the values that each is in, by its range."""
    numbers = np.array(settings, dtype=np.float64)
    third = np.searchsorted(np.quantile(numbers, [1 / 3, 2 / 3]), numbers, side="left")
    ranges = {t: f"{numbers[third == t].min():.3g} to {numbers[third == t].max():.3g}" for t in set(third.tolist())}
    return [ranges[t] for t in third.tolist()]


def pareto_of(first: ScoreTables, second: ScoreTables, sign: int, beside: Row, reference: str) -> Pareto:
    """Every candidate with a score in both objectives, the front first, from the best to the worst in the first objective."""
    means = {name: (level(first, name, reference), level(second, name, reference)) for name in first.tables}
    known = {name: pair for name, pair in means.items() if not any(map(math.isnan, pair))}
    signed = {name: (sign * one, beside.sign * other) for name, (one, other) in known.items()}
    front = {n for n, p in signed.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in signed.values())}
    order = sorted(known, key=lambda name: (name not in front, -signed[name][0], name))
    points = tuple(Point(name, *known[name], name in front) for name in order)
    return Pareto(beside.name, beside.title, beside.sign, points)
