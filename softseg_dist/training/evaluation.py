"""Evaluation of a trained model on the validation and test subjects of its split: one score, and rows of the results table.

Held-out subjects are measured in the same way after the search. Legend: N items, K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from softseg_dist.data.preprocess import Sample
from softseg_dist.data.store import Store
from softseg_dist.judging.results import Row, rows_of_case, write_rows
from softseg_dist.judging.rows import Grid, Wanted, case_rows
from softseg_dist.judging.thresholds import CURVE, choose_thresholds
from softseg_dist.judging.uncertainty import Spread, uncertainty_rows
from softseg_dist.numerics.metrics import TABLE, objective_score
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.batches import cases_of
from softseg_dist.training.inference import predict_sample, sample_maps
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitTask, Worker, cases_path

Subset = Literal["validation", "test", "holdout"]


def mean_reference(sample: Sample) -> np.ndarray:
    """The mean of the raters, soft [N K *S]: the reference for every candidate, independent of its training target."""
    mean: np.ndarray = sample.raters.mean(axis=1)
    return mean


def grid_of(sample: Sample) -> Grid:
    """The grid on which a prepared case is measured."""
    return Grid(sample.spacing_mm, sample.voxel_mm3, sample.placement.slices)


def validation_score(model: Model, task: FitTask, store: Store, worker: Worker) -> float:
    """The signed objective on validation, higher is better: mean over subjects of their cases' mean; NaN if all are NaN."""
    scored = []
    for case, sample, prediction in _predict(model, store, task.split.validation, worker):
        grid = grid_of(sample)
        maps, scale = (grid.case(prediction), grid.case(mean_reference(sample))), grid.scale(store.mean_volumes_mm3)
        scored.append((case, objective_score(task.objectives[0], *maps, scale)))
    scores: dict[str, list[float]] = {}
    for case, score in sorted(worker.gather(scored)):
        scores.setdefault(store.cases[case].subject, []).append(score)
    return _mean([_mean(of_subject) for of_subject in scores.values()])


def evaluate(model: Model, task: FitTask, store: Store, worker: Worker) -> dict[str, Any]:
    """Choose thresholds on validation, measure validation and test, and write the fit's rows of the results table.

    Returns what of it belongs into the `FitResult`.
    """
    predicted = [(case, p) for case, _, p in _predict(model, store, task.split.validation, worker)]
    on_validation = dict(sorted(worker.gather(predicted), key=lambda item: item[0]))
    references = [mean_reference(store.sample(case)) for case in on_validation]
    thresholds = choose_thresholds(list(on_validation.values()), references)
    rows = _in_order(
        worker, [(case, _rows(task, store, "validation", store.sample(case), p, thresholds)) for case, p in predicted]
    ) + measure(model, task, store, "test", task.split.test, thresholds, worker)
    if worker.leads:
        write_rows(rows, cases_path(task.folder))
    names = [metric.row.name for metric in task.objectives]
    found = {name: _score(rows, name, "validation") for name in names}
    return {
        "score": found[names[0]],
        "test_score": _score(rows, names[0], "test"),
        "scores": {name: score for name, score in found.items() if score is not None},
        "thresholds": thresholds,
    }


def measure(
    model: Model, task: FitTask, store: Store, subset: Subset, subjects: Sequence[str], thresholds: dict[str, float], worker: Worker
) -> list[Row]:
    """The rows of the results table of all cases of `subjects`, the `subset` of the fit, at thresholds chosen before."""
    measured = [
        (
            case,
            _rows(task, store, subset, sample, prediction, thresholds)
            + _uncertainty_rows(model, task, store, subset, sample, worker.device),
        )
        for case, sample, prediction in _predict(model, store, subjects, worker)
    ]
    return _in_order(worker, measured)


def _in_order(worker: Worker, parts: list[tuple[int, list[Row]]]) -> list[Row]:
    """The rows of all workers' cases, in the order of the store."""
    return [row for _, rows in sorted(worker.gather(parts), key=lambda part: part[0]) for row in rows]


def _predict(model: Model, store: Store, subjects: Sequence[str], worker: Worker) -> Iterator[tuple[int, Sample, np.ndarray]]:
    """This worker's cases of `subjects`: index, sample, prediction."""
    for case in cases_of(store, subjects)[worker.rank :: worker.num_workers]:
        sample = store.sample(case)
        yield case, sample, predict_sample(model, sample, worker.device)


def _rows(
    task: FitTask, store: Store, subset: Subset, sample: Sample, prediction: np.ndarray, thresholds: dict[str, float]
) -> list[Row]:
    references = {"mean": mean_reference(sample)}
    if len(sample.rater_names) > 1:
        references |= {name: sample.raters[:, r] for r, name in enumerate(sample.rater_names)}
    if sample.truth is not None:
        references["truth"] = sample.truth
    grid, own = grid_of(sample), tuple(metric for metric in task.objectives if metric.row.name not in TABLE)
    maps = {name: grid.case(reference) for name, reference in references.items()}
    wanted = Wanted(store.classes, tuple(thresholds.values()), CURVE, own)
    measured = case_rows(grid.case(prediction), maps, wanted, grid.scale(store.mean_volumes_mm3))
    return rows_of_case(measured, task.study, task.candidate, task.split.index, subset, sample)


def _uncertainty_rows(model: Model, task: FitTask, store: Store, subset: Subset, sample: Sample, device: str) -> list[Row]:
    """The study's uncertainty measurements of a case. Random draws depend on split and case only."""
    seed = seed_of(task.study, task.seed, task.split.index, "uncertainty", sample.name)
    grid, measured = grid_of(sample), []
    for method in task.uncertainty:
        spread = Spread.of(map(grid.case, sample_maps(model, sample, method, seed, device)))
        scale = grid.scale(store.mean_volumes_mm3)
        measured += uncertainty_rows(method.short, spread, grid.case(sample.raters), store.classes, scale)
    return rows_of_case(measured, task.study, task.candidate, task.split.index, subset, sample)


def _score(rows: list[Row], metric: str, subset: Subset) -> float | None:
    subjects: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["subset"] == subset and row["reference"] == "mean" and row["metric"] == metric and row["threshold"] is None:
            subjects.setdefault(row["subject"], {}).setdefault(row["case"], []).append(row["value"])
    score = _mean([_mean([_mean(classes) for classes in cases.values()]) for cases in subjects.values()])
    return None if np.isnan(score) else score


def _mean(values: list[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return sum(known) / len(known) if known else float("nan")
