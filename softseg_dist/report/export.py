"""The report's numbers for other programs: tables as CSV files, ranking and tests as LaTeX.

A CSV has one row per entry of a part of the `Summary`, and one column per number in it: `crossed.p` is the p of its crossed
test. What does not exist is left empty. LaTeX uses nothing but `tabular` and `\\hline`, so that it compiles in any document.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pandas as pd

from softseg_dist.frozen import leaves
from softseg_dist.report.paired_tests import Comparison
from softseg_dist.report.scores import RULES
from softseg_dist.report.tables import Summary, plain
from softseg_dist.words import count, interval, number, p_value

ESCAPED = str.maketrans(
    {character: f"\\{character}" for character in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"|": r"\textbar{}", "−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "³": "$^3$"}
)
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a text that begins so is executed by spreadsheets


def csv_tables(summary: Summary) -> dict[str, str]:
    """The text of a CSV file for every part of the summary that has rows, by the part's name."""
    measures = summary.measures
    parts: dict[str, Any] = {
        "ranking": summary.ranking,
        "tests": summary.comparisons,
        "against_best": summary.rivals,
        "main_effects": summary.effects,
        "interactions": summary.interactions,
        "training": summary.training,
        "splits": summary.splits,
        "recipes": [{"name": name} | fields for name, fields in summary.varying.items()],
        "threshold_curves": [
            {"name": name, "threshold": threshold, "dice": dice}
            for name, curve in summary.curves.items()
            for threshold, dice in zip(summary.curve_thresholds, curve, strict=True)
        ],
        "reliability": [
            {"name": t.name, "edge": edge, "voxels": voxels, "predicted": predicted, "observed": observed}
            for t in measures.reliability.values()
            for edge, voxels, predicted, observed in zip(t.edges, t.voxels, t.predicted, t.observed, strict=True)
        ],
        "recalibrated": list(measures.recalibrated.values()),
        "volumes": [
            {"name": one.name, "class": one.class_name, "subject": subject, "true_mm3": true, "predicted_mm3": predicted}
            for one in itertools.chain.from_iterable(measures.agreements.values())
            for subject, true, predicted in zip(one.subjects, one.true_mm3, one.predicted_mm3, strict=True)
        ],
        "lesions": list(measures.lesions.values()),
        "surfaces": list(measures.surfaces.values()),
        "sites": measures.sites,
        "cases": summary.checks.cases,
        "empty_map": summary.checks.learned,
        "raters": list(measures.raters.candidates.values()) if measures.raters else [],
        "uncertainty": list(itertools.chain.from_iterable(measures.uncertainty.values())),
        "pareto": summary.pareto.points if summary.pareto else [],
        "given_up": [plain(race) for race in summary.raced.values()],
        "tuning": summary.tuned,
        "holdout": summary.holdout.scores if summary.holdout else [],
    }
    tables = {name: pd.DataFrame([_flat(row) for row in rows], dtype=object) for name, rows in parts.items() if rows}
    return {name: table.to_csv(index=False, lineterminator="\n") for name, table in tables.items()}


def _flat(row: Any) -> dict[str, Any]:
    """The leaves of a row; the texts of a list, such as the warnings of a test, are one text."""
    joined = ((key, "; ".join(map(str, value)) if isinstance(value, list) else value) for key, value in leaves(plain(row)))
    return {key: f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value for key, value in joined}


def latex(summary: Summary) -> str:
    """Ranking and, if there is anything to compare, tests: two LaTeX tables with captions that say n."""
    n = f"n = {count(summary.num_tested, 'tested subject')}, {count(len(summary.splits), 'split')}; unit: a subject in a split"
    primary = "t-test over subjects" if summary.of_models else "crossed random-effects test"
    title = summary.objective.title
    cuts = [f"Dice, {RULES[rule]}" for rule in summary.used_rules]
    scores = {s.name: [number(s.mean), interval(s.low, s.high), number(s.sd)] for s in summary.ranking}
    dice = {s.name: [number(s.dice[rule]) for rule in summary.used_rules] for s in summary.ranking}
    ranking = _tabular(
        ["", "candidate", title, "95 % interval", "sd", *cuts],
        [[str(s.rank or "–"), s.name, *scores[s.name], *dice[s.name]] for s in summary.ranking],
        f"Candidates, ranked by {title} on {summary.chosen_on}. On test: mean, 95 % interval of the {primary}, "
        f"sd of the means of the splits, and Dice of masks cut as the column says. {n}.",
        "ranking",
    )
    if not summary.comparisons:
        return ranking
    tests = _tabular(
        ["candidate", "difference", "95 % interval", "p", "p, Holm", "n pairs"],
        [_tested(comparison) for comparison in summary.comparisons],
        f"Paired differences to {summary.reference} in {title}: {primary}, Holm's correction over "
        f"{count(len(summary.comparisons), 'comparison')}. {n}.",
        "tests",
    )
    return f"{ranking}\n{tests}"


def _tested(c: Comparison) -> list[str]:
    size = number(c.crossed.mean, signed=True), interval(c.crossed.low, c.crossed.high, signed=True)
    return [c.candidate, *size, *map(p_value, (c.crossed.p, c.p_holm)), str(c.crossed.num_pairs)]


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, label: str) -> str:
    """A table whose texts are left and whose numbers right."""
    columns = "".join("l" if title in ("", "candidate") else "r" for title in head)
    lines = [" & ".join(cell.translate(ESCAPED) for cell in row) + r" \\" for row in (head, *rows)]
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"]
    about = rf"\caption{{{caption.translate(ESCAPED)}}}", rf"\label{{tab:{label}}}"
    return "\n".join([r"\begin{table}", r"\centering", *body, *about, r"\end{table}"]) + "\n"
