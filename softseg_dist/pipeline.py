"""A study from beginning to end: prepare, split, search, collect, report. What the command line calls."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from subprocess import Popen
from typing import Any

from pydantic import ValidationError

from softseg_dist.data.check import Problem
from softseg_dist.engine.cautions import inspect_store
from softseg_dist.engine.context import Backend, Prepared, RunContext, check_ray, prepare
from softseg_dist.engine.final_model import make_model
from softseg_dist.engine.finalists import ENSEMBLE, HOLDOUT, measure_ensembles, open_holdout
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import Outcome, run_search
from softseg_dist.errors import UserError
from softseg_dist.interrupts import interruptible
from softseg_dist.judging.results import merge_tables
from softseg_dist.places import Address, Place, make_folder, redacted, sweep_partials, without_credentials
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import SPOOL
from softseg_dist.report.comparison import RunComparison, compare
from softseg_dist.report.export import csv_tables, latex
from softseg_dist.report.page import outer_json, summary_json, write_outer_page, write_page
from softseg_dist.report.pictures import choose_overlays
from softseg_dist.report.run_folder import RunData, load_outer, load_run
from softseg_dist.report.tables import summarise
from softseg_dist.sealed import KEEPER, Damaged
from softseg_dist.search.candidate import is_tuning
from softseg_dist.search.optuna_study import OPTUNA_LOG, sample_proposals
from softseg_dist.study import Resources, Study
from softseg_dist.study_file import StudyFile, describe, load_sources
from softseg_dist.tracking.delivery import ENVIRONMENT_URI, check_server, server_address
from softseg_dist.tracking.tracker import Tracker, default_uri, run_id_of
from softseg_dist.training.preflight import preflight, start_child
from softseg_dist.training.task import cases_path, vouched

PACKAGES = ("softseg_dist", "ray", "torch", "monai", "optuna", "mlflow", "nibabel", "pyarrow", "numpy", "scipy", "pydantic")

RECORDS = (KEEPER, "study.json", "splits.json", "run.json", "holdout.json", "outer.json")
TABLES = ("results.parquet", ENSEMBLE, "outer.parquet", HOLDOUT)
REPORTED = (*RECORDS, *TABLES, "fits/*/*.json", "fits/*/*/history.jsonl", "fits/*/*/cases.parquet")  # what a report is made of
MODEL = "model"  # the folder of the winner, trained on all subjects


@dataclass(frozen=True)
class RunOptions:
    """Where and on how much machine; nothing here changes a result. `out` and `stores` are paths, or URIs of shared places.

    Logins in addresses are kept from what is stored and shown: see `places`. `tracking_uri` None is MLFLOW_TRACKING_URI, if set.

    `final_model`: train the winner on all subjects when the study is complete. `local`: in this process, without Ray, one fit at a
    time. `debug`: as `local`, unless an option asks for Ray; the study's code is loaded as in a worker, and tracebacks are shown.
    """

    data_root: Path | None = None
    out: str | Path = "runs"
    stores: str | Path = "stores"
    max_concurrent: int | None = None
    workers_per_fit: int | None = None
    gpus_per_fit: float | None = None
    fits_per_gpu: int | None = None
    tracking_uri: str | Address | None = None
    command: str = ""
    final_model: bool = True
    address: str | None = None
    max_wait_s: float | None = None
    local: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        places = {name: str(getattr(self, name)) for name in ("out", "stores")}
        if self.address and any(Address.of(place).secrets for place in places.values()):
            do = "give them to its machines: a role, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in their environment"
            raise UserError(f"--address: credentials in --out or --stores do not reach a cluster that runs already; {do}")
        clean: dict[str, object] = {name: without_credentials(place) for name, place in places.items()}
        if isinstance(self.tracking_uri, str):
            clean["tracking_uri"] = Address.of(self.tracking_uri)
        for name, value in (clean | {"command": redacted(self.command)}).items():
            object.__setattr__(self, name, value)

    @property
    def in_process(self) -> bool:
        """Do the fits run in this process, without Ray?"""
        asks_for_ray = self.address is not None or self.fits_per_gpu is not None or (self.workers_per_fit or 1) > 1
        return self.local or (self.debug and not asks_for_ray)


@dataclass(frozen=True)
class Finished:
    """The outcome of a run. `folder` may be a URI.

    `report` is on this machine, or None if no fit has finished; `model` too, or None while fits are left to run.
    """

    folder: str
    outcome: Outcome
    report: Path | None
    model: Path | None
    tracking_uri: str


def run_study(file: StudyFile, options: RunOptions, progress: Progress) -> Finished:
    """Run or continue a study. Mistakes of the user are found before the first fit starts.

    Raises UserError on bad input, a changed study, or a run folder in use; finished fits stay as they are.
    """
    backend_of(options)  # its refusals come before the data are read
    check_tracking(options)
    with start_child() as child:  # it imports while the data are prepared
        try:
            prepared = prepare(file.study, options.data_root, options.stores, progress.note)
        except BaseException:
            child.kill()
            raise
        return run_prepared(file, prepared, Place.at(options.out) / file.study.name, options, progress, child)


def run_prepared(
    file: StudyFile, prepared: Prepared, run: Place, options: RunOptions, progress: Progress, child: Popen[bytes] | None = None
) -> Finished:
    """Run a study whose data are prepared in the folder `run`; otherwise as `run_study`. `child` is that of `preflight`."""
    if options.debug and options.in_process:
        file = file.as_sent()
    file = replace(file, study=prepared.resolved(file.study))
    study, splits = file.study, file.study.make_splits(prepared.sites, prepared.persons)
    resources = resources_of(study, options)
    recipes = {**study.candidates, **sample_proposals(study)}
    cautions = inspect_store(study, prepared.store, splits)
    preflight(recipes, study.uncertainty, prepared.store, splits[0], file.sources, child)
    for caution in cautions:
        progress.note(f"warning: {caution.detail}")
    if options.tracking_uri is None and (server := server_address(None)):
        progress.note(f"MLflow: {server.shown}, of the environment's {ENVIRONMENT_URI}")
    ledger, copy = Ledger(run.uri), WorkingCopy(run.uri)
    make_folder(copy.folder)
    with ledger.lock():
        sweep_partials(copy.folder)
        held_out = study.held_out(prepared.sites)
        for line in ledger.open_study(study, splits, prepared.store.fingerprint, held_out, file.sources):
            progress.note(f"extended: {line}")
        file.sources.record_as_run()
        copy.pull("mlflow_run", "mlflow.db", SPOOL)
        run_id_of(copy.folder)
        ledger.write("run.json", _described(run, file, prepared, options, cautions))
        copy.push("mlflow_run")
        tracker = Tracker(options.tracking_uri, copy.folder, study, run.uri)
        tracker.data_set(type(study.data).__name__, prepared.store.digest, prepared.uri)
        backend = backend_of(options)
        context = RunContext(study, splits, prepared, ledger, copy, resources, backend, progress, tracker, file.sources)
        return _run(context, tracker, options.final_model)


def _run(context: RunContext, tracker: Tracker, final_model: bool) -> Finished:
    """Search, and when the search is complete, all that follows from it."""
    copy, again = context.copy, set[str]()
    status, page, model, outcome = "FAILED", None, None, Outcome(0, 0, 0, interrupted=True)
    try:
        with context.backend.held():
            while True:
                outcome = run_search(context)
                status = "KILLED" if outcome.interrupted else "FINISHED"
                try:
                    if _collect(copy):
                        winner = summarise(load_run(copy.folder)).winner.name
                        page = _conclude(context, tracker, winner, outcome)
                        if final_model and not (outcome.interrupted or outcome.unfinished):
                            model = make_model(context, winner, copy.folder / MODEL)
                            copy.push(MODEL)
                            tracker.model(model)
                    break
                except Damaged as damage:
                    context.progress.note(str(damage))
                    if outcome.interrupted:  # the next run makes it again
                        break
                    if not damage.fit or damage.fit in again:
                        raise
                    again.add(damage.fit)
                    context.ledger.forget(damage.fit)
                    if copy.place.path is None:  # it may only be this machine's copy that is damaged
                        shutil.rmtree(copy.folder / "fits" / damage.fit, ignore_errors=True)
    except KeyboardInterrupt:  # before or after the search: the next run goes on there
        status, outcome = "KILLED", replace(outcome, interrupted=True)
    finally:
        sweep_partials(copy.folder)  # of processes that were killed meanwhile
        for line in tracker.close(status):
            context.progress.note(line)
        copy.push(SPOOL, OPTUNA_LOG, *(["mlflow.db"] if tracker.uri == default_uri(copy.folder) else []))
    return Finished(context.ledger.folder, outcome, page, model, tracker.uri)


def check_tracking(options: RunOptions) -> None:
    """Raise UserError if the MLflow server of the options cannot be one. One that is down is waited for."""
    check_server(server_address(options.tracking_uri))


def _conclude(context: RunContext, tracker: Tracker, winner: str, outcome: Outcome) -> Path:
    """Held-out subjects, ensembles and report, whose page is returned. Raises Damaged if what a fit has left is damaged."""
    open_holdout(context, winner, outcome)
    measure_ensembles(context, winner, outcome)
    page = _page(context.copy)
    for path in sorted(page.parent.iterdir()):
        tracker.artifact(path, "report")
    return page


def backend_of(options: RunOptions) -> Backend:
    """Where the fits run. Raises UserError if the options exclude each other, or this Ray is not supported."""
    if options.local:
        names = ("address", "workers_per_fit", "fits_per_gpu", "max_concurrent")
        asked = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
        if excluded := [name for name, value in asked.items() if value not in (None, 1)]:
            raise UserError(f"--local runs one fit at a time in this process: leave out {' and '.join(excluded)}")
    if options.in_process:
        from softseg_dist.engine.local import LocalBackend

        return LocalBackend(options.debug)
    check_ray()
    from softseg_dist.engine.ray_tune import RayBackend  # a run with --local imports no Ray

    return RayBackend(options.address, options.max_wait_s)


def report_run(run: str | Path) -> Path:
    """Write the report of a run folder, finished or not, or of a nested study; returns its page, which is on this machine."""
    copy = pulled(run)
    if (outer := load_outer(copy.folder)) is None:
        return _page(copy)
    page = write_outer_page(outer, copy.folder)
    copy.push("report")
    return page


def numbers_of(run: str | Path) -> dict[str, Any]:
    """The numbers of the report of a run folder, or of a nested study, for machines."""
    folder = pulled(run).folder
    outer = load_outer(folder)
    return summary_json(folder) if outer is None else outer_json(outer)


def csv_of(run: str | Path) -> list[Path]:
    """Write the tables of the report of a run folder as CSV files beside its page; returns their paths on this machine."""
    copy = pulled(run)
    folder, tables = copy.folder / "report", csv_tables(summarise(load_run(copy.folder)))
    folder.mkdir(exist_ok=True)
    for name, text in tables.items():
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    copy.push("report")
    return [folder / f"{name}.csv" for name in tables]


def latex_of(run: str | Path) -> str:
    """Ranking and tests of a run folder, as LaTeX tables."""
    return latex(summarise(load_run(pulled(run).folder)))


def compare_runs(
    run_a: str | Path, run_b: str | Path, candidates: tuple[str | None, str | None] = (None, None), metric: str | None = None
) -> RunComparison:
    """In what two run folders differ, and by how much their scores do; see `report.comparison.compare`."""
    loaded = load_run(pulled(run_a).folder), load_run(pulled(run_b).folder)
    return compare(loaded, (without_credentials(run_a), without_credentials(run_b)), candidates, metric)


def pulled(run: str | Path) -> WorkingCopy:
    """A run folder with all that a report is made of."""
    copy = WorkingCopy(run)
    copy.pull(*REPORTED)
    return copy


def refit_run(run: str | Path, candidate: str | None, options: RunOptions, progress: Progress, trust: bool = False) -> Path:
    """Train a candidate of a run, by default its winner, on all subjects; returns the model's folder.

    That of the winner is `model` in the run folder, that of another candidate `model-<name>`.
    The code of the study is executed if this user has run it on this machine, or with `trust`.
    Raises UserError if not, if the run has no such candidate, or its store is not to be had any more.
    """
    context, loaded = reopened(run, options, progress, trust, "training a model")
    copy, winner = context.copy, summarise(loaded).winner.name
    name = candidate or winner
    with interruptible():
        model = make_model(context, name, copy.folder / (MODEL if name == winner else f"{MODEL}-{name}"))
    copy.push(model.name)
    return model


def reopened(run: str | Path, options: RunOptions, progress: Progress, trust: bool, doing: str) -> tuple[RunContext, RunData]:
    """A run as it was recorded, to train in again; `refit_run` says what is raised."""
    copy = pulled(run)
    loaded, ledger = load_run(copy.folder), Ledger(run)
    if sources := ledger.sources():
        if not trust:
            sources.check_trusted(run, doing)
        load_sources(sources)  # as the study was run, for its own classes
    if loaded.study.get("predictions"):
        raise UserError(f"{run}: these predictions were made elsewhere: there is nothing to train")
    study = Study.model_validate(loaded.study)
    prepared = Prepared(str(loaded.run["store"]), loaded.run["store_fingerprint"])
    resources, backend = resources_of(study, options), backend_of(options)
    return RunContext(study, ledger.splits(), prepared, ledger, copy, resources, backend, progress, sources=sources), loaded


def _page(copy: WorkingCopy) -> Path:
    """Write the report and send it to where the run is; returns its page, which is here."""
    run = load_run(copy.folder)
    summary = summarise(run)
    copy.pull(f"fits/{summary.winner.name}/*/best.safetensors")
    page = write_page(run, summary, choose_overlays(run, summary))
    copy.push("report")
    return page


def resources_of(study: Study, options: RunOptions) -> Resources:
    """The study's, with the changes of the command line. Raises UserError if options exclude each other."""
    names = ("max_concurrent", "workers_per_fit", "gpus_per_fit", "fits_per_gpu")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    either = {"gpus_per_fit", "fits_per_gpu"}  # they set the same share: the one on the command line replaces both
    replaced = dict.fromkeys(either - given.keys()) if either & given.keys() else {}
    try:
        return study.resources.replace(**replaced, **given)
    except ValidationError as error:
        raise UserError(describe(error)) from None


def _collect(copy: WorkingCopy) -> bool:
    """Merge the fits' rows into the results table; False if no fit of it has finished. Trials of a learning rate are not in it.

    Raises Damaged if what a fit has left is not as it was.
    """
    copy.pull(*REPORTED)
    ledger, name = Ledger(copy.folder), "results.parquet"
    ended = sorted(ledger.results(strict=True).items())
    fits = [fit for _, fit in ended if fit.state == "finished" and not is_tuning(fit.candidate)]
    if fits:
        tables = (vouched(fit, cases_path(copy.folder / "fits" / fit.key)) for fit in fits)
        merge_tables(tables, copy.folder / name, ledger.seal_of(name))
        copy.push(name)
    return bool(fits)


def _described(run: Place, file: StudyFile, prepared: Prepared, options: RunOptions, cautions: list[Problem]) -> dict[str, Any]:
    """What is needed to run this again, and what the report shows about data, versions and machine."""
    store = prepared.store
    facts = facts_of(store.cases, store.classes, store.mean_volumes_mm3)
    return provenance(options.command) | {
        "run": run.uri if run.path is None else None,  # a local one may be moved
        "tracking_uri": server.shown if (server := server_address(options.tracking_uri)) else None,
        "study_file": file.sources.study,
        "study_fingerprint": file.study.fingerprint,
        "store": prepared.uri,
        "store_fingerprint": store.fingerprint,
        "store_digest": store.digest,
        "data": facts | {"size": store.size, "sizes_differ": store.sizes_differ, "spacing_mm": store.sample(0).spacing_mm},
        "cautions": [{"rule": caution.rule, "text": caution.detail} for caution in cautions],
    }


def facts_of(cases: Sequence[Any], classes: Sequence[str], mean_volumes_mm3: Sequence[float]) -> dict[str, Any]:
    """The fields of run.json about the cases of a data set or a store."""
    site_of = {case.subject: case.site for case in cases}
    return {
        "num_cases": len(cases),
        "num_subjects": len(site_of),
        "classes": list(classes),
        "raters": sorted({name for case in cases for name in case.rater_names}),
        "sites": dict(sorted(Counter(site_of.values()).items())),
        "site_of": site_of,
        "mean_volumes_mm3": list(mean_volumes_mm3),
    }


def provenance(command: str) -> dict[str, Any]:
    """The fields of run.json about what made it, where and when."""
    host = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "host": platform.node()}
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"command": redacted(command), "versions": versions, "machine": host, "started": started}
