"""The primary test: worked examples, an independent version, its level, and designs that leave something undetermined."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from simulated_studies import SHORT, Setting, simulate

from softseg_dist.numerics.crossed_test import CrossedTest, crossed_test
from softseg_dist.numerics.statistics import corrected_t_test, wilcoxon_test

N = float("nan")
PROPERTY = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
STARTS = ((0.4, 0.2, 0.4), (0.05, 0.6, 0.35), (0.8, 0.1, 0.1), (0.1, 0.1, 0.8))
UNBALANCED = [[0.12, N, 0.05], [0.31, 0.22, N], [N, -0.08, -0.02], [0.18, 0.27, 0.09], [N, 0.02, 0.14]]
TWO_LEVELS = [[N, 0.15, 0.33], [0.31, 0.05, 0.33], [0.19, 0.05, 0.24], [N, -0.13, 0.09], [0.09, N, N]]
TWO_SPLITS = [[0.1, N], [0.3, 0.2], [N, 0.4], [0.2, N]]


def k_fold(folds: list[list[float]]) -> np.ndarray:
    """Each subject in one fold."""
    table = np.full((sum(map(len, folds)), len(folds)), N)
    for j, fold in enumerate(folds):
        start = sum(map(len, folds[:j]))
        table[start : start + len(fold), j] = fold
    return table


def standard_error(test: CrossedTest) -> float:
    return test.mean / test.t


@pytest.mark.parametrize(
    ("table", "expected", "components"),
    [
        (UNBALANCED, (0.112907, 0.058038, 3.327701, 1.945402, 0.137830, -0.061920, 0.287734), (0.011324, 0, 0.005310)),
        (TWO_LEVELS, (0.141250, 0.075327, 3.141173, 1.875152, 0.153300, -0.092494, 0.374995), (0.012480, 0.013610, 0.001231)),
        (k_fold([[0.1, 0.3], [0.2, 0.5], [-0.1, 0.2]]), (0.2, 0.086603, 2, 2.309401, 0.147197), None),
        (np.where(np.eye(5, dtype=bool), [0.1, 0.3, 0.2, 0.5, -0.1], N), (0.2, 0.1, 4, 2, 0.116117), None),
        (TWO_SPLITS, (0.238265, 0.070219, 1, 3.393179, 0.182452), None),
    ],
    ids=["unbalanced", "two levels", "3 folds", "leave one out", "two splits"],
)
def test_worked_examples_to_six_digits(table: list, expected: tuple, components: tuple | None):
    found = crossed_test(np.array(table))
    shown = found.mean, standard_error(found), found.df, found.t, found.p, found.low, found.high
    assert shown[: len(expected)] == pytest.approx(expected, abs=6e-7)
    if components:
        assert (found.var_subject, found.var_split, found.var_error) == pytest.approx(components, abs=6e-7)


class Dense:
    """The same test from matrices [n n], with another optimiser: L-BFGS-B on the gradient, from four starts."""

    def __init__(self, table: np.ndarray) -> None:
        rows, columns = np.nonzero(~np.isnan(table))
        self.raw, self.shape = table[rows, columns], (len(set(rows)), len(set(columns)))
        self.columns = columns[:, None] == np.unique(columns)  # [n b]
        self.y = (self.raw - self.raw.mean()) / self.raw.std(ddof=1)
        same = rows[:, None] == rows, columns[:, None] == columns
        self.parts = [*(pairs.astype(float) for pairs in same), np.eye(len(rows))]
        self.free = np.array([len(rows) != self.shape[0], len(rows) != self.shape[1], True])

    def projection(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        v = sum(t * part for t, part in zip(theta, self.parts, strict=True))
        inverse = np.linalg.inv(v)
        one = inverse.sum(1)
        return inverse - np.outer(one, one) / one.sum(), one / one.sum(), float(np.linalg.slogdet(v)[1] + np.log(one.sum()))

    def deviance(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        p, _, logs = self.projection(theta)
        py = p @ self.y
        gradient = [np.sum(p * part) - py @ part @ py for part in self.parts]
        return logs + float(self.y @ py), np.where(self.free, gradient, 0)

    def components(self) -> np.ndarray:
        bounds = [(0, None) if free else (0, 0) for free in self.free[:2]] + [(1e-4, None)]
        best = None
        for shares in STARTS:
            start = np.where(self.free, shares, 0)
            start[2] += 1 - start.sum()
            options = {"ftol": 0, "gtol": 1e-11, "maxiter": 2000}
            found = optimize.minimize(self.deviance, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
            best = found if best is None or found.fun < best.fun - 1e-9 else best
        return best.x

    def test(self) -> tuple[float, float, float]:
        """Mean, standard error, degrees of freedom."""
        theta = self.components()
        p, x, _ = self.projection(theta)
        mu = x @ self.y
        of_split = self.columns * x[:, None]  # [n b]
        left = (of_split - np.outer(x, of_split.sum(0))).T  # u = left @ y
        assert np.allclose(left @ self.y, (of_split * (self.y - mu)[:, None]).sum(0))
        q = np.array([np.trace(left @ part @ left.T) for part in self.parts])
        v = np.array([x @ part @ x for part in self.parts])
        k = v[1] / q[1]
        r = np.maximum(v - k * q, 0) * self.free * [1, 0, 1] * (self.shape[1] > 2)
        information = np.array([[np.trace(p @ g @ p @ h) / 2 for h in self.parts] for g in self.parts])[
            np.ix_(self.free, self.free)
        ]
        w = np.zeros((3, 3))
        w[np.ix_(self.free, self.free)] = np.linalg.inv(information)
        covariance = left @ sum(t * part for t, part in zip(theta, self.parts, strict=True)) @ left.T
        spread = 2 * k**2 * (covariance**2).sum() + 2 * k * r @ w @ (q * self.free) + r @ w @ r
        df = np.clip(2 * (k * q @ theta + r @ theta) ** 2 / spread, min(self.shape) - 1, len(x) - 1)
        variance = k * ((left @ self.y) ** 2).sum() + r @ theta
        unit = self.raw.std(ddof=1)
        return self.raw.mean() + unit * mu, unit * np.sqrt(variance), df


@pytest.mark.parametrize("seed", range(24))
def test_an_independent_dense_version_agrees(seed: int):
    generator = np.random.default_rng(seed)
    subjects, splits = int(generator.integers(8, 20)), int(generator.integers(2, 10))
    sd = tuple(generator.choice([0.3, 0.6, 1.0], 3))
    table = simulate(generator, subjects, splits, int(generator.integers(3, 7)), sd, effect=0.4)
    found = crossed_test(table)
    mean, error, df = Dense(table).test()
    assert (found.mean, standard_error(found), found.df) == pytest.approx((mean, error, df), rel=1e-6)


def test_components_of_a_complete_table_are_those_of_the_analysis_of_variance():
    generator = np.random.default_rng(4)
    a, b = 9, 5
    table = generator.normal(0, 2, (a, 1)) + generator.normal(0, 1, (1, b)) + generator.normal(0, 0.5, (a, b))
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    error = ((table - rows - columns + table.mean()) ** 2).sum() / ((a - 1) * (b - 1))
    result = crossed_test(table)
    assert result.var_error == pytest.approx(error)
    assert result.var_subject == pytest.approx(float(rows.var(ddof=1)) - error / b)
    assert result.var_split == pytest.approx(float(columns.var(ddof=1)) - error / a)
    assert result.mean == pytest.approx(float(table.mean()))


def test_planted_components_come_back():
    result = crossed_test(simulate(np.random.default_rng(1), subjects=150, splits=150, tested=60, sd=(1.0, 0.5, 0.7), effect=2.0))
    assert result.var_subject == pytest.approx(1.0**2, rel=0.25)
    assert result.var_split == pytest.approx(0.5**2, rel=0.25)
    assert result.var_error == pytest.approx(0.7**2, rel=0.05)
    assert result.low < 2.0 < result.high


@pytest.mark.engine
@pytest.mark.parametrize("setting", SHORT)
def test_it_rejects_about_five_percent_of_studies_of_equal_candidates(setting: Setting):
    generator = np.random.default_rng(SHORT.index(setting))
    rejected = [crossed_test(setting.table(generator)).p < 0.05 for _ in range(400)]
    assert 0.025 <= np.mean(rejected) <= 0.085


def test_it_finds_an_effect_that_the_corrected_t_test_mostly_misses():
    generator = np.random.default_rng(3)
    tables = [simulate(generator, effect=0.6) for _ in range(150)]
    crossed = np.mean([crossed_test(t).p < 0.05 for t in tables])
    corrected = np.mean([corrected_t_test(np.nanmean(t, axis=0), 8 / 24).p < 0.05 for t in tables])
    assert crossed > 0.6 > 0.4 > corrected


@given(SEEDS, st.sampled_from([-3.0, 1e-9, -1e7]))
@PROPERTY
def test_order_scale_and_sign_of_the_data_change_nothing(seed: int, scale: float):
    generator = np.random.default_rng(seed)
    table = simulate(generator, subjects=10, splits=5, tested=4, effect=0.5)
    one = crossed_test(table)
    other = crossed_test(scale * table[generator.permutation(10)][:, generator.permutation(5)])
    low, high = (one.low, one.high) if scale > 0 else (one.high, one.low)
    assert (other.mean, other.low, other.high) == pytest.approx((scale * one.mean, scale * low, scale * high), rel=1e-4)
    assert (other.p, other.df) == pytest.approx((one.p, one.df), rel=1e-4)


@given(SEEDS, st.integers(2, 12), st.integers(2, 8))
@PROPERTY
def test_degrees_of_freedom_stay_between_the_smaller_side_and_the_pairs(seed: int, subjects: int, splits: int):
    generator = np.random.default_rng(seed)
    result = crossed_test(simulate(generator, subjects, splits, int(generator.integers(1, subjects + 1))))
    if not np.isnan(result.p):
        assert min(result.num_subjects, result.num_splits) - 1 <= result.df <= result.num_pairs - 1
        assert result.low < result.mean < result.high
        assert 0 < result.p <= 1


def test_one_subject_per_split_and_split_per_subject_is_the_one_sample_t_test():
    d = np.random.default_rng(0).normal(0.3, 1, 12)
    result, expected = crossed_test(np.where(np.eye(12, dtype=bool), d, N)), stats.ttest_1samp(d, 0)
    assert (result.t, result.p, result.df) == pytest.approx((expected.statistic, expected.pvalue, 11))
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_equal_folds_are_the_t_test_on_their_means():
    folds = np.random.default_rng(5).normal(0.2, 1, (5, 4))
    result, expected = crossed_test(k_fold(folds.tolist())), stats.ttest_1samp(folds.mean(axis=1), 0)
    assert (result.t, result.p, result.df) == pytest.approx((expected.statistic, expected.pvalue, 4))
    assert result.var_subject == 0


def test_splits_of_one_subject_have_no_split_component():
    generator = np.random.default_rng(6)
    table = np.full((4, 12), N)
    for j in range(12):
        table[j % 4, j] = generator.normal(0.2, 1)
    result = crossed_test(table)
    assert result.var_split == 0
    assert 0 < result.p < 1
    assert 3 <= result.df <= 11


def test_equal_split_totals_give_no_p():
    """The differences vary within the splits alone, so two splits say nothing about how much a further one would differ."""
    result = crossed_test(np.array([[0.1, N], [0.3, N], [N, 0.3], [N, 0.1]]))
    assert np.isnan([result.p, result.low, result.high]).all()
    assert "split totals are all equal" in result.note


def test_subjects_and_splits_without_any_pair_do_not_count():
    table = simulate(np.random.default_rng(7), subjects=10, splits=5, tested=4, effect=0.2)
    padded = np.full((13, 7), N)
    padded[2:12, 1:6] = table
    assert crossed_test(padded) == crossed_test(table)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.full((3, 3), N), "no pair"),
        (np.empty((0, 0)), "no pair"),
        (np.array([[0.1, 0.2, 0.3]]), "only one subject"),
        (np.array([[0.1], [0.2], [0.3]]), "only one split"),
        (np.array([[0.1, N]]), "only one subject"),
        (np.full((4, 3), 0.1), "all differences are equal"),
        (np.zeros((4, 3)), "all differences are equal"),
    ],
)
def test_a_table_that_cannot_be_tested_says_why(table: np.ndarray, words: str):
    result = crossed_test(table)
    assert np.isnan([result.p, result.t, result.low, result.high]).all()
    assert words in result.note
    assert result.mean == pytest.approx(np.nanmean(table) if (~np.isnan(table)).any() else N, nan_ok=True)


@pytest.mark.parametrize(("splits", "words"), [(2, "2 splits, 1 degree of freedom"), (3, "3 splits, 2 degrees of freedom")])
def test_two_or_three_splits_are_said_to_decide_nothing(splits: int, words: str):
    few = crossed_test(simulate(np.random.default_rng(1), subjects=20, splits=splits, tested=10))
    enough = crossed_test(simulate(np.random.default_rng(1), subjects=20, splits=5, tested=10))
    assert any(words in warning and "at least 5 are advised" in warning for warning in few.warnings)
    assert not enough.warnings


def planted(subject: np.ndarray, seed: int) -> np.ndarray:
    """Differences of 15 random splits of these subjects, which dominate."""
    generator = np.random.default_rng(seed)
    return simulate(generator, len(subject), 15, len(subject) // 5, (0.0, 0.2, 0.4)) + subject[:, None]


def test_one_subject_that_carries_the_variance_is_named():
    subject = np.append(np.random.default_rng(2).normal(size=29), 9.0)
    table = planted(subject, 2)
    names = [f"sub-{i:03d}" for i in range(30)]
    result = crossed_test(table, names)
    assert "sub-029" in result.warnings[0]
    assert "nearly blind" in result.warnings[0]
    assert crossed_test(table[:29], names[:29]).warnings == ()


def test_skewed_subjects_are_said_with_a_rank_test_beside():
    subject = np.exp(stats.norm.ppf((np.arange(24) + 0.5) / 24))  # quantiles of the log-normal distribution
    table = planted(subject - subject.mean(), 3)
    result = crossed_test(table)
    assert "two to three times too small" in result.warnings[0]
    means = np.nanmean(table[~np.isnan(table).all(axis=1)], axis=1)
    assert f"p = {stats.wilcoxon(means).pvalue:.2g}" in result.warnings[0]
    assert crossed_test(planted(stats.norm.ppf((np.arange(24) + 0.5) / 24), 3)).warnings == ()


@pytest.mark.engine
def test_warnings_are_rare_for_normal_subjects_and_frequent_for_skewed_or_dominating_ones():
    generator = np.random.default_rng(0)
    seen = {"normal": 0, "skewed": 0, "one": 0}
    for seed in range(100):
        normal = generator.normal(size=30)
        seen["normal"] += bool(crossed_test(planted(normal, seed)).warnings)
        seen["skewed"] += bool(crossed_test(planted(np.exp(normal), seed)).warnings)
        seen["one"] += "row 29" in " ".join(crossed_test(planted(np.append(normal[1:], 8.0), seed)).warnings)
    assert seen["normal"] <= 8
    assert seen["skewed"] >= 60
    assert seen["one"] >= 80


def test_it_is_no_slower_than_a_page_allows():
    """60 subjects and 15 splits took 4 ms; a page holds some hundred tests."""
    table = simulate(np.random.default_rng(0), subjects=60, splits=15, tested=12)
    started = time.process_time()
    for _ in range(20):
        crossed_test(table)
    assert (time.process_time() - started) / 20 < 0.05


def test_wilcoxon_over_splits_rejects_too_often():
    generator = np.random.default_rng(5)
    tables = [simulate(generator, 40, 15, 8, (2.0, 0.3, 0.3)) for _ in range(200)]
    assert np.mean([wilcoxon_test(np.nanmean(t, axis=0)).p < 0.05 for t in tables]) > 0.12
