"""The model that a study leaves behind: a candidate trained on all subjects, as a folder that `softseg predict` takes.

Held-out subjects are left out: the report measures them with fits that have not seen them, and neither has the model.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from softseg_dist.data.splits import Split
from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import run_beside
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.record.ledger import json_of
from softseg_dist.study import Recipe
from softseg_dist.training.saved_model import CARD, ModelCard, checked_weights, read_card, save_model
from softseg_dist.training.task import FitResult, FitTask, vouched, weights_path

REFIT = "refit"  # its folder among the fits of a candidate
SAME = ("study", "candidate", "recipe", "preprocess", "epochs", "num_subjects", "store_fingerprint")


def make_model(context: RunContext, candidate: str, out: Path) -> Path:
    """Train a candidate on all subjects of the study that are not held out and save it in `out`; at once if that was done before.

    It trains for the median of the best epochs of its fits; the learning rate falls to 0 by then, and the last weights count, as
    there is no validation subject. Thresholds are the means of those that its splits chose.
    Raises UserError if the study has no such candidate, none of its fits has finished, or the training is lost repeatedly.
    """
    ledger = context.ledger
    fits = [r for r in ledger.results().values() if r.candidate == candidate and r.state == "finished"]
    records = ledger.candidates()
    if candidate not in records:
        raise UserError(f"{ledger.folder}: has no candidate {candidate!r}; there are {', '.join(records) or 'none'}")
    if not fits:
        raise UserError(f"{ledger.folder}: no fit of {candidate} has finished, so there is nothing to train it by")
    recipe = Recipe.model_validate(records[candidate].recipe)
    epochs = max(1, round(statistics.median(fit.best_epoch or 1 for fit in fits)))
    task = _task(context, candidate, recipe.replace(optim=recipe.optim.replace(epochs=epochs, patience=None)))
    card = _card(context, task, fits)
    if (out / CARD).exists():
        try:
            before = read_card(out)
            checked_weights(out, before)
            if all(getattr(before, name) == getattr(card, name) for name in SAME):
                return out
        except UserError as error:
            context.progress.note(f"{error}; it is made again now")
    context.progress.note(f"training {candidate} on all {card.num_subjects} subjects for {epochs} epochs")
    result = run_beside(context, task)
    if result.state != "finished":
        raise UserError(f"{task.candidate} trained on all subjects has failed: {result.reason}")
    weights = weights_path(context.copy.folder / "fits" / candidate / REFIT)
    weights.parent.mkdir(parents=True, exist_ok=True)
    if (place := Place.at(task.folder)).path is None:
        (place / weights.name).pull(weights)
    save_model(out, card, vouched(result, weights))
    return out


def _task(context: RunContext, candidate: str, recipe: Recipe) -> FitTask:
    """A fit without validation and test subjects, and so without what is measured on them; it has no time limit."""
    holdout = context.ledger.holdout()
    subjects = set(context.prepared.sites) - set(holdout.subjects if holdout else ())
    split = Split(index=len(context.splits), train=tuple(sorted(subjects)))
    task = context.fit_task(candidate, recipe, split)
    folder = f"{context.ledger.folder}/fits/{candidate}/{REFIT}"
    return task.replace(folder=folder, second_objective=None, uncertainty=(), time_limit_s=None)


def _card(context: RunContext, task: FitTask, fits: Sequence[FitResult]) -> ModelCard:
    study, store = context.study, context.prepared.store
    test_scores = [fit.test_score for fit in fits if fit.test_score is not None]
    return ModelCard(
        study=study.name,
        question=study.question,
        candidate=task.candidate,
        recipe=json_of(task.recipe),
        classes=store.classes,
        dim=study.preprocess.dim,
        channels=store.channels,
        channel_names=study.data.channel_names,
        size=store.size,
        preprocess=store.preprocess,
        spacings_mm=store.spacings_mm,
        epochs=task.recipe.optim.epochs,
        thresholds={rule: statistics.fmean(fit.thresholds[rule] for fit in fits) for rule in fits[0].thresholds},
        objective=study.objectives[0].row.name,
        validation_score=statistics.fmean(fit.score for fit in fits if fit.score is not None),
        test_score=statistics.fmean(test_scores) if test_scores else None,
        num_subjects=len(task.split.train),
        store_fingerprint=store.fingerprint,
        study_source=context.sources,
        versions={"python": platform.python_version(), **{n: version(n) for n in ("softseg_dist", "torch", "monai")}},
        created=datetime.now(UTC).date().isoformat(),
    )
