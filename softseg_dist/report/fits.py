"""Candidates and their fits: how recipes differ, how training went, what it took, and what a search did with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softseg_dist.frozen import leaves
from softseg_dist.numerics.metrics import Row, row_of
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.paired_tests import kind_of
from softseg_dist.report.ranking import level
from softseg_dist.report.run_folder import RecordedCandidate, RunData
from softseg_dist.report.scores import ScoreTables, soft_scores


def varying_fields(candidates: Sequence[RecordedCandidate]) -> dict[str, dict[str, str]]:
    """Per candidate the fields of its recipe that are not the same for all; nested fields are joined by a dot.

    A list whose objects are of other types in some candidate (no augmentation, or other transforms) is one field.
    """
    recipes = {c.name: dict(c.recipe) for c in candidates if c.recipe}
    for field in dict.fromkeys(field for recipe in recipes.values() for field in recipe):
        lists = all(isinstance(recipe.get(field), list) for recipe in recipes.values())
        types = {name: kind_of(recipe.get(field)) for name, recipe in recipes.items()}
        if lists and len(set(types.values())) > 1 and None not in types.values():
            recipes = {name: recipe | {field: types[name]} for name, recipe in recipes.items()}
    texts = {name: flattened(recipe) for name, recipe in recipes.items()}
    fields = dict.fromkeys(field for recipe in texts.values() for field in recipe)
    differing = [f for f in fields if len({recipe.get(f) for recipe in texts.values()}) > 1]
    return {name: {f: recipe[f] for f in differing if f in recipe} for name, recipe in texts.items()}


def flattened(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The JSON of a recipe as {path of a field, joined by dots: its value as text}."""
    return {path: f"{value:g}" if isinstance(value, float) else str(value) for path, value in leaves(recipe)}


@dataclass(frozen=True)
class TrainingSummary:
    """How the fits of one candidate went. `dead_share` is a mean over fits, None if not recorded; `duration_s` a median.

    `raced` fits are not missing: they were not run because the candidate was given up early.
    """

    name: str
    finished: int
    failed: int
    missing: int
    raced: int
    not_converged: int
    best_epoch: float
    epochs: float
    dead_share: float | None
    parameters: int | None
    duration_s: float
    peak_memory_mb: float


@dataclass(frozen=True)
class Compute:
    """What all fits took, those that failed and those of tuning too. `hours` add up every process of every fit.

    `engines` says how many fits of the comparisons were trained in which way, by the engine's name.
    """

    num_fits: int
    num_tuning: int
    hours: float
    engines: dict[str, int]


def training_of(run: RunData, candidate: RecordedCandidate) -> TrainingSummary:
    """How the fits of one candidate went."""
    fits = [fit for fit in run.fits if fit.candidate == candidate.name]
    finished = [fit for fit in fits if fit.state == "finished"]
    dead = [fit.dead_share for fit in finished if fit.dead_share is not None]
    left = run.num_fits - len(fits)
    return TrainingSummary(
        name=candidate.name,
        finished=len(finished),
        failed=len(fits) - len(finished),
        missing=0 if candidate.raced else left,
        raced=left if candidate.raced else 0,
        not_converged=sum(fit.converged is False for fit in finished),
        best_epoch=_median([fit.best_epoch for fit in finished if fit.best_epoch is not None]),
        epochs=_median([fit.epochs for fit in finished]),
        dead_share=float(np.mean(dead)) if dead else None,
        parameters=next((fit.parameters for fit in finished if fit.parameters is not None), None),
        duration_s=_median([fit.duration_s for fit in finished]),
        peak_memory_mb=max((fit.peak_memory_mb for fit in finished), default=0.0) or NAN,
    )


def compute_of(run: RunData) -> Compute:
    """Of all fits that have ended."""
    tuning = [fit for trial in run.trials for fit in trial.fits]
    fits = [*run.fits, *tuning]
    hours = sum(fit.duration_s * fit.num_workers for fit in fits) / 3600
    return Compute(len(fits), len(tuning), hours, engines=dict(Counter(fit.engine or fit.precision for fit in run.finished)))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else NAN


@dataclass(frozen=True)
class Point:
    """A candidate in two objectives. `front`: no other is at least as good in both and better in one."""

    name: str
    first: float
    second: float
    front: bool


@dataclass(frozen=True)
class Pareto:
    """All candidates by the objective and by a metric `beside` it; of means, so that neighbours need not differ."""

    beside: Row
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Tuned:
    """How one candidate was tuned: what its `num_trials` trials varied, what was chosen, the best and worst score on validation."""

    name: str
    num_trials: int
    chosen: dict[str, str]
    best: float
    worst: float


def pareto_of(run: RunData, scores: ScoreTables, reference: str) -> Pareto | None:
    """Every candidate with a score in both objectives, the front first, from the best to the worst in the first objective.

    None for a study with one objective; `scores` are of the first one, on test.
    """
    if not (second := run.study.get("second_objective")):
        return None
    sign, beside = row_of(run.study["objective"]).sign, row_of(second)
    others = soft_scores(run.results, beside.name)
    means = {name: (level(scores, name, reference), level(others, name, reference)) for name in scores.tables}
    known = {name: pair for name, pair in means.items() if not any(map(math.isnan, pair))}
    signed = {name: (sign * one, beside.sign * other) for name, (one, other) in known.items()}
    front = {n for n, p in signed.items() if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in signed.values())}
    order = sorted(known, key=lambda name: (name not in front, -signed[name][0], name))
    return Pareto(beside, tuple(Point(name, *known[name], name in front) for name in order))


def tuned_of(run: RunData) -> tuple[Tuned, ...]:
    """One entry per tuned candidate, in the order of the study; trials without a finished fit have no score."""
    found, sign = [], row_of(run.study["objective"]).sign
    for candidate in run.candidates:
        if not (trials := [trial for trial in run.trials if trial.candidate == candidate.name]):
            continue
        chosen, tried = flattened(candidate.recipe), [flattened(trial.recipe) for trial in trials]
        varied = {field: value for field, value in chosen.items() if any(recipe.get(field) != value for recipe in tried)}
        means = [float(np.mean(known)) for trial in trials if (known := [f.score for f in trial.fits if f.score is not None])]
        ordered = sorted(means, key=lambda mean: sign * mean) or [NAN]
        found.append(Tuned(candidate.name, len(trials), varied, best=ordered[-1], worst=ordered[0]))
    return tuple(found)
