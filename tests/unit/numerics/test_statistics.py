"""Statistics: the tests that stand beside the primary one, Holm's correction and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_studies import simulate

from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.numerics.statistics import bland_altman, corrected_t_test, holm, paired_bootstrap, subject_test, wilcoxon_test

NAN = float("nan")
PROPERTY = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


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
    crossed, (low, high) = crossed_test(table), paired_bootstrap(table, seed=0)
    assert low < np.nanmean(table) < high
    assert 0.7 * (crossed.high - crossed.low) < high - low < 1.6 * (crossed.high - crossed.low)


def test_bootstrap_is_reproducible_and_undefined_without_two_subjects_and_splits():
    table = simulate(np.random.default_rng(9), subjects=8, splits=4, tested=2)
    assert paired_bootstrap(table, seed=1) == paired_bootstrap(table, seed=1)
    assert paired_bootstrap(table, seed=1) != paired_bootstrap(table, seed=2)
    assert np.isnan(paired_bootstrap(np.full((2, 2), NAN), seed=0)).all()
    assert np.isnan(paired_bootstrap(np.array([[0.1, 0.2]]), seed=0)).all()


def test_limits_of_agreement_by_hand():
    found = bland_altman(np.array([3.0, 5.0, 7.0]), np.array([2.0, 5.0, 5.0]))
    assert (found.bias, found.n) == ((1 + 0 + 2) / 3, 3)
    assert (found.low, found.high) == pytest.approx((1 - 1.96 * 1.0, 1 + 1.96 * 1.0))  # sd of 1, 0, 2 is 1


def test_one_pair_has_a_bias_and_no_limits():
    one = bland_altman(np.array([3.0]), np.array([1.0]))
    assert (one.bias, one.n) == (2.0, 1)
    assert np.isnan([one.low, one.high]).all()
