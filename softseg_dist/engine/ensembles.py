"""What the fits of a candidate predict together: an ensemble over splits, from the weights that they left behind.

Repeated splits, and repeats of one split, test a subject several times. None of these fits has seen it in training. So their mean
is a fair prediction of it, and their spread is the uncertainty that the choice of training subjects, and of seeds, causes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import Outcome
from softseg_dist.judging import results
from softseg_dist.judging.rows import Measurement, Yardstick
from softseg_dist.training.evaluation import spread_rows
from softseg_dist.training.inference import ensemble_maps

TABLE = "ensemble.parquet"  # in the run folder; rows as in the results table, with split -1
METHOD = "ensemble"  # what the names of its rows begin with
MEMBERS = f"{METHOD}_members"  # how many fits have predicted a case together


def measure_ensembles(context: RunContext, winner: str, outcome: Outcome) -> None:
    """Measure every case that two or more fits of the winner have tested, as predicted by them all, and so for the control.

    Writes `ensemble.parquet` when the search is complete, if the study asks for uncertainty. Runs in the driver and trains
    nothing; costs nothing if the table holds these cases already, predicted by as many fits.
    Raises UserError if the weights of a finished fit are gone.
    """
    if not context.study.uncertainty or outcome.interrupted or outcome.unfinished:
        return
    names, copy = [name for name in dict.fromkeys((winner, context.study.control)) if name], context.copy
    copy.pull(TABLE, *(f"fits/{name}/*/best.safetensors" for name in names))
    cases = {
        (name, case.name): weights
        for name in names
        for of_subject in [_members(context, name)]
        for case in context.prepared.store.cases
        if len(weights := of_subject.get(case.subject, [])) > 1
    }
    if not cases:
        context.progress.note(
            "no subject is tested by two fits, so there is no ensemble to measure; MonteCarlo splits or repeats do that"
        )
        return
    if _held(copy.folder / TABLE) == {key: len(weights) for key, weights in cases.items()}:
        return
    context.progress.note(f"measuring what the fits of {' and '.join(names)} predict together")
    results.write_rows([row for name in names for row in _rows(context, name, cases)], copy.folder / TABLE)
    copy.push(TABLE)


def _members(context: RunContext, candidate: str) -> dict[str, list[Path]]:
    """The weights of all finished fits of a candidate by the subjects that they tested."""
    splits = {split.index: split for split in context.splits}
    members: dict[str, list[Path]] = {}
    for _, result in sorted(context.ledger.results().items()):
        if result.candidate == candidate and result.state == "finished":
            weights = context.weights_of(result)
            for subject in splits[result.split].test:
                members.setdefault(subject, []).append(weights)
    return members


def _rows(context: RunContext, candidate: str, cases: dict[tuple[str, str], list[Path]]) -> list[results.Row]:
    store, model = context.prepared.store, context.model_of(candidate)
    rows = []
    for case in store.cases:
        if not (weights := cases.get((candidate, case.name))):
            continue
        sample = store.sample(case.index)
        yardstick = Yardstick(store.classes, store.mean_volumes_mm3)
        measured = spread_rows(METHOD, ensemble_maps(model, weights, sample, context.device), sample, store, yardstick)
        measured += [Measurement(name, "mean", None, MEMBERS, float(len(weights))) for name in store.classes]
        rows += results.Head(context.study.name, candidate, -1, 0, "test", "own", sample.subject, sample.name).rows(measured)
    return rows


def _held(path: Path) -> dict[tuple[str, str], int]:
    """How many fits have predicted each (candidate, case) of the table that is there."""
    if not path.exists():
        return {}
    table = pd.read_parquet(path, columns=["candidate", "case", "metric", "value"])
    counted = table[table["metric"] == MEMBERS]
    keys = zip(counted["candidate"].astype(str), counted["case"].astype(str), strict=True)
    return dict(zip(keys, counted["value"].astype(int), strict=True))
