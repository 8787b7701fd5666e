"""A run folder as it lies on disk: study, splits, recipes, finished fits, the results table and learning curves.

The study is read as plain JSON: its own losses may be defined in a study file that is not loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.judging.results import SCHEMA
from softseg_dist.numerics.metrics import row_of
from softseg_dist.record.ledger import CandidateRecord, HoldoutRecord, Ledger, RaceRecord
from softseg_dist.sealed import checked
from softseg_dist.training.task import FitResult, cases_path, history_of, vouched

FEW_VALUES = dict.fromkeys(("candidate", "subset", "grid", "subject", "case", "class", "reference", "metric"), "category")


@dataclass(frozen=True)
class RecordedCandidate:
    """A candidate as recorded: its name, the JSON of its recipe, and whether a search proposed it.

    `recipe` is the one that was trained, `planned` the one of the study file, which may have been tuned since; {} for a
    proposed one. `raced` is None unless it was given up early; `note` is what a reader of its results should know.
    """

    name: str
    recipe: Mapping[str, Any]
    proposed: bool
    planned: Mapping[str, Any]
    raced: RaceRecord | None = None
    note: str = ""


@dataclass(frozen=True)
class Trial:
    """One trial of the tuning of a candidate, which is never ranked: its recipe, and its fits."""

    candidate: str
    recipe: Mapping[str, Any]
    fits: tuple[FitResult, ...]


@dataclass(frozen=True)
class RunData:
    """Everything that a report is made of. `run` is {} until the run has ended once; `results` has the rows of `judging.results`.

    `results` are the rows on test, on the grids of the files. Of the objective against the mean of the raters, `validation` has the
    rows on validation, and `prepared` those on test on the grid of training. All are of the candidates; tuning has its own `fits`.
    `ensemble` has what the fits of winner and control predict together, if that was measured. `holdout` has the rows about
    held-out subjects, None until they were opened; `holdout_record` names them and their openings, None if there are none.
    """

    folder: Path
    study: Mapping[str, Any]
    splits: tuple[Split, ...]
    run: Mapping[str, Any]
    candidates: tuple[RecordedCandidate, ...]
    fits: tuple[FitResult, ...]
    results: pd.DataFrame
    validation: pd.DataFrame
    prepared: pd.DataFrame
    histories: Mapping[tuple[str, str], pd.DataFrame]
    trials: tuple[Trial, ...] = ()
    ensemble: pd.DataFrame | None = None
    holdout: pd.DataFrame | None = None
    holdout_record: HoldoutRecord | None = None

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size of the prepared grid; () if the run did not record it."""
        return tuple((self.run.get("data") or {}).get("spacing_mm") or ())

    @property
    def cautions(self) -> list[tuple[str, str]]:
        """What the data do to the candidates, as (rule, sentence), which `engine.cautions` found when the run started."""
        return [(found["rule"], found["text"]) for found in self.run.get("cautions", ())]

    @property
    def of_models(self) -> bool:
        """Are these predictions that were judged without splits, and so without any that train?"""
        return not any(split.train for split in self.splits)

    @property
    def site_of(self) -> Mapping[str, str]:
        """The site of every subject, as far as the run recorded it."""
        return (self.run.get("data") or {}).get("site_of") or {}

    @property
    def num_fits(self) -> int:
        """Of a candidate that runs all splits: one for each repeat."""
        return len(self.splits) * int(self.study.get("repeats", 1))

    @property
    def num_planned(self) -> int:
        """Of all candidates; of one that was given up those that it has."""
        ended = Counter(fit.candidate for fit in self.fits)
        return sum(ended[candidate.name] if candidate.raced else self.num_fits for candidate in self.candidates)

    @property
    def subjects(self) -> set[str]:
        """All subjects of the splits."""
        return {subject for split in self.splits for subject in (*split.train, *split.validation, *split.test)}

    @property
    def tested(self) -> set[str]:
        """All subjects of the test sets."""
        return {subject for split in self.splits for subject in split.test}

    @property
    def finished(self) -> tuple[FitResult, ...]:
        """The fits that have a score."""
        return tuple(fit for fit in self.fits if fit.state == "finished")


@dataclass(frozen=True)
class OuterData:
    """Outer splits of a nested study: `record` is outer.json as `nested` writes it, `results` the outer test rows."""

    question: str
    record: Mapping[str, Any]
    results: pd.DataFrame


def load_run(folder: Path) -> RunData:
    """Read a run folder, finished or not. Raises UserError if it is none, a file cannot be read, or no fit has finished yet."""
    ledger = Ledger(folder)
    study, splits = ledger.read("study.json"), ledger.read("splits.json")
    if not isinstance(study, dict) or not isinstance(splits, list):
        raise UserError(f"{folder}: not a run folder: it must hold study.json and splits.json; give runs/<study>")
    if study.get("nested"):
        raise UserError(f"{folder}: a nested study has a run for every outer split; give {folder}/outer/000 or another one")
    records = ledger.candidates()
    tuning = {name: record for name, record in records.items() if record.origin == "tuning"}
    ended, races = tuple(ledger.results(strict=True).values()), ledger.races(strict=True)
    fits = tuple(fit for fit in ended if fit.candidate not in tuning)
    finished = [fit for fit in fits if fit.state == "finished"]
    if not finished:
        failed = f"; {len(fits)} have failed, the first: {fits[0].reason}" if fits else ""
        raise UserError(f"{folder}: no fit has finished yet, so there is nothing to report{failed}")
    results, validation, prepared = _results(ledger, row_of(study["objective"]).name, finished, tuning)
    histories = {(fit.candidate, fit.key): pd.DataFrame(history_of(folder / "fits" / fit.key, fit)) for fit in fits}
    return RunData(
        folder=folder,
        study=study,
        splits=tuple(Split.model_validate(split) for split in splits),
        run=ledger.read("run.json") or {},
        candidates=_candidates(study, {n: r for n, r in records.items() if n not in tuning}, races, fits),
        fits=fits,
        results=results,
        validation=validation,
        prepared=prepared,
        histories={key: history for key, history in histories.items() if not history.empty},
        trials=tuple(
            Trial(name.rpartition("~")[0], record.recipe, tuple(fit for fit in ended if fit.candidate == name))
            for name, record in tuning.items()
        ),
        ensemble=_table(ledger, "ensemble.parquet"),
        holdout=_table(ledger, "holdout.parquet"),
        holdout_record=ledger.holdout(),
    )


def load_outer(folder: Path) -> OuterData | None:
    """What a nested study has collected in its folder so far; None if there is nothing. Raises UserError on a torn file."""
    ledger = Ledger(folder)
    record, results = ledger.read("outer.json"), _table(ledger, "outer.parquet")
    if record is None or results is None:
        return None
    return OuterData(ledger.read("study.json")["question"], record, results)


def _candidates(
    study: Mapping[str, Any], records: Mapping[str, CandidateRecord], races: Mapping[str, RaceRecord], fits: Iterable[FitResult]
) -> tuple[RecordedCandidate, ...]:
    """Those of the study file first, in its order, then what a search proposed, in the order asked."""
    fixed: dict[str, Any] = study.get("candidates") or {}
    found = []
    for name in dict.fromkeys([*fixed, *records, *(fit.candidate for fit in fits)]):
        planned, record = fixed.get(name) or {}, records.get(name)
        recipe, note = (record.recipe or planned, record.note) if record else (planned, "")
        found.append(RecordedCandidate(name, recipe, name not in fixed, planned, races.get(name), note))
    return tuple(found)


def _table(ledger: Ledger, name: str) -> pd.DataFrame | None:
    path = ledger.working / name
    return _rows(checked(path, ledger.seal_of(name))) if path.exists() else None


def _results(ledger: Ledger, objective: str, finished: list[FitResult], left_out: Iterable[str]) -> Iterator[pd.DataFrame]:
    """The rows on test, on validation, and on test on the prepared grid: those that a run collected at its end, and later ones."""
    name, fits = "results.parquet", ledger.working / "fits"
    path = ledger.working / name
    parts = [_shown(checked(path, ledger.seal_of(name)), objective)] if path.exists() else []
    held = {key for part in parts for key in part.groupby(["candidate", "split", "repeat"], observed=True).groups}
    left = [fit for fit in finished if (fit.candidate, *fit.slot) not in held]
    parts += [_shown(vouched(fit, cases_path(fits / fit.key)), objective) for fit in left]
    table = pd.concat(parts, ignore_index=True).astype(FEW_VALUES)
    table = table[~table["candidate"].isin(tuple(left_out))]
    wanted = ("test", "own"), ("validation", "own"), ("test", "prepared")
    return (table[(table["subset"] == subset) & (table["grid"] == grid)] for subset, grid in wanted)


def _shown(path: Path, metric: str) -> pd.DataFrame:
    """The rows on the grids of the files about test subjects, and those of the objective on validation and on the prepared grid."""
    own, objective = ("grid", "==", "own"), [("metric", "==", metric), ("reference", "==", "mean")]
    chosen_by, prepared = [("subset", "==", "validation"), own], [("subset", "==", "test"), ("grid", "==", "prepared")]
    return _rows(path, [[("subset", "==", "test"), own], chosen_by + objective, prepared + objective])


def _rows(path: Path, filters: list[list[tuple[str, str, str]]] | None = None) -> pd.DataFrame:
    columns = pq.read_schema(path).names
    if lacks := [name for name in SCHEMA.names if name not in columns]:
        to_do = "report it with that version, or run the study again under a new name"
        raise UserError(f"{path} was made by an older version of softseg_dist (no column {', '.join(lacks)}): {to_do}")
    return pd.read_parquet(path, filters=filters).astype(FEW_VALUES)


RECORDED = {  # fields of run.json
    "study_file": "study file",
    "study_fingerprint": "fingerprint of the study",
    "store_fingerprint": "fingerprint of the data (images, masks and preprocessing)",
    "store_digest": "digest of the prepared numbers",
    "started": "last started (UTC)",
}
SAID = ("predictions", "data", "preprocess", "splits", "repeats", "objective", "search", "seed")  # fields of study.json


def origin_of(run: RunData) -> list[tuple[str, str]]:
    """What was run on what, as (what, value); what a run did not record is left out."""
    found = [(words, str(run.run[field])) for field, words in RECORDED.items() if run.run.get(field)]
    return found + [(field, _written(run.study[field])) for field in SAID if run.study.get(field) is not None]


def _written(value: Any) -> str:
    """`MonteCarlo(count=6, test=0.2)`: the JSON of an object as it was written."""
    if isinstance(value, Mapping):
        fields = {k: v for k, v in value.items() if k not in ("type", "code") and v is not None}
        inner = ", ".join(f"{k}={_written(v)}" for k, v in fields.items())
        return f"{value['type']}({inner})" if "type" in value else f"{{{inner}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_written, value))})"
    return str(value)
