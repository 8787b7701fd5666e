"""Raters: agreement with each other, energy distance and entropy, by hand and at the extremes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from softseg_dist.numerics.raters import LEVELS, entropy_disagreement_correlation, ged2, pairwise_dice

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
    s, y = [prediction > level for level in LEVELS], list(raters)
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


def test_the_correlation_is_that_of_the_entropies():
    generator = np.random.default_rng(0)
    prediction, rater_mean = generator.random(200), generator.integers(0, 5, 200) / 4
    entropies = [stats.entropy([p, 1 - p]) for p in (prediction, rater_mean)]
    expected = stats.spearmanr(*np.round(entropies, 12)).statistic
    assert entropy_disagreement_correlation(prediction, rater_mean) == pytest.approx(expected)


def test_a_map_that_is_unsure_where_raters_differ_correlates_fully():
    rater_mean = np.array([0.0, 0.25, 0.5, 0.9])
    assert entropy_disagreement_correlation(rater_mean**1, rater_mean) == pytest.approx(1)
    assert entropy_disagreement_correlation(1 - rater_mean, rater_mean) == pytest.approx(1)
    assert entropy_disagreement_correlation(np.array([0.5, 0.3, 0.0, 0.2]), rater_mean) < 0


def test_the_correlation_is_nan_where_an_entropy_is_constant():
    varied = np.array([0.1, 0.4, 0.8])
    for constant in (np.zeros(3), np.array([0.0, 1.0, 0.0]), np.full(3, 0.5)):
        assert np.isnan(entropy_disagreement_correlation(constant, varied))
        assert np.isnan(entropy_disagreement_correlation(varied, constant))
    assert np.isnan(entropy_disagreement_correlation(varied[:0], varied[:0]))


def test_one_vote_of_three_is_as_much_disagreement_as_two():
    means = np.array([0, 1, 2, 3], dtype=np.float32) / 3
    assert entropy_disagreement_correlation(np.array([0.125, 0.25, 0.75, 0.875]), means) == pytest.approx(1)
    raters = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=np.float32).mean(axis=1)
    assert entropy_disagreement_correlation(np.array([0.4, 0.4, 0.1]), raters) == pytest.approx(1)
