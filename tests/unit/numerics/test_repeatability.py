"""Repeatability: hand arithmetic, the worked example of Shrout and Fleiss, and tables that leave something undetermined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist.numerics.repeatability import bland_altman, coefficient_of_variation, icc

NAN = float("nan")
SHROUT_FLEISS = np.array(  # their table 2: 6 targets, 4 judges
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], dtype=float
)


def with_gap_columns(table: np.ndarray) -> np.ndarray:
    """The same measurements, but no two subjects share a session."""
    n, k = table.shape
    spread = np.full((n, n * k), NAN)
    for i, row in enumerate(table):
        spread[i, i * k : (i + 1) * k] = row
    return spread


def test_the_worked_example_of_shrout_and_fleiss():
    two_way, one_way = icc(SHROUT_FLEISS), icc(with_gap_columns(SHROUT_FLEISS))
    assert (two_way.form, round(two_way.value, 2)) == ("ICC(2,1)", 0.29)
    assert (one_way.form, round(one_way.value, 2)) == ("ICC(1,1)", 0.17)
    assert (two_way.num_subjects, two_way.num_sessions) == (one_way.num_subjects, one_way.num_sessions) == (6, 24)


def test_the_intervals_of_that_example():
    """As other software prints them for these data."""
    two_way, one_way = icc(SHROUT_FLEISS), icc(with_gap_columns(SHROUT_FLEISS))
    assert (two_way.low, two_way.high) == pytest.approx((0.019, 0.761), abs=5e-4)
    assert (one_way.low, one_way.high) == pytest.approx((-0.133, 0.723), abs=5e-4)


def test_a_constant_offset_between_sessions_lowers_absolute_agreement():
    found = icc(np.array([[2.0, 4.0], [4.0, 6.0], [6.0, 8.0]]))
    assert found.value == pytest.approx((8 - 0) / (8 + 0 + 2 * (6 - 0) / 3))  # 2/3
    assert np.isnan(found.low)
    assert "no interval" in found.note


def test_one_way_by_hand_with_unequal_numbers_of_sessions():
    table = np.array([[1.0, 3.0, NAN], [6.0, NAN, NAN], [8.0, 9.0, 10.0]])
    grand = (1 + 3 + 6 + 8 + 9 + 10) / 6
    between = (2 * (2 - grand) ** 2 + 1 * (6 - grand) ** 2 + 3 * (9 - grand) ** 2) / (3 - 1)
    within = (1 + 1 + 0 + 1 + 0 + 1) / (6 - 3)
    n0 = (6 - (4 + 1 + 9) / 6) / (3 - 1)
    found = icc(table)
    assert found.form == "ICC(1,1)"
    assert found.value == pytest.approx((between - within) / (between + (n0 - 1) * within))
    assert np.isnan(found.low)
    assert "unequal" in found.note


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 100), st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_agreement_does_not_depend_on_unit_or_origin(seed: int, unit: float, origin: float):
    table = np.random.default_rng(seed).normal(size=(8, 1)) + 0.3 * np.random.default_rng(seed + 1).normal(size=(8, 3))
    before, after = icc(table), icc(unit * table + origin)
    assert (after.value, after.low, after.high) == pytest.approx((before.value, before.low, before.high), rel=1e-6)
    assert before.low < before.value < before.high


def test_planted_agreement_comes_back():
    generator = np.random.default_rng(0)
    table = 2 * generator.normal(size=(2000, 1)) + generator.normal(size=(2000, 2))
    assert icc(table).value == pytest.approx(4 / 5, abs=0.02)
    assert icc(np.where(generator.random(table.shape) < 0.2, NAN, table)).value == pytest.approx(4 / 5, abs=0.02)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ([[1.0, 2.0]], "fewer than two subjects"),
        ([[NAN, NAN]], "fewer than two subjects"),
        ([[1.0], [2.0]], "no subject has two sessions"),
        ([[1.0, NAN], [NAN, 2.0]], "no subject has two sessions"),
        ([[3.0, 3.0], [3.0, 3.0]], "equal"),
        ([[1.0, 2.0], [2.0, 1.0]], "no denominator"),
    ],
)
def test_agreement_that_cannot_be_had_is_nan_and_says_why(table: list[list[float]], why: str):
    found = icc(np.array(table))
    assert np.isnan([found.value, found.low, found.high]).all()
    assert why in found.note


def test_sessions_that_agree_exactly_have_full_agreement():
    exact = np.array([[1.1, 1.1], [2.3, 2.3], [3.7, 3.7]])
    for table in (exact, with_gap_columns(exact)):
        assert icc(table).value == pytest.approx(1)
        assert "no interval" in icc(table).note


def test_variation_by_hand():
    table = np.array([[9.0, 11.0, NAN], [19.0, 20.0, 21.0], [5.0, NAN, NAN]])
    found = coefficient_of_variation(table)
    assert found.value == pytest.approx(np.sqrt((1 * 2 / 10**2 + 2 * 1 / 20**2) / (1 + 2)))
    assert found.num_subjects == 2
    assert found.note == ""


def test_variation_that_cannot_be_had_is_nan_and_says_why():
    once, zero = coefficient_of_variation(np.array([[1.0, NAN]])), coefficient_of_variation(np.zeros((2, 2)))
    assert np.isnan([once.value, zero.value]).all()
    assert "no measurement was repeated" in once.note
    assert zero.note.startswith("2 left out")
    some = coefficient_of_variation(np.array([[0.0, 0.0], [9.0, 11.0]]))
    assert (some.value, some.num_subjects) == (pytest.approx(np.sqrt(2) / 10), 1)


def test_limits_of_agreement_by_hand():
    found = bland_altman(np.array([3.0, 5.0, 7.0, NAN]), np.array([2.0, 5.0, 5.0, 1.0]))
    assert (found.bias, found.n) == ((1 + 0 + 2) / 3, 3)
    assert (found.low, found.high) == pytest.approx((1 - 1.96 * 1.0, 1 + 1.96 * 1.0))  # sd of 1, 0, 2 is 1


def test_limits_that_cannot_be_had_are_nan_and_say_why():
    nothing, one = bland_altman(np.array([NAN]), np.array([1.0])), bland_altman(np.array([3.0]), np.array([1.0]))
    assert (nothing.n, one.n, one.bias) == (0, 1, 2.0)
    assert np.isnan([nothing.bias, nothing.low, one.low, one.high]).all()
    assert "no pair" in nothing.note
    assert "only one pair" in one.note
