"""A run folder as it lies on disk: study, splits, recipes, finished fits, the results table and learning curves.

The study is read as plain JSON: its own losses may be defined in a study file that nobody has loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.search.ledger import HoldoutRecord
from softseg_dist.training.task import FitResult, cases_path, history_path

NAMES = ("candidate", "subset", "subject", "case", "class", "reference", "metric")  # columns of few different values


@dataclass(frozen=True)
class Candidate:
    """A candidate as recorded: its name, the JSON of its recipe, and whether a search proposed it."""

    name: str
    recipe: Mapping[str, Any]
    proposed: bool


@dataclass(frozen=True)
class RunData:
    """Everything that a report is made of. `run` is {} until the run has ended once; `results` has the rows of DESIGN.md.

    `holdout` has the rows about held-out subjects, None until they were opened; `holdout_record` says who they are and who has
    looked, None if nobody is held out.
    """

    folder: Path
    study: Mapping[str, Any]
    splits: tuple[Split, ...]
    run: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    fits: tuple[FitResult, ...]
    results: pd.DataFrame
    histories: Mapping[tuple[str, int], pd.DataFrame]
    holdout: pd.DataFrame | None = None
    holdout_record: HoldoutRecord | None = None

    @property
    def finished(self) -> tuple[FitResult, ...]:
        """The fits that have a score."""
        return tuple(fit for fit in self.fits if fit.state == "finished")


@dataclass(frozen=True)
class OuterData:
    """Outer splits of a nested study: `record` is outer.json as `nested.OuterRecord` writes it, `results` the outer test rows."""

    record: Mapping[str, Any]
    results: pd.DataFrame


def load_run(folder: Path) -> RunData:
    """Read a run folder, finished or not.

    Raises UserError if it is not a run folder, if a file in it cannot be read, or if no fit has finished yet.
    """
    study, splits = _json(folder / "study.json"), _json(folder / "splits.json")
    if not isinstance(study, dict) or not isinstance(splits, list):
        raise UserError(f"{folder}: not a run folder: it must hold study.json and splits.json; give runs/<study>")
    if study.get("nested"):
        raise UserError(
            f"{folder}: a nested study has a run for every outer split; give {folder}/outer/000 or another one"
        )
    fits = tuple(_fit(path) for path in sorted(folder.glob("fits/*/*.json")) if path.stem.isdecimal())
    finished = [fit for fit in fits if fit.state == "finished"]
    if not finished:
        failed = f"; {len(fits)} have failed, the first: {fits[0].reason}" if fits else ""
        raise UserError(f"{folder}: no fit has finished yet, so there is nothing to report{failed}")
    histories = {(fit.candidate, fit.split): _history(_fit_folder(folder, fit)) for fit in fits}
    return RunData(
        folder=folder,
        study=study,
        splits=tuple(Split.model_validate(split) for split in splits),
        run=_json(folder / "run.json") or {},
        candidates=_candidates(folder, study, fits),
        fits=fits,
        results=_results(folder, finished),
        histories={key: history for key, history in histories.items() if not history.empty},
        holdout=_table(folder / "holdout.parquet"),
        holdout_record=_holdout_record(folder / "holdout.json"),
    )


def load_outer(folder: Path) -> OuterData | None:
    """What a nested study has collected in its folder so far; None if there is nothing. Raises UserError on a torn file."""
    record, results = _json(folder / "outer.json"), _table(folder / "outer.parquet")
    return None if record is None or results is None else OuterData(record, results)


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: not JSON (torn?); restore it, or run the study again") from None


def _fit(path: Path) -> FitResult:
    try:
        return FitResult.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path}: not the record of a fit (torn?); remove it and run the study again") from None


def _holdout_record(path: Path) -> HoldoutRecord | None:
    record = _json(path)
    try:
        return None if record is None else HoldoutRecord.model_validate(record)
    except ValidationError:
        raise UserError(f"{path}: not the record of held-out subjects; restore it") from None


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_parquet(path).astype(dict.fromkeys(NAMES, "category")) if path.exists() else None


def _fit_folder(folder: Path, fit: FitResult) -> Path:
    return folder / "fits" / fit.candidate / f"{fit.split:03d}"


def _candidates(folder: Path, study: Mapping[str, Any], fits: tuple[FitResult, ...]) -> tuple[Candidate, ...]:
    """Those of the study file first, in its order, then what a search proposed, in the order asked."""
    fixed = dict(study.get("candidates") or {})
    records = {path.parent.name: _json(path) for path in sorted(folder.glob("fits/*/candidate.json"))}
    asked = sorted((r for n, r in records.items() if n not in fixed), key=lambda record: record.get("number", 0))
    proposed = {record["name"]: record.get("recipe") or {} for record in asked}
    unknown: dict[str, Any] = {
        fit.candidate: {} for fit in fits if fit.candidate not in fixed and fit.candidate not in proposed
    }
    return tuple(Candidate(name, recipe, name not in fixed) for name, recipe in (fixed | proposed | unknown).items())


def _results(folder: Path, finished: list[FitResult]) -> pd.DataFrame:
    """The collected table, and the fits' own rows where it does not hold them: a run collects when it ends."""
    path, parts = folder / "results.parquet", []
    if path.exists():
        parts.append(pd.read_parquet(path))
    held = set() if not parts else set(parts[0].groupby(["candidate", "split"], observed=True).groups)
    for fit in finished:
        if (fit.candidate, fit.split) not in held:
            part = cases_path(_fit_folder(folder, fit))
            if not part.exists():
                raise UserError(
                    f"{part}: the cases of a finished fit are missing; remove {part.parent}.json and run again"
                )
            parts.append(pd.read_parquet(part))
    table = pd.concat(parts, ignore_index=True)
    return table.astype(dict.fromkeys(NAMES, "category"))


def _history(folder: Path) -> pd.DataFrame:
    path = history_path(folder)
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return pd.DataFrame([json.loads(row) for row in rows])
