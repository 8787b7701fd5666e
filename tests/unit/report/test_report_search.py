"""What a report says of a search, of held-out subjects, of who is best, and of factors that depend on each other."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from sealed_files import put, put_table, value_of
from synthetic_run import CELLS, write_run, written_page
from synthetic_search import give_up, hold_out, nest, tune

from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.numerics.statistics import holm
from softseg_dist.report.findings import caveats, effects_answer, group_answer, holdout_answer, interactions_answer
from softseg_dist.report.held_out import outer_answer, outer_table
from softseg_dist.report.page import outer_json, write_outer_page
from softseg_dist.report.run_folder import RunData, load_outer, load_run
from softseg_dist.report.scores import soft_scores
from softseg_dist.report.tables import Summary, summarise
from softseg_dist.words import number

CONTROL = "hard-sigmoid-dice"
TRIALS = [f"trial-{i:04d}" for i in range(6)]


def summary_of(folder: Path) -> Summary:
    return summarise(load_run(folder))


def searched(folder: Path, **options: object) -> Path:
    return write_run(folder, candidates=[CONTROL], proposed=TRIALS, num_splits=3, num_tested=4, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def factorial(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunData, Summary]:
    """All cells on six splits."""
    run = load_run(write_run(tmp_path_factory.mktemp("factorial")))
    return run, summarise(run)


def test_fits_of_a_candidate_that_was_given_up_are_saved_not_missing(tmp_path: Path):
    folder = searched(tmp_path)
    give_up(folder, "trial-0004", after=1, incumbent="trial-0001")
    summary = summary_of(folder)
    training = {t.name: t for t in summary.training}
    assert (training["trial-0004"].raced, training["trial-0004"].missing, training["trial-0004"].finished) == (2, 0, 1)
    assert summary.num_planned == sum(t.finished for t in summary.training) == 7 * 3 - 2
    assert summary.raced["trial-0004"].after == 1
    said = caveats(summary)
    assert any("1 of 7 candidates (2 fits saved)" in text for text in said)
    assert not any("have no score" in text for text in said)


def test_a_candidate_that_was_given_up_never_leads_whatever_its_few_splits_say(tmp_path: Path):
    before = summary_of(searched(tmp_path))
    leader = before.winner.name
    give_up(tmp_path, leader, after=1, incumbent=before.ranking[1].name)
    after = summary_of(tmp_path)
    assert after.winner.name == before.ranking[1].name
    assert after.ranking[-1].name == leader
    assert after.ranking[-1].rank == len(after.ranking)


def test_nobody_on_the_front_is_beaten_in_both_objectives(tmp_path: Path):
    folder = searched(tmp_path)
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"second_objective": "ece"})
    summary = summary_of(folder)
    pareto = summary.pareto
    assert pareto is not None
    assert (pareto.beside.name, pareto.beside.sign) == ("ece", -1)
    assert {point.name for point in pareto.points} == {CONTROL, *TRIALS}
    for point in pareto.points:
        beaten = any(o.first >= point.first and o.second <= point.second and o is not point for o in pareto.points)
        assert point.front is not beaten
    means = {standing.name: (standing.mean, standing.beside["ece"]) for standing in summary.ranking}
    assert all((point.first, point.second) == pytest.approx(means[point.name]) for point in pareto.points)


def test_trials_of_tuning_are_shown_and_never_ranked(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:4], num_splits=2)
    assert any("one fixed learning rate" in text for text in caveats(summary_of(folder)))
    tune(folder, CELLS[1], {0.0003: 0.8, 0.001: 0.83, 0.003: 0.86}, chosen=0.003)
    summary = summary_of(folder)
    assert {standing.name for standing in summary.ranking} == set(CELLS[:4])
    (tuned,) = summary.tuned
    assert (tuned.name, tuned.num_trials, tuned.best, tuned.worst) == (CELLS[1], 3, 0.86, 0.8)
    assert tuned.chosen == {"optim.lr": "0.003"}
    assert len(summary.effects) == 2  # the study file has a factorial still, whatever the rates became
    assert (summary.compute.num_fits, summary.compute.num_tuning) == (4 * 2 + 3, 3)
    assert not any("one fixed learning rate" in text for text in caveats(summary))


@pytest.mark.engine
def test_held_out_subjects_are_tested_once_and_said_first(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:4], num_splits=4)
    winner = summary_of(folder).winner.name
    hold_out(folder, winner, CONTROL, gain=0.03)
    summary = summary_of(folder)
    held = summary.holdout
    assert held is not None
    assert held.crossed is not None
    assert held.crossed.low < 0.03 < held.crossed.high
    assert [score.name for score in held.scores] == [winner, CONTROL]
    assert (held.scores[0].score.num_subjects, held.scores[0].score.num_splits) == (8, 4)
    assert held.scores[0].dice["grid"] == pytest.approx(held.scores[0].score.mean)
    assert number(held.crossed.mean, signed=True) in holdout_answer(summary)
    assert any("in the ranking is optimistic" in text for text in caveats(summary))


def test_subjects_that_were_opened_twice_or_for_another_winner_confirm_less(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:3], num_splits=2)
    winner = summary_of(folder).winner.name
    hold_out(folder, winner, CONTROL, gain=0.03, opened=2)
    assert any("opened 2 times, the last at 2026-11-21 10:00 UTC" in text for text in caveats(summary_of(folder)))
    other = next(name for name in CELLS[1:3] if name != winner)
    hold_out(folder, other, CONTROL, gain=0.03)
    said = caveats(summary_of(folder))
    assert any(f"opened for {other}, which no longer ranks highest" in text for text in said)
    assert any("The mean of the highest of several candidates is optimistic" in text for text in said)


def test_subjects_that_nobody_has_looked_at_stay_closed(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2)
    hold_out(folder, CELLS[1], CONTROL, gain=0.0, opened=0)
    summary = summary_of(folder)
    assert holdout_answer(summary) == ""
    assert any("8 subjects in no split: not opened yet" in text for text in caveats(summary))


def test_who_is_not_distinguishable_from_the_best_follows_from_holm(factorial: tuple[RunData, Summary]):
    run, summary = factorial
    scores = soft_scores(run.results, "dice_dml")
    others = [standing.name for standing in summary.ranking[1:]]
    adjusted = holm([crossed_test(scores.difference(name, summary.winner.name)).p for name in others])
    expected = tuple(name for name, p in zip(others, adjusted, strict=True) if p >= 0.05)
    assert tuple(rival.candidate for rival in summary.rivals if rival.tied) == expected
    assert expected
    assert set(expected) <= {name for name in CELLS if name.startswith("soft")}
    text = group_answer(summary)
    assert all(name in text for name in expected)
    assert f"{len(expected)} of 7 others" in text


def test_all_others_worse_than_the_best_is_said_so(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:3], num_splits=4)
    table = pd.read_parquet(folder / "results.parquet")
    table["value"] += 0.2 * ((table["candidate"] == CELLS[2]) & (table["metric"] == "dice_dml"))
    put_table(table, folder / "results.parquet")
    summary = summary_of(folder)
    assert not any(rival.tied for rival in summary.rivals)
    assert group_answer(summary) == (
        f"Lower on test than the highest ranked, {CELLS[2]}: all 2 others, at the 5 % level after Holm's correction; "
        "as it was picked by its rank, this describes and does not confirm."
    )


def test_effects_that_add_up_show_no_interaction(factorial: tuple[RunData, Summary]):
    _, summary = factorial
    assert [(i.factor, i.other) for i in summary.interactions] == [
        ("activation", "loss"),
        ("activation", "label"),
        ("loss", "label"),
    ]
    for interaction in summary.interactions:
        assert interaction.num_cells == 2
        assert interaction.crossed.low < 0 < interaction.crossed.high
    assert "No interaction of two factors was shown" in interactions_answer(summary)


def test_an_interaction_is_found_and_said(factorial: tuple[RunData, Summary]):
    run, _ = factorial
    table = run.results.copy()
    both = table["candidate"].str.contains("soft-normrelu") & (table["metric"] == "dice_dml")
    table["value"] += 0.04 * both  # soft labels gain with NormReLU only
    summary = summarise(replace(run, results=table))
    found = {(i.factor, i.other): i for i in summary.interactions}
    planted = found["activation", "label"]
    assert (planted.level, planted.base, planted.other_level, planted.other_base) == ("NormReLU", "Sigmoid", "soft", "hard")
    assert planted.crossed.low < 0.04 < planted.crossed.high
    assert planted.p_holm < 0.01
    assert found["loss", "label"].p_holm > 0.05
    text = interactions_answer(summary)
    assert "averages over other factors mislead" in text
    assert "NormReLU instead of Sigmoid adds" in text
    assert "with soft than with hard (activation by label" in text
    assert effects_answer(summary)


@pytest.mark.engine
def test_the_page_tells_all_of_a_search(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL], proposed=TRIALS[:6], num_splits=2, num_tested=4)
    give_up(folder, "trial-0004", after=1, incumbent="trial-0001")
    tune(folder, CONTROL, {0.0003: 0.8, 0.003: 0.86}, chosen=0.003)
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"second_objective": "brier"})
    hold_out(folder, summary_of(folder).winner.name, CONTROL, gain=0.03)
    page, summary = written_page(folder).read_text(), summary_of(folder)
    for told in ("Two objectives", "Given up early", "Tuning of each", "optim.lr 0.003"):
        assert told in page
    assert "Opened once, at 2026-11-20 10:00 UTC" in page
    assert page.index("8 held-out subjects, in no split") < page.index("<nav")
    assert page.count('tied"><td class="rank">') == sum(rival.tied for rival in summary.rivals)
    assert "the group may be too small" in page
    assert page.count("trial-0004") > 1


def test_a_nested_study_says_what_its_procedure_is_worth(tmp_path: Path):
    nest(tmp_path, gain=0.02)
    outer = load_outer(tmp_path)
    assert outer is not None
    table = outer_table(outer)
    assert table.difference is not None
    assert table.difference.low < 0.02 < table.difference.high
    assert (table.difference.num_pairs, table.difference.num_splits) == (5 * 6, 5)
    page = unescape(write_outer_page(outer, tmp_path).read_text())
    said = outer_json(outer)
    assert "5 of 6 outer splits complete" in page
    assert "chose differently: soft-normrelu-dice in 3 outer splits, soft-sigmoid-dice in 2 outer splits." in page
    assert said["answer"] in page
    assert number(table.difference.mean, signed=True) in said["answer"]
    assert "Is it < or >?" in page
    json.dumps(said, allow_nan=False)


def test_a_nested_study_names_the_subject_that_weakens_its_test(tmp_path: Path) -> None:
    nest(tmp_path, gain=0.02)
    rows = pd.read_parquet(tmp_path / "outer.parquet")
    far = (rows["candidate"] == "winner") & (rows["subject"] == "007")
    put_table(rows.assign(value=rows["value"] - far), tmp_path / "outer.parquet")
    outer = load_outer(tmp_path)
    assert outer is not None
    page = unescape(write_outer_page(outer, tmp_path).read_text())
    assert "One subject carries the variance (007, mean difference -0.15)" in page
    assert "Of the difference: differences are skewed" in page


def test_a_nested_study_without_a_control_compares_nothing(tmp_path: Path):
    nest(tmp_path, gain=0.0, control=None)
    outer = load_outer(tmp_path)
    assert outer is not None
    assert outer_table(outer).difference is None
    assert "control" not in outer_answer(outer_table(outer))
    assert write_outer_page(outer, tmp_path).is_file()


def test_a_note_of_the_ledger_is_read_with_care(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2)
    path = folder / "fits" / CELLS[1] / "candidate.json"
    put(path, value_of(path) | {"note": "every learning rate that was tried has failed"})
    assert f"{CELLS[1]}: every learning rate that was tried has failed." in caveats(summary_of(folder))
