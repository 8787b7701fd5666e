"""Statistics: the tests of docs/statistics.md, their size, and designs that leave something undetermined."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_studies import SETTINGS, Setting, simulate
from statsmodels.regression.mixed_linear_model import MixedLM

from softseg_dist.numerics.statistics import (
    bland_altman,
    corrected_t_test,
    crossed_test,
    holm,
    paired_bootstrap,
    subject_test,
    wilcoxon_test,
)

NAN = float("nan")
PROPERTY = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def henderson(table: np.ndarray) -> tuple[float, float]:
    """Mean and its variance straight from the formulas of docs/statistics.md, with raw sums of squares."""
    mask = ~np.isnan(table)
    x, n, m, num = np.nan_to_num(table), mask.sum(1), mask.sum(0), mask.sum()
    mean = x.sum() / num
    t0, ts, tf, tm = (x**2).sum(), (x.sum(1) ** 2 / n).sum(), (x.sum(0) ** 2 / m).sum(), num * mean**2
    k1, k2 = (mask / n[:, None]).sum(), (mask / m).sum()
    k3, k4 = (n**2).sum() / num, (m**2).sum() / num
    left = np.array([[num - k3, k1 - k4, len(n) - 1], [k2 - k3, num - k4, len(m) - 1], [num - k3, num - k4, num - 1]])
    s, f, e = np.maximum(np.linalg.solve(left, [ts - tm, tf - tm, t0 - tm]), 0)
    return mean, s * k3 / num + f * k4 / num + e / num


@given(SEEDS)
@PROPERTY
def test_crossed_test_follows_the_moment_equations(seed: int):
    table = simulate(np.random.default_rng(seed), subjects=12, splits=6, tested=5, effect=0.3)
    table = table[~np.isnan(table).all(axis=1)]
    mean, variance = henderson(table)
    result = crossed_test(table)
    assert result.mean == pytest.approx(mean)
    assert result.t == pytest.approx(mean / np.sqrt(variance), rel=1e-6)
    assert (result.low + result.high) / 2 == pytest.approx(mean)
    assert result.high - mean == pytest.approx(stats.t.ppf(0.975, result.df) * np.sqrt(variance), rel=1e-6)


def test_crossed_test_of_a_complete_table_finds_the_components_of_the_analysis_of_variance():
    generator = np.random.default_rng(4)
    a, b = 9, 5
    table = generator.normal(0, 2, (a, 1)) + generator.normal(0, 1, (1, b)) + generator.normal(0, 0.5, (a, b))
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    error = ((table - rows - columns + table.mean()) ** 2).sum() / ((a - 1) * (b - 1))
    result = crossed_test(table)
    assert result.var_error == pytest.approx(error)
    assert result.var_subject == pytest.approx(float(rows.var(ddof=1)) - error / b)
    assert result.var_split == pytest.approx(float(columns.var(ddof=1)) - error / a)


def test_crossed_test_recovers_planted_components():
    table = simulate(np.random.default_rng(1), subjects=150, splits=150, tested=60, sd=(1.0, 0.5, 0.7), effect=2.0)
    result = crossed_test(table)
    assert result.var_subject == pytest.approx(1.0**2, rel=0.25)
    assert result.var_split == pytest.approx(0.5**2, rel=0.25)
    assert result.var_error == pytest.approx(0.7**2, rel=0.05)
    assert result.low < 2.0 < result.high


@pytest.mark.parametrize("setting", SETTINGS)
def test_crossed_test_rejects_about_five_percent_of_studies_of_equal_candidates(setting: Setting):
    generator = np.random.default_rng(SETTINGS.index(setting))
    rejected = [crossed_test(simulate(generator, *setting)).p < 0.05 for _ in range(1000)]
    assert 0.03 <= np.mean(rejected) <= 0.075


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_crossed_test_of_a_complete_table_is_the_mixed_model(seed: int):
    table = simulate(np.random.default_rng(seed), subjects=20, splits=12, tested=20, effect=0.3)
    cells = pd.DataFrame([(i, j, d) for (i, j), d in np.ndenumerate(table)], columns=["subject", "split", "d"])
    components = {"subject": "0 + C(subject)", "split": "0 + C(split)"}
    model = MixedLM.from_formula("d ~ 1", cells, re_formula="0", vc_formula=components, groups=np.ones(len(cells)))
    fitted = model.fit(reml=True)
    by_name = dict(zip(model.exog_vc.names, fitted.vcomp, strict=True))
    result = crossed_test(table)
    assert result.mean == pytest.approx(fitted.fe_params["Intercept"], rel=1e-3)
    assert result.var_subject == pytest.approx(by_name["subject"], rel=1e-3)
    assert result.var_split == pytest.approx(by_name["split"], rel=1e-3)
    assert result.var_error == pytest.approx(fitted.scale, rel=1e-3)
    assert result.t == pytest.approx(fitted.tvalues["Intercept"], rel=1e-3)


def test_crossed_test_finds_an_effect_that_the_corrected_t_test_mostly_misses():
    generator = np.random.default_rng(3)
    tables = [simulate(generator, effect=0.6) for _ in range(150)]
    ratio = 8 / 24
    crossed = np.mean([crossed_test(t).p < 0.05 for t in tables])
    corrected = np.mean([corrected_t_test(np.nanmean(t, axis=0), ratio).p < 0.05 for t in tables])
    assert crossed > 0.6 > 0.4 > corrected


@given(SEEDS)
@PROPERTY
def test_crossed_test_does_not_depend_on_order_and_scales_with_its_data(seed: int):
    generator = np.random.default_rng(seed)
    table = simulate(generator, subjects=10, splits=5, tested=4, effect=0.5)
    shuffled = table[generator.permutation(10)][:, generator.permutation(5)]
    one, other = crossed_test(table), crossed_test(-3 * shuffled)
    assert (other.mean, other.low, other.high) == pytest.approx((-3 * one.mean, -3 * one.high, -3 * one.low))
    assert other.p == pytest.approx(one.p)


def test_one_subject_per_split_and_split_per_subject_is_the_one_sample_t_test():
    d = np.random.default_rng(0).normal(0.3, 1, 12)
    table = np.where(np.eye(12, dtype=bool), d, NAN)
    result = crossed_test(table)
    expected = stats.ttest_1samp(d, 0)
    interval = expected.confidence_interval()
    assert (result.t, result.p, result.df) == pytest.approx((expected.statistic, expected.pvalue, 11))
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert "one-sample t-test" in result.note


def test_k_fold_design_is_solved_without_an_error_component():
    generator = np.random.default_rng(5)
    table = np.full((20, 5), NAN)
    for i in range(20):
        table[i, i % 5] = generator.normal(0.2, 1)
    result = crossed_test(table)
    folds = np.array([table[~np.isnan(table[:, j]), j] for j in range(5)])
    within = folds.var(axis=1, ddof=1).mean()
    assert result.var_error == 0
    assert result.var_subject == pytest.approx(within)
    assert result.var_split == pytest.approx(max(0, folds.mean(axis=1).var(ddof=1) - within / 4))
    assert 0 < result.p < 1
    assert "tested once" in result.note


def test_k_fold_with_different_folds_speaks_about_new_training_runs():
    """All subjects of a fold share one difference: the folds, not the subjects, are the evidence."""
    of_fold = np.array([0.1, 0.3, 0.2, 0.4, 0.25])
    table = np.full((20, 5), NAN)
    table[np.arange(20), np.arange(20) % 5] = of_fold[np.arange(20) % 5]
    assert crossed_test(table).p == pytest.approx(stats.ttest_1samp(of_fold, 0).pvalue)


def test_one_subject_per_split_is_solved_without_an_error_component():
    generator = np.random.default_rng(6)
    table = np.full((4, 12), NAN)
    for j in range(12):
        table[j % 4, j] = generator.normal(0.2, 1)
    result = crossed_test(table)
    assert result.var_error == 0
    assert 0 < result.p < 1
    assert "each split tested one subject" in result.note


def test_subjects_and_splits_without_any_pair_do_not_count():
    table = simulate(np.random.default_rng(7), subjects=10, splits=5, tested=4, effect=0.2)
    padded = np.full((13, 7), NAN)
    padded[2:12, 1:6] = table
    assert crossed_test(padded) == crossed_test(table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.full((3, 3), NAN), "no pair"),
        (np.empty((0, 0)), "no pair"),
        (np.array([[0.1, 0.2, 0.3]]), "only one subject"),
        (np.array([[0.1], [0.2], [0.3]]), "only one split"),
        (np.array([[0.1, NAN]]), "only one subject"),
        (np.full((4, 3), 0.1), "all differences are equal"),
        (np.zeros((4, 3)), "all differences are equal"),
    ],
)
def test_a_table_that_cannot_be_tested_says_why(table: np.ndarray, words: str):
    result = crossed_test(table)
    assert np.isnan([result.p, result.t, result.low, result.high]).all()
    assert words in result.note
    assert result.mean == pytest.approx(np.nanmean(table) if (~np.isnan(table)).any() else NAN, nan_ok=True)


def test_wilcoxon_is_exact_and_names_its_smallest_p():
    result = wilcoxon_test(np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06]))
    assert result.p == pytest.approx(2.0 ** (1 - 6))
    assert "2^(1-6)" in result.note
    assert wilcoxon_test(np.array([-0.01, 0.02, 0.03, 0.04, 0.05, NAN, 0.06])).p == pytest.approx(2 * 2 / 2**6)


def test_wilcoxon_of_no_difference_is_one_and_drops_zeros():
    assert wilcoxon_test(np.zeros(6)).p == 1
    assert wilcoxon_test(np.array([0.1, 0.2, 0.0, 0.3])).p == pytest.approx(2.0 ** (1 - 3))
    assert np.isnan(wilcoxon_test(np.array([NAN])).p)


def test_corrected_t_of_the_worked_example():
    result = corrected_t_test(np.array([0.02, 0.03, 0.01, 0.025, 0.015]), 1 / 3)
    assert result.statistic == pytest.approx(3.464102, abs=1e-6)
    assert result.p == pytest.approx(0.025721, abs=1e-6)


@pytest.mark.parametrize(("values", "words"), [([], "fewer"), ([0.1], "fewer"), ([0.1, 0.1, 0.1], "equal")])
def test_corrected_t_that_cannot_be_had_says_why(values: list[float], words: str):
    result = corrected_t_test(np.array(values), 1 / 3)
    assert np.isnan(result.p)
    assert words in result.note


@given(SEEDS)
@PROPERTY
def test_subject_test_is_the_one_sample_t_test_of_scipy(seed: int):
    values = np.random.default_rng(seed).normal(0.3, 1, 9)
    result, expected = subject_test(np.append(values, NAN)), stats.ttest_1samp(values, 0)
    assert (result.t, result.df, result.p) == pytest.approx((expected.statistic, 8, expected.pvalue))
    assert (result.low, result.high) == pytest.approx(expected.confidence_interval(0.95))
    assert result.num_subjects == 9


@pytest.mark.parametrize(("values", "words"), [([], "fewer"), ([0.1, NAN], "fewer"), ([0.1, 0.1, 0.1], "equal")])
def test_subject_test_that_cannot_be_had_says_why(values: list[float], words: str):
    result = subject_test(np.array(values))
    assert np.isnan(result.p)
    assert words in result.note


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([3 * 0.01, 2 * 0.03, 2 * 0.03])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_holm_leaves_nan_out_of_the_count():
    assert holm([0.02, NAN, 0.5]) == pytest.approx([2 * 0.02, NAN, 0.5], nan_ok=True)


def test_bootstrap_agrees_with_the_crossed_interval_within_a_factor():
    table = simulate(np.random.default_rng(8), effect=0.4)
    crossed, bootstrap = crossed_test(table), paired_bootstrap(table, seed=0)
    width = crossed.high - crossed.low
    assert bootstrap.mean == pytest.approx(crossed.mean)
    assert 0.7 * width < bootstrap.high - bootstrap.low < 1.6 * width


def test_bootstrap_is_reproducible_and_defined_for_small_tables():
    table = simulate(np.random.default_rng(9), subjects=8, splits=4, tested=2)
    assert paired_bootstrap(table, seed=1) == paired_bootstrap(table, seed=1)
    assert paired_bootstrap(table, seed=1) != paired_bootstrap(table, seed=2)
    assert "no pair" in paired_bootstrap(np.full((2, 2), NAN), seed=0).note
    assert "nothing to resample" in paired_bootstrap(np.array([[0.1, 0.2]]), seed=0).note


def test_limits_of_agreement_by_hand():
    found = bland_altman(np.array([3.0, 5.0, 7.0]), np.array([2.0, 5.0, 5.0]))
    assert (found.bias, found.n) == ((1 + 0 + 2) / 3, 3)
    assert (found.low, found.high) == pytest.approx((1 - 1.96 * 1.0, 1 + 1.96 * 1.0))  # sd of 1, 0, 2 is 1


def test_one_pair_has_a_bias_and_no_limits():
    one = bland_altman(np.array([3.0]), np.array([1.0]))
    assert (one.bias, one.n) == (2.0, 1)
    assert np.isnan([one.low, one.high]).all()
