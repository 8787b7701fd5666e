"""Calibration: reliability tables by hand, that they add up, and the neighbourhood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist.numerics.metrics import NUM_BINS, neighbourhood, reliability

SEEDS = st.integers(0, 2**32 - 1)


def test_a_table_by_hand():
    table = reliability(np.array([0.05, 0.55, 0.55, 0.95, 1.0]), np.array([0.0, 0.0, 1.0, 0.9, 1.0]))
    assert table.voxels.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert table.prediction[[0, 5, 9]] == pytest.approx([0.05, 0.55 + 0.55, 0.95 + 1.0])
    assert table.reference[[0, 5, 9]] == pytest.approx([0.0, 1.0, 0.9 + 1.0])
    gaps = 1 * abs(0.05 - 0), 2 * abs(0.55 - 0.5), 2 * abs((0.95 + 1.0) / 2 - (0.9 + 1.0) / 2)
    assert table.error == pytest.approx(sum(gaps) / 5)


def test_a_calibrated_map_has_no_error_whatever_its_noise():
    p = np.repeat(np.arange(0, NUM_BINS) / NUM_BINS + 0.05, 20)
    y = np.concatenate([np.arange(20) < round(20 * q) for q in p[::20]]).astype(float)  # a share q of 20 voxels
    table = reliability(p, y)
    np.testing.assert_allclose(table.prediction, table.reference)
    assert table.error == pytest.approx(0, abs=1e-12)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_tables_of_two_parts_add_up_to_the_table_of_all(seed: int):
    p, y = np.random.default_rng(seed).random((2, 50))
    whole, first, second = reliability(p, y), reliability(p[:20], y[:20]), reliability(p[20:], y[20:])
    for sums, a, b in zip(whole, first, second, strict=True):
        np.testing.assert_allclose(sums, a + b)
    assert whole.voxels.sum() == 50


def test_no_voxel_has_no_error_and_one_voxel_has_its_own():
    assert np.isnan(reliability(np.zeros(0), np.zeros(0)).error)
    assert reliability(np.array([0.3]), np.array([1.0])).error == pytest.approx(0.7)


def test_the_neighbourhood_is_a_box_of_5_mm_and_at_least_3_voxels_around_what_is_labelled():
    reference = np.zeros((2, 1, 40, 20))
    reference[0, 0, 20, 10] = 0.01
    reference[1, 0, 0, 0] = 1
    near = neighbourhood(reference, (0.5, 4.0))
    assert near[0, 0, 10:31, 7:14].all()
    assert near[1, 0, :11, :4].all()
    assert near.sum() == 21 * 7 + 11 * 4


def test_no_label_has_no_neighbourhood_and_one_class_does_not_widen_another():
    reference = np.zeros((1, 2, 9, 9, 9))
    reference[0, 0, 4, 4, 4] = 1
    assert neighbourhood(reference, (5.0, 5.0, 5.0)).sum(axis=(0, 2, 3, 4)).tolist() == [7**3, 0]


def test_the_largest_error_is_that_of_one_bin():
    table = reliability(np.array([0.05, 0.55, 0.55, 0.95, 1.0]), np.array([0.0, 0.0, 1.0, 0.6, 0.6]))
    assert table.largest_error == pytest.approx((0.95 + 1.0) / 2 - 0.6)
    assert np.isnan(reliability(np.zeros(0), np.zeros(0)).largest_error)
