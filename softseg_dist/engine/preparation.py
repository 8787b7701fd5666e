"""A study's data, prepared: all that `softseg prepare` does. Imports no Ray and no MLflow, so the command starts quickly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from softseg_dist.data.cases import Case
from softseg_dist.data.processes import over_processes
from softseg_dist.data.store import Store
from softseg_dist.data.store_cache import local_store, shared_store
from softseg_dist.study import Study


@dataclass(frozen=True)
class Prepared:
    """The store of a study, the path or URI by which workers find it, and the site of each of its subjects."""

    where: str
    store: Store
    sites: Mapping[str, str]


def prepare(study: Study, data_root: Path | None, stores: str | Path, note: Callable[[str], None]) -> Prepared:
    """Build the study's store, or find it built; `note` is told how far it is. Raises UserError on data that cannot be used."""
    cases = _first_subjects(study.data.cases(data_root), study.subjects)

    def say(done: int, total: int, name: str) -> None:
        if done % max(1, total // 10) == 0:
            note(f"prepared {done} of {total} cases, the last one {name}")

    where = shared_store(stores, cases, study.data, study.preprocess, say, over_processes)
    store = Store.open(local_store(where))
    return Prepared(where, store, {case.subject: case.site for case in store.cases})


def _first_subjects(cases: tuple[Case, ...], count: int | None) -> tuple[Case, ...]:
    kept = sorted({case.subject for case in cases})[:count]
    return tuple(case for case in cases if case.subject in kept)
