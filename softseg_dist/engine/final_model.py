"""The model that a study leaves behind: a candidate trained on all subjects, as a folder that `softseg predict` takes.

All but the held-out ones: what the report says of them is said of training runs that have not seen them, and so is the model.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.ray_refit import train_on_workers
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger, json_of
from softseg_dist.sources import Sources
from softseg_dist.study import Recipe, Resources, Study
from softseg_dist.training.fit import fit
from softseg_dist.training.saved_model import CARD, ModelCard, read_card, save_model
from softseg_dist.training.task import FitResult, FitTask, weights_path

REFIT = "refit"  # its folder among the fits of a candidate
SAME = ("study", "candidate", "recipe", "preprocess", "epochs", "num_subjects", "store_fingerprint")


@dataclass(frozen=True)
class Trained:
    """What a model is made from, or held-out subjects are opened for: the study that was run, its store, where everything lies."""

    study: Study
    sources: Sources | None
    ledger: Ledger
    store: Store
    store_where: str
    folder: Path  # of the run, on this machine


@dataclass(frozen=True)
class Where:
    """On which machines to train."""

    resources: Resources
    address: str | None = None
    max_wait_s: float | None = None


def make_model(made: Trained, candidate: str, out: Path, where: Where, progress: Progress) -> Path:
    """Train a candidate on all subjects of the study that are not held out and save it in `out`; at once if that was done before.

    It is trained for the median of the best epochs of its fits, with the learning rate falling to 0 by then, and its last weights
    count, as nobody is left to validate on. Thresholds are the means of those that its splits chose.
    Raises UserError if the study has no such candidate, or none of its fits has finished.
    """
    fits = [r for (name, _), r in made.ledger.results().items() if name == candidate and r.state == "finished"]
    records = made.ledger.candidates()
    if candidate not in records:
        raise UserError(
            f"{made.ledger.folder}: has no candidate {candidate!r}; there are {', '.join(records) or 'none'}"
        )
    if not fits:
        raise UserError(f"{made.ledger.folder}: no fit of {candidate} has finished, so there is nothing to train it by")
    recipe = Recipe.model_validate(records[candidate].recipe)
    epochs = max(1, round(statistics.median(fit.best_epoch or 1 for fit in fits)))
    task = _task(made, candidate, recipe.replace(optim=recipe.optim.replace(epochs=epochs, patience=None)), where)
    card = _card(made, task, fits)
    if _is_there(out, card):
        return out
    progress.note(f"training {candidate} on all {card.num_subjects} subjects for {epochs} epochs")
    alone_s = _seconds_alone(made, task, fits)
    result = train_on_workers(
        task, fit, where.resources, progress, where.address, where.max_wait_s, made.sources, alone_s
    )
    if result.state != "finished":
        raise UserError(f"{task.candidate} trained on all subjects has failed: {result.reason}")
    weights = weights_path(made.folder / "fits" / candidate / REFIT)
    weights.parent.mkdir(parents=True, exist_ok=True)
    if (place := Place.at(task.folder)).path is None:
        (place / weights.name).pull(weights)
    save_model(out, card, weights)
    return out


def _task(made: Trained, candidate: str, recipe: Recipe, where: Where) -> FitTask:
    splits, holdout = made.ledger.splits(), made.ledger.holdout()
    subjects = {case.subject for case in made.store.cases} - set(holdout.subjects if holdout else ())
    everybody = Split(index=len(splits), train=tuple(sorted(subjects)))
    return FitTask(
        study=made.study.name,
        seed=made.study.seed,
        candidate=candidate,
        recipe=recipe,
        split=everybody,
        objective=made.study.objective,
        store=made.store_where,
        store_fingerprint=made.store.fingerprint,
        folder=f"{made.ledger.folder}/fits/{candidate}/{REFIT}",
        threads=where.resources.cpus_per_fit,
        checkpoint_every_s=where.resources.checkpoint_every_s,
    )


def _seconds_alone(made: Trained, task: FitTask, fits: Sequence[FitResult]) -> float:
    """How long one worker takes, as the candidate's fits tell: they have validated and measured, too, so that is the most."""
    subjects = {split.index: len(split.train) for split in made.ledger.splits()}
    spent_s = sum(fit.duration_s * fit.num_workers for fit in fits)
    work = sum(fit.epochs * subjects[fit.split] for fit in fits)
    return spent_s / work * task.recipe.optim.epochs * len(task.split.train)


def _card(made: Trained, task: FitTask, fits: Sequence[FitResult]) -> ModelCard:
    store = made.store
    return ModelCard(
        study=made.study.name,
        question=made.study.question,
        candidate=task.candidate,
        recipe=json_of(task.recipe),
        classes=store.classes,
        dim=made.study.preprocess.dim,
        channels=store.channels,
        size=store.size,
        preprocess=store.preprocess,
        epochs=task.recipe.optim.epochs,
        thresholds=_means([fit.thresholds for fit in fits]),
        objective=made.study.objective,
        validation_score=statistics.fmean(fit.score for fit in fits if fit.score is not None),
        test_score=_mean([fit.test_score for fit in fits]),
        num_subjects=len(task.split.train),
        store_fingerprint=store.fingerprint,
        study_source=made.sources,
        versions={"python": platform.python_version(), **{n: version(n) for n in ("softseg_dist", "torch", "monai")}},
        created=datetime.now(UTC).date().isoformat(),
    )


def _is_there(out: Path, card: ModelCard) -> bool:
    if not (out / CARD).exists():
        return False
    before = read_card(out)
    return all(getattr(before, name) == getattr(card, name) for name in SAME)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _means(thresholds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {rule: statistics.fmean(of_fit[rule] for of_fit in thresholds) for rule in thresholds[0]}
