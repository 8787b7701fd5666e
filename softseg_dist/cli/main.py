"""softseg: run studies, check data, print reports. Options choose places and machines; they do not change results.

Exit codes: 0 done, 1 some fits failed, 2 bad input, 130 interrupted and resumable.
Heavy packages are imported inside the commands, so that `softseg --help` is fast.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import softseg_dist
from softseg_dist.cli.compare import compare, evaluate
from softseg_dist.cli.models import predict, refit, verify
from softseg_dist.cli.options import (
    Address,
    DataRoot,
    Debug,
    FitsPerGpu,
    Json,
    Local,
    MaxWait,
    Out,
    Patient,
    RunArg,
    Stores,
    StudyArg,
    open_streams,
    say,
)
from softseg_dist.cli.submit import after_debug, submit
from softseg_dist.errors import UserError, no_room, out_of_reach
from softseg_dist.interrupts import interrupt_always
from softseg_dist.words import command, count, listed, next_command

if TYPE_CHECKING:  # they would import torch
    from softseg_dist.data.cases import DataSet
    from softseg_dist.data.check import Problem
    from softseg_dist.data.preprocess import Sample
    from softseg_dist.engine.plan import Offer, Plan, Prices
    from softseg_dist.engine.session import Outcome
    from softseg_dist.nested import Nested
    from softseg_dist.pipeline import Finished

app = typer.Typer(
    help="Cross-validated studies of soft-label segmentation training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = "Interrupted; the same command continues it."
PRICES = Path("cluster/prices.yaml")
MAX_SHOWN = 24  # cases on the montage of `softseg check`
MAX_PROBLEMS = 10  # lines of `softseg init`
VALUE = r"(?<!class )(?<!channel )(?<![\w.-])\d+(\.\d+)?"  # a number in a sentence, but that of a class


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"softseg_dist {softseg_dist.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version")] = False,
) -> None:
    """Cross-validated studies of soft-label segmentation training."""


@app.command()
def demo(out: Out = "runs", stores: Stores = "stores", local: Local = False, debug: Debug = False, as_json: Json = False) -> None:
    """Run the quickstart study on simulated images, which needs no data: about 2 minutes on 2 cores."""
    path = Path(softseg_dist.__file__).with_name("demo.py")
    if not as_json:
        typer.echo(f"Study    {path}\n         copy it to start your own")
    run(path, out=out, stores=stores, local=local, debug=debug, as_json=as_json)


@app.command()
def run(
    study: StudyArg,
    data_root: DataRoot = None,
    out: Out = "runs",
    stores: Stores = "stores",
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Fits at a time; default: as many as there is room for")] = None,
    workers_per_fit: Annotated[int | None, typer.Option(min=1, help="Processes that share every batch of a fit")] = None,
    gpus_per_fit: Annotated[float | None, typer.Option(min=0, help="GPUs of each worker, such as 0.25; default: 1 if any")] = None,
    fits_per_gpu: FitsPerGpu = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow's server or database; default: MLFLOW_TRACKING_URI, or the run's own")
    ] = None,
    address: Address = None,
    max_wait: MaxWait = None,
    local: Local = False,
    debug: Debug = False,
    as_json: Json = False,
) -> None:
    """Run a study or continue it: prepare data, train every candidate on every split, write the report."""
    from softseg_dist.api import open_study, run_file
    from softseg_dist.engine.progress import progress_for
    from softseg_dist.nested import Nested
    from softseg_dist.pipeline import RunOptions

    options = RunOptions(
        data_root=data_root,
        out=out,
        stores=stores,
        max_concurrent=max_concurrent,
        workers_per_fit=workers_per_fit,
        gpus_per_fit=gpus_per_fit,
        fits_per_gpu=fits_per_gpu,
        tracking_uri=tracking_uri,
        command=command("softseg", *sys.argv[1:]),
        address=address,
        max_wait_s=max_wait,
        final_model=not debug,
        local=local,
        debug=debug,
    )
    live = not options.in_process
    try:
        ended = run_file(open_study(study, debug), options, lambda: progress_for(sys.stdout, as_json=as_json, live=live))
    except KeyboardInterrupt:  # before the run folder was open
        typer.echo(json.dumps({"end": "interrupted"}) if as_json else INTERRUPTED)
        raise typer.Exit(130) from None
    end, text, code = _end(ended.outcome)
    if isinstance(ended, Nested):
        places = {"run": ended.folder, "reports": [run.report for run in ended.runs], **ended.record}
        lines = [text, *_outer_places(ended)]
    else:
        places, lines = {"run": ended.folder, "report": ended.report, "model": ended.model}, [text, *_places(ended)]
    more = after_debug() if debug and end == "done" else ()
    typer.echo(json.dumps({"end": end, **places, **vars(ended.outcome)}, default=str) if as_json else "\n".join([*lines, *more]))
    raise typer.Exit(code)


@app.command()
def prepare(study: StudyArg, data_root: DataRoot = None, stores: Stores = "stores", debug: Debug = False) -> None:
    """Read, resample and crop a study's images once, into one Arrow file."""
    from softseg_dist.api import open_study
    from softseg_dist.engine.context import prepare as prepare_store
    from softseg_dist.words import dimensions

    made = prepare_store(open_study(study, debug).study, data_root, stores, typer.echo)
    store = made.store
    size = ("up to " if store.sizes_differ else "") + dimensions(store.size)
    typer.echo(f"{made.uri}: {len(store.cases)} cases of {len(made.sites)} subjects, {size}, classes {', '.join(store.classes)}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A data set")],
    out: Annotated[Path | None, typer.Option(help="The study file; default: named after the folder, here")] = None,
) -> None:
    """Look at a folder, say what it holds, and write a study file that runs as it is."""
    from softseg_dist.data.discovery import look_at
    from softseg_dist.first_study import facts, study_source

    name = re.sub(r"\W+", "_", folder.resolve().name).strip("_") or "study"
    file = Path(f"{name}.py") if out is None else out
    if file.exists():
        raise UserError(f"{file} exists already: give another name with --out, or remove it")
    contents = look_at(folder)
    text, table = study_source(contents, file), Table("", "", box=None, pad_edge=False, show_header=False)
    for what, found in facts(contents):
        table.add_row(what, found)
    Console(markup=False, emoji=False).print(table)
    for problem in contents.problems[:MAX_PROBLEMS]:
        say("warning", problem)
    if (more := len(contents.problems) - MAX_PROBLEMS) > 0:
        say("warning", f"and {more} more; the study file names the cases that are left out (exclude=...)")
    file.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {file}; look at the data next: {next_command('check', file)}")


@app.command()
def check(
    study: StudyArg,
    data_root: DataRoot = None,
    picture: Annotated[Path, typer.Option(help="File of the picture")] = Path("montage.png"),
    as_json: Json = False,
) -> None:
    """Check a study's data: print a table of problems, and draw every case with the contours of its labels."""
    from softseg_dist.api import open_study
    from softseg_dist.data.cases import check_apart
    from softseg_dist.data.check import Problem, check_cases, unread
    from softseg_dist.data.montage import montage
    from softseg_dist.engine.cautions import Inspection
    from softseg_dist.engine.plan import splits_of

    loaded = open_study(study).study
    cases, inspection = loaded.kept(loaded.data.scan(data_root)), Inspection(loaded)
    usable: list[Sample] = []

    def look(sample: Sample) -> None:
        inspection.look(sample)
        usable.extend([sample] if len(usable) < MAX_SHOWN else [])

    problems = [*unread(loaded.data, data_root), *check_cases(cases, loaded.preprocess.resolved(cases), look, loaded.data.classes)]
    splits = None
    if all(problem.level != "error" for problem in problems):
        try:
            check_apart(cases, [case.sources() for case in cases])
            splits = splits_of(loaded, data_root)[1]
        except UserError as error:
            problems.append(Problem("", "error", "cannot be split", str(error)))
    problems += inspection.cautions(splits)
    if usable:
        montage(usable, picture, loaded.data.classes)
    shown = str(picture) if usable else None
    if as_json:
        typer.echo(json.dumps({"cases": len(cases), "problems": [vars(p) for p in problems], "picture": shown}))
    else:
        for group in _grouped(problems):
            names = list(dict.fromkeys(problem.case for problem in group if problem.case))
            of = f"{len(names)} cases ({listed(names)})" if len(names) > 1 else names[0] if names else ""
            first = ", the first" * (len({problem.detail for problem in group}) > 1)
            typer.echo(f"{group[0].level}: {', '.join(filter(None, (group[0].rule, of)))}{first}: {group[0].detail}")
        typer.echo(f"{count(len(cases), 'case')}, {count(len(problems), 'problem')}" + (f"; picture: {shown}" if shown else ""))
        typer.echo(_after_check(loaded.data, problems, study, data_root))
    raise typer.Exit(2 if any(problem.level == "error" for problem in problems) else 0)


def _grouped(problems: Sequence[Problem]) -> list[list[Problem]]:
    """The problems in groups: those of one differ in the case, in files named after it, and in values alone."""
    groups: defaultdict[tuple[str, ...], list[Problem]] = defaultdict(list)
    for problem in problems:
        names = [re.escape(name) for name in (problem.case, *problem.case.split("_")) if len(name) > 1]
        detail = re.sub("|".join([*names, VALUE]), "*", problem.detail) if problem.case else problem.detail
        groups[problem.level, problem.rule, detail].append(problem)
    return list(groups.values())


def _after_check(data: DataSet, problems: Sequence[Problem], study: Path, data_root: Path | None) -> str:
    if not (wrong := [problem.case for problem in problems if problem.level == "error"]):
        return f"Look at the picture, and then: {next_command('run', study, data_root=data_root, debug=True)}"
    out = tuple(dict.fromkeys([*getattr(data, "exclude", ()), *filter(None, wrong)]))
    can = any(wrong) and "exclude" in type(data).model_fields
    remedy = f"Mend these files, or leave the cases out by exclude={out} of the data set" if can else "Mend what is an error"
    return f"{remedy}; then again: {next_command('check', study, data_root=data_root)}"


@app.command()
def report(
    run: RunArg,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write its tables as CSV files beside the page")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="Print ranking and tests as LaTeX tables")] = False,
) -> None:
    """Write the report of a run again, or its numbers as JSON, CSV or LaTeX."""
    from softseg_dist.api import Run
    from softseg_dist.pipeline import csv_of, latex_of, numbers_of

    if as_json + as_csv + as_latex > 1:
        raise UserError("give one of --json, --csv and --latex")
    if as_json:
        typer.echo(json.dumps(numbers_of(run), indent=2))
    elif as_csv:
        typer.echo("\n".join(map(str, csv_of(run))))
    elif as_latex:
        typer.echo(latex_of(run))
    else:
        typer.echo(str(Run(run).report()))


app.command()(compare)
app.command()(evaluate)
app.command()(refit)
app.command()(verify)
app.command()(predict)


@app.command()
def plan(
    study: StudyArg,
    data_root: DataRoot = None,
    prices: Annotated[Path | None, typer.Option(help="Price list; default: cluster/prices.yaml if it is there")] = None,
    seconds_per_fit: Annotated[float | None, typer.Option(min=0.001, help="Duration of one fit")] = None,
    run: Annotated[str | None, typer.Option(help="A run folder, e.g. that of --debug, whose fits say how long one takes")] = None,
    splits: Annotated[Path | None, typer.Option("--write-splits", help="Write the splits as nnU-Net's splits_final.json")] = None,
    as_json: Json = False,
) -> None:
    """Show how many fits a study has, how long they take, and what they cost on rented machines."""
    from softseg_dist.api import open_study
    from softseg_dist.engine.cautions import inspect_first
    from softseg_dist.engine.plan import load_prices, offers, plan_study, write_splits

    prices = prices or (PRICES if PRICES.exists() else None)
    priced = load_prices(prices) if prices else None
    loaded = open_study(study).study
    planned = plan_study(loaded, data_root, seconds_per_fit, run)
    if splits is not None:
        write_splits(loaded, data_root, splits)
    cautions = inspect_first(loaded, data_root)
    old = prices if priced and priced.are_old(date.today()) else None
    found = offers(planned, loaded.resources, priced.machines, old is None) if priced and planned.seconds_per_fit else ()
    if as_json:
        machines = [vars(offer) | {"machine": offer.machine.model_dump(mode="json")} for offer in found]
        if old:
            machines = [offer | {"machine": {k: v for k, v in offer["machine"].items() if "usd" not in k}} for offer in machines]
        written = str(priced.written) if priced else None
        more = {"fits": planned.fits, "prices_written": written, "machines": machines, "cautions": list(map(vars, cautions))}
        typer.echo(json.dumps(vars(planned) | more))
    else:
        run = f"runs/{planned.study}-debug" + ("/outer/000" if planned.outer > 1 else "")
        measured = next_command("plan", study, data_root=data_root, prices=prices, run=run)
        _print_plan(planned, found, priced, old, [next_command("run", study, data_root=data_root, debug=True), measured])
        for caution in cautions:
            say(caution.level, caution.detail)


@app.command()
def status(run: RunArg, as_json: Json = False) -> None:
    """Show the progress of a run, without changing it: finished and running fits, time of the last event."""
    from softseg_dist.record.status import show, status_of

    found = status_of(run)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        show(found, Console(markup=False, emoji=False, highlight=False, soft_wrap=True))


@app.command()
def sync(
    run: RunArg,
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow server or database; default: that of the run")] = None,
    as_json: Json = False,
) -> None:
    """Send to MLflow the records that it did not receive during a run because its server did not answer."""
    from softseg_dist.tracking.tracker import sync_run

    synced = sync_run(run, tracking_uri)
    sent = f"{synced.sent} records sent to {synced.tracking_uri}, {synced.waiting} not sent yet"
    typer.echo(json.dumps(vars(synced)) if as_json else "\n".join([*synced.notes, sent]))
    raise typer.Exit(1 if synced.waiting or synced.notes else 0)


app.command()(submit)


def _end(outcome: Outcome) -> tuple[str, str, int]:
    """How a run ended, for JSON and as a sentence, and the exit code."""
    if outcome.interrupted:
        return "interrupted", INTERRUPTED, 130
    if outcome.failed or outcome.unfinished:
        return "failed", "Some fits failed.", 1
    return "done", "Done.", 0


def _outer_places(nested: Nested) -> Iterator[str]:
    done, planned = len(nested.record["outer"]), nested.record["planned"]
    yield from [f"Numbers  {nested.folder}/outer.json and outer.parquet: {done} of {planned} outer splits"] * bool(done)
    yield from (f"Report   {run.report}" for run in nested.runs if run.report is not None)
    yield "Model    none: for one, run the study without nested=..., under another name"


def _places(finished: Finished) -> Iterator[str]:
    report, uri, model = finished.report, finished.tracking_uri, finished.model
    if report is not None:
        browser = next_command("-m", "webbrowser", "-t", report.resolve().as_uri(), program="python")
        yield f"Report   {report}\n         open it: {browser}"
        yield f"Numbers  {next_command('report', finished.folder, json=True)}"
    if finished.outcome.finished or finished.outcome.failed:
        how = uri if uri.startswith("http") else next_command("ui", program="mlflow", backend_store_uri=uri)
        yield f"MLflow   {uri}\n         open it: {how}"
    if model is not None:
        from softseg_dist.prediction import how_to_predict  # imports torch

        yield f"Model    {model}\n         use it:  {how_to_predict(model)}"


def _print_plan(plan: Plan, offers: Sequence[Offer], prices: Prices | None, old: Path | None, first: Sequence[str]) -> None:
    console = Console(markup=False, emoji=False, soft_wrap=True, highlight=False)
    candidates = f"{plan.candidates} candidates" + (f" and {plan.trials} trials" if plan.trials else "")
    nested = f", in each of {plan.outer} outer splits" if plan.outer > 1 else ""
    tuning = f", {plan.tuning} fits for learning rates before" if plan.tuning else ""
    at_most = "at most " if plan.trials else ""  # a race or a failure may end a trial early
    repeats = f" with {plan.repeats} seeds" if plan.repeats > 1 else ""
    console.print(f"{plan.study}: {candidates}, each on {plan.splits} splits{repeats}{tuning}{nested}: {at_most}{plan.fits} fits")
    if not plan.seconds_per_fit:
        typer.echo(f"The duration of a fit is not known yet: {first[0]}\nand then{'':32}{first[1]}")
        return
    total = plan.fits * plan.seconds_per_fit / 3600
    console.print(f"{plan.seconds_per_fit:,.1f} s per fit at most, {total:,.2f} hours one after the other")
    if prices is None:
        console.print("For costs give a price list with --prices, such as cluster/prices.yaml of the repository.")
        return
    usd = () if old else ("USD", "USD spot")
    table = Table("Machine", "Where", "GPUs", "Places", "Hours", *usd, box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.no_wrap, column.justify = True, "right" if number > 2 else "left"
    for offer in offers:
        machine = offer.machine
        gpus = f"{machine.gpus} x {machine.gpu}" if machine.gpus else ""
        amounts = (f"{value:.2f}" for value in (offer.hours, offer.on_demand_usd, offer.spot_usd) if value is not None)
        table.add_row(machine.name, f"{machine.provider} {machine.region}", gpus, str(offer.places), *amounts)
    console.print(table if offers else "No machine of the price list can hold one fit: see the study's resources.")
    console.print("Places: fits at a time. Several machines divide the hours, not the costs; the speed of machines differs.")
    stale = f"older than a year, so that no costs are shown; renew prices and date in {old}, from"
    console.print(f"Prices of {prices.written}, {stale if old else 'indicative; see'} {'; '.join(prices.pages.values())}")


def main() -> None:
    """The command `softseg`."""
    open_streams()
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    interrupt_always()
    os.environ["MPLBACKEND"] = "agg"  # figures are files; that of a notebook may not be installed here
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else no_room(error) or out_of_reach(error)
        if message is None:
            raise
        say("error", message)
        sys.exit(2)


if __name__ == "__main__":
    main()
