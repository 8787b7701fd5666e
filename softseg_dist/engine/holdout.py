"""The held-out subjects of a study: opened once, when its search is complete, for the winner and the control alone.

Each of their finished fits predicts every held-out case with its own weights and thresholds. So the differences are a table
[held-out subject x split], in which subjects and training runs are both random. A study that is extended afterwards may have
another winner: the subjects are opened for that one as well, and the record says that they were open before.

It runs in the driver and trains nothing: per fit of the two it costs what their evaluation on as many test cases did.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import Outcome
from softseg_dist.judging.results import merge_tables, write_rows
from softseg_dist.record.ledger import HoldoutRecord, Opening
from softseg_dist.training.evaluation import Chosen, measure
from softseg_dist.training.model import load_weights
from softseg_dist.training.task import FitResult, Worker, holdout_path

TABLE = "holdout.parquet"  # all rows about held-out subjects, in the run folder


def open_holdout(context: RunContext, winner: str, outcome: Outcome) -> None:
    """Measure winner and control on the held-out subjects, unless that was done before; nothing happens without any.

    Nothing is opened while a fit is missing. That the subjects are opened is recorded before the first prediction. Every fit
    leaves its rows in its folder, so an interrupted opening continues; all of them are merged into `holdout.parquet`.
    Raises UserError if the weights of a finished fit are gone.
    """
    record, results = context.ledger.holdout(), context.ledger.results()
    if record is None or outcome.interrupted or outcome.unfinished:
        return
    note, copy = context.progress.note, context.copy
    if (given_up := outcome.finished + outcome.failed - len(results)) > 0:
        note(f"the held-out subjects stay closed: {given_up} fits were given up, run again to try them again")
        return
    names = [name for name in dict.fromkeys((winner, context.study.control)) if name]
    fits = [result for _, result in sorted(results.items()) if result.candidate in names and result.state == "finished"]
    _record(context, record, winner, fits)
    copy.pull("fits/*/*/holdout.parquet", *(f"fits/{name}/*/best.safetensors" for name in names))
    todo = [result for result in fits if not holdout_path(context.fit_folder(result)).exists()]
    if todo:
        note(f"opening {len(record.subjects)} held-out subjects for {' and '.join(names)}: {len(todo)} fits")
        started = time.monotonic()
        for result in todo:
            _measure(context, result, record.subjects)
        note(f"measured them in {time.monotonic() - started:.1f} s")
    merge_tables(sorted(copy.folder.glob("fits/*/*/holdout.parquet")), copy.folder / TABLE)
    copy.push(TABLE)
    copy.pull("holdout.json")


def _record(context: RunContext, record: HoldoutRecord, winner: str, fits: Sequence[FitResult]) -> None:
    """Record this opening, unless it is the same as the last one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    opening = Opening(at=now, winner=winner, control=context.study.control, fits=tuple(fit.key for fit in fits))
    if record.opened:
        last = record.opened[-1]
        if last.replace(at=opening.at) == opening:
            return
        context.progress.note(f"the held-out subjects were open before, last at {last.at} for {last.winner}: its record says so")
    context.ledger.write_holdout(record.replace(opened=(*record.opened, opening)))


def _measure(context: RunContext, result: FitResult, subjects: tuple[str, ...]) -> None:
    model, rows_path = context.model_of(result.candidate), holdout_path(context.fit_folder(result))
    load_weights(model, context.weights_of(result))
    split = next(split for split in context.splits if split.index == result.split)
    task = context.fit_task(result.candidate, context.recipe_of(result.candidate), split, result.repeat).replace(uncertainty=())
    worker = Worker(device=context.device)
    chosen = Chosen(result.thresholds, result.recalibration)
    write_rows(measure(model, task, context.prepared.store, "holdout", subjects, chosen, worker), rows_path)
    context.copy.push(f"fits/{result.key}/{rows_path.name}")
