"""What a report says beside the objective: planted calibration, volumes, lesions, raters; and nothing of what was not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sealed_files import put, put_table, value_of
from synthetic_measures import ALL, FOUND, INTER_RATER, LESIONS, MISSED, OVERCONFIDENCE, RECALIBRATED, VOLUME_BIAS
from synthetic_run import CELLS, write_run, written_page

from softseg_dist.report.breakdown import by_site
from softseg_dist.report.measures import NAN, ReliabilityTable, recalibrated_of, reliability_of
from softseg_dist.report.paired_tests import new_sites_test
from softseg_dist.report.run_folder import RunData, load_run
from softseg_dist.report.scores import ScoreTables
from softseg_dist.report.tables import Summary, summarise

CONTROL = "hard-sigmoid-dice"
NAMES = CELLS[:3]
RATERS = ("rater1", "rater2", "rater3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    return write_run(folder, candidates=NAMES, measured=ALL, sessions=2, raters=RATERS, num_splits=4)


@pytest.fixture(scope="module")
def run(folder: Path) -> RunData:
    return load_run(folder)


@pytest.fixture(scope="module")
def summary(run: RunData) -> Summary:
    return summarise(run)


def rows_of(run: RunData, metric: str, candidate: str = CONTROL) -> pd.DataFrame:
    return run.results[(run.results["metric"] == metric) & (run.results["candidate"] == candidate)]


def test_reliability_tables_add_up_over_cases_and_splits(run: RunData, summary: Summary):
    table = summary.measures.reliability[CONTROL]
    voxels = rows_of(run, "reliability_voxels").groupby("threshold")["value"].sum()
    assert table.edges == tuple(voxels.index)
    assert table.voxels == tuple(voxels)
    assert table.predicted == pytest.approx([edge + 0.05 for edge in table.edges])
    assert table.observed == pytest.approx([edge + 0.05 - OVERCONFIDENCE for edge in table.edges])
    assert table.ece == pytest.approx(OVERCONFIDENCE)
    assert sum(table.shares) == pytest.approx(1)
    assert table.num_cases == 4 * 6 * 2


def test_recalibrated_scores_stand_beside_those_before(summary: Summary):
    assert list(summary.measures.recalibrated) == sorted(NAMES)
    for name, one in summary.measures.recalibrated.items():
        assert one.name == name
        assert list(one.before) == list(one.after) == list(RECALIBRATED)
        assert one.after == pytest.approx({metric: after for metric, (_, after) in RECALIBRATED.items()})
        (standing,) = (standing for standing in summary.ranking if standing.name == name)
        assert one.before == pytest.approx({"brier_skill": 0.7, "ece": standing.beside["ece"], "ece_max": 0.3})
        assert one.missed == pytest.approx(MISSED)


def test_a_candidate_with_a_fit_that_is_not_recalibrated_has_no_such_line(run: RunData):
    rows = run.results[run.results["subset"] == "test"]
    lacks = (rows["candidate"] == CONTROL) & (rows["split"] == 1)
    lacks &= rows["metric"].str.endswith("_recalibrated") | (rows["metric"] == "volume_at_0_mm3")
    assert set(recalibrated_of(rows[~lacks])) == set(NAMES) - {CONTROL}


def test_an_empty_bin_has_no_mean_and_no_weight(run: RunData):
    rows = run.results[run.results["metric"].str.startswith("reliability")].copy()
    rows.loc[rows["threshold"] == 0.9, "value"] = 0.0
    table = reliability_of(rows)[CONTROL]
    assert np.isnan(table.predicted[-1])
    assert np.isnan(table.observed[-1])
    assert table.ece == pytest.approx(OVERCONFIDENCE)


def test_volumes_agree_up_to_the_planted_bias_one_pair_per_subject(summary: Summary):
    (agreement,) = summary.measures.agreements[CONTROL]
    assert len(agreement.subjects) == agreement.limits.n == summary.num_tested
    assert agreement.limits.bias == pytest.approx(VOLUME_BIAS * np.mean(agreement.true_mm3), rel=0.15)
    assert agreement.limits.low < agreement.limits.bias < agreement.limits.high


def test_a_subject_counts_once_in_volumes_however_often_it_was_tested(run: RunData, summary: Summary):
    (agreement,) = summary.measures.agreements[CONTROL]
    rows = rows_of(run, "volume_pred_mm3")
    subject = agreement.subjects[0]
    assert agreement.predicted_mm3[0] == pytest.approx(rows.loc[rows["subject"] == subject, "value"].mean())


def test_lesions_are_counted_at_the_threshold_of_the_grid(run: RunData, summary: Summary):
    lesions = summary.measures.lesions[CONTROL]
    for size, planted in FOUND.items():
        rows = rows_of(run, f"lesions_found_{size}")
        rate = lesions.sensitivity[size]
        assert rate.count == rows.loc[rows["threshold"] == 0.4, "value"].sum()
        assert rate.total == LESIONS[size] * 4 * 6 * 2
        assert rate.share == pytest.approx(planted, abs=3 * (planted * (1 - planted) / rate.total) ** 0.5)
        assert rate.share == pytest.approx(rate.count / rate.total)
    assert lesions.sensitivity[""].total == sum(lesions.sensitivity[size].total for size in FOUND)
    false, predicted = rows_of(run, "false_lesions"), rows_of(run, "lesions_predicted")
    counts = [part.loc[part["threshold"] == 0.4, "value"].sum() for part in (false, predicted)]
    assert [lesions.false_discovery.count, lesions.false_discovery.total] == counts


def test_cases_without_a_surface_are_left_out_and_counted(run: RunData, summary: Summary):
    for name in NAMES:
        rows = rows_of(run, "hd95_mm", name)
        at_grid = rows[rows["threshold"] == 0.4]["value"]
        surfaces = summary.measures.surfaces[name]
        assert (surfaces.undefined, surfaces.values) == (at_grid.isna().sum(), len(at_grid))
        assert 1 < surfaces.hd95_mm < 4
    assert any(surfaces.undefined for surfaces in summary.measures.surfaces.values())


def test_cases_whose_prediction_is_empty_are_counted_as_missed(tmp_path: Path):
    folder = write_run(tmp_path, candidates=NAMES[:2], num_splits=2, measured=("surface", "lesions"))
    table = pd.read_parquet(folder / "results.parquet")
    at_grid = (table["candidate"] == NAMES[0]) & (table["threshold"] == 0.4) & (table["split"] == 0)
    table.loc[at_grid & (table["metric"] == "lesions_predicted"), "value"] = 0
    put_table(table, folder / "results.parquet")
    distances = table.loc[at_grid & (table["metric"] == "hd95_mm"), "value"]
    surfaces = summarise(load_run(folder)).measures.surfaces
    assert surfaces[NAMES[0]].missed == distances.notna().sum() > 0
    assert surfaces[NAMES[1]].missed == 0


def test_the_scores_of_sites_add_up_to_all_scores(run: RunData, summary: Summary):
    sites = summary.measures.sites
    assert [site.site for site in sites] == ["A", "B"]
    assert sum(site.num_scores for site in sites) == summary.winner.num_scores
    assert sum(site.num_subjects for site in sites) == summary.num_tested
    mean = sum(site.one * site.num_scores for site in sites) / summary.winner.num_scores
    assert mean == pytest.approx(summary.winner.mean)
    other = sum(site.other * site.num_scores for site in sites) / summary.winner.num_scores
    assert other == pytest.approx(next(s.mean for s in summary.ranking if s.name == summary.reference))
    one_site = dict(run.run["data"]) | {"site_of": dict.fromkeys(run.run["data"]["site_of"], "A")}
    assert summarise(replace(run, run={"data": one_site})).measures.sites == ()


def test_raters_among_themselves_count_every_subject_once(run: RunData, summary: Summary):
    raters = summary.measures.raters
    assert raters is not None
    assert raters.names == RATERS
    rows = run.results[run.results["metric"] == "inter_rater_dice"]
    by_subject = rows.groupby("subject", observed=True)["value"].mean()  # the same for all candidates and splits
    assert raters.inter_rater == pytest.approx(by_subject.mean())
    assert (raters.low, raters.high) == pytest.approx(tuple(by_subject.quantile([0.25, 0.75])))
    assert abs(raters.inter_rater - INTER_RATER) < 0.05
    assert raters.num_subjects == summary.num_tested
    assert 0.1 < raters.candidates[CONTROL].ged2 < 0.3
    assert raters.candidates[CONTROL].dice.keys() == set(RATERS)


def test_what_is_measured_against_all_raters_is_not_a_rater(summary: Summary):
    assert set(summary.winner.by_reference) == set(RATERS)


def test_uncertainty_stands_by_method(summary: Summary):
    assert list(summary.measures.uncertainty) == ["mc_dropout", "tta"]
    for entries in summary.measures.uncertainty.values():
        assert {entry.name for entry in entries} == set(NAMES)
        assert 0.3 < entries[0].measures["ged2"] < 0.5
        assert 0.1 < entries[0].measures["entropy"] < 0.3


@pytest.mark.engine
def test_every_figure_has_a_caption_that_says_n(folder: Path):
    page = written_page(folder).read_text()
    for section in ("calibration", "volumes", "objects", "sites", "raters", "uncertainty"):
        assert f'<section id="{section}">' in page
        assert f'<a href="#{section}">' in page
    assert "A difference in calibration that vanishes after recalibration was a matter of scale" in page
    captions = [part.split("</figcaption>")[0] for part in page.split("<figcaption>")[1:]]
    assert len(captions) == page.count("<img ")
    assert all("n = " in caption or "(n in the title)" in caption for caption in captions)


@pytest.mark.engine
def test_a_run_without_these_rows_shows_no_such_section(tmp_path: Path):
    folder = write_run(tmp_path, candidates=NAMES, num_splits=2, raters=())
    record = value_of(folder / "run.json")
    del record["data"]["site_of"]
    put(folder / "run.json", record)
    measures = summarise(load_run(folder)).measures
    assert not any(vars(measures).values())
    page = written_page(folder).read_text()
    for section in ("holdout", "search", "calibration", "volumes", "objects", "sites", "raters", "uncertainty"):
        assert f'id="{section}"' not in page
    assert "recalibrat" not in page.lower()
    assert 'id="threshold"' in page


def test_an_ensemble_over_splits_is_read_from_its_own_table(tmp_path: Path):
    rows = pd.read_parquet(write_run(tmp_path, candidates=NAMES[:2], measured=("uncertainty",), num_splits=2) / "results.parquet")
    tta = rows[rows["metric"].str.startswith("tta_") & (rows["split"] == 0)]
    ensemble = tta.assign(split=-1, metric=tta["metric"].str.replace("tta", "ensemble"))
    members = ensemble.groupby(["candidate", "subject"]).head(1).assign(metric="ensemble_members", reference="mean", value=2.0)
    put_table(pd.concat([ensemble, members]), tmp_path / "ensemble.parquet")
    measured = summarise(load_run(tmp_path)).measures.uncertainty
    assert list(measured) == ["mc_dropout", "tta", "ensemble"]
    assert {entry.name for entry in measured["ensemble"]} == set(NAMES[:2])
    assert measured["ensemble"][0].measures["members"] == 2
    assert measured["ensemble"][0].num_subjects == 6


def test_a_reliability_table_without_a_voxel_has_shares_of_zero() -> None:
    empty = ReliabilityTable("a", (0.0, 0.5), (0.0, 0.0), (NAN, NAN), (NAN, NAN), NAN, 1)
    assert empty.shares == (0.0, 0.0)


def test_sites_of_predictions_without_splits_have_the_interval_of_a_t_test() -> None:
    subjects = tuple("abcdefgh")
    tables = {"x": np.linspace(0.5, 0.9, 8)[:, None], "y": np.linspace(0.4, 0.7, 8)[:, None]}
    sites = by_site(
        ScoreTables(subjects, (0,), tables, of_models=True), dict.fromkeys(subjects, "A") | {"a": "B", "b": "B"}, "x", "y"
    )
    (one, other) = (site.crossed for site in sites)
    expected = stats.ttest_1samp((tables["x"] - tables["y"])[2:, 0], 0).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((expected.low, expected.high))
    assert (one.num_pairs, other.num_pairs) == (6, 2)


def test_subjects_of_an_unknown_site_are_no_site() -> None:
    differences, site_of = np.arange(10.0).reshape(5, 2), {"a": "A", "b": "B", "c": "", "d": ""}
    assert new_sites_test(differences, "abcde", site_of) is None
    assert new_sites_test(differences, "abcde", {**site_of, "c": "C"}) is not None
