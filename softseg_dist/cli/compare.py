"""The command `softseg compare`: two runs, or two candidates of one run, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from softseg_dist.cli.options import Json
from softseg_dist.words import listed

if TYPE_CHECKING:  # would import torch
    from softseg_dist.report.comparison import CandidateContrast, RunComparison

COLUMNS = ("candidate", "A", "B", "B minus A", "95 % interval", "p", "p (Holm)", "n")


def compare(
    run_a: Annotated[str, typer.Argument(metavar="RUN_A", help="A run folder or its URI, e.g. runs/s001")],
    run_b: Annotated[str, typer.Argument(metavar="RUN_B", help="Another run folder; or the same one, with two candidates")],
    candidate_a: Annotated[
        str | None, typer.Option(help="Candidate of RUN_A; default: all with the same name, and the winners")
    ] = None,
    candidate_b: Annotated[str | None, typer.Option(help="Candidate of RUN_B; a name given once applies to both runs")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare by; default: the objective of both")] = None,
    as_json: Json = False,
) -> None:
    """Show how the settings and the scores of two runs differ, paired by subject and split where both have them."""
    from softseg_dist.pipeline import compare_runs
    from softseg_dist.report.comparison_words import comparison_json

    found = compare_runs(run_a, run_b, (candidate_a, candidate_b), metric)
    if as_json:
        typer.echo(json.dumps(comparison_json(found), indent=2, allow_nan=False))
    else:
        _show(found, Console(highlight=False, soft_wrap=True))


def _show(found: RunComparison, console: Console) -> None:
    from softseg_dist.report.comparison_words import answer, called, caveats, metric_of, pairing_sentence

    for side, p in (("A", found.a), ("B", found.b)):
        size = f"{p.num_splits} splits, {p.num_tested} tested subjects"
        console.print(f"{side}: {p.run} ({p.study}; {size})", markup=False)
    changed = {"Studies": found.study, "Versions": found.versions}
    changed |= {f"Recipes of {called(contrast)}": contrast.changed for contrast in found.contrasts}
    for what, fields in changed.items():
        if fields:
            console.print(f"{what} differ:", markup=False)
        for field, (a, b) in fields.items():
            console.print(f"  {field}: {a} -> {b}", markup=False)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            console.print(f"Only in {side}: {listed(names)}", markup=False)
    console.print(f"\nB minus A in {metric_of(found)} on test. {pairing_sentence(found)}", markup=False)
    console.print("Columns A and B are means over all scores of a run; B minus A is the mean over pairs.")
    rows = [COLUMNS, *map(_row, found.contrasts)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        console.print("  ".join(map(str.ljust, row, widths)).rstrip(), markup=False)
    console.print(f"\n{answer(found)}", markup=False)
    for text in caveats(found):
        console.print(f"Note: {text}", markup=False)


def _row(contrast: CandidateContrast) -> tuple[str, ...]:
    from softseg_dist.report.comparison_words import called, sample
    from softseg_dist.words import interval, number, p_value

    test = contrast.test
    return (
        called(contrast),
        number(contrast.a.mean),
        number(contrast.b.mean),
        number(test.mean, signed=True),
        interval(test.low, test.high, signed=True),
        p_value(test.p),
        p_value(contrast.p_holm),
        sample(contrast),
    )
