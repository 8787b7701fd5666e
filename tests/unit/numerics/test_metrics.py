"""Metrics: the formulas of docs/yardstick.md, extremes, empty maps, and one pass over all thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist.numerics.metrics import (
    OBJECTIVES,
    brier,
    confusion,
    dice_curve,
    dice_dml,
    dice_soft,
    ece,
    hard_scores,
    mae,
    mask_volume_error,
    mse,
    objective_score,
    soft_metrics,
    volume_difference_mm3,
    volume_error,
)

PROPERTY = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def hard_metrics(prediction: np.ndarray, reference: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """The scores at one threshold, each [K]."""
    scores = hard_scores(confusion(prediction, reference, (threshold,)))
    return {name: values[:, 0] for name, values in scores.items()}


def one_class(*values: float) -> np.ndarray:
    """A case of one item and one class in one row: [1 1 1 S]."""
    return np.array(values, dtype=np.float32).reshape(1, 1, 1, -1)


def random_case(seed: int, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    prediction, reference = generator.random((2, 3, classes, 6, 5), dtype=np.float32)
    return prediction, np.where(reference < 0.5, 0, reference).astype(np.float32)


def blob(size: int = 96, items: int = 20, radius: float = 15) -> np.ndarray:
    """A disc with a soft edge in each of `items` slices [N 1 X Y], as a good prediction has it."""
    distance = np.hypot(*(np.indices((size, size)) - size / 2))
    return np.repeat(np.clip((radius - distance) / 6 + 0.5, 0, 1).astype(np.float32)[None, None], items, axis=0)


X, Y = one_class(0.2, 0.5, 0.9, 0.0), one_class(0.3, 0.5, 1.0, 0.1)


def test_soft_dice_of_the_worked_example():
    products, sums = 0.2 * 0.3 + 0.5 * 0.5 + 0.9 * 1.0, (0.2 + 0.5 + 0.9) + (0.3 + 0.5 + 1.0 + 0.1)
    np.testing.assert_allclose(dice_soft(X, Y), [2 * products / sums], rtol=1e-6)
    np.testing.assert_allclose(1 - dice_soft(X, Y), [0.308571], atol=1e-6)


def test_dml_dice_of_the_worked_example():
    np.testing.assert_allclose(dice_dml(X, Y), [(1.6 + 1.9 - 0.3) / (1.6 + 1.9)], rtol=1e-6)
    np.testing.assert_allclose(1 - dice_dml(X, Y), [0.085714], atol=1e-6)


def test_soft_dice_prefers_a_wrong_prediction_where_labels_are_soft_and_the_dml_form_does_not():
    half, one = one_class(0.5, 0.5), one_class(1.0, 1.0)
    assert dice_soft(half, half) == pytest.approx(0.5)
    assert dice_soft(one, half) == pytest.approx(2 / 3)
    assert dice_dml(half, half) == 1 > dice_dml(one, half)


@given(SEEDS)
@PROPERTY
def test_both_soft_dice_agree_on_hard_references(seed: int):
    prediction, reference = random_case(seed)
    hard = (reference >= 0.5).astype(np.float32)
    np.testing.assert_allclose(dice_soft(prediction, hard), dice_dml(prediction, hard), rtol=1e-6)


@given(SEEDS)
@PROPERTY
def test_a_perfect_prediction_has_no_error(seed: int):
    _, reference = random_case(seed)
    found = soft_metrics(reference, reference, voxel_mm3=2.0)
    np.testing.assert_allclose(found["dice_dml"], 1)
    for name in ("mse", "mae", "brier", "ece", "volume_error", "volume_error_abs"):
        np.testing.assert_allclose(found[name], 0, atol=1e-9)


def test_errors_of_the_worked_example():
    np.testing.assert_allclose(mse(X, Y), [(0.1**2 + 0.1**2 + 0.1**2) / 4], rtol=1e-5)
    np.testing.assert_allclose(mae(X, Y), [0.3 / 4], rtol=1e-6)


@given(SEEDS)
@PROPERTY
def test_mean_brier_over_raters_is_the_brier_of_their_mean_plus_their_disagreement(seed: int):
    generator = np.random.default_rng(seed)
    prediction = generator.random((2, 1, 4, 4))
    raters = (generator.random((5, 2, 1, 4, 4)) < 0.4).astype(float)
    mean = raters.mean(axis=0)
    over_raters = np.mean([brier(prediction, rater) for rater in raters], axis=0)
    np.testing.assert_allclose(over_raters, brier(prediction, mean) + (mean * (1 - mean)).mean())


def test_volume_counts_partial_voxels_and_a_positive_error_is_too_large():
    np.testing.assert_allclose(soft_metrics(X, Y, 0.5)["volume_true_mm3"], [(0.3 + 0.5 + 1.0 + 0.1) * 0.5], rtol=1e-6)
    np.testing.assert_allclose(volume_error(X, Y), [(1.6 - 1.9) / 1.9], rtol=1e-6)
    np.testing.assert_allclose(volume_difference_mm3(X, Y, 0.5), [(1.9 - 1.6) * 0.5], rtol=1e-6)
    assert volume_error(Y, X)[0] > 0


def test_classes_do_not_mix():
    prediction, reference = random_case(0)
    both = soft_metrics(prediction, reference, 1.0)
    for k in range(2):
        alone = soft_metrics(prediction[:, k : k + 1], reference[:, k : k + 1], 1.0)
        for name, values in both.items():
            np.testing.assert_allclose(values[k], alone[name][0], err_msg=name)


def test_sums_do_not_lose_small_values_to_float32():
    many = np.full((1, 1, 4096, 4096), 0.1, dtype=np.float32)
    np.testing.assert_allclose(soft_metrics(many, many, 1.0)["volume_pred_mm3"], [many.size * float(np.float32(0.1))], rtol=1e-12)


def test_overlap_and_relative_volume_are_nan_where_both_are_empty():
    empty = one_class(0.0, 0.0)
    hard = hard_metrics(empty, empty, 0.5)
    found = soft_metrics(empty, empty, 1.0) | hard
    for name in ("dice_soft", "dice_dml", "volume_error", "volume_error_abs", "ece", *hard):
        assert np.isnan(found[name]).all(), name
    assert found["brier"] == found["mae"] == found["volume_pred_mm3"] == 0


def test_the_volume_of_a_mask_is_measured_against_that_of_the_soft_reference():
    prediction, soft = one_class(0.9, 0.6, 0.2), one_class(1.0, 0.4, 0.1)
    counts = confusion(prediction, soft, (0.1, 0.5, 0.95))
    expected = [(3 - 1.5) / 1.5, (2 - 1.5) / 1.5, (0 - 1.5) / 1.5]
    np.testing.assert_allclose(mask_volume_error(counts, soft), [expected], rtol=1e-6)
    empty = one_class(0.0, 0.0, 0.0)
    assert np.isnan(mask_volume_error(confusion(prediction, empty, (0.5,)), empty)).all()


def test_predicting_nothing_or_something_where_there_is_nothing_scores_zero():
    empty, full = one_class(0.0, 0.0), one_class(1.0, 0.0)
    for found in (hard_metrics(empty, full, 0.5), hard_metrics(full, empty, 0.5)):
        assert all(found[name] == 0 for name in ("dice", "iou", "precision", "recall"))
    assert dice_soft(empty, full) == dice_dml(full, empty) == 0


def test_thresholded_overlap_by_hand():
    prediction, reference = one_class(0.9, 0.8, 0.7, 0.1, 0.2), one_class(1.0, 0.5, 0.4, 0.6, 0.0)
    found = hard_metrics(prediction, reference, 0.5)  # tp 2, fp 1, fn 1, tn 1
    expected = {"dice": 4 / 6, "iou": 2 / 4, "precision": 2 / 3, "recall": 2 / 3, "specificity": 1 / 2}
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected)


def test_specificity_is_nan_without_background():
    assert np.isnan(hard_metrics(one_class(1, 1), one_class(1, 1), 0.5)["specificity"]).all()


@given(SEEDS, st.lists(st.sampled_from([0.05, 0.3, 0.5, 0.392, 0.95]), min_size=1, max_size=7))
@PROPERTY
def test_all_thresholds_at_once_give_what_each_gives_alone(seed: int, thresholds: list[float]):
    prediction, reference = random_case(seed)
    prediction = np.round(prediction, 1)  # so that some voxels lie exactly on a threshold
    counts = confusion(prediction, reference, thresholds)
    hard = (reference >= 0.5).swapaxes(0, 1).reshape(2, -1)
    for t, tau in enumerate(thresholds):
        above = (prediction > np.float32(tau)).swapaxes(0, 1).reshape(2, -1)
        np.testing.assert_array_equal(counts.tp[:, t], (above & hard).sum(axis=1))
        np.testing.assert_array_equal(counts.fp[:, t], (above & ~hard).sum(axis=1))
        np.testing.assert_array_equal(counts.fn[:, t], (~above & hard).sum(axis=1))
        np.testing.assert_array_equal(counts.tn[:, t], (~above & ~hard).sum(axis=1))


def test_dice_curve_is_the_dice_at_each_threshold():
    prediction, reference = random_case(3)
    curve = dice_curve(prediction, reference, (0.7, 0.2))
    np.testing.assert_allclose(curve[:, 0], hard_metrics(prediction, reference, 0.7)["dice"])
    np.testing.assert_allclose(curve[:, 1], hard_metrics(prediction, reference, 0.2)["dice"])


def test_ece_is_the_weighted_gap_of_the_bins():
    prediction = one_class(0.91, 0.95, 0.55, 0.55)
    reference = one_class(1.0, 0.9, 0.0, 1.0)
    gap_high, gap_middle = abs((0.91 + 0.95) / 2 - (1.0 + 0.9) / 2), abs(0.55 - 0.5)
    np.testing.assert_allclose(ece(prediction, reference), [(2 * gap_high + 2 * gap_middle) / 4], atol=1e-7)


def test_ece_looks_only_at_the_neighbourhood_of_the_foreground():
    prediction, reference = np.zeros((2, 1, 1, 11, 11))
    reference[..., 5, 5] = 1.0
    prediction[..., 5, 5] = 1.0
    prediction[..., 2, 2] = 0.3  # 3 voxels away along both axes: just inside the 7 x 7 box
    prediction[..., 1, 1] = 0.3  # outside
    np.testing.assert_allclose(ece(prediction, reference), [0.3 / 49])


def test_ece_neighbourhood_does_not_reach_into_other_items_and_works_in_3d():
    reference = np.zeros((2, 1, 9, 9, 9))
    reference[0, 0, 4, 4, 4] = 1
    prediction = reference + 0.1 * (reference == 0)
    np.testing.assert_allclose(ece(prediction, reference), [0.1 * (7**3 - 1) / 7**3])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_prefers_the_perfect_prediction_and_is_a_soft_metric(name: str):
    reference = blob(size=24, items=2, radius=6)
    worse = objective_score(name, 0.5 * reference, reference, 0.25)
    assert objective_score(name, reference, reference, 0.25) > worse
    assert worse == pytest.approx(OBJECTIVES[name].sign * soft_metrics(0.5 * reference, reference, 0.25)[name][0])


def test_objective_leaves_out_classes_without_a_value():
    prediction, reference = random_case(1)
    prediction[:, 1] = reference[:, 1] = 0
    assert objective_score("dice_dml", prediction, reference, 1.0) == dice_dml(prediction, reference)[0]
    assert np.isnan(objective_score("dice_dml", 0 * prediction, 0 * reference, 1.0))
