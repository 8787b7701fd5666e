"""The ledger: the run folder's record of the study, its candidates and every fit that has ended.

    study.json  splits.json  store.json  code.json  sources/<digest>.py  holdout.json
    fits/<candidate>/  candidate.json  race.json  <split>.json  <split>-r<repeat>.json from repeat 1 on

It is the truth about a run: a new run reads it and starts only what is missing. Files appear whole or not at all, on any
filesystem that pyarrow knows (a path, or a URI such as s3://bucket/runs/study).
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

import softseg_dist
from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen, canonical_json, digest
from softseg_dist.locks import hold
from softseg_dist.places import Place, working_folder
from softseg_dist.record.changes import Json, holdout_change, study_changes
from softseg_dist.sealed import AGAIN, KEEPER, RESTORE, Damaged, key_of, read_json, sealed_json
from softseg_dist.sources import Sources
from softseg_dist.study import Study
from softseg_dist.training.task import FitResult, fit_name, is_fit_name
from softseg_dist.words import listed

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Frozen)


class CandidateRecord(Frozen):
    """A candidate as it was first emitted.

    `number` counts the candidates of its own kind, in the order of their first emission; it is Optuna's trial number for a
    proposed one. `recipe` is JSON, which is readable without the study file; with `tune_each` it has the learning rate that was
    chosen, and is recorded then. `params` and `distributions` (JSON of each) are Optuna's. A "tuning" candidate is a learning rate
    that is tried for a fixed one. `note` is a remark for readers of the results.
    """

    name: str
    origin: Literal["fixed", "proposed", "tuning"]
    number: int
    recipe: dict[str, Any]
    params: dict[str, Any] = {}
    distributions: dict[str, str] = {}
    note: str = ""


class RaceRecord(Frozen):
    """A candidate that gets no more splits, since it is significantly worse than the `incumbent`, which has run fully.

    `after` splits that both had, its mean paired `difference` to the incumbent was that, in the objective's own unit, with the
    one-sided `p`; the second objective's, if there is one, likewise. `values` are those that Optuna gets: the incumbent's
    means plus the differences.
    """

    candidate: str
    incumbent: str
    after: int
    difference: float
    p: float
    second_difference: float | None = None
    second_p: float | None = None
    values: tuple[float, ...] = ()


class Opening(Frozen):
    """One opening of the held-out subjects: when (ISO, UTC), for which winner and control, with which of their fits."""

    at: str
    winner: str
    control: str | None = None
    fits: tuple[str, ...] = ()


class HoldoutRecord(Frozen):
    """The subjects of no split, and every opening: more than one if the study was extended since."""

    subjects: tuple[str, ...]
    opened: tuple[Opening, ...] = ()


class Ledger:
    """Reads and writes one run folder. Reading needs no lock; `open_study` and a search hold it.

    `working` is the folder of this machine for what only the driver needs: the run folder itself, if it is on this machine.
    """

    def __init__(self, folder: str | Path) -> None:
        self.place = Place.at(folder)
        self.folder = self.place.uri
        self.working = working_folder(self.place)
        self._held = False
        self._key = ""

    @property
    def key(self) -> str:
        """What the seals of this run have in common; "" if nothing has been written yet."""
        self._key = self._key or key_of(self.place)
        return self._key

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other drivers out while the block runs; may be nested. Of an object store it keeps out those of this machine only.

        Raises UserError, naming process and host, if another driver holds it.
        """
        if self._held:
            yield
            return
        with hold(self.working / ".lock", self.folder):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def open_study(
        self,
        study: Study,
        splits: Sequence[Split],
        fingerprint: str | None = None,
        held_out: tuple[str, ...] = (),
        sources: Sources | None = None,
    ) -> tuple[str, ...]:
        """Record the study, or check it against the one recorded; returns what an extension adds, one line per change.

        `fingerprint` is that of the store, so that results from other images or preprocessing are never mixed. `held_out` are
        the subjects of no split. `sources` are kept by digest: no text that a result was made with is overwritten.
        Raises UserError with the differences if finished fits would no longer belong to the study, or if a version with other
        numerics made them; nothing is written then.
        """
        with self.lock():
            now, now_splits = json_of(study), [json_of(split) for split in splits]
            refused: list[str] = []
            extended: list[str] = []
            code = self.read(KEEPER) or {}
            if (before := self.read("study.json")) is not None:
                if (made := code.get("numerics")) != softseg_dist.NUMERICS:
                    other = f"another version of softseg_dist (numerics {made or 0}, this version has {softseg_dist.NUMERICS})"
                    to_do = "its results and new ones are not mixed, give the study a new name, or another --out"
                    raise UserError(f"{self.folder} was made by {other}: {to_do}")
                texts = (old, sources) if sources and (old := self.sources()) else None
                refused, extended = study_changes(before, now, self.read("splits.json") or [], now_splits, texts)
                known = self.holdout()
                if moved := holdout_change(known.subjects if known else (), held_out):
                    refused.append(moved)
            stored = (self.read("store.json") or {}).get("fingerprint")
            if stored is not None and fingerprint is not None and stored != fingerprint:
                refused.append(f"store (images and preprocessing): {stored} -> {fingerprint}")
            if refused:
                advice = "Finished fits are untouched: give the study a new name, or another --out"
                raise UserError(f"{self.folder}: holds another study: {listed(refused, separator='; ')}. {advice}")
            self._write_code(code, sources)
            self.write("splits.json", now_splits)
            if held_out and before is None:
                self.write_holdout(HoldoutRecord(subjects=held_out))
            if fingerprint is not None:
                self.write("store.json", {"fingerprint": fingerprint})
            self.write("study.json", now)
        return tuple(extended)

    def read(self, path: str) -> Any:
        """The value in a file of the run folder; None if there is no file. Raises Damaged if it is not as it was written."""
        return read_json(self.place, path, self.key, RESTORE)

    def write(self, path: str, value: object) -> None:
        """Replace a file of the run folder by a frozen object, or by JSON: an object or a list."""
        content = json_of(value) if isinstance(value, Frozen) else value
        (self.place / path).write(sealed_json(content, self.seal_of(path)))

    def seal_of(self, path: str) -> str:
        """What a file of the run folder is sealed with, which fits no other file and no other run."""
        if not self.key:
            self._write_code({}, None)
        return f"{self.key}/{path}"

    def fit_folder(self, candidate: str, split: Split, repeat: int = 0) -> str:
        """The folder that belongs to one fit alone: its checkpoint, history, weights and cases."""
        return str(self.place / "fits" / candidate / fit_name(split.index, repeat))

    def write_candidate(self, record: CandidateRecord) -> None:
        """Record a candidate before its first fit is emitted."""
        self.write(f"fits/{record.name}/candidate.json", record)

    def write_result(self, result: FitResult) -> None:
        """Record a fit that has ended, finished or failed: it never runs again."""
        self.write(f"fits/{result.key}.json", result)

    def write_race(self, record: RaceRecord) -> None:
        """Record that a candidate gets no more splits, for good."""
        self.write(f"fits/{record.candidate}/race.json", record)

    def forget(self, fit: str) -> None:
        """Let a fit run again, and the race of its candidate decide again; `fit` is its key."""
        for path in (f"fits/{fit}.json", f"fits/{fit.partition('/')[0]}/race.json"):
            (self.place / path).delete()

    def candidates(self) -> dict[str, CandidateRecord]:
        """All recorded candidates by name: the fixed ones first, each kind by number.

        Raises Damaged if a record cannot be read: which recipe its fits belong to would be a guess.
        """
        names = (self.place / "fits").names(folders=True)
        found = (
            self._record(CandidateRecord, f"fits/{name}/candidate.json", f"remove fits/{name} to run it again") for name in names
        )
        return {record.name: record for record in sorted(filter(None, found), key=lambda r: (r.origin, r.number))}

    def results(self, strict: bool = False) -> dict[str, FitResult]:
        """Every fit that has ended, by its key. A damaged file is named in a warning and left out; if `strict`, raises Damaged."""
        found = {}
        for name in self.candidates():
            stems = [file.removesuffix(".json") for file in (self.place / "fits" / name).names() if file.endswith(".json")]
            for key in (f"{name}/{stem}" for stem in stems if is_fit_name(stem)):
                if (result := self._record(FitResult, f"fits/{key}.json", AGAIN, key, strict)) is not None:
                    found[key] = result
        return found

    def write_holdout(self, record: HoldoutRecord) -> None:
        """Record the held-out subjects and their openings."""
        self.write("holdout.json", record)

    def holdout(self) -> HoldoutRecord | None:
        """The held-out subjects and their openings; None if there are none. Raises Damaged if the record cannot be read."""
        return self._record(HoldoutRecord, "holdout.json", "restore it")

    def races(self, strict: bool = False) -> dict[str, RaceRecord]:
        """The candidates that lost their race, by name. A damaged one is left out (the race decides again), unless `strict`."""
        found = {name: self._record(RaceRecord, f"fits/{name}/race.json", AGAIN, strict=strict) for name in self.candidates()}
        return {name: record for name, record in found.items() if record is not None}

    def splits(self) -> tuple[Split, ...]:
        """The splits that were recorded with the study; () if there is no study."""
        return tuple(Split.model_validate(split) for split in self.read("splits.json") or ())

    def sources(self) -> Sources | None:
        """The texts that the study was last run with; None if it was built of the package alone.

        Raises UserError if one of them is missing or was changed.
        """
        if not (recorded := (self.read(KEEPER) or {}).get("sources")):
            return None
        texts = {}
        for file, name in recorded[-1]["files"].items():
            text = (self.place / f"sources/{name}.py").read()
            if text is None or digest(text) != name:
                raise UserError(f"{self.folder}/sources/{name}.py: {file} as it was run is missing or changed; restore it")
            texts[file] = text.decode()
        return Sources(recorded[-1]["study"], texts)

    def _write_code(self, code: Json, sources: Sources | None) -> None:
        known = code.get("sources", [])
        if sources is not None and sources.texts:
            for text in sources.texts.values():
                if not (place := self.place / f"sources/{digest(text)}.py").is_file():
                    place.write(text.encode())
            now = {"study": sources.study, "files": {file: digest(text) for file, text in sources.texts.items()}}
            known = [*(one for one in known if one != now), now]
        self._key = code.get("key") or self._key or secrets.token_hex(8)
        content = {"key": self._key, "numerics": softseg_dist.NUMERICS, "sources": known}
        (self.place / KEEPER).write(sealed_json(content, KEEPER))

    def _record(self, kind: type[F], path: str, to_do: str, fit: str = "", strict: bool = True) -> F | None:
        """The record in a file; None if there is no file, or with a warning, unless `strict`, if it is not such a record."""
        key = self.key
        try:
            return None if (value := read_json(self.place, path, key)) is None else kind.model_validate(value)
        except (Damaged, ValidationError):
            damage = Damaged(self.place / path, to_do, fit)
        if strict:
            raise damage
        log.warning("%s", damage)
        return None


def json_of(value: Frozen) -> Json:
    """The JSON of a frozen object, as reading it back from a file would give it."""
    return json.loads(canonical_json(value.model_dump(mode="json")))
