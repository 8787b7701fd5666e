"""Evaluation of a trained model on the validation and test subjects of its split: one score, and rows of the results table.

Epochs are compared on the prepared grid, in float32. What is reported is judged on the grid of the file, against what each rater
drew there. Held-out subjects are judged in the same way after the search. Legend: N items, K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from softseg_dist.data.preprocess import Sample
from softseg_dist.data.store import Store
from softseg_dist.frozen import grouped
from softseg_dist.judging.judge import Grid, Measurement, Yardstick, judge, references_of
from softseg_dist.judging.results import Head, Row, write_rows
from softseg_dist.judging.thresholds import (
    Evidence,
    Histogram,
    Recalibration,
    choose_thresholds,
    evidence,
    fit_recalibration,
    histogram,
)
from softseg_dist.judging.uncertainty import Spread, uncertainty_rows
from softseg_dist.numerics.metrics import TABLE, Map, Scale, measured, objective_score
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.batches import cases_of
from softseg_dist.training.inference import predict_sample, sample_maps
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitTask, Worker, cases_path

Subset = Literal["validation", "test", "holdout"]
Predicted = tuple[int, Sample, np.ndarray]  # case, sample, prediction [N K *S]
T = TypeVar("T")


class Chosen(NamedTuple):
    """What the validation cases of a fit chose: a threshold by each rule, and the recalibration of each class; {} for none."""

    thresholds: dict[str, float]
    recalibration: dict[str, Recalibration]


def mean_reference(sample: Sample) -> np.ndarray:
    """The mean of the raters, soft [N K *S], NaN in voxels to ignore: the same reference for all, whatever their targets."""
    return sample.raters.mean(axis=1)


def validation_score(model: Model, task: FitTask, store: Store, worker: Worker) -> float:
    """The signed objective on validation, on the prepared grid, higher is better: mean over subjects of cases; or NaN."""
    scored = []
    for case, sample, prediction in _predict(model, store, task.split.validation, worker):
        scored.append((case, objective_score(task.objectives[0], *_prepared(sample, prediction, store))))
    scores = grouped((store.cases[case].subject, score) for case, score in sorted(worker.gather(scored)))
    return _mean([_mean(of_subject) for of_subject in scores.values()])


def evaluate(model: Model, task: FitTask, store: Store, worker: Worker) -> dict[str, Any]:
    """Choose thresholds and recalibration, judge validation and test, write the rows. Returns what belongs into `FitResult`."""
    judging = Judging(task, store)
    predicted = list(_predict(model, store, task.split.validation, worker))
    found = sorted(worker.gather(_over_threads(judging.evidence, predicted, task.threads)), key=lambda part: part[0])
    recalibration = fit_recalibration([shape for _, _, shape in found], store.classes)
    chosen = Chosen(choose_thresholds([of_case for _, of_case, _ in found]), recalibration)
    rows = _in_order(worker, judging.rows("validation", predicted, chosen))
    rows += measure(model, task, store, "test", task.split.test, chosen, worker)
    if worker.leads:
        write_rows(rows, cases_path(task.folder))
    names = [metric.row.name for metric in task.objectives]
    scores = {name: _score(rows, name, "validation", "prepared") for name in names}
    known, test_score = {name: score for name, score in scores.items() if score is not None}, _score(rows, names[0], "test", "own")
    return {"score": scores[names[0]], "test_score": test_score, "scores": known, **chosen._asdict()}


def measure(
    model: Model, task: FitTask, store: Store, subset: Subset, subjects: Sequence[str], chosen: Chosen, worker: Worker
) -> list[Row]:
    """The rows of the results table of all cases of `subjects`, the `subset` of the fit, with what was chosen before."""
    judging, predicted = Judging(task, store), list(_predict(model, store, subjects, worker))
    parts = judging.rows(subset, predicted, chosen)
    if task.uncertainty:
        unsure = {case: judging.uncertainty_rows(model, subset, sample, worker.device) for case, sample, _ in predicted}
        parts = [(case, rows + unsure[case]) for case, rows in parts]
    return _in_order(worker, parts)


class Judging:
    """Judges the predictions of one fit, case by case, on as many threads as the fit has."""

    def __init__(self, task: FitTask, store: Store) -> None:
        self.task, self.store = task, store
        own = tuple(metric for metric in task.objectives if metric.row.name not in TABLE)
        self.yardstick = Yardstick(store.classes, store.mean_volumes_mm3, own)

    def evidence(self, part: Predicted) -> tuple[int, Evidence, Histogram]:
        """What a validation case says about thresholds and recalibration, on the grid of its file."""
        case, sample, prediction = part
        maps = self.store.preprocess.restore(prediction, sample.placement)
        references = references_of(sample.own, sample.rater_names, self.yardstick, maps)
        seen = references.part(maps), references.maps["mean"]
        return case, evidence(*seen), histogram(*seen, references.scale.spacing_mm)

    def rows(self, subset: Subset, predicted: Iterable[Predicted], chosen: Chosen) -> list[tuple[int, list[Row]]]:
        """All rows of each case; of recalibrated maps, too, but of the cases that chose the recalibration."""
        yardstick = replace(self.yardstick, recalibration={} if subset == "validation" else chosen.recalibration)

        def of_case(part: Predicted) -> tuple[int, list[Row]]:
            case, sample, prediction = part
            maps = self.store.preprocess.restore(prediction, sample.placement)
            judged = judge(maps, sample.own, sample.rater_names, yardstick, sorted(set(chosen.thresholds.values())))
            rows = self._head(subset, sample, "own").rows(judged)
            if subset != "holdout":  # which chooses nothing, and is compared with nothing
                rows += self._head(subset, sample, "prepared").rows(self._objectives(sample, prediction))
            return case, rows

        return _over_threads(of_case, predicted, self.task.threads)

    def uncertainty_rows(self, model: Model, subset: Subset, sample: Sample, device: str) -> list[Row]:
        """The study's uncertainty measurements of a case. Random draws depend on split and case only."""
        task = self.task
        seed = seed_of(*task.seeds, "uncertainty", sample.name)
        found: list[Measurement] = []
        for method in task.uncertainty:
            drawn = sample_maps(model, sample, method, seed, device)
            found += spread_rows(method.short, drawn, sample, self.store, self.yardstick)
        return self._head(subset, sample, "own").rows(found)

    def _objectives(self, sample: Sample, prediction: np.ndarray) -> Iterator[Measurement]:
        """The objectives on the grid of training."""
        maps_and_scale = _prepared(sample, prediction, self.store)
        for metric in self.task.objectives:
            for name, value in zip(self.store.classes, measured(metric, *maps_and_scale), strict=True):
                yield Measurement(name, "mean", None, metric.row.name, float(value))

    def _head(self, subset: Subset, sample: Sample, grid: Literal["own", "prepared"]) -> Head:
        task = self.task
        return Head(task.study, task.candidate, *task.slot, subset, grid, sample.subject, sample.name)


def spread_rows(method: str, drawn: Iterable[np.ndarray], sample: Sample, store: Store, yardstick: Yardstick) -> list[Measurement]:
    """The uncertainty measurements of several soft maps [N K *S] of one case, on the grid of its file."""
    restore, one = store.preprocess.restore, np.ones((len(sample.image), 1, *sample.image.shape[2:]), dtype=np.float32)
    window = restore(one, sample.placement)  # where a map may be above 0
    references = references_of(sample.own, sample.rater_names, yardstick, window)
    spread = Spread.of(references.part(restore(maps, sample.placement)) for maps in drawn)
    return uncertainty_rows(method, spread, references.raters, yardstick.classes, references.scale)


def _prepared(sample: Sample, prediction: np.ndarray, store: Store) -> tuple[Map, Map, Scale]:
    """Prediction, mean of the raters and their scale on the grid on which a case is prepared; both are 0 in voxels to ignore."""
    grid, mean = Grid(sample.spacing_mm, sample.voxel_mm3, sample.placement.slices or ()), mean_reference(sample)
    scale = grid.scale(store.mean_volumes_mm3)
    if (ignored := np.isnan(mean[:, :1])).any():
        prediction, mean = np.where(ignored, np.float32(0), prediction), np.nan_to_num(mean)
        scale = replace(scale, ignored=grid.case(ignored))
    return grid.case(prediction), grid.case(mean), scale


def _over_threads(function: Callable[[Any], T], tasks: Iterable[Any], threads: int) -> list[T]:
    if threads == 1:
        return list(map(function, tasks))
    with ThreadPoolExecutor(threads) as pool:  # numpy and scipy hold no interpreter lock in large arrays
        return list(pool.map(function, tasks))


def _in_order(worker: Worker, parts: list[tuple[int, list[Row]]]) -> list[Row]:
    """The rows of all workers' cases, in the order of the store."""
    return [row for _, rows in sorted(worker.gather(parts), key=lambda part: part[0]) for row in rows]


def _predict(model: Model, store: Store, subjects: Sequence[str], worker: Worker) -> Iterator[Predicted]:
    """This worker's cases of `subjects`."""
    for case in cases_of(store, subjects)[worker.rank :: worker.num_workers]:
        sample = store.sample(case)
        yield case, sample, predict_sample(model, sample, worker.device)


def _score(rows: list[Row], metric: str, subset: Subset, grid: str) -> float | None:
    subjects: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        of_metric = row["metric"] == metric and row["reference"] == "mean" and row["threshold"] is None
        if of_metric and row["subset"] == subset and row["grid"] == grid:
            subjects.setdefault(row["subject"], {}).setdefault(row["case"], []).append(row["value"])
    score = _mean([_mean([_mean(classes) for classes in cases.values()]) for cases in subjects.values()])
    return None if np.isnan(score) else score


def _mean(values: list[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return sum(known) / len(known) if known else float("nan")
