"""One self-contained HTML page about a run: everything on it is inlined, so it can be mailed, archived and printed.

`write_page` writes report/index.html and the figures beside it as PNG; `summary_json` gives the same numbers for programs, `export`
for spreadsheets and papers. `write_outer_page` and `outer_json` are those of a nested study.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from inspect import isfunction
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from softseg_dist import words
from softseg_dist.data.check import ALIKE
from softseg_dist.numerics.metrics import TABLE
from softseg_dist.report import figures
from softseg_dist.report.findings import WHERE, caveats, sentences
from softseg_dist.report.held_out import OuterTable, outer_answer, outer_table
from softseg_dist.report.measures import MEASURES, METHODS, SIZES
from softseg_dist.report.pictures import Overlay, overlay_figure
from softseg_dist.report.run_folder import OuterData, RunData, load_run, origin_of
from softseg_dist.report.scores import RULES
from softseg_dist.report.tables import Summary, plain, summarise

FEW_RECIPE_FIELDS = 8  # more columns do not fit on paper; recipes are whole in the ledger
TEMPLATES = Path(__file__).parent / "templates"


def write_page(data: RunData, summary: Summary, overlays: Sequence[Overlay] = ()) -> Path:
    """Write report/index.html and report/*.png into the folder of a run, finished or not; returns the path of the page.

    `overlays` are slices to look at, in the order shown: usually best, median and worst test case of the highest ranked.
    """
    folder = data.folder / "report"
    folder.mkdir(exist_ok=True)
    pictures = {}
    for name, (figure, alt) in _figures(summary, data, overlays).items():
        image = figures.png(figure)
        (folder / f"{name}.png").write_bytes(image)
        kind, content = ("png", image) if name == "overlays" else ("svg+xml", figures.svg(figure))
        pictures[name] = {"source": f"data:image/{kind};base64,{base64.b64encode(content).decode()}", "alt": alt}
    page = folder / "index.html"
    page.write_text(_render(summary, data, pictures), encoding="utf-8")
    return page


def write_outer_page(outer: OuterData, folder: Path) -> Path:
    """Write the page of a nested study into its folder, which holds a run of every outer split; returns its path."""
    table = outer_table(outer)
    page = folder / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    text = _environment().get_template("outer.html").render(o=table, answer=outer_answer(table), metric=_meaning(table))
    page.write_text(text, encoding="utf-8")
    return page


def outer_json(outer: OuterData) -> dict[str, Any]:
    """The numbers of the page of a nested study, ready for json.dumps."""
    table = outer_table(outer)
    return {"answer": outer_answer(table), **plain(table)}


def summary_json(run: Path) -> dict[str, Any]:
    """The numbers of the page, ready for json.dumps: the `Summary`, the answer, the caveats and where the run came from."""
    data = load_run(run)
    summary = summarise(data)
    limits = [*(text for _, text in data.cautions), *caveats(summary)]
    return {**sentences(summary), "caveats": limits, **plain(summary), "run": plain(dict(data.run))}


def _figures(summary: Summary, data: RunData, overlays: Sequence[Overlay]) -> dict[str, tuple[Figure, str]]:
    """Those that the run has data for, each with its text for readers who cannot see it."""
    title, measures, names = summary.objective.title, summary.measures, figures.shown(summary)
    calibrated = [n for n in names if n in measures.reliability]
    pair = [n for n in dict.fromkeys((summary.winner.name, summary.reference)) if n in measures.agreements]
    found: dict[str, tuple[Figure, str]] = {}
    if summary.comparisons:
        found["differences"] = (figures.forest_figure(summary), f"Forest plot of differences in {title}; numbers are in the tests")
    if summary.curves:
        found["thresholds"] = figures.curve_figure(summary), "Curves of mean Dice against the threshold, one per candidate"
    if calibrated:
        found["reliability"] = figures.reliability_figure(summary, calibrated), "Reliability diagrams, one per candidate"
    if pair:
        found["volumes"] = figures.agreement_figure(summary, pair), "Bland-Altman plots of volumes; the limits are in the table"
    if overlays:
        found["overlays"] = (overlay_figure(overlays), "Image, soft truth, predictions and signed errors of single test cases")
    if (learning := figures.learning_figure(summary, data.histories)) is not None:
        found["learning"] = learning, f"Learning curves: {title} on validation by epoch"
    return found


def _sections(summary: Summary, pictures: Collection[str]) -> dict[str, str]:
    """Those that the run has something for, in their order: name of the template, title."""
    measures = summary.measures
    sections = {
        "caveats": ("Read with care", True),
        "holdout": ("Held-out subjects", summary.holdout),
        "ranking": ("Ranking", True),
        "tests": ("Tests", summary.comparisons),
        "search": ("Search", summary.pareto or summary.raced or summary.tuned),
        "threshold": ("Threshold", "thresholds" in pictures),
        "calibration": ("Calibration", "reliability" in pictures),
        "volumes": ("Volumes", measures.agreements),
        "objects": ("Lesions and surfaces", measures.lesions or measures.surfaces),
        "sites": ("Sites", measures.sites),
        "raters": ("Raters", measures.raters),
        "uncertainty": ("Uncertainty", measures.uncertainty),
        "cases": ("Cases", summary.checks.cases),
        "training": ("Training", summary.trained),
        "failures": ("Failed fits", summary.failures),
        "data": ("Data and splits", True),
        "methods": ("Methods", True),
        "repeat": ("How to repeat this", True),
    }
    return {name: title for name, (title, there) in sections.items() if there}


def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update({name: value for name, value in vars(words).items() if isfunction(value)})
    environment.filters["moment"] = words.moment
    return environment


def _render(summary: Summary, data: RunData, pictures: Mapping[str, Mapping[str, str]]) -> str:
    fields = list(dict.fromkeys(f for recipe in summary.varying.values() for f in recipe))
    said = sentences(summary)
    template = _environment().get_template("page.html")
    return template.render(
        s=summary,
        n=f"{words.count(summary.num_tested, 'tested subject')}, {words.count(len(summary.splits), 'split')}",
        run=data.run,
        info=data.run.get("data") or {},
        sections=_sections(summary, pictures),
        pictures=pictures,
        numbers=words.command("softseg", "report", data.run.get("run") or data.folder, json=True),
        repeats=data.study.get("repeats", 1),
        said=said,
        first=[*said["not_learned"], *(text for rule, text in data.cautions if rule == ALIKE)],
        where=WHERE,
        metric=_meaning(summary),
        caveats=[*(text for rule, text in data.cautions if rule != ALIKE), *caveats(summary)],
        shown=figures.shown(summary),
        most=figures.MOST,
        cut=_cut(summary),
        rule_names=RULES,
        to_best={rival.candidate: rival for rival in summary.rivals},
        sizes=SIZES,
        metrics=TABLE,
        methods=METHODS,
        uncertainty_names=MEASURES,
        differing=[f for f in fields if "." not in f or f.partition(".")[0] not in fields],  # of other classes no field is named
        recipe_fields=fields[:FEW_RECIPE_FIELDS],
        recipe_fields_left=fields[FEW_RECIPE_FIELDS:],
        notes=_notes(summary),
        origin=origin_of(data),
    )


def _meaning(table: Summary | OuterTable) -> str:
    """What the objective is, for a reader who has not met it."""
    return f"{words.capital(table.objective.title)}: {table.objective.meaning.rstrip('.')}."


def _notes(summary: Summary) -> dict[str, list[str]]:
    """What the tests had to say about themselves: {note: candidates}."""
    said = {c.candidate: [*c.crossed.remarks, "" if summary.of_models else c.corrected.note] for c in summary.comparisons}
    notes = filter(None, dict.fromkeys(note for remarks in said.values() for note in remarks))
    return {note: [name for name, remarks in said.items() if note in remarks] for note in notes}


def _cut(summary: Summary) -> str:
    """At what predictions are cut for lesions, surfaces and raters."""
    having = ["grid" in standing.thresholds for standing in summary.ranking if standing.thresholds]
    chosen = "the threshold that each fit chose on its grid"
    return chosen if all(having) else f"{chosen}, or 0.5 without one" if any(having) else "0.5"
