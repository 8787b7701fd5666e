"""What a search did: which candidates are best in two objectives, which were given up early, how each was tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from softseg_dist.numerics.metrics import Row, row_of
from softseg_dist.numerics.statistics import NAN
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.report.fits import flattened
from softseg_dist.report.ranking import level
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import ScoreTables, soft_scores


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
class Tuned:
    """How one candidate was tuned: what its `num_trials` trials varied, what was chosen, the best and worst score on validation."""

    name: str
    num_trials: int
    chosen: dict[str, str]
    best: float
    worst: float


@dataclass(frozen=True)
class Searched:
    """What there is of a search: None, {} and () where a study has none of it. `raced` says why candidates were given up."""

    pareto: Pareto | None
    raced: dict[str, RaceRecord]
    tuned: tuple[Tuned, ...]


def searched_of(run: RunData, test: pd.DataFrame, scores: ScoreTables, reference: str) -> Searched:
    """All of it; `scores` are of the objective, on test."""
    sign, second = row_of(run.study["objective"]).sign, run.study.get("second_objective")
    beside = row_of(second) if second else None
    return Searched(
        pareto=pareto_of(scores, soft_scores(test, beside.name), sign, beside, reference) if beside else None,
        raced={c.name: c.raced for c in run.candidates if c.raced},
        tuned=tuned_of(run, sign),
    )


def pareto_of(first: ScoreTables, second: ScoreTables, sign: int, beside: Row, reference: str) -> Pareto:
    """Every candidate with a score in both objectives, the front first, from the best to the worst in the first objective."""
    means = {name: (level(first, name, reference), level(second, name, reference)) for name in first.tables}
    known = {name: pair for name, pair in means.items() if not any(map(math.isnan, pair))}
    signed = {name: (sign * one, beside.sign * other) for name, (one, other) in known.items()}
    front = {n for n, p in signed.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in signed.values())}
    order = sorted(known, key=lambda name: (name not in front, -signed[name][0], name))
    points = tuple(Point(name, *known[name], name in front) for name in order)
    return Pareto(beside.name, beside.title, beside.sign, points)


def tuned_of(run: RunData, sign: int) -> tuple[Tuned, ...]:
    """One entry per tuned candidate, in the order of the study; trials without a finished fit have no score."""
    found = []
    for candidate in run.candidates:
        if not (trials := [trial for trial in run.trials if trial.candidate == candidate.name]):
            continue
        chosen, tried = flattened(candidate.recipe), [flattened(trial.recipe) for trial in trials]
        varied = {field: value for field, value in chosen.items() if any(recipe.get(field) != value for recipe in tried)}
        means = [float(np.mean(known)) for trial in trials if (known := [f.score for f in trial.fits if f.score is not None])]
        ordered = sorted(means, key=lambda mean: sign * mean) or [NAN]
        found.append(Tuned(candidate.name, len(trials), varied, best=ordered[-1], worst=ordered[0]))
    return tuple(found)
