"""Thresholds: the optimal Dice of a calibrated map (docs/yardstick.md, "Thresholds"), ties, empty cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist.judging.thresholds import CURVE, choose_thresholds, dice_optimal_threshold, evidence, grid_threshold, optimal_dice

RAMP = np.arange(11) / 10


def expected_dice(chosen: np.ndarray, probability: np.ndarray) -> float:
    return 2 * probability[chosen].sum() / (chosen.sum() + probability.sum())


def as_case(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(1, 1, 1, -1)


def alone(values):
    """What a map says about thresholds whose reference is the map itself."""
    return evidence(as_case(values), as_case(values))


def test_optimal_dice_of_the_worked_example():
    assert optimal_dice(RAMP) == pytest.approx(2 * 4.9 / (7 + 5.5))  # {.4, ..., 1}: .784
    assert optimal_dice(RAMP) / 2 == pytest.approx(0.392)
    assert expected_dice(RAMP >= 0.5, RAMP) == pytest.approx(0.7826, abs=5e-5)
    assert expected_dice(RAMP > 0.5, RAMP) == pytest.approx(0.7619, abs=5e-5)


def test_a_voxel_exactly_at_half_the_optimal_dice_leaves_it_unchanged():
    m = np.array([1.0, 0.4, 0.4, 0.2])  # {1, .4, .4}: 2 x 1.8 / (3 + 2) = .72
    best = optimal_dice(m)
    added = np.append(m, best / 2)
    chosen = added >= best / 2
    assert 2 * added[chosen].sum() / (chosen.sum() + added.sum()) == pytest.approx(optimal_dice(added))


@given(st.floats(1e-30, 1), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_threshold_is_never_0(value: float, size: int):
    assert dice_optimal_threshold([alone(np.full(size, value))]) > 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_no_set_of_voxels_has_a_higher_expected_dice(values: list[float]):
    m = np.sort(np.array(values))[::-1]
    if not m.any():
        assert np.isnan(optimal_dice(m))
        return
    prefixes = [expected_dice(np.arange(m.size) < size, m) for size in range(m.size + 1)]  # the best set is a prefix
    assert optimal_dice(m) == pytest.approx(max(prefixes))
    assert optimal_dice(m) / 2 <= 0.5 + 1e-12


def test_optimal_dice_equals_brute_force_over_all_sets_on_200_random_maps():
    generator = np.random.default_rng(0)
    for _ in range(200):
        m = generator.uniform(size=generator.integers(2, 11))
        sets = (np.arange(1, 2**m.size)[:, None] >> np.arange(m.size)) & 1
        dice = 2 * sets @ m / (sets.sum(axis=1) + m.sum())
        best = dice.max()
        assert optimal_dice(m) == pytest.approx(best)
        np.testing.assert_array_equal(m >= best / 2 - 1e-12, sets[dice.argmax()].astype(bool))


def test_dice_optimal_is_the_mean_over_cases_and_leaves_out_empty_predictions():
    hard = np.array([1.0, 1.0, 0.0])
    cases = [alone(RAMP), alone(hard), alone(np.zeros(4))]
    assert dice_optimal_threshold(cases) == pytest.approx((0.784 / 2 + 1 / 2) / 2)
    assert dice_optimal_threshold([alone(np.zeros(4))]) == 0.5


def test_grid_finds_the_best_dice():
    prediction, reference = as_case([0.72, 0.68, 0.31, 0.1]), as_case([1, 1, 1, 0])
    assert grid_threshold([evidence(prediction, reference)]) == 0.3
    assert grid_threshold([evidence(as_case([0.6, 0.6, 0.1]), as_case([1, 1, 0]))]) == 0.5


def test_grid_takes_the_tie_nearest_to_one_half():
    prediction, reference = as_case([0.9, 0.9, 0.1]), as_case([1, 1, 0])
    assert grid_threshold([evidence(prediction, reference)]) == 0.5
    assert grid_threshold([evidence(0.5 * prediction, reference)]) == 0.45  # all of 0.1 .. 0.45 tie


def test_grid_without_any_foreground_is_one_half():
    assert grid_threshold([alone(np.zeros(3))]) == 0.5


def test_the_curve_runs_from_005_to_095():
    assert CURVE[0] == 0.05
    assert CURVE[-1] == 0.95
    assert len(CURVE) == 19
    assert 0.5 in CURVE


def test_every_rule_gives_a_threshold_inside_the_unit_interval():
    generator = np.random.default_rng(0)
    predictions = [generator.random((3, 2, 8, 8), dtype=np.float32) for _ in range(3)]
    chosen = choose_thresholds([evidence(p, np.round(p)) for p in predictions])
    assert set(chosen) == {"fixed", "grid", "dice_optimal"}
    assert all(0 < tau < 1 for tau in chosen.values())
    assert chosen["fixed"] == 0.5
