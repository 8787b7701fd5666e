"""CSV files and LaTeX tables say what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_measures import ALL
from synthetic_run import CELLS, write_run
from typer.testing import CliRunner

from softseg_dist.cli.main import app
from softseg_dist.errors import UserError
from softseg_dist.pipeline import csv_of
from softseg_dist.report.export import latex
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import Summary, summarise
from softseg_dist.words import p_value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), candidates=CELLS[:4], measured=ALL, num_splits=3)


@pytest.fixture(scope="module")
def summary(folder: Path) -> Summary:
    return summarise(load_run(folder))


def test_csv_files_hold_every_number_of_the_ranking_and_the_tests(folder: Path, summary: Summary):
    tables = {path.stem: pd.read_csv(path) for path in csv_of(folder)}
    ranking, tests = tables["ranking"], tables["tests"]
    assert list(ranking["name"]) == [standing.name for standing in summary.ranking]
    assert list(ranking["mean"]) == pytest.approx([standing.mean for standing in summary.ranking])
    assert list(tests["crossed.p"]) == pytest.approx([c.crossed.p for c in summary.comparisons])
    assert list(ranking["dice.grid"]) == pytest.approx([standing.dice["grid"] for standing in summary.ranking])
    assert set(tables) >= {"reliability", "volumes", "lesions", "surfaces", "sites", "raters", "uncertainty", "recipes"}
    assert len(tables["reliability"]) == 4 * 10
    assert len(tables["volumes"]) == 4 * summary.num_tested
    assert list(tables["threshold_curves"]["dice"]) == pytest.approx([d for dice in summary.curves.values() for d in dice])
    agreements = [one for of_classes in summary.measures.agreements.values() for one in of_classes]
    assert list(tables["volumes"]["subject"].map("{:03d}".format)) == [subject for one in agreements for subject in one.subjects]
    assert list(tables["volumes"]["true_mm3"]) == pytest.approx([volume for one in agreements for volume in one.true_mm3])


def test_what_does_not_exist_is_an_empty_field(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=1)
    (row, _) = (pd.read_csv(path) for path in csv_of(folder) if path.stem in ("tests", "ranking"))
    assert np.isnan(row["sd"]).all()
    assert "nan" not in (folder / "report" / "tests.csv").read_text().lower()


@pytest.mark.parametrize("text", ["=HYPERLINK(A1)", "+1", "-1+2", "@SUM(A1)", "\t=1"])
def test_a_text_that_a_spreadsheet_would_execute_is_quoted(tmp_path: Path, text: str):
    folder = write_run(tmp_path, candidates=CELLS[:1], proposed=[text], num_splits=2)
    cells = [cell for path in csv_of(folder) for cell in pd.read_csv(path).to_numpy().ravel() if isinstance(cell, str)]
    assert f"'{text}" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t"))]


def test_latex_needs_no_package_and_says_n(summary: Summary):
    text = latex(summary)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert "rule" not in text
    assert text.isascii()
    assert f"n = {summary.num_tested} tested subjects, 3 splits" in text
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert all(row.count("&") == len(columns) - 1 for row in rows)
    for comparison in summary.comparisons:
        assert p_value(comparison.p_holm).replace("<", "$<$") in text


def test_names_are_escaped_for_latex(tmp_path: Path):
    folder = write_run(tmp_path, candidates=["hard-sigmoid-dice"], proposed=["trial_1&2"], num_splits=2)
    assert r"trial\_1\&2" in latex(summarise(load_run(folder)))


@pytest.mark.engine
def test_the_command_writes_csv_prints_latex_and_does_one_thing_at_a_time(folder: Path):
    written = CliRunner().invoke(app, ["report", str(folder), "--csv"]).output.split()
    assert str(folder / "report" / "ranking.csv") in written
    assert all(Path(path).is_file() for path in written)
    assert CliRunner().invoke(app, ["report", str(folder), "--latex"]).output.strip() == latex(summarise(load_run(folder))).strip()
    refused = CliRunner().invoke(app, ["report", str(folder), "--csv", "--json"])
    assert isinstance(refused.exception, UserError)
