"""Candidates and their fits: how recipes differ, how training went and what it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softseg_dist.frozen import leaves
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.run_folder import RecordedCandidate, RunData


def varying_fields(candidates: Sequence[RecordedCandidate]) -> dict[str, dict[str, str]]:
    """Per candidate the fields of its recipe that are not the same for all; nested fields are joined by a dot.

    A list whose objects are of other types in some candidate (no augmentation, or other transforms) is one field.
    """
    recipes = {c.name: dict(c.recipe) for c in candidates if c.recipe}
    for field in dict.fromkeys(field for recipe in recipes.values() for field in recipe):
        types = {name: _types(recipe.get(field)) for name, recipe in recipes.items()}
        if len(set(types.values())) > 1 and None not in types.values():
            recipes = {name: recipe | {field: types[name]} for name, recipe in recipes.items()}
    texts = {name: flattened(recipe) for name, recipe in recipes.items()}
    fields = dict.fromkeys(field for recipe in texts.values() for field in recipe)
    differing = [f for f in fields if len({recipe.get(f) for recipe in texts.values()}) > 1]
    return {name: {f: recipe[f] for f in differing if f in recipe} for name, recipe in texts.items()}


def flattened(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The JSON of a recipe as {path of a field, joined by dots: its value as text}."""
    return {path: f"{value:g}" if isinstance(value, float) else str(value) for path, value in leaves(recipe)}


def _types(value: Any) -> str | None:
    """The types of a list of objects; None for anything else."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return None
    return ", ".join(str(item["type"]) for item in value) or "none"


def learning_rates(candidates: Sequence[RecordedCandidate]) -> tuple[float, ...]:
    """All learning rates of the candidates, once each."""
    return tuple(sorted({c.recipe["optim"]["lr"] for c in candidates if "lr" in c.recipe.get("optim", {})}))


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

    `duration_s` is the median of one fit, `peak_memory_mb` the largest of any process (NaN if not recorded). `engines` says how
    many fits of the comparisons were trained in which way, by the engine's name.
    """

    num_fits: int
    num_tuning: int
    hours: float
    duration_s: float
    longest_s: float
    peak_memory_mb: float
    most_workers: int
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
    """Time and memory of all fits that have ended."""
    tuning = [fit for trial in run.trials for fit in trial.fits]
    fits = [*run.fits, *tuning]
    finished = [fit.duration_s for fit in run.finished]
    return Compute(
        num_fits=len(fits),
        num_tuning=len(tuning),
        hours=sum(fit.duration_s * fit.num_workers for fit in fits) / 3600,
        duration_s=_median(finished),
        longest_s=max(finished),
        peak_memory_mb=max(fit.peak_memory_mb for fit in fits) or NAN,
        most_workers=max(fit.num_workers for fit in fits),
        engines=dict(Counter(fit.engine or fit.precision for fit in run.finished)),
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else NAN
