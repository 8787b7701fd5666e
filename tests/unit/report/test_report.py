"""The report: numbers that follow from planted effects, runs that are unfinished or odd, and one page with everything inside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sealed_files import put, put_table, value_of, vouch
from synthetic_run import CELLS, GAIN, recipe, write_run, written_page

from softseg_dist.data.phantom import Phantom
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.store import build_store
from softseg_dist.errors import UserError
from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.numerics.statistics import holm
from softseg_dist.report.figures import MOST, forest_figure, png, shown, svg
from softseg_dist.report.findings import answer, caveats, effects_answer, group_answer, scores_answer, sites_answer
from softseg_dist.report.fits import varying_fields
from softseg_dist.report.page import summary_json, write_page
from softseg_dist.report.paired_tests import OF_MODELS
from softseg_dist.report.pictures import Overlay, choose_overlays, overlay_figure
from softseg_dist.report.run_folder import RecordedCandidate, RunData, load_run
from softseg_dist.report.scores import soft_scores
from softseg_dist.report.tables import Summary, plain, summarise
from softseg_dist.training.model import Model, save_weights
from softseg_dist.words import number, p_value

CONTROL = "hard-sigmoid-dice"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return load_run(write_run(tmp_path_factory.mktemp("factorial")))


@pytest.fixture(scope="module")
def summary(run: RunData) -> Summary:
    return summarise(run)


def overlay(label: str = "best", shape: tuple[int, int] = (40, 30)) -> Overlay:
    x, y = np.indices(shape)
    truth = np.clip(6 - np.hypot(x - 20, y - 12), 0, 1)
    predictions = {CONTROL: np.roll(truth, 2, axis=0), "soft-normrelu-wing": np.roll(truth, 1, axis=0)}
    return Overlay("sub-001", label, truth + 0.1 * x, truth, predictions, 0.9, (0.5, 0.5), "GM")


def test_mean_is_over_subjects_of_means_over_cases_of_means_over_classes(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL], num_splits=1, num_subjects=9, num_tested=2, classes=("GM", "WM"))
    table = pd.read_parquet(folder / "results.parquet")
    first = table["subject"].iloc[0]
    table = table[table["subset"] == "test"]
    second_session = table[table["subject"] == first].assign(case="second", value=lambda t: t["value"] - 0.1)
    put_table(pd.concat([table, second_session]), folder / "results.parquet")
    rows = table[(table["metric"] == "dice_dml") & (table["reference"] == "mean")]
    by_subject = rows.groupby("subject")["value"].mean()
    expected = (by_subject[first] - 0.1 / 2 + by_subject.drop(first).sum()) / 2
    assert summarise(load_run(folder)).winner.mean == pytest.approx(expected)


def test_ranking_is_ordered_by_the_objective_and_complete(summary: Summary):
    means = [standing.chosen_by for standing in summary.ranking]
    assert summary.chosen_on == "validation"
    assert means == sorted(means, reverse=True)
    assert [standing.rank for standing in summary.ranking] == list(range(1, 9))
    assert {standing.name for standing in summary.ranking} == set(CELLS)
    for standing in summary.ranking:
        assert standing.low < standing.mean < standing.high
        assert standing.mean == pytest.approx(np.mean(list(standing.by_split.values())))  # splits of equal size
        assert standing.sd == pytest.approx(np.std(list(standing.by_split.values()), ddof=1))


def test_comparisons_are_the_tests_of_the_paired_differences(run: RunData, summary: Summary):
    rows = run.results[(run.results["metric"] == "dice_dml") & (run.results["reference"] == "mean")]
    scores = rows.pivot_table(index="subject", columns="split", values="value", aggfunc="mean", observed=True)
    tables = {
        name: part.pivot_table(index="subject", columns="split", values="value", observed=True).reindex_like(scores).to_numpy()
        for name, part in rows.groupby("candidate", observed=True)
    }
    for comparison in summary.comparisons:
        expected = crossed_test(tables[comparison.candidate] - tables[CONTROL])
        assert comparison.crossed.p == pytest.approx(expected.p)
        assert comparison.crossed.mean == pytest.approx(expected.mean)
        assert comparison.crossed.num_pairs == 6 * 6
    adjusted = holm([comparison.crossed.p for comparison in summary.comparisons])
    assert [comparison.p_holm for comparison in summary.comparisons] == pytest.approx(adjusted)
    assert summary.test_to_train == pytest.approx(6 / 18)


def test_main_effects_find_what_was_planted(summary: Summary):
    effects = {effect.factor: effect for effect in summary.effects}
    assert {factor: (e.level, e.base) for factor, e in effects.items()} == {
        "label": ("soft", "hard"),
        "activation": ("NormReLU", "Sigmoid"),
        "loss": ("AdaptiveWing", "Dice"),
    }
    planted = {"label": GAIN["soft"], "activation": GAIN["normrelu"], "loss": GAIN["wing"]}
    for factor, effect in effects.items():
        assert effect.crossed.low < planted[factor] < effect.crossed.high
        assert effect.num_cells == 4
    assert effects["label"].p_holm < 0.01


def test_no_main_effects_unless_the_factorial_is_complete(tmp_path: Path):
    assert summarise(load_run(write_run(tmp_path, candidates=CELLS[:3], num_splits=2))).effects == ()


def test_answer_names_effect_interval_p_and_n(summary: Summary):
    text = answer(summary)
    best = summary.comparisons[0]
    assert best.candidate in text
    assert number(best.crossed.mean, signed=True) in text
    assert "95 % interval" in text
    assert "Holm-corrected p" in text
    assert f"{best.crossed.num_subjects} tested subjects, 6 splits" in text
    assert "soft is better than hard" in effects_answer(summary)


def test_answer_claims_nothing_where_nothing_was_shown(tmp_path: Path):
    candidates = [CONTROL, "hard-sigmoid-wing", "hard-normrelu-wing"]
    text = answer(summarise(load_run(write_run(tmp_path, candidates=candidates, num_splits=3, seed=1))))
    assert text.startswith("No candidate was shown to be better than the control")


def test_answer_says_so_when_nothing_can_be_tested(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:4], num_splits=2, num_subjects=5, num_tested=1)
    rows = pd.read_parquet(folder / "results.parquet")
    put_table(rows.assign(subject="the only one"), folder / "results.parquet")
    summary = summarise(load_run(folder))
    assert answer(summary).startswith("Nothing could be tested (only one subject")
    assert effects_answer(summary) == ""


@pytest.mark.parametrize(("gain", "words"), [(0.1, "is better than"), (-0.1, "is worse than"), (0.0, "not shown to differ")])
def test_answer_for_one_candidate_and_its_control(tmp_path: Path, gain: float, words: str):
    folder = write_run(tmp_path, candidates=[CONTROL, "hard-sigmoid-wing"], num_splits=4)
    rows = pd.read_parquet(folder / "results.parquet")
    rows["value"] += gain * (rows["candidate"] == "hard-sigmoid-wing")
    put_table(rows, folder / "results.parquet")
    assert words in answer(summarise(load_run(folder)))


def test_an_objective_that_should_be_low_ranks_the_lowest_first(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[*CELLS[:2], "soft-sigmoid-dice"], objective="brier", num_splits=3)
    table = pd.read_parquet(folder / "results.parquet")
    chosen = (table["metric"] == "brier") & (table["candidate"] == "soft-sigmoid-dice")
    noise = np.random.default_rng(0).normal(0, 1e-4, len(table))
    table["value"] = table["value"] + noise - 0.01 * chosen
    put_table(table, folder / "results.parquet")
    summary = summarise(load_run(folder))
    assert summary.winner.name == "soft-sigmoid-dice"
    assert summary.comparisons[0].crossed.mean < 0
    assert "Brier score (lower is better)" in answer(summary)
    assert "soft-sigmoid-dice (difference −0.010" in answer(summary)


def test_an_objective_of_the_user_is_reported_by_what_its_json_says_without_its_code(tmp_path: Path):
    row = {"name": "ece", "title": "own error", "meaning": "what we look at", "higher_is_better": False}
    objective = {"type": "s009_mine:Gone", "code": "0123", "row": row}
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=3, objective=objective)
    summary = summarise(load_run(folder))
    assert (summary.objective.name, summary.objective.title, summary.objective.sign) == ("ece", "own error", -1)
    assert summary.objective.meaning == "what we look at"
    assert "own error (lower is better)" in answer(summary)


def test_dice_is_taken_at_the_threshold_that_each_fit_chose(run: RunData, summary: Summary):
    fit = next(f for f in run.finished if f.candidate == CONTROL and f.split == 0)
    rows = run.results[(run.results["candidate"] == CONTROL) & (run.results["reference"] == "mean")]
    at = rows[(rows["metric"] == "dice") & (rows["split"] == 0) & (rows["threshold"] == fit.thresholds["dice_optimal"])]
    assert len(at) == 6
    standing = next(s for s in summary.ranking if s.name == CONTROL)
    assert standing.thresholds["grid"] == pytest.approx(0.4)
    assert standing.dice["grid"] == pytest.approx(summary.curves[CONTROL][summary.curve_thresholds.index(0.4)])
    assert standing.dice["fixed"] < standing.dice["dice_optimal"]


@pytest.mark.engine
def test_an_unfinished_run_is_reported_from_what_is_there(tmp_path: Path):
    folder = write_run(tmp_path, collected=False, failed=[("soft-sigmoid-wing", 3)], missing=[(CONTROL, 5)])
    summary = summarise(load_run(folder))
    training = {t.name: t for t in summary.training}
    assert (training["soft-sigmoid-wing"].failed, training["soft-sigmoid-wing"].finished) == (1, 5)
    assert training[CONTROL].missing == 1
    pairs = {c.candidate: c.crossed.num_pairs for c in summary.comparisons}
    assert pairs["soft-sigmoid-wing"] == 4 * 6  # neither its failed split nor the control's missing one
    assert pairs["soft-sigmoid-dice"] == 5 * 6
    assert summary.failures == {"soft-sigmoid-wing/003": "loss is NaN in epoch 7"}
    assert any("2 of 48 fits have no score (1 failed, 1 not run yet)" in text for text in caveats(summary))


def test_a_candidate_gains_nothing_by_lacking_the_hardest_split(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL, "hard-sigmoid-wing"], missing=[("hard-sigmoid-wing", 2)])
    table = pd.read_parquet(folder / "results.parquet")
    soft = table["threshold"].isna()
    table.loc[soft & (table["split"] == 2), "value"] -= 0.4  # hard for everybody
    table.loc[soft & (table["candidate"] == "hard-sigmoid-wing"), "value"] -= 0.03
    put_table(table, folder / "results.parquet")
    first, second = summarise(load_run(folder)).ranking
    assert (first.name, second.name) == (CONTROL, "hard-sigmoid-wing")
    assert first.mean < second.mean


def test_without_a_control_the_highest_ranked_is_the_reference(tmp_path: Path):
    summary = summarise(load_run(write_run(tmp_path, candidates=CELLS[:3], control=None, num_splits=2)))
    assert summary.reference == summary.winner.name
    assert summary.winner.chosen_by == max(standing.chosen_by for standing in summary.ranking)
    assert answer(summary).startswith("The study names no control")
    assert any("was chosen by its mean on validation subjects" in text for text in caveats(summary))


def move(folder: Path, subset: str, candidate: str, by: float) -> None:
    """Change the objective of a candidate on test or on validation."""
    table = pd.read_parquet(folder / "results.parquet")
    here = (table["subset"] == subset) & (table["candidate"] == candidate) & (table["metric"] == "dice_dml")
    table.loc[here, "value"] += by
    put_table(table, folder / "results.parquet")


def test_what_is_tested_chooses_nothing(tmp_path: Path):
    """The best on validation wins, also where another one is better on test."""
    folder = write_run(tmp_path, candidates=CELLS[:3], num_splits=4)
    move(folder, "validation", CELLS[1], 0.2)
    move(folder, "test", CELLS[2], 0.2)
    summary = summarise(load_run(folder))
    assert summary.winner.name == CELLS[1]
    assert summary.winner.mean < next(s.mean for s in summary.ranking if s.name == CELLS[2])
    move(folder, "test", CELLS[2], 0.2)
    assert [s.name for s in summarise(load_run(folder)).ranking] == [s.name for s in summary.ranking]
    share = "(1 of 2 others, at the 5 % level after Holm's correction)."
    assert group_answer(summary) == (
        f"Better on test than the highest ranked, {CELLS[1]}: {CELLS[2]} {share} "
        f"Not shown to differ from the highest ranked, {CELLS[1]}: {CELLS[0]} {share}"
    )


def test_without_a_control_the_most_complete_is_compared_with_and_named(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:3], control=None, num_splits=6, missing=[(CELLS[2], 0)])
    move(folder, "validation", CELLS[2], 0.2)
    summary = summarise(load_run(folder))
    assert summary.winner.name == CELLS[2] != summary.reference
    assert f"{CELLS[2]} ranks highest on validation" in answer(summary)
    assert any(text.startswith(f"All are compared with {summary.reference}, which was chosen") for text in caveats(summary))


def test_what_users_call_things_is_shown_as_it_is(tmp_path: Path):
    row = {"name": "dice_dml", "title": "cost $a_{$ & <x>", "meaning": "m", "higher_is_better": True}
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2, classes=("G_$M$ <b>", "x"), measured=("volume", "reliability"))
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"objective": {"type": "own:Cost", "row": row}})
    page = written_page(folder).read_text()
    assert "G_$M$ &lt;b&gt;" in page
    assert "<b>" not in page[page.index("Read with care") :]


def test_the_methods_count_known_sites_and_cite_what_they_used(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:1], control=None, num_splits=2)
    recorded = value_of(folder / "run.json")
    recorded["data"] |= {"sites": {"": 20, "A": 20}, "num_subjects": 40}
    put(folder / "run.json", recorded)
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"repeats": 2})
    page = written_page(folder).read_text()
    methods = page[page.index('<section id="methods">') :]
    assert "of 40 subjects, " in methods
    assert "mean over its cases, classes and repeats" in methods
    assert "[4]" not in methods


def test_a_run_without_scores_on_validation_is_ranked_on_test_and_says_so(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:3], num_splits=4)
    table = pd.read_parquet(folder / "results.parquet")
    put_table(table[(table["subset"] == "test") | (table["candidate"] != CELLS[1])], folder / "results.parquet")
    summary = summarise(load_run(folder))
    assert summary.chosen_on == "test"
    assert summary.winner.mean == max(s.mean for s in summary.ranking)
    assert any("for lack of scores on validation" in text for text in caveats(summary))


def test_validation_subjects_who_are_never_tested_make_no_winner_optimistic(tmp_path: Path):
    summary = summarise(load_run(write_run(tmp_path, candidates=CELLS[:3], num_splits=1)))
    assert summary.chosen_tested == 0
    assert not any("optimistic" in text for text in caveats(summary))


def test_from_three_sites_on_a_test_over_sites_stands_beside_the_primary_test(run: RunData, summary: Summary):
    assert all(c.new_sites is None for c in summary.comparisons)  # two sites
    assert sites_answer(summary) == ""
    site_of = {subject: "ABC"[i % 3] for i, subject in enumerate(sorted(run.subjects))}
    three = summarise(replace(run, run={**run.run, "data": {**run.run["data"], "site_of": site_of}}))
    first, scores = three.comparisons[0], soft_scores(run.results, "dice_dml")
    table = pd.DataFrame(scores.difference(first.candidate, CONTROL), index=list(scores.subjects))
    of_subject = table.mean(axis=1).dropna()
    of_site = of_subject.groupby(of_subject.index.map(site_of)).mean()
    assert first.new_sites is not None
    assert first.new_sites.p == pytest.approx(stats.ttest_1samp(of_site, 0).pvalue)
    assert "for new sites (t-test over 3 sites)" in sites_answer(three)
    assert "new subjects of these sites" in sites_answer(three)


def test_what_weakens_a_test_is_read_with_care(tmp_path: Path):
    few = summarise(load_run(write_run(tmp_path / "few", candidates=CELLS[:3], num_splits=2)))
    assert any(text.startswith("2 splits, 1 degree of freedom") and CELLS[1] in text for text in caveats(few))
    folder = write_run(tmp_path / "one", candidates=CELLS[:2], num_splits=10, num_tested=12)
    table = pd.read_parquet(folder / "results.parquet")
    subject = table["subject"].iloc[0]
    one = (table["subject"] == subject) & (table["candidate"] == CELLS[1]) & (table["metric"] == "dice_dml")
    table.loc[one, "value"] -= 0.6
    put_table(table, folder / "results.parquet")
    said = [text for text in caveats(summarise(load_run(folder))) if "nearly blind" in text]
    assert len(said) == 1
    assert f"({subject}, mean difference" in said[0]


def test_one_tested_subject_is_said_once_and_makes_no_interval_approximate(tmp_path: Path):
    summary = summarise(load_run(write_run(tmp_path, candidates=CELLS[:4], num_splits=1, num_tested=1)))
    said = [scores_answer(summary), answer(summary), *caveats(summary)]
    assert sum("only one subject" in text for text in said) == 1
    assert not any("intervals are approximate" in text for text in said)


def test_a_control_without_scores_is_not_compared_with(tmp_path: Path):
    failed = [(CONTROL, j) for j in range(2)]
    summary = summarise(load_run(write_run(tmp_path, candidates=CELLS[:3], failed=failed, num_splits=2)))
    assert summary.reference == summary.winner.name
    assert summary.ranking[-1].rank is None
    assert f"The control {CONTROL} has no finished fit" in answer(summary)


@pytest.mark.engine
def test_one_candidate_and_one_split_still_make_a_page(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL], num_splits=1)
    page = written_page(folder).read_text()
    assert "nothing to compare it with" in page
    assert "<h2>Tests" not in page


def test_a_winner_of_a_search_comes_with_its_caveat(tmp_path: Path):
    proposed = [f"trial-{i:04d}" for i in range(MOST)]
    folder = write_run(tmp_path, candidates=CELLS[:4], proposed=proposed, num_splits=2, num_tested=4)
    summary = summarise(load_run(folder))
    assert summary.winner.proposed
    assert any("was found by a search" in text for text in caveats(summary))
    assert len(shown(summary)) == MOST + 1
    assert CONTROL in shown(summary)
    assert len(summary.effects) == 2  # of the factorial that the study file holds


def test_of_many_candidates_that_did_not_converge_some_are_named_and_all_counted(summary: Summary):
    slow = replace(summary, training=tuple(replace(t, not_converged=2) for t in summary.training))
    (text,) = (text for text in caveats(slow) if text.startswith("Not converged"))
    names = [f"{t.name} 2 of 6" for t in summary.training]
    assert text.endswith(f": {', '.join(names[:6])} and {len(names) - 6} more.")


@pytest.mark.engine
def test_fits_in_different_precisions_are_told_apart(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2)
    assert summarise(load_run(folder)).compute.engines.keys() == {"float32"}
    path = folder / "fits" / CONTROL / "000.json"
    put(path, value_of(path) | {"precision": "bfloat16", "engine": "bfloat16, graph"})
    summary = summarise(load_run(folder))
    assert summary.compute.engines["bfloat16, graph"] == 1
    assert any("trained in bfloat16 and in float32" in text for text in caveats(summary))
    assert "bfloat16, graph (1 fit)" in written_page(folder).read_text()


def test_values_that_do_not_exist_are_left_out_and_counted(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:3], num_splits=3)
    table = pd.read_parquet(folder / "results.parquet")
    empty = (table["candidate"] == CONTROL) & (table["split"] == 0) & (table["metric"] == "dice_dml")
    hit = table.index[empty & (table["reference"] == "mean")][:1]
    table.loc[hit, "value"] = np.nan
    put_table(table, folder / "results.parquet")
    summary = summarise(load_run(folder))
    control = next(s for s in summary.ranking if s.name == CONTROL)
    assert (control.undefined, control.values) == (1, 18)
    assert control.num_scores == 17
    assert any("1 of 54 values of the objective are undefined" in text for text in caveats(summary))


class _Reader(HTMLParser):
    """Text, addresses of everything that a browser would load, sections and the links to them."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.loaded: list[str] = []
        self.alts: list[str] = []
        self.linked: list[str] = []
        self.sections: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        addresses = [value for name in ("src", "href") if (value := given.get(name))]
        self.loaded += [address for address in addresses if not address.startswith("#")]
        self.linked += [address[1:] for address in addresses if address.startswith("#")]
        self.sections += [given["id"] or ""] if tag == "section" and "id" in given else []
        self.alts += [given.get("alt") or ""] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.engine
def test_the_page_holds_everything_and_says_what_the_json_says(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:4], num_splits=4)
    page = written_page(folder, [overlay("best"), overlay("worst")])
    reader = _Reader()
    reader.feed(page.read_text())
    text = " ".join(" ".join(reader.text).split())
    found = json.loads(json.dumps(summary_json(folder), allow_nan=False))

    assert page == folder / "report" / "index.html"
    assert all(address.startswith("data:image/") for address in reader.loaded)
    assert reader.linked == reader.sections
    assert not re.search(r"@import|url\(|<script|<link", page.read_text())
    assert len(reader.loaded) == len(reader.alts) == 4
    assert all(reader.alts)
    names = {"differences", "thresholds", "overlays", "learning"}
    assert {path.stem for path in folder.glob("report/*.png")} == names
    for said in (found["question"], found["answer"], found["effects_answer"], found["scores_answer"], *found["caveats"]):
        assert said in text
    for standing in found["ranking"]:
        assert standing["name"] in text
        assert number(standing["mean"]) in text
    for comparison in found["comparisons"]:
        assert p_value(comparison["p_holm"]) in text
        assert number(comparison["crossed"]["low"], signed=True) in text
    for word in ("0123456789abcdef", "89abcdef0123", "torch 2.13.0", "softseg run studies/s002_gray_matter.py"):
        assert word in text


@pytest.mark.engine
def test_cautions_of_the_run_are_read_with_care_and_identical_targets_before_the_answer(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2)
    record = value_of(folder / "run.json")
    cautions = [{"rule": "equal images", "text": "a = b twice"}, {"rule": "identical targets", "text": "hard = soft throughout"}]
    put(folder / "run.json", record | {"cautions": cautions})
    page, found = written_page(folder).read_text(), summary_json(folder)
    assert found["caveats"][:2] == ["a = b twice", "hard = soft throughout"]
    assert page.index("hard = soft throughout") < page.index(found["answer"][:30]) < page.index("a = b twice")
    assert page.count("hard = soft throughout") == 1


@pytest.mark.engine
def test_a_page_without_run_json_and_with_a_question_that_looks_like_html(tmp_path: Path):
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2, failed=[(CELLS[1], 1)])
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"question": "<script>alert(1)</script> a < b?"})
    (folder / "run.json").unlink()
    page = written_page(folder).read_text()
    assert "loss is NaN in epoch 7" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_json_has_no_nan_and_keeps_none():
    assert plain({"a": float("nan"), 1: (1.0, None)}) == {"a": None, "1": [1.0, None]}


def test_the_same_run_gives_the_same_figure(summary: Summary):
    assert svg(forest_figure(summary)) == svg(forest_figure(summary))


def test_an_empty_overlay_shows_the_whole_image():
    nothing = np.zeros((20, 16))
    figure = overlay_figure([Overlay("sub-001", "worst", nothing, nothing, {"a": nothing}, float("nan"), (0.5, 0.8))])
    assert len(png(figure)) > 1000


@pytest.mark.parametrize("collected", [True, False])
def test_results_of_an_older_version_are_refused_in_one_line(tmp_path: Path, collected: bool) -> None:
    """A table without a column of today, collected at the end of a run or not yet."""
    folder = write_run(tmp_path, candidates=CELLS[:2], num_splits=2, collected=collected)
    for path in folder.rglob("*.parquet"):
        put_table(pd.read_parquet(path).drop(columns="reference"), path)
        if not collected:
            vouch(path.parent)
    with pytest.raises(UserError, match=r"parquet was made by an older version of softseg_dist \(no column reference\)") as refused:
        load_run(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["study.json", "splits.json"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, missing: str):
    folder = write_run(tmp_path, candidates=[CONTROL], num_splits=1)
    (folder / missing).unlink()
    with pytest.raises(UserError, match="not a run folder"):
        load_run(folder)


def test_a_run_without_a_finished_fit_says_why(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL, CELLS[1]], num_splits=2)
    for path in folder.glob("fits/*/*.json"):
        if path.stem.isdecimal():
            path.unlink()
    with pytest.raises(UserError, match="no fit has finished yet"):
        load_run(folder)


def test_torn_files_are_named(tmp_path: Path):
    folder = write_run(tmp_path, candidates=[CONTROL], num_splits=2)
    record = folder / "fits" / CONTROL / "001.json"
    record.write_text(record.read_text()[:20])
    with pytest.raises(UserError, match=r"001\.json is not as it was written"):
        load_run(folder)


def test_candidates_that_differ_in_a_parameter_of_an_augmentation_show_it():
    flip, turn = {"type": "Flip"}, {"type": "Affine", "degrees": 10.0}

    def fields(one: list[dict[str, object]], other: list[dict[str, object]]) -> dict[str, dict[str, str]]:
        recipes = {"a": {"augment": one}, "b": {"augment": other}}
        return varying_fields([RecordedCandidate(name, recipe, False, {}, {}) for name, recipe in recipes.items()])

    assert fields([turn], [turn | {"degrees": 20.0}]) == {"a": {"augment.0.degrees": "10"}, "b": {"augment.0.degrees": "20"}}
    assert fields([turn, flip], []) == {"a": {"augment": "Affine + Flip"}, "b": {"augment": "none"}}


@pytest.mark.engine
def test_the_objective_is_explained_on_the_page(tmp_path: Path):
    page = written_page(write_run(tmp_path, candidates=CELLS[:2], num_splits=2)).read_text()
    assert page.index("Dice semimetric loss") < page.index("Contents")


def without_training(folder: Path, num_splits: int = 1, ours: str = "") -> Path:
    """A run folder of predictions that existed already: of one split nothing but test subjects; 0.5 alone but for `ours`."""
    write_run(folder, candidates=CELLS[:3], num_splits=num_splits, measured=("lesions", "surface"))
    if num_splits == 1:
        (split,) = value_of(folder / "splits.json")
        put(folder / "splits.json", [{"type": "Split", "index": 0, "test": split["test"]}])
    for path in folder.glob("fits/*/0*.json"):
        fit = value_of(path)
        known = {name: fit[name] for name in ("type", "candidate", "split", "state", "test_score")}
        thresholds = fit["thresholds"] if fit["candidate"] == ours else {"fixed": 0.5}
        put(path, known | {"thresholds": thresholds})
    for path in folder.rglob("history.jsonl"):
        path.unlink()
    for path in folder.glob("fits/*/candidate.json"):
        put(path, value_of(path) | {"recipe": {}})
    study = value_of(folder / "study.json")
    put(folder / "study.json", study | {"candidates": {name: {} for name in study["candidates"]}})
    return folder


def test_predictions_without_splits_are_tested_over_subjects_and_the_test_says_so(tmp_path: Path) -> None:
    summary = summarise(load_run(without_training(tmp_path)))
    assert summary.of_models
    for comparison in summary.comparisons:
        differences = soft_scores(load_run(tmp_path).results, "dice_dml").difference(comparison.candidate, comparison.reference)
        expected = stats.ttest_1samp(differences[:, 0], 0)
        assert comparison.crossed.p == pytest.approx(expected.pvalue)
        assert comparison.crossed.remarks == (OF_MODELS,)
    assert not any("Wilcoxon" in caveat for caveat in caveats(summary))


def with_store(folder: Path, num_subjects: int) -> Path:
    """The same run, with a store of cases of the same names."""
    data = Phantom(subjects=num_subjects, size=(16, 16), num_slices=1)
    store = build_store(folder / "stores", data.cases(None), data, Preprocess(dim=2))
    record = value_of(folder / "run.json") | {"store": str(store), "store_fingerprint": store.stem}
    put(folder / "run.json", record)
    return folder


def test_a_run_whose_objective_is_undefined_on_all_test_cases_has_a_report_without_pictures(tmp_path: Path) -> None:
    folder = with_store(write_run(tmp_path, candidates=CELLS[:2], num_splits=2), num_subjects=1)
    results = pd.read_parquet(folder / "results.parquet")
    results.loc[(results["metric"] == "dice_dml") & (results["subset"] == "test"), "value"] = np.nan
    put_table(results, folder / "results.parquet")
    run = load_run(folder)
    assert choose_overlays(run, summarise(run)) == ()
    assert write_page(run, summarise(run)).is_file()


@pytest.mark.parametrize("labels", [["best"], ["best", "worst"], ["best", "median", "worst"]], ids=len)
def test_no_case_is_shown_twice(tmp_path: Path, labels: list[str]) -> None:
    written = write_run(tmp_path, candidates=CELLS[:1], num_splits=1, num_subjects=9, num_tested=len(labels), seed=0)
    folder = with_store(written, num_subjects=9)
    save_weights(Model.of_json(recipe(CELLS[0]), 1, 1, (16, 16)), folder / "fits" / CELLS[0] / "000" / "best.safetensors")
    vouch(folder / "fits" / CELLS[0] / "000")
    run = load_run(folder)
    overlays = choose_overlays(run, summarise(run))
    assert [overlay.label for overlay in overlays] == labels
    assert len({overlay.case for overlay in overlays}) == len(labels)


def test_equal_candidates_are_called_equal(tmp_path: Path) -> None:
    folder = without_training(tmp_path)
    results = pd.read_parquet(folder / "results.parquet")
    one = results[results["candidate"] == CELLS[0]]
    put_table(pd.concat([one.assign(candidate=name) for name in CELLS[:3]]), folder / "results.parquet")
    found = answer(summarise(load_run(folder)))
    assert found.startswith(f"{CELLS[1]}, {CELLS[2]} and the control {CELLS[0]} have equal scores on")
    assert found.endswith("(6 tested subjects, 1 split).")


def test_where_one_candidate_has_thresholds_from_validation_the_others_are_cut_at_half(tmp_path: Path) -> None:
    summary = summarise(load_run(without_training(tmp_path, num_splits=6, ours=CELLS[1])))
    assert summary.used_rules == ("fixed", "grid", "dice_optimal")
    thresholds = {s.name: list(s.thresholds) for s in summary.ranking}
    assert thresholds == {CELLS[0]: ["fixed"], CELLS[1]: ["fixed", "grid", "dice_optimal"], CELLS[2]: ["fixed"]}
    assert set(summary.measures.surfaces) == set(summary.measures.lesions) == set(CELLS[:3])


@pytest.mark.engine
@pytest.mark.parametrize("num_splits", [1, 6])
def test_the_page_of_predictions_has_no_section_without_content(tmp_path: Path, num_splits: int) -> None:
    page = written_page(without_training(tmp_path, num_splits)).read_text()
    left_out = ["time of all fits", "fits finished", 'id="training"', "No pictures", ">grid<", ">Dice-optimal<"]
    assert not [text for text in left_out if text in page]
    assert ("Wilcoxon" in page) == ("Bootstrap" in page) == (num_splits > 1)
    assert ("t-test over subjects (primary)" in page) == (num_splits == 1)
    assert ("crossed random effects (primary)" in page) == (num_splits > 1)
    assert "nan" not in re.sub("<style.*?</style>|<img[^>]*>", "", page, flags=re.S)
