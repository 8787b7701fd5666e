"""Two runs compared: what differs, what may be paired, and differences that were planted come back."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sealed_files import put, put_table, value_of
from synthetic_run import write_run
from synthetic_search import give_up
from typer.testing import CliRunner

from softseg_dist.cli.main import app, main
from softseg_dist.errors import UserError
from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.numerics.statistics import holm
from softseg_dist.report.comparison import (
    CandidateContrast,
    RunComparison,
    answer,
    caveats,
    compare,
    comparison_json,
    pairing_sentence,
)
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise

CONTROL, SOFT, BOTH = "hard-sigmoid-dice", "soft-sigmoid-dice", "soft-normrelu-wing"
NAMES = (CONTROL, SOFT, BOTH)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("first") / "run", candidates=NAMES)


@pytest.fixture
def second(first: Path, tmp_path: Path) -> Path:
    """A copy of the first run, to be changed."""
    return Path(shutil.copytree(first, tmp_path / "second"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    put(path, change(value_of(path)))


def shift(run: Path, candidate: str, by: float, sd: float = 0.0) -> None:
    """Change a candidate's scores in the soft metrics by `by` and noise."""
    table = pd.read_parquet(run / "results.parquet")
    rows = (table["candidate"] == candidate) & table["threshold"].isna()
    table.loc[rows, "value"] += np.random.default_rng(1).normal(by, sd, rows.sum())
    put_table(table, run / "results.parquet")


def other_splits(run: Path, num_kept: int) -> None:
    """One person of training moves to validation in all splits but the first `num_kept`."""

    def moved(split: dict[str, Any]) -> dict[str, Any]:
        one, *rest = split["train"]
        return split | {"train": rest, "validation": [*split["validation"], one]}

    edit(run / "splits.json", lambda splits: splits[:num_kept] + [moved(split) for split in splits[num_kept:]])


def compared(a: Path, b: Path, *candidates: str | None, metric: str | None = None) -> RunComparison:
    pair = (*candidates, None, None)[:2]
    return compare((load_run(a), load_run(b)), (str(a), str(b)), pair, metric)


def contrast(found: RunComparison, name: str) -> CandidateContrast:
    return next(c for c in found.contrasts if (c.a.candidate, c.b.candidate) == (name, name))


def scores(run: Path, candidate: str, metric: str = "dice_dml") -> pd.DataFrame:
    rows = load_run(run).results.query("metric == @metric and reference == 'mean' and candidate == @candidate")
    return rows.pivot_table(index="subject", columns="split", values="value", observed=True)


def test_equal_runs_differ_by_nothing(first: Path, second: Path) -> None:
    found = compared(first, second)
    assert [c.test.mean for c in found.contrasts] == [0, 0, 0]
    assert all(c.paired_by == "subject and split" and c.test.num_subjects == 20 for c in found.contrasts)
    assert (found.study, found.versions, found.only_a, found.only_b) == ({}, {}, (), ())
    assert not any(c.changed for c in found.contrasts)
    assert "all scores are the same" in answer(found)
    assert answer(compared(first, second, SOFT)).startswith(f"{SOFT} of B has the same scores as {SOFT} of A")


def test_a_planted_difference_comes_back_by_the_crossed_test(first: Path, second: Path) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    shift(second, CONTROL, 0.0, sd=0.01)
    found = compared(first, second)
    planted, none = contrast(found, SOFT), contrast(found, CONTROL)
    assert planted.test == crossed_test((scores(second, SOFT) - scores(first, SOFT)).to_numpy())
    assert planted.test.low < 0.03 < planted.test.high
    assert planted.p_holm < 0.001
    assert none.p_holm > 0.05
    assert [c.p_holm for c in found.contrasts] == pytest.approx(holm([c.test.p for c in found.contrasts]), nan_ok=True)
    assert f"B is better than A for {SOFT}" in answer(found)
    assert "Holm-corrected p < 0.001; 36 pairs of 20 subjects, 6 splits" in answer(compared(first, second, SOFT))


def test_swapping_the_runs_flips_every_sign(first: Path, second: Path) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    edit(second / "study.json", lambda study: study | {"seed": 1})
    there, back = compared(first, second, SOFT), compared(second, first, SOFT)
    (forth,), (reverse,) = there.contrasts, back.contrasts
    assert reverse.test.mean == pytest.approx(-forth.test.mean)
    assert (reverse.test.low, reverse.test.high) == pytest.approx((-forth.test.high, -forth.test.low))
    assert reverse.test.p == pytest.approx(forth.test.p)
    assert (there.study, back.study) == ({"seed": ("0", "1")}, {"seed": ("1", "0")})


def test_less_is_better_where_the_metric_says_so(first: Path, second: Path) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    text = answer(compared(first, second, SOFT, metric="brier"))
    assert f"{SOFT} of B is worse than {SOFT} of A on Brier score (lower is better) (difference +0.0" in text


def test_winners_are_compared_and_marked(first: Path, second: Path) -> None:
    winner = summarise(load_run(first)).winner.name
    shift(second, CONTROL, 0.2, sd=0.01)
    found = compared(first, second)
    assert [(c.a.candidate, c.b.candidate) for c in found.contrasts if c.winners] == [(winner, CONTROL)]
    assert any("chosen by scores of its own run" in text for text in caveats(found))


def test_splits_are_paired_by_their_people_not_by_their_number(first: Path, second: Path) -> None:
    edit(second / "splits.json", lambda splits: [s | {"index": 5 - s["index"]} for s in reversed(splits)])
    table = pd.read_parquet(second / "results.parquet")
    put_table(table.assign(split=5 - table["split"]), second / "results.parquet")
    found = compared(first, second, SOFT)
    assert found.pairing.splits == tuple((i, 5 - i) for i in range(6))
    assert [c.test.mean for c in found.contrasts] == [0]


def test_splits_that_only_one_run_has_are_left_out(first: Path, second: Path) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    other_splits(second, num_kept=4)
    found = compared(first, second, SOFT)
    expected = crossed_test((scores(second, SOFT) - scores(first, SOFT)).loc[:, :3].to_numpy())
    assert found.contrasts[0].test == expected
    assert "4 splits have the same people in both of 6 in A and 6 in B" in pairing_sentence(found)


@pytest.mark.parametrize(("num_kept", "said"), [(0, "no split of A has"), (1, "only one split of A has")])
def test_without_common_splits_subjects_are_paired(first: Path, second: Path, num_kept: int, said: str) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    other_splits(second, num_kept)
    found = compared(first, second, SOFT)
    (only,) = found.contrasts
    differences = scores(second, SOFT).mean(axis=1) - scores(first, SOFT).mean(axis=1)
    expected = stats.ttest_1samp(differences, 0)
    assert only.paired_by == "subject"
    assert (only.test.t, only.test.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert said in pairing_sentence(found)
    assert "took part" not in pairing_sentence(found), "the same people take part in both"
    assert any("ignores the variation between training runs" in text for text in caveats(found))


def test_other_people_in_other_splits_leave_the_subjects_that_both_tested(first: Path, tmp_path: Path) -> None:
    found = compared(first, write_run(tmp_path, candidates=[SOFT], num_subjects=24, seed=3), SOFT)
    assert found.contrasts[0].test.num_subjects == len(found.pairing.subjects) > 2
    assert "30 people took part in A, 24 in B, 24 in both" in pairing_sentence(found)


def test_missing_fits_leave_less_to_pair_than_the_runs_have(first: Path, tmp_path: Path) -> None:
    found = compared(first, write_run(tmp_path, candidates=NAMES, missing=[(SOFT, j) for j in range(1, 6)]))
    assert contrast(found, SOFT).paired_by == "subject"
    assert contrast(found, CONTROL).paired_by == "subject and split"
    assert "B: 5 of 18 fits have no score; tests use what both have." in caveats(found)


def test_fits_that_a_race_has_saved_are_not_missing(first: Path, second: Path) -> None:
    give_up(second, BOTH, after=3, incumbent=SOFT)
    found = compared(first, second, SOFT)
    assert (found.b.planned, found.b.finished) == (15, 15)
    assert not any("have no score" in text for text in caveats(found))


def test_equal_names_in_other_data_sets_are_other_people(first: Path, second: Path) -> None:
    edit(second / "study.json", lambda study: study | {"data": study["data"] | {"folder": "elsewhere"}})
    found = compared(first, second)
    assert found.study == {"data.folder": ("gm_challenge", "elsewhere")}
    for c in found.contrasts:
        assert c.paired_by == "nothing"
        assert np.isnan([c.test.p, c.p_holm]).all()
        assert c.test.mean == c.b.mean - c.a.mean
    assert "Bids(gm_challenge), B about Bids(elsewhere): subjects of the same name are other people" in pairing_sentence(found)
    assert answer(found).startswith("Nothing could be tested")


def test_other_grids_and_versions_and_recipes_are_said(first: Path, second: Path) -> None:
    def coarser(run: dict[str, Any]) -> dict[str, Any]:
        other = {"store_fingerprint": "f" * 16, "data": run["data"] | {"spacing_mm": [1.0, 1.0]}}
        return run | other | {"versions": run["versions"] | {"torch": "3.0"}}

    edit(second / "run.json", coarser)
    for path in (second / "study.json", second / "fits" / SOFT / "candidate.json"):
        put(path, json.loads(json.dumps(value_of(path)).replace('"degrees": 20.0', '"degrees": 5.0')))
    found = compared(first, second, SOFT)
    assert found.study == {"store": ("0123456789abcdef", "f" * 16)}
    assert found.versions == {"torch": ("2.13.0", "3.0")}
    assert contrast(found, SOFT).changed == {"augment.0.degrees": ("20.0", "5.0")}
    said = " ".join(caveats(found))
    assert "prepared in different ways (grid: 0.5 x 0.5 mm in A, 1 x 1 mm in B)" in said
    assert "scored on" not in said, "all scores are on the grids of the files"
    assert "images or labels have changed" in said


def test_values_that_do_not_exist_are_counted_once(first: Path, second: Path) -> None:
    table = pd.read_parquet(second / "results.parquet")
    soft = (table["candidate"] == SOFT) & (table["metric"] == "dice_dml") & (table["reference"] == "mean")
    table.loc[table.index[soft][:2], "value"] = np.nan
    put_table(table, second / "results.parquet")
    found = compared(first, second)
    assert contrast(found, SOFT).test.num_pairs == 34
    assert any(text.startswith("2 of 216 values of the metric are undefined") for text in caveats(found))


def test_two_candidates_of_one_run_differ_as_its_report_says(first: Path) -> None:
    (found,) = compared(first, first, CONTROL, SOFT).contrasts
    expected = next(c for c in summarise(load_run(first)).comparisons if c.candidate == SOFT)
    assert found.test == expected.crossed
    assert found.changed == {"label": ("hard", "soft")}


def test_trials_of_two_searches_are_compared_only_if_they_are_the_same_recipe(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", candidates=[CONTROL], proposed=["trial-000", "trial-001"], num_splits=2)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    edit(b / "fits/trial-001/candidate.json", lambda record: record | {"recipe": record["recipe"] | {"label": "hard"}})
    found = compared(a, b)
    winners = {(c.a.candidate, c.b.candidate) for c in found.contrasts if c.winners}
    pairs = {(c.a.candidate, c.b.candidate) for c in found.contrasts}
    assert pairs - winners <= {(CONTROL, CONTROL), ("trial-000", "trial-000")}
    assert found.other_trials == ("trial-001",)
    assert any("share a name but not the recipe" in text for text in caveats(found))


def test_json_holds_the_numbers_and_no_nan(first: Path, second: Path) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    found = compared(first, second)
    told = json.loads(json.dumps(comparison_json(found), allow_nan=False))
    assert told["answer"] == answer(found)
    assert [c["test"]["mean"] for c in told["contrasts"]] == [c.test.mean for c in found.contrasts]


def refused(a: Path, b: Path, *candidates: str | None, metric: str | None = None) -> str:
    with pytest.raises(UserError) as raised:
        compared(a, b, *candidates, metric=metric)
    return str(raised.value)


def test_what_cannot_be_compared_is_refused_in_one_line(first: Path, second: Path, tmp_path: Path) -> None:
    assert refused(first, first).startswith(f"{first}: compared with itself; name two")
    assert refused(first, second, "nobody").endswith(f"has no candidate 'nobody'; there are {', '.join(NAMES)}")
    assert "--metric must be one of brier, dice_dml, " in refused(first, second, metric="loss")
    assert f"{first}: no test case has the metric mae" in refused(first, second, metric="mae")
    edit(second / "study.json", lambda study: study | {"objective": "brier"})
    assert f"dice_dml in {first} and brier in {second}; choose with --metric: brier, dice_dml" in refused(first, second)
    assert any("brier and dice_dml chose the epochs" in t for t in caveats(compared(first, second, SOFT, metric="ece")))

    failed = write_run(tmp_path / "failed", candidates=[CONTROL, SOFT], num_splits=2, failed=[(SOFT, 0), (SOFT, 1)])
    assert f"{failed}: no fit of {SOFT} has finished" in refused(first, failed, SOFT)

    strange = write_run(tmp_path / "strange", candidates=["hard-normrelu-dice"], num_splits=2, control=None)
    edit(strange / "study.json", lambda study: study | {"data": {"type": "Phantom", "shape": "cord", "seed": 0}})
    assert "nothing in common: no candidate of the same name, and A is about Bids" in refused(first, strange)
    assert compared(first, strange, SOFT, "hard-normrelu-dice").contrasts[0].paired_by == "nothing"


@pytest.mark.engine
def test_the_command_says_the_same_as_json(first: Path, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shift(second, SOFT, 0.03, sd=0.01)
    words = ["compare", str(first), second.as_uri()]
    shown = CliRunner().invoke(app, words)
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert shown.exit_code == 0
    lines = shown.output.splitlines()
    assert told["answer"] in lines
    assert all(f"Note: {text}" in lines for text in told["caveats"])
    for found in told["contrasts"]:
        assert any(line.startswith(f"{found['a']['candidate']}") for line in lines)
    assert f"{told['contrasts'][1]['test']['mean']:+.3f}" in shown.output
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal: columns are aligned
    monkeypatch.setenv("COLUMNS", "160")
    assert re.search(rf"{CONTROL} {{3,}}0\.\d{{3}}  0\.\d{{3}} ", CliRunner().invoke(app, words).output)


def test_the_command_refuses_in_one_line_with_exit_code_2(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["softseg", "compare", str(first), str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere: not a run folder" in line
