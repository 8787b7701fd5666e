"""What the fits of winner and control predict when the search is complete: held-out subjects, and tested subjects together.

Each of these fits predicts every held-out case with its own weights and thresholds: the differences are a table [held-out
subject x split], in which subjects and training runs are both random. They are opened again for the winner of an extended study.

Repeated splits, and repeats of one split, test a subject several times, by fits that have not seen it in training. Their mean, an
ensemble, is a fair prediction of it; their spread is what the choice of training subjects and seeds does. Nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import Outcome
from softseg_dist.frozen import grouped
from softseg_dist.judging.judge import Measurement, Yardstick
from softseg_dist.judging.results import Head, Row, merge_tables, write_rows
from softseg_dist.record.ledger import HoldoutRecord, Opening
from softseg_dist.sealed import is_intact
from softseg_dist.training.evaluation import Chosen, measure, spread_rows
from softseg_dist.training.inference import ensemble_maps
from softseg_dist.training.model import load_weights
from softseg_dist.training.task import FitResult, Worker, holdout_path

HOLDOUT = "holdout.parquet"  # all rows about held-out subjects, in the run folder
ENSEMBLE = "ensemble.parquet"  # beside it; rows as in the results table, with split -1
METHOD = "ensemble"  # what the names of its rows begin with
MEMBERS = f"{METHOD}_members"  # how many fits have predicted a case together


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
    names = _names(context, winner)
    fits = _fits(context, names)
    _record(context, record, winner, fits)
    copy.pull("fits/*/*/holdout.parquet")
    todo = [result for result in fits if not is_intact(holdout_path(context.fit_folder(result)), _seal_of(context, result))]
    if todo:
        note(f"opening {len(record.subjects)} held-out subjects for {' and '.join(names)}: {len(todo)} fits")
    for result in todo:
        _measure(context, result, record.subjects)
    tables = {holdout_path(context.fit_folder(result)): _seal_of(context, result) for _, result in sorted(results.items())}
    intact = [path for path, key in tables.items() if is_intact(path, key)]
    merge_tables(intact, copy.folder / HOLDOUT, context.ledger.seal_of(HOLDOUT))
    copy.push(HOLDOUT)
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
    rows = measure(model, task, context.prepared.store, "holdout", subjects, chosen, worker)
    write_rows(rows, rows_path, _seal_of(context, result))
    context.copy.push(f"fits/{result.key}/{rows_path.name}")


def _seal_of(context: RunContext, result: FitResult) -> str:
    return context.ledger.seal_of(f"fits/{result.key}/{holdout_path('').name}")


def measure_ensembles(context: RunContext, winner: str, outcome: Outcome) -> None:
    """Measure every case that two or more fits of the winner have tested, as predicted by them all, and so for the control.

    Writes `ensemble.parquet` when the search is complete, if the study asks for uncertainty. Costs nothing if the table holds these
    cases already, predicted by as many fits. Raises UserError if the weights of a finished fit are gone.
    """
    if not context.study.uncertainty or outcome.interrupted or outcome.unfinished:
        return
    names, copy, tested = _names(context, winner), context.copy, {split.index: split.test for split in context.splits}
    weighted = [(fit, context.weights_of(fit)) for fit in _fits(context, names)]
    members = grouped(((fit.candidate, subject), weights) for fit, weights in weighted for subject in tested[fit.split])
    tried = [(name, case.name, members[name, case.subject]) for name in names for case in context.prepared.store.cases]
    cases = {(name, case): weights for name, case, weights in tried if len(weights) > 1}
    if not cases:
        context.progress.note("no two fits test one subject, so no ensemble is measured; more MonteCarlo splits or repeats help")
        return
    copy.pull(ENSEMBLE)
    key = context.ledger.seal_of(ENSEMBLE)
    if _held(copy.folder / ENSEMBLE, key) == {key: len(weights) for key, weights in cases.items()}:
        return
    context.progress.note(f"measuring what the fits of {' and '.join(names)} predict together")
    write_rows([row for name in names for row in _rows(context, name, cases)], copy.folder / ENSEMBLE, key)
    copy.push(ENSEMBLE)


def _names(context: RunContext, winner: str) -> list[str]:
    return [name for name in dict.fromkeys((winner, context.study.control)) if name]


def _fits(context: RunContext, names: Sequence[str]) -> list[FitResult]:
    """The finished fits of these candidates, whose weights are on this machine then."""
    context.copy.pull(*(f"fits/{name}/*/best.safetensors" for name in names))
    results = sorted(context.ledger.results().items())
    return [result for _, result in results if result.candidate in names and result.state == "finished"]


def _rows(context: RunContext, candidate: str, cases: dict[tuple[str, str], list[Path]]) -> list[Row]:
    store, model, rows = context.prepared.store, context.model_of(candidate), []
    yardstick = Yardstick(store.classes, store.mean_volumes_mm3)
    for case in store.cases:
        if not (weights := cases.get((candidate, case.name))):
            continue
        sample = store.sample(case.index)
        measured = spread_rows(METHOD, ensemble_maps(model, weights, sample, context.device), sample, store, yardstick)
        measured += [Measurement(name, "mean", None, MEMBERS, float(len(weights))) for name in store.classes]
        rows += Head(context.study.name, candidate, -1, 0, "test", "own", sample.subject, sample.name).rows(measured)
    return rows


def _held(path: Path, key: str) -> dict[Any, float]:
    """How many fits have predicted each (candidate, case) of the table that is there."""
    if not is_intact(path, key):
        return {}
    counted = pd.read_parquet(path, columns=["candidate", "case", "value"], filters=[("metric", "==", MEMBERS)])
    return counted.set_index(["candidate", "case"])["value"].to_dict()
