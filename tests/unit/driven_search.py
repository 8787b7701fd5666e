"""A searcher that is driven by hand, one fit after the other, with fits that train nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial

from softseg_dist import Recipe, Study
from softseg_dist.data.splits import Split
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.training.task import FitResult, FitTask


def searcher(folder: Path, study: Study) -> StudySearcher:
    """A session of the study in `folder`."""
    splits = study.splits.make({f"sub-{i}": "" for i in range(10)}, study.seed)
    ledger = Ledger(folder)
    ledger.open_study(study, splits)

    def make_task(candidate: str, recipe: Recipe, split: Split, repeat: int, attempt: int) -> FitTask:
        return FitTask(
            study=study.name,
            seed=study.seed,
            candidate=candidate,
            recipe=recipe,
            split=split,
            repeat=repeat,
            objective=study.objective,
            second_objective=study.second_objective,
            store="",
            store_fingerprint="",
            folder=ledger.fit_folder(candidate, split, repeat),
            attempt=attempt,
        )

    return StudySearcher(study, splits, ledger, make_task)


def score_of(task: FitTask) -> float:
    """What depends on recipe, split and repeat alone."""
    return task.recipe.optim.lr * 10 + task.split.index / 100 + task.repeat / 1000


def finished(task: FitTask, score: float | None = None, second: float | None = None) -> FitResult:
    """A fit's result with its score, and that of the second objective."""
    name = task.objectives[0].row.name
    scores = {name: score_of(task) if score is None else score}
    if task.second_objective is not None and second is not None:
        scores[task.second_objective] = second
    known = {"candidate": task.candidate, "split": task.split.index, "repeat": task.repeat}
    return FitResult(**known, state="finished", score=scores[name], scores=scores)


def failed(task: FitTask) -> FitResult:
    """The result of a fit that diverged."""
    return FitResult(candidate=task.candidate, split=task.split.index, repeat=task.repeat, state="failed", reason="loss is nan")


def run(search: StudySearcher, num_fits: int = 1000, end: Callable[[FitTask], FitResult] = finished) -> list[FitTask]:
    """Run fits one at a time until `num_fits` have ended or there are no more."""
    tasks = []
    while len(tasks) < num_fits and (task := search.next_fit()) is not None:
        search.finish(end(task))
        tasks.append(task)
    return tasks


def optuna_trials(search: StudySearcher) -> list[FrozenTrial]:
    """What Optuna knows."""
    assert search._optuna is not None
    found: list[FrozenTrial] = search._optuna._optuna.trials
    return found


def interrupted(
    folder: Path, study: Study, stops: Sequence[int], end: Callable[[FitTask], FitResult]
) -> tuple[list[tuple[str, Recipe]], StudySearcher]:
    """Run a study in sessions that end after so many fits, the last one at its end: all fits that ran, and the last searcher."""
    ran = []
    for num_fits in (*stops, 1000):
        part = searcher(folder, study)
        ran += [(task.key, task.recipe) for task in run(part, num_fits, end)]
    return ran, part
