"""Raters: agreement with each other, energy distance and volumes, by hand and at the extremes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist.numerics.raters import LEVELS, ged2, pairwise_dice, volume_crps

PROPERTY = settings(max_examples=30, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def masks(*rows: str) -> np.ndarray:
    """Raters' masks out of words of 0 and 1."""
    return np.array([[c == "1" for c in row] for row in rows])


def iou_distance(a: np.ndarray, b: np.ndarray) -> float:
    return 1 - (a & b).sum() / (a | b).sum() if (a | b).any() else 0.0


def test_pairwise_dice_is_the_mean_over_pairs():
    found = pairwise_dice(masks("1100", "1110", "0011"))
    assert found == pytest.approx((2 * 2 / (2 + 3) + 0 + 2 * 1 / (3 + 2)) / 3)


def test_two_empty_raters_are_no_pair_and_one_empty_rater_scores_zero():
    assert pairwise_dice(masks("000", "000", "110")) == 0  # 0 and 0; the empty pair is left out
    assert pairwise_dice(masks("110", "110")) == 1
    assert np.isnan(pairwise_dice(masks("000", "000")))


@given(SEEDS)
@PROPERTY
def test_energy_distance_follows_its_definition_and_is_never_negative(seed: int):
    generator = np.random.default_rng(seed)
    prediction, raters = generator.random((3, 4)), generator.random((3, 3, 4)) < generator.random()
    s, y = [prediction >= level for level in LEVELS], list(raters)
    by_pairs = [np.mean([iou_distance(a, b) for a in left for b in right]) for left, right in ((s, y), (s, s), (y, y))]
    found = ged2(prediction, raters)
    assert found == pytest.approx(2 * by_pairs[0] - by_pairs[1] - by_pairs[2], abs=1e-12)
    assert -1e-12 <= found <= 2


def test_energy_distance_is_0_for_raters_that_agree_with_a_hard_prediction():
    raters = masks("0110", "0110", "0110")
    assert ged2(raters[0].astype(np.float32), raters) == 0
    assert ged2(np.zeros(4), np.zeros((2, 4), dtype=bool)) == 0


def test_energy_distance_is_2_where_prediction_and_raters_share_no_voxel():
    assert ged2(np.array([1.0, 0.0]), masks("01", "01")) == 2


def test_a_soft_map_that_spreads_like_the_raters_is_nearer_than_a_hard_one():
    raters = masks("1000", "1100", "1110", "1111")
    soft, hard = raters.mean(axis=0), (raters.mean(axis=0) >= 0.5).astype(float)
    assert ged2(soft, raters) < ged2(hard, raters)


def crps_by_definition(prediction: np.ndarray, volumes: np.ndarray) -> float:
    """E |X - v| - E |X - X'| / 2 over 4,000 equally spaced thresholds."""
    taus = (np.arange(4000) + 0.5) / 4000
    x = (prediction.ravel()[None] >= taus[:, None]).sum(axis=1)
    volume, count = np.unique(x, return_counts=True)  # few volumes are met often
    spread = np.average(np.abs(volume[:, None] - volume), weights=np.outer(count, count))
    return float(np.mean([np.abs(x - v).mean() for v in volumes]) - spread / 2)


@given(SEEDS)
@settings(max_examples=5, deadline=None)
def test_the_crps_of_a_volume_follows_its_definition(seed: int):
    generator = np.random.default_rng(seed)
    prediction, volumes = generator.random(8) * (generator.random(8) < 0.7), generator.uniform(0, 8, 3)
    assert volume_crps(prediction, volumes) == pytest.approx(crps_by_definition(prediction, volumes), abs=2e-3)


def test_the_crps_of_a_hard_map_is_the_mean_error_of_its_volume():
    hard = np.array([1.0, 1.0, 1.0, 0.0])
    assert volume_crps(hard, np.array([3.0, 1.0, 4.0])) == pytest.approx((0 + 2 + 1) / 3)
    assert volume_crps(0 * hard, np.array([0.0, 2.5])) == pytest.approx((0 + 2.5) / 2)
