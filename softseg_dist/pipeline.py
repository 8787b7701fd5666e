"""A study from beginning to end: prepare, split, search, collect, report. What the command line calls."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from softseg_dist.data.layouts import Case
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.errors import UserError
from softseg_dist.report.overlays import choose_overlays
from softseg_dist.report.page import write_report
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise
from softseg_dist.search.ledger import Ledger
from softseg_dist.search.live import Progress
from softseg_dist.search.run import run_search
from softseg_dist.search.searcher import sample_proposals
from softseg_dist.search.session import Outcome
from softseg_dist.search.tracking import Tracker, without_password
from softseg_dist.study import Study
from softseg_dist.study_file import StudyFile, load_source
from softseg_dist.training.files import replace_file
from softseg_dist.training.fit import fit
from softseg_dist.training.preflight import check_recipes
from softseg_dist.training.results import merge_tables
from softseg_dist.training.task import cases_path

PACKAGES = (
    "softseg_dist",
    "ray",
    "torch",
    "monai",
    "optuna",
    "mlflow",
    "nibabel",
    "pyarrow",
    "numpy",
    "scipy",
    "pydantic",
)


@dataclass(frozen=True)
class RunOptions:
    """Where and on how much machine; nothing here changes a result."""

    data_root: Path | None = None
    out: Path = Path("runs")
    stores: Path = Path("stores")
    max_concurrent: int | None = None
    gpus_per_fit: float | None = None
    tracking_uri: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Prepared:
    """The store of a study, and the site of each of its subjects."""

    path: Path
    store: Store
    sites: Mapping[str, str]


@dataclass(frozen=True)
class Finished:
    """What a run left behind. `report` is None if no fit has finished."""

    folder: Path
    outcome: Outcome
    report: Path | None
    tracking_uri: str


def prepare(study: Study, data_root: Path | None, stores: Path, progress: Progress) -> Prepared:
    """Build the study's store, or find it built. Raises UserError on data that cannot be used."""
    cases = _first_subjects(study.data.cases(data_root), study.subjects)

    def say(done: int, total: int, name: str) -> None:
        if done % max(1, total // 10) == 0:
            progress.note(f"prepared {done} of {total} cases, the last one {name}")

    path = build_store(stores, cases, study.data, study.preprocess, say)
    store = Store.open(path)
    return Prepared(path, store, {case.subject: case.site for case in store.cases})


def run_study(file: StudyFile, options: RunOptions, progress: Progress) -> Finished:
    """Run a study or go on with it. What a user can get wrong is found before the first fit starts.

    Raises UserError on bad input, a changed study, or a run folder in use; finished fits stay as they are.
    """
    study, folder = file.study, options.out / file.study.name
    prepared = prepare(study, options.data_root, options.stores, progress)
    splits = study.splits.make(prepared.sites, study.seed)
    check_recipes({**study.candidates, **sample_proposals(study)}, prepared.store, splits[0])
    _make(folder)
    ledger = Ledger(folder)
    with ledger.lock():
        for line in ledger.open_study(study, splits, prepared.store.fingerprint):
            progress.note(f"extended: {line}")
        _describe_run(folder, file, prepared, options)
        tracker = Tracker(options.tracking_uri, folder, study)
        tracker.data_set(type(study.data).__name__, prepared.store.digest, str(prepared.path))
        status, page = "FAILED", None
        try:
            outcome = _search(file, splits, prepared, ledger, tracker, options, progress)
            status = "KILLED" if outcome.interrupted else "FINISHED"
            if outcome.finished:
                page = _collect(folder)
                for path in sorted(page.parent.iterdir()):
                    tracker.artifact(path, "report")
        finally:
            for line in tracker.close(status):
                progress.note(line)
    return Finished(folder, outcome, page, tracker.uri)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}; give another --out") from error


def report_run(folder: Path) -> Path:
    """Write the report of a run folder, finished or not; returns its page."""
    for path in folder.glob("*.py"):  # the study file as it was run: its own classes may be needed to predict
        load_source(path.stem, path.read_text(encoding="utf-8"))
    run = load_run(folder)
    return write_report(folder, choose_overlays(run, summarise(run)))


def _search(
    file: StudyFile,
    splits: tuple[Split, ...],
    prepared: Prepared,
    ledger: Ledger,
    tracker: Tracker,
    options: RunOptions,
    progress: Progress,
) -> Outcome:
    changes = {"max_concurrent": options.max_concurrent, "gpus_per_fit": options.gpus_per_fit}
    resources = file.study.resources.replace(**{name: value for name, value in changes.items() if value is not None})
    return run_search(
        file.study,
        splits,
        prepared.path.absolute(),
        prepared.store.fingerprint,
        ledger,
        fit,
        resources,
        tracker,
        progress,
        study_source=(file.stem, file.text),
    )


def _collect(folder: Path) -> Path:
    """Merge the fits' rows into the results table and write the report."""
    ended = [
        (result.candidate, f"{result.split:03d}")
        for result in Ledger(folder).results().values()
        if result.state == "finished"
    ]
    merge_tables(
        [cases_path(folder / "fits" / candidate / split) for candidate, split in sorted(ended)],
        folder / "results.parquet",
    )
    return report_run(folder)


def _describe_run(folder: Path, file: StudyFile, prepared: Prepared, options: RunOptions) -> None:
    """What somebody needs to run this again, and what the report says about data, versions and machine."""
    store, sites = prepared.store, list(prepared.sites.values())
    sample = store.sample(0)
    record = {
        "command": options.command,
        "tracking_uri": without_password(options.tracking_uri),
        "study_fingerprint": file.study.fingerprint,
        "store": str(prepared.path.absolute()),
        "store_fingerprint": store.fingerprint,
        "store_digest": store.digest,
        "data": {
            "num_cases": len(store.cases),
            "num_subjects": len(sites),
            "classes": list(store.classes),
            "raters": sorted({name for case in store.cases for name in case.rater_names}),
            "sites": {site: sites.count(site) for site in sorted(set(sites))},
            "size": list(store.size),
            "spacing_mm": list(sample.spacing_mm),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "host": platform.node(),
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_file(folder / f"{file.stem}.py", lambda partial: partial.write_text(file.text, encoding="utf-8"))
    replace_file(folder / "run.json", lambda partial: partial.write_text(json.dumps(record, indent=1)))


def _first_subjects(cases: tuple[Case, ...], count: int | None) -> tuple[Case, ...]:
    kept = sorted({case.subject for case in cases})[:count]
    return tuple(case for case in cases if case.subject in kept)
