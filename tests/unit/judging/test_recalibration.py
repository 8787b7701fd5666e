"""Recalibration: as a fit over all voxels, all cases with the same weight, and blind to what is a matter of scale alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import expit, logit

from softseg_dist.judging.judge import Yardstick, case_rows
from softseg_dist.judging.thresholds import (
    FEWEST_VALUES,
    SLOPES,
    TINY,
    Histogram,
    fit_recalibration,
    histogram,
    least_log_loss,
    recalibrated,
)
from softseg_dist.numerics.metrics import Map, Scale, neighbourhood

SPACING_MM = (1.0, 1.0)
CASES = [(24, 24), (40, 31), (17, 60)]
SEEDS = st.integers(0, 2**32 - 1)


def case(shape: tuple[int, int], seed: int, a: float = 1.0, b: float = 0.0, num_classes: int = 1) -> tuple[Map, Map]:
    """A map p and a reference y with E[y | p] = sigmoid(a logit(p) + b), [1 K *shape], of labels in the middle."""
    generator = np.random.default_rng(seed)
    distance = np.hypot(*(np.indices(shape) - np.array(shape)[:, None, None] / 2)) - min(shape) / 4
    x = -distance / 2 + generator.normal(0, 1.5, (1, num_classes, *shape))
    y = generator.binomial(4, expit(a * x + b)) / 4
    return expit(x).astype(np.float32), (y * (distance < min(shape) / 8)).astype(np.float32)


def fitted(cases: Sequence[tuple[Map, Map]]) -> tuple[float, float]:
    """Of one class."""
    return fit_recalibration([histogram(p, y, SPACING_MM) for p, y in cases], ["a"])["a"]


def least_over_voxels(cases: Sequence[tuple[Map, Map]]) -> tuple[float, float]:
    """From the raw voxels, by roots of the derivatives alone: b for every a, then a."""
    used = [neighbourhood(y, SPACING_MM) & (p > 0) for p, y in cases]
    weight = np.concatenate([np.full(mask.sum(), 1 / mask.sum()) for mask in used])
    x = logit(np.concatenate([p[mask] for (p, _), mask in zip(cases, used, strict=True)]).astype(float).clip(TINY, 1 - TINY))
    y = np.concatenate([y[mask] for (_, y), mask in zip(cases, used, strict=True)])

    def b_of(a: float) -> float:
        return brentq(lambda b: weight @ (expit(a * x + b) - y), -300, 300, xtol=1e-12)

    def slope(a: float) -> float:
        return weight @ ((expit(a * x + b_of(a)) - y) * x)

    low, high = SLOPES
    a = low if slope(low) > 0 else high if slope(high) < 0 else brentq(slope, low, high, xtol=1e-12)
    return a, b_of(a)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.4, 1.0), (3.0, -2.0), (6.0, 4.0)])
def test_the_fit_over_bins_is_the_fit_over_voxels(a: float, b: float) -> None:
    cases = [case(shape, seed, a, b) for seed, shape in enumerate(CASES)]
    assert fitted(cases) == pytest.approx(least_over_voxels(cases), abs=1e-3, rel=1e-3)


@given(SEEDS, st.floats(0.05, 20), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_what_is_planted_is_found(seed: int, a: float, b: float) -> None:
    x = np.random.default_rng(seed).normal(0, 2, 400)
    weight = np.full(400, 2.0)
    found = least_log_loss(weight, weight * x, weight * expit(a * x + b))
    np.testing.assert_allclose(expit(found[0] * x + found[1]), expit(a * x + b), atol=1e-3)


def test_the_slope_stays_in_its_limits() -> None:
    x = np.linspace(-3, 3, 100)
    assert least_log_loss(np.ones(100), x, (x > 0.5).astype(float))[0] == SLOPES[1]
    assert least_log_loss(np.ones(100), x, (x < 0.5).astype(float))[0] == SLOPES[0]


def test_a_case_weighs_as_much_as_another_of_more_voxels() -> None:
    few, many = case((20, 20), 1, 0.5, 1.0), case((80, 80), 2, 3.0, -1.0)
    assert fitted([few, many]) == pytest.approx(least_over_voxels([few, many]), abs=1e-3, rel=1e-3)
    shares = [histogram(*each, SPACING_MM).bins[0, 0].sum() for each in (few, many)]
    assert shares == pytest.approx([1, 1])


def test_voxels_far_from_labels_and_voxels_of_0_say_nothing() -> None:
    p, y = case((60, 60), 3)
    near = neighbourhood(y, SPACING_MM)
    other = np.where(near, p, np.float32(0.3))
    np.testing.assert_array_equal(histogram(p, y, SPACING_MM).bins, histogram(other, y, SPACING_MM).bins)
    half = p * (np.arange(60) % 2).astype(np.float32)
    bins = histogram(half, y, SPACING_MM).bins[0]
    used = near & (half > 0)
    assert bins[2].sum() == pytest.approx(y[used].mean())
    assert bins[1].sum() == pytest.approx(logit(half[used].astype(float)).mean(), rel=1e-5)


def test_where_p_is_0_q_is_0_and_order_stays() -> None:
    p = np.array([0, 1e-9, 1e-6, 0.2, 0.5, 0.9, 1], dtype=np.float32).reshape(1, 1, -1)
    q = recalibrated(p, [(1.3, 1.0)])[0, 0]
    assert q[0] == 0
    assert q[1] == q[2] == pytest.approx(expit(1.3 * logit(1e-6) + 1), rel=1e-4)
    assert (np.diff(q[2:]) > 0).all()
    assert q[3] == pytest.approx(expit(1.3 * logit(0.2) + 1))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_log_loss_of_the_cases_that_chose_it_is_never_worse_than_before(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p, y = case((24, 24), seed, *generator.uniform((0.1, -2), (5, 2)))
    used = neighbourhood(y, SPACING_MM) & (p > 0)
    if not used.any():
        return

    def loss(q: Map) -> float:
        q = q[used].astype(float).clip(TINY, 1 - TINY)
        return float(-(y[used] * np.log(q) + (1 - y[used]) * np.log1p(-q)).mean())

    assert loss(recalibrated(p, [fitted([(p, y)])])) <= loss(p) + 1e-6


def test_levels_are_not_recalibrated_and_20_different_values_in_all_maps_are_enough() -> None:
    _, y = case((30, 30), 4)

    def levels(first: int, count: int) -> Histogram:
        values = (np.arange(900) % count + first) / 100
        values[:2] = 0, 1  # which do not count
        return histogram(values.astype(np.float32).reshape(y.shape), y, SPACING_MM)

    assert fit_recalibration([levels(1, FEWEST_VALUES - 1)], ["a"]) == {}
    assert fit_recalibration([levels(1, 12), levels(4, FEWEST_VALUES - 4)], ["a"]) == {}  # 19 between them
    assert fit_recalibration([levels(1, 12), levels(4, FEWEST_VALUES - 3)], ["a"]).keys() == {"a"}
    assert fit_recalibration([], ["a"]) == {}


def test_a_class_that_no_validation_case_has_stays_as_it_is() -> None:
    p, y = case((30, 30), 5, 2.0, 1.0, num_classes=2)
    y[:, 1] = 0
    found = fit_recalibration([histogram(p, y, SPACING_MM)], ["a", "b"])
    assert found["b"] == (1.0, 0.0)
    assert found["a"] == pytest.approx(least_over_voxels([(p[:, :1], y[:, :1])]), abs=1e-3, rel=1e-3)


def rows(p: Map, y: Map, recalibration: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Those of one class without a threshold, against the mean of the raters."""
    yardstick = Yardstick(("a",), (100.0,), (), recalibration)
    found = case_rows(p, {"mean": y}, yardstick, (0.5,), Scale(2.0, (100.0,), SPACING_MM))
    return {row.metric: row.value for row in found if row.threshold is None and row.reference == "mean"}


def test_a_candidate_that_is_only_too_sharp_equals_the_other_after_recalibration() -> None:
    cases = [case(shape, seed) for seed, shape in enumerate(CASES)]
    sharp = [(expit(2.5 * logit(p.clip(0.01, 0.99)) + 0.7).astype(np.float32), y) for p, y in cases]
    plain = [(p.clip(0.01, 0.99), y) for p, y in cases]
    one, other = ({"a": fitted(of)} for of in (plain, sharp))
    for (p, y), (too_sharp, _) in zip(plain, sharp, strict=True):
        before, after = rows(p, y, one), rows(too_sharp, y, other)
        assert after["brier_skill"] < before["brier_skill"] - 0.05
        for name in ("brier_skill_recalibrated", "ece_max_recalibrated", "ece_recalibrated"):
            assert after[name] == pytest.approx(before[name], abs=2e-3), name


def test_rows_of_the_recalibrated_map_are_those_of_that_map_and_the_volume_that_it_cannot_reach_is_told() -> None:
    p, y = case((30, 30), 6)
    p[..., 14:] = 0
    found = rows(p, y, {"a": (2.0, -0.5)})
    again = rows(recalibrated(p, [(2.0, -0.5)]), y, {})
    for name in ("brier_skill", "ece", "ece_max"):
        assert found[f"{name}_recalibrated"] == again[name] != found[name]
    assert found["volume_at_0_mm3"] == pytest.approx(2.0 * y[..., 14:].sum())
    assert not any("recalibrated" in name or name == "volume_at_0_mm3" for name in again)
