"""Nested cross-validation: for every outer split a study of its own, that holds out the outer test subjects.

    runs/<study>/outer/000/  a run like any other, and so on      runs/<study>/outer.json  outer.parquet  what they amount to

Whatever an inner study chooses, its winner is measured on subjects that had no part in the choice. So the outer table says what the
whole procedure is worth, search included; each outer split may have another winner. It costs the fits of as many studies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import pandas as pd

from softseg_dist.engine.context import prepare
from softseg_dist.engine.finalists import HOLDOUT
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import Outcome
from softseg_dist.judging.results import write_frame
from softseg_dist.pipeline import Finished, RunOptions, backend_of, check_tracking, run_prepared
from softseg_dist.places import Place, make_folder
from softseg_dist.record.ledger import Ledger, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.report.scores import mean_of, soft_scores
from softseg_dist.sealed import checked
from softseg_dist.study import WINNER, Study
from softseg_dist.study_file import StudyFile
from softseg_dist.words import number

TABLE = "outer.parquet"
KEYS = ["subject", "case", "class", "reference", "threshold", "metric"]  # what a row is about


@dataclass(frozen=True)
class Nested:
    """The outcome of a nested run: one `Finished` for every outer split that it reached; the complete ones as in `outer.json`."""

    folder: str
    runs: tuple[Finished, ...]
    record: dict[str, Any]
    interrupted: bool

    @property
    def outcome(self) -> Outcome:
        """Fits of all outer splits that the run reached."""
        kinds = ("finished", "failed", "unfinished")
        sums = {kind: sum(getattr(run.outcome, kind) for run in self.runs) for kind in kinds}
        return Outcome(**sums, interrupted=self.interrupted)


def run_nested(file: StudyFile, options: RunOptions, progress: Callable[[], Progress]) -> Nested:
    """Run or continue a nested study: its outer splits one after the other, each as `run_study` would, but without a model.

    `progress` makes a display for each. Raises UserError as `run_study` does, for any inner study before the first fit.
    """
    check_tracking(options)
    backend, study, run = backend_of(options), file.study, Place.at(options.out) / file.study.name
    prepared = prepare(study, options.data_root, options.stores, progress().note)
    study = prepared.resolved(study)
    assert study.nested is not None
    splits = study.nested.of_cases(prepared.sites, prepared.persons, study.seed)
    inner = [study.inner(split) for split in splits]
    for one in inner:
        one.make_splits(prepared.sites, prepared.persons)
    ledger, copy = Ledger(run.uri), WorkingCopy(run.uri)
    make_folder(copy.folder)
    outer: list[dict[str, Any]] = []
    record = {"study": study.name, "objective": json_of(study)["objective"], "control": study.control}
    record |= {"planned": len(splits), "outer": outer}
    runs: list[Finished] = []
    tables: list[pd.DataFrame] = []
    interrupted = False
    with ledger.lock(), backend.held():
        for line in ledger.open_study(study, splits, prepared.store.fingerprint, sources=file.sources):
            progress().note(f"extended: {line}")
        try:
            for split, one in zip(splits, inner, strict=True):
                shown, name = progress(), f"outer/{split.name}"
                shown.note(f"outer split {split.name}, {split.index + 1} of {len(splits)}")
                options = replace(options, final_model=False)
                runs.append(run_prepared(replace(file, study=one), prepared, run / name, options, shown))
                if runs[-1].outcome.interrupted:
                    break
                if (found := _outer_winner(one, split.index, name, run)) is not None:
                    outer.append(found[0])
                    tables.append(found[1].assign(study=study.name))
                    write_frame(pd.concat(tables, ignore_index=True), copy.folder / TABLE, ledger.seal_of(TABLE))
                    copy.push(TABLE)
                    ledger.write("outer.json", record)
                    shown.note(_line(found[0], study.control))
        except KeyboardInterrupt:  # between two searches
            interrupted = True
    return Nested(run.uri, tuple(runs), record, interrupted or any(run.outcome.interrupted for run in runs))


def _outer_winner(study: Study, split: int, name: str, run: Place) -> tuple[dict[str, Any], pd.DataFrame] | None:
    """The record of an inner run, and its rows of the outer table; None if its held-out subjects were not opened yet.

    `validation_score` is the mean over the inner splits; the other two are means over outer test subjects and inner splits, of the
    study's objective. None: undefined everywhere, or no control.
    """
    ledger = Ledger((run / name).uri)
    holdout = ledger.holdout()
    if holdout is None or not holdout.opened:
        return None
    winner, control = holdout.opened[-1].winner, study.control
    rows = pd.read_parquet(checked(WorkingCopy((run / name).uri).folder / HOLDOUT, ledger.seal_of(HOLDOUT)))
    scores = soft_scores(rows, study.objectives[0].row.name)

    def known(candidate: str) -> float | None:
        return None if math.isnan(mean := mean_of(scores.of(candidate))) else mean

    on_validation = [r.score for r in ledger.results().values() if r.candidate == winner and r.score is not None]
    found = {
        "split": split,
        "run": name,
        "winner": winner,
        "recipe": ledger.candidates()[winner].recipe,
        "validation_score": fmean(on_validation),
        "holdout_score": known(winner),
        "control_holdout_score": None if control is None else known(control),
    }
    shown = {WINNER: winner} | ({} if control is None else {control: control})
    of_each = [_over_fits(rows[rows["candidate"] == name], label, split) for label, name in shown.items()]
    return found, pd.concat(of_each)


def _line(found: dict[str, Any], control: str | None) -> str:
    names = {"validation": "validation_score", "outer test": "holdout_score"}
    names |= {control: "control_holdout_score"} if control not in (None, found["winner"]) else {}
    scores = ", ".join(f"{what} {number(found[score], 4)}" for what, score in names.items())
    return f"Outer split {found['split']:03d}: {found['winner']} won, {scores}"


def _over_fits(rows: pd.DataFrame, label: str, split: int) -> pd.DataFrame:
    """One row, the mean without NaN, for each value that all fits of a candidate measured. A threshold of one fit is dropped."""
    grouped = rows.groupby(KEYS, observed=True, dropna=False)["value"].agg(["mean", "size"])
    of_all = grouped[grouped["size"] == len(rows[["split", "repeat"]].drop_duplicates())]
    means = of_all["mean"].rename("value").reset_index()
    return means.assign(candidate=label, split=split, repeat=0, subset="test", grid="own")
