"""The commands `softseg compare` and `softseg evaluate`: runs, and predictions of other programs, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softseg_dist.cli.options import DataRoot, Json, StudyArg
from softseg_dist.errors import UserError
from softseg_dist.words import command, listed, next_command

if TYPE_CHECKING:  # would import torch
    from softseg_dist.report.comparison import CandidateContrast, RunComparison

COLUMNS = ("candidate", "A", "B", "B minus A", "95 % interval", "p", "p (Holm)", "n")


def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run folder or its URI, e.g. runs/s001")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another run folder; or the same one, with two candidates")],
    candidate_a: Annotated[str | None, typer.Option(help="Candidate of RUN_A; default: all of one name, and the winners")] = None,
    candidate_b: Annotated[str | None, typer.Option(help="Candidate of RUN_B; a name given once applies to both runs")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare by; default: the objective of both")] = None,
    as_json: Json = False,
) -> None:
    """Show how the settings and the scores of two runs differ, paired by subject and split where both have them."""
    from softseg_dist.pipeline import compare_runs
    from softseg_dist.report.comparison import comparison_json

    found = compare_runs(run_a, run_b, (candidate_a, candidate_b), metric)
    if as_json:
        typer.echo(json.dumps(comparison_json(found), indent=2, allow_nan=False))
    else:
        _show(found)


def evaluate(
    study: StudyArg,
    predictions: Annotated[list[str], typer.Option(metavar="NAME=FOLDER", help="A folder of maps or masks, or a run; repeatable")],
    data_root: DataRoot = None,
    splits: Annotated[Path | None, typer.Option(help="File of splits (JSON, YAML, nnU-Net's) whose test sets are judged")] = None,
    out: Annotated[str, typer.Option(help="Folder for runs, on this machine; the run folder is OUT/<name>")] = "runs",
    name: Annotated[str | None, typer.Option(help="Name of the run folder; default: <study name>-evaluation")] = None,
    control: Annotated[str | None, typer.Option(help="Candidate that all others are compared with; default: the study's")] = None,
    pattern: Annotated[str, typer.Option(help="Names such as {case}_{class}.nii.gz; default: of images, nnU-Net or predict")] = "",
    common: Annotated[bool, typer.Option("--common", help="Compare only the cases that all candidates have")] = False,
    as_json: Json = False,
) -> None:
    """Judge predictions that exist already, each on the grid of its image, and write the report of a run folder."""
    from softseg_dist import api
    from softseg_dist.assessment import EvaluateOptions

    named = [text.partition("=") for text in predictions]
    if bad := [text for text, (key, _, folder) in zip(predictions, named, strict=True) if not (key and folder)]:
        raise UserError(f"--predictions takes NAME=FOLDER, got {bad[0]!r}")
    if len({key for key, _, _ in named}) < len(named):
        raise UserError(f"--predictions: each candidate has its own name, got {', '.join(key for key, _, _ in named)}")
    options = EvaluateOptions(name, control, pattern, common, command("softseg", *sys.argv[1:]))
    run = api.evaluate({key: folder for key, _, folder in named}, study, data_root, out, splits=splits, options=options)
    page = Path(run.folder) / "report" / "index.html"
    if as_json:
        typer.echo(json.dumps({"run": run.folder, "report": str(page), "answer": run.answer}))
    else:
        typer.echo(f"{run.answer}\nReport   {page}\nNumbers  {next_command('report', run.folder, json=True)}")


def _show(found: RunComparison) -> None:
    from softseg_dist.report.comparison import answer, caveats, pairing_sentence, title_of

    for side, p in (("A", found.a), ("B", found.b)):
        typer.echo(f"{side}: {p.run} ({p.study}; {p.num_splits} splits, {p.num_tested} tested subjects)")
    changed = {"Studies": found.study, "Versions": found.versions}
    changed |= {f"Recipes of {title_of(contrast)}": contrast.changed for contrast in found.contrasts}
    for what, fields in changed.items():
        if fields:
            typer.echo(f"{what} differ:")
        for field, (a, b) in fields.items():
            typer.echo(f"  {field}: {a} -> {b}")
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            typer.echo(f"Only in {side}: {listed(names)}")
    typer.echo(f"\nB minus A in {found.metric.full_title} on test. {pairing_sentence(found)}")
    typer.echo("Columns A and B are means over all scores of a run; B minus A is the mean over pairs.")
    rows = [COLUMNS, *map(_row, found.contrasts)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())
    typer.echo(f"\n{answer(found)}")
    for text in caveats(found):
        typer.echo(f"Note: {text}")


def _row(contrast: CandidateContrast) -> tuple[str, ...]:
    from softseg_dist.report.comparison import sample, title_of
    from softseg_dist.words import interval, number, p_value

    test, means = contrast.test, (number(contrast.a.mean), number(contrast.b.mean))
    difference = number(test.mean, signed=True), interval(test.low, test.high, signed=True)
    return title_of(contrast), *means, *difference, p_value(test.p), p_value(contrast.p_holm), sample(contrast)
