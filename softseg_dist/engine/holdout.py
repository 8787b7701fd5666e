"""The held-out subjects of a study: opened once, when its search is complete, for the winner and the control and nobody else.

Each of their finished fits predicts every held-out case with its own weights and thresholds. So the differences are a table
[held-out subject x split], in which subjects and training runs are both random. A study that is extended afterwards may have
another winner: the subjects are opened for that one as well, and the record says that they were open before.

It runs in the driver and trains nothing: per fit of the two it costs what their evaluation on as many test cases did.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from softseg_dist.engine.final_model import Trained
from softseg_dist.engine.progress import Progress, key_of
from softseg_dist.engine.session import Outcome
from softseg_dist.errors import UserError
from softseg_dist.judging.results import merge_tables, write_rows
from softseg_dist.record.ledger import HoldoutRecord, Opening
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.study import Recipe, Resources
from softseg_dist.training.evaluation import measure
from softseg_dist.training.model import Model, load_weights
from softseg_dist.training.task import FitResult, FitTask, Worker, holdout_path, weights_path

TABLE = "holdout.parquet"  # all rows about held-out subjects, in the run folder


def open_holdout(
    made: Trained, copy: WorkingCopy, winner: str, outcome: Outcome, resources: Resources, progress: Progress
) -> None:
    """Measure winner and control on the held-out subjects, unless that was done before; nothing happens without any.

    Nothing is opened while a fit is missing. That the subjects are opened is recorded before the first prediction. Every fit
    leaves its rows in its folder, so an opening that was interrupted goes on; all of them are merged into `holdout.parquet`.

    Raises UserError if the weights of a finished fit are gone.
    """
    record, results = made.ledger.holdout(), made.ledger.results()
    if record is None or outcome.interrupted or outcome.unfinished:
        return
    if (given_up := outcome.finished + outcome.failed - len(results)) > 0:
        progress.note(f"the held-out subjects stay closed: {given_up} fits were given up, run again to try them again")
        return
    names = [name for name in dict.fromkeys((winner, made.study.control)) if name]
    fits = [result for (name, _), result in sorted(results.items()) if name in names and result.state == "finished"]
    _record(made, record, winner, fits, progress)
    copy.pull("fits/*/*/holdout.parquet", *(f"fits/{name}/*/best.safetensors" for name in names))
    todo = [result for result in fits if not holdout_path(_folder(made, result)).exists()]
    if todo:
        progress.note(f"opening {len(record.subjects)} held-out subjects for {' and '.join(names)}: {len(todo)} fits")
        started = time.monotonic()
        _measure(made, copy, todo, record.subjects, resources)
        progress.note(f"measured them in {time.monotonic() - started:.1f} s")
    merge_tables(sorted(made.folder.glob("fits/*/*/holdout.parquet")), made.folder / TABLE)
    copy.push(TABLE)
    copy.pull("holdout.json")


def _record(made: Trained, record: HoldoutRecord, winner: str, fits: Sequence[FitResult], progress: Progress) -> None:
    """Write down who looks now, unless it is who looked last."""
    opening = Opening(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        winner=winner,
        control=made.study.control,
        fits=tuple(map(key_of, fits)),
    )
    if record.opened:
        last = record.opened[-1]
        if last.replace(at=opening.at) == opening:
            return
        progress.note(
            f"the held-out subjects were open before, last at {last.at} for {last.winner}: its record says so"
        )
    made.ledger.write_holdout(record.replace(opened=(*record.opened, opening)))


def _measure(
    made: Trained, copy: WorkingCopy, fits: Sequence[FitResult], subjects: tuple[str, ...], resources: Resources
) -> None:
    device = "cuda" if torch.cuda.is_available() and resources.gpus_per_fit != 0 else "cpu"
    store, splits, records = made.store, made.ledger.splits(), made.ledger.candidates()
    for result in fits:
        folder = _folder(made, result)
        if not weights_path(folder).exists():
            raise UserError(
                f"{weights_path(folder)}: the weights of a finished fit are gone; remove its folder and {folder}.json, run again"
            )
        recipe = Recipe.model_validate(records[result.candidate].recipe)
        model = Model.of(recipe, store.channels, len(store.classes), store.dim).on(device)
        load_weights(model, weights_path(folder))
        task = FitTask(
            study=made.study.name,
            seed=made.study.seed,
            candidate=result.candidate,
            recipe=recipe,
            split=splits[result.split],
            objective=made.study.objective,
            store=made.store_where,
            store_fingerprint=store.fingerprint,
            folder=str(folder),
        )
        rows = measure(model, task, store, "holdout", subjects, result.thresholds, Worker(device=device))
        write_rows(rows, holdout_path(folder))
        copy.push(f"fits/{task.key}/{holdout_path(folder).name}")


def _folder(made: Trained, result: FitResult) -> Path:
    return made.folder / "fits" / key_of(result)
