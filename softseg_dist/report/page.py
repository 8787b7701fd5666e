"""One self-contained HTML page about a run: everything on it is inlined, so it can be mailed, archived and printed.

`write_report` writes report/index.html and the figures beside it as PNG; `summary_json` gives the same numbers for
machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from softseg_dist.report import words
from softseg_dist.report.caveats import caveats
from softseg_dist.report.figures import (
    MOST,
    curve_figure,
    forest_figure,
    learning_figure,
    paired_figure,
    shown,
)
from softseg_dist.report.findings import answer, effects_answer
from softseg_dist.report.look import data_uri, png
from softseg_dist.report.pictures import Overlay, overlay_figure
from softseg_dist.report.ranking import RULES
from softseg_dist.report.run_folder import RunData, load_run
from softseg_dist.report.tables import Summary, plain, summarise

RULE_NAMES = {"fixed": "fixed 0.5", "grid": "grid", "dice_optimal": "Dice-optimal"}
FEW_RECIPE_FIELDS = 8  # more columns do not fit on paper; recipes are whole in the ledger


@dataclass(frozen=True)
class Picture:
    """A figure on the page: its source, and what it shows in words."""

    source: str
    alt: str


def write_report(run: Path, overlays: Sequence[Overlay] = ()) -> Path:
    """Write report/index.html and report/*.png into the run folder; returns the path of the page.

    Args:
        run: folder of a run, finished or not.
        overlays: slices to look at, in the order shown: usually best, median and worst test case of the highest ranked.

    Raises UserError if the folder is not a run, or if no fit has finished yet.
    """
    data = load_run(run)
    summary = summarise(data)
    folder = run / "report"
    folder.mkdir(exist_ok=True)
    figures = _figures(summary, data, overlays)
    for name, (figure, _) in figures.items():
        (folder / f"{name}.png").write_bytes(png(figure))
    pictures = {
        name: Picture(data_uri(figure, vector=name != "overlays"), alt) for name, (figure, alt) in figures.items()
    }
    page = folder / "index.html"
    page.write_text(_render(summary, data, pictures), encoding="utf-8")
    return page


def summary_json(run: Path) -> dict[str, Any]:
    """The numbers of the page, ready for json.dumps: the `Summary`, the answer, the caveats and where the run came from."""
    data = load_run(run)
    summary = summarise(data)
    return {
        "answer": answer(summary),
        "effects_answer": effects_answer(summary),
        "caveats": caveats(summary, _spacing(data)),
        **plain(summary),
        "run": plain(dict(data.run)),
    }


def _figures(summary: Summary, data: RunData, overlays: Sequence[Overlay]) -> dict[str, tuple[Figure, str]]:
    """Those that the run has data for, with their text for those who cannot see them."""
    title = summary.objective_title
    found: dict[str, tuple[Figure, str]] = {}
    if summary.comparisons:
        found["differences"] = (
            forest_figure(summary),
            f"Forest plot of differences in {title}; the numbers are in the tests",
        )
        found["splits"] = paired_figure(summary), f"Box plots over splits of {title}, paired with {summary.reference}"
    if summary.curves:
        found["thresholds"] = curve_figure(summary), "Curves of mean Dice against the threshold, one per candidate"
    if overlays:
        found["overlays"] = (
            overlay_figure(overlays),
            "Image, soft truth, prediction and signed error of single test cases",
        )
    if (learning := learning_figure(summary, data.histories)) is not None:
        found["learning"] = learning, f"Learning curves: {title} on validation by epoch"
    return found


def _render(summary: Summary, data: RunData, pictures: Mapping[str, Picture]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formats = (words.number, words.interval, words.p_value, words.percent, words.duration, words.count, words.verdict)
    environment.globals.update({function.__name__: function for function in formats})
    fields = list(dict.fromkeys(f for recipe in summary.varying.values() for f in recipe))
    return environment.get_template("page.html").render(
        s=summary,
        run=data.run,
        info=data.run.get("data") or {},
        pictures=pictures,
        folder=data.run.get("run") or data.folder,
        answer=answer(summary),
        effects_answer=effects_answer(summary),
        caveats=caveats(summary, _spacing(data)),
        shown=shown(summary),
        most=MOST,
        rules=RULES,
        rule_names=RULE_NAMES,
        recipe_fields=fields[:FEW_RECIPE_FIELDS],
        recipe_fields_left=fields[FEW_RECIPE_FIELDS:],
        notes=_notes(summary),
        candidates=data.candidates,
    )


def _notes(summary: Summary) -> dict[str, list[str]]:
    """What the tests had to say about themselves: {note: candidates}."""
    notes: dict[str, list[str]] = {}
    for comparison in summary.comparisons:
        for note in (comparison.crossed.note, comparison.corrected.note, comparison.bootstrap.note):
            if note and comparison.candidate not in notes.setdefault(note, []):
                notes[note].append(comparison.candidate)
    return notes


def _spacing(data: RunData) -> tuple[float, ...]:
    return tuple((data.run.get("data") or {}).get("spacing_mm") or ())
