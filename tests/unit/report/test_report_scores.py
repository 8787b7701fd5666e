"""What scores are worth: absolute scores, an empty map, both grids, single cases, large structures, and intervals that are none."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sealed_files import put, put_table, value_of
from synthetic_run import write_run, written_page

from softseg_dist.numerics.metrics import TABLE
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.export import csv_tables
from softseg_dist.report.figures import forest_figure
from softseg_dist.report.findings import answer, caveats, learned_answer, scores_answer
from softseg_dist.report.page import summary_json
from softseg_dist.report.paired_tests import effect_in_words, primary_test
from softseg_dist.report.pictures import Overlay, overlay_figure
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.scores import ScoreTables
from softseg_dist.report.tables import Summary, summarise
from softseg_dist.words import interval, interval_clause, number

CONTROL, OTHER = "hard-sigmoid-dice", "soft-sigmoid-dice"
EMPTY, LARGE = 0.1, 5


def scored(folder: Path, skill: float = 0.0, prepared: float = 0.0, num_splits: int = 4, num_tested: int = 6) -> Summary:
    """A run of two candidates by Brier skill: `skill` is added to all; `prepared` to OTHER on the grid of training alone.

    An empty map scores `EMPTY` on average, 0.2 more or less on every other subject. Subjects below `LARGE` are ten times as large.
    """
    write_run(folder, candidates=[CONTROL, OTHER], num_splits=num_splits, num_tested=num_tested, measured=["volume"])
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"objective": "brier_skill"})
    table = pd.read_parquet(folder / "results.parquet")
    subjects = table["subject"].astype(int)
    table["value"] = table["value"].mask(table["metric"] == "volume_true_mm3", np.where(subjects < LARGE, 1000.0, 100.0))
    rows = table[(table["metric"] == "dice_dml") & (table["reference"] == "mean")]
    skills = rows.assign(metric="brier_skill", value=rows["value"] + skill)
    empty = rows.assign(metric="empty_map", value=EMPTY + 0.2 * (-1.0) ** rows["subject"].astype(int))
    own = rows.assign(metric="brier_skill_case", value=0.5)
    on_training = skills[skills["subset"] == "test"].assign(grid="prepared")
    on_training["value"] += prepared * (on_training["candidate"] == OTHER)
    everything = [table, skills, on_training, *(part[part["subset"] == "test"] for part in (empty, own))]
    put_table(pd.concat(everything, ignore_index=True), folder / "results.parquet")
    return summarise(load_run(folder))


def text_of(page: Path) -> str:
    """The text of a page, without tags and style."""
    return " ".join(re.sub("<style.*?</style>|<[^>]*>", " ", page.read_text(), flags=re.S).split())


@pytest.mark.engine
def test_absolute_scores_come_before_differences(tmp_path: Path) -> None:
    summary = scored(tmp_path)
    text, standings = scores_answer(summary), {s.name: s for s in summary.ranking}
    assert text.startswith("Brier skill on test, on the files' own grids: control hard-sigmoid-dice ")
    for name in (CONTROL, OTHER):
        row = standings[name]
        assert f"{name} {number(row.mean)} ({interval_clause(row.low, row.high)})" in text
    assert f"a map that is 0 everywhere {number(summary.checks.empty_map)}" in text
    page = written_page(tmp_path).read_text().replace("&#39;", "'")
    assert page.index(text) < page.index(answer(summary).replace("'", "'"))
    assert summary_json(tmp_path)["scores_answer"] == text


def test_the_empty_map_is_weighed_as_candidates_are(tmp_path: Path) -> None:
    summary = scored(tmp_path)
    rows = load_run(tmp_path).results
    mine = rows[(rows["metric"] == "empty_map") & (rows["candidate"] == CONTROL)]
    assert summary.checks.empty_map == pytest.approx(mine["value"].mean())
    assert not learned_answer(summary)


@pytest.mark.engine
def test_what_is_no_better_than_an_empty_map_has_not_learned_the_task(tmp_path: Path) -> None:
    summary = scored(tmp_path, skill=-0.8)
    found = learned_answer(summary)
    assert [text.partition(" has not learned the task")[0] for text in found] == list(
        dict.fromkeys((summary.winner.name, summary.reference))
    )
    for one in summary.checks.unlearned:
        assert one.crossed.low <= 0
    page = text_of(written_page(tmp_path))
    assert page.index("has not learned the task") < page.index("Brier skill on test")


def test_one_split_without_an_interval_is_judged_by_the_difference_itself(tmp_path: Path) -> None:
    assert not scored(tmp_path / "good", num_splits=1).checks.unlearned
    assert scored(tmp_path / "bad", skill=-0.9, num_splits=1).checks.unlearned


@pytest.mark.engine
def test_an_interval_beyond_a_perfect_score_is_not_printed_and_says_why(tmp_path: Path) -> None:
    summary = scored(tmp_path, skill=0.13)
    row = summary.winner
    assert np.isnan([row.low, row.high]).all()
    assert row.no_interval == "interval not estimable: it leaves the scale of the score, which ends at 1"
    assert "95 % interval not estimable: it leaves the scale of the score, which ends at 1" in scores_answer(summary)
    assert "not estimable" in text_of(written_page(tmp_path))


@pytest.mark.parametrize(
    ("name", "limits"),
    [("brier_skill", (-np.inf, 1)), ("brier", (0, np.inf)), ("dice_dml", (0, 1)), ("volume_error", (-np.inf, np.inf))],
)
def test_a_metric_has_the_limits_that_its_perfect_value_sets(name: str, limits: tuple[float, float]) -> None:
    assert TABLE[name].limits == limits


def test_limits_of_every_metric_hold_its_perfect_value_and_that_of_an_empty_prediction() -> None:
    for row in TABLE.values():
        low, high = row.limits
        assert low <= row.best <= high
        assert not isinstance(row.when_prediction_empty, float | int) or low <= row.when_prediction_empty <= high


def test_an_interval_on_one_degree_of_freedom_is_not_printed_and_says_why(tmp_path: Path) -> None:
    table = np.full((4, 2), np.nan)
    table[[0, 1], 0], table[[2, 3], 1] = (0.1, 0.2), (0.3, 0.35)  # two folds
    test = primary_test(ScoreTables(("a", "b", "c", "d"), (0, 1), {}), table)
    assert test.df == pytest.approx(1)
    assert test.p > 0
    assert np.isnan([test.low, test.high]).all()
    assert test.remarks[-1] == "interval not estimable: it stands on one degree of freedom"
    assert "95 % interval not estimable (one degree of freedom), p = " in effect_in_words(test, test.p)
    assert interval(NAN, NAN) == "not estimable"
    summary = scored(tmp_path, num_splits=2)
    assert summary.comparisons[0].crossed.df < 1.5
    assert any("not estimable" in text.get_text() for axis in forest_figure(summary).axes for text in axis.texts)


def test_a_difference_whose_sign_depends_on_the_grid_is_named(tmp_path: Path) -> None:
    turned = scored(tmp_path / "turned", prepared=-0.2)
    (comparison,) = turned.comparisons
    assert turned.checks.prepared == {OTHER: pytest.approx(comparison.crossed.mean - 0.2)}
    (text,) = (text for text in caveats(turned) if "depends on the grid" in text)
    for value in (comparison.crossed.mean, turned.checks.prepared[OTHER]):
        assert number(value, signed=True) in text
    assert not any("depends on the grid" in text for text in caveats(scored(tmp_path / "same", prepared=0.01)))


@pytest.mark.engine
def test_every_case_has_a_row_and_the_csv_has_all(tmp_path: Path) -> None:
    summary = scored(tmp_path, num_tested=9)
    cases, rows = summary.checks.cases, load_run(tmp_path).results
    assert len(cases) == summary.num_cases > 20
    of_winner = [case.winner for case in cases]
    assert of_winner == sorted(of_winner, reverse=True)
    first = cases[0]
    mine = rows[(rows["case"] == first.case) & (rows["metric"] == "brier_skill")]
    of_candidate = mine.groupby("candidate", observed=True)["value"].mean()
    assert (first.winner, first.reference) == (of_candidate[summary.winner.name], of_candidate[summary.reference])
    assert first.difference == pytest.approx(first.winner - first.reference)
    assert first.num_splits == mine["split"].nunique()
    assert csv_tables(summary)["cases"].count("\n") == len(cases) + 1
    page = text_of(written_page(tmp_path))
    assert f"The 10 best and the 10 worst of {len(cases)} cases" in page
    assert page.count(f" {first.case} {first.subject} ") == 1


@pytest.mark.engine
def test_the_share_of_the_largest_cases_stands_beside_the_skill_of_a_case(tmp_path: Path) -> None:
    summary = scored(tmp_path)
    volumes = [case.volume_mm3 for case in summary.checks.cases]
    assert summary.checks.largest_share == pytest.approx(3000 / sum(volumes))
    assert summary.checks.case_skill == {CONTROL: 0.5, OTHER: 0.5}
    share = f"{100 * summary.checks.largest_share:.0f} %"
    assert f"the 3 largest of {len(volumes)} cases hold {share} of the reference volume" in text_of(written_page(tmp_path))


@pytest.mark.engine
def test_every_score_says_its_subset_and_its_grid(tmp_path: Path) -> None:
    scored(tmp_path)
    page = written_page(tmp_path).read_text().replace("&#39;", "'")
    captions = re.findall('<figcaption>(.*?)</figcaption>|<p class="note">(.*?)</p>', page, flags=re.S)
    means = [text for pair in captions for text in pair if "Means on test" in text or "Mean Dice" in text]
    assert means
    for text in means:
        assert "own grid" in text


@pytest.mark.engine
def test_methods_name_what_was_done_and_cite_it(tmp_path: Path) -> None:
    summary = scored(tmp_path)
    text = text_of(written_page(tmp_path))
    methods = text[text.index("For a paper:") :]
    for words in ("softseg_dist 0.1.0", "PyTorch 2.13.0", "30 subjects", "split 4 times", "18, 6 and 6", "2 raters", CONTROL):
        assert words in methods
    assert TABLE["brier_skill"].meaning[:20] in methods
    assert f"n = {summary.num_tested} tested subjects, 4 splits" in methods
    for source in ("10.1016/j.media.2021.102038", "Brier GW", "Satterthwaite FE", "Holm S", "Wilcoxon F", "Nadeau C"):
        assert source in methods


def test_control_and_winner_stand_side_by_side(tmp_path: Path) -> None:
    soft = np.zeros((24, 20))
    soft[8:14, 6:12] = 0.7
    figure = overlay_figure([Overlay("sub-001", "best", soft, soft, {CONTROL: soft / 2, OTHER: soft}, 0.9, (0.5, 0.5))])
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:6] == ["image", "soft truth", CONTROL, "minus truth", OTHER, "minus truth"]
    alone = overlay_figure([Overlay("sub-001", "best", soft, soft, {OTHER: soft}, 0.9, (0.5, 0.5))])
    assert [axis.get_title() for axis in alone.axes][:4] == ["image", "soft truth", OTHER, "minus truth"]
