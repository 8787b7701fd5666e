"""Metrics: the formulas of docs/yardstick.md, extremes, empty maps, and one pass over all thresholds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist import Metric, Scale, UserError
from softseg_dist.numerics.metrics import (
    METRICS,
    TABLE,
    Map,
    Pair,
    PerClass,
    confusion,
    hard_scores,
    mask_volume_error,
    objective_score,
    soft_metrics,
)

OBJECTIVES = [name for name, row in TABLE.items() if row.may_lead]
PROPERTY = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def value(name: str, prediction: np.ndarray, reference: np.ndarray, voxel_mm3: float = 1.0) -> np.ndarray:
    """A soft metric per class [K], on voxels of 1 mm along every axis."""
    return METRICS[name](prediction, reference, scale_of(prediction, voxel_mm3))


def scale_of(maps: np.ndarray, voxel_mm3: float) -> Scale:
    return Scale(voxel_mm3, (10.0,) * maps.shape[1], (1.0,) * (maps.ndim - 2))


def soft(prediction: np.ndarray, reference: np.ndarray, voxel_mm3: float) -> dict[str, np.ndarray]:
    return soft_metrics(Pair(prediction, reference, scale_of(prediction, voxel_mm3)), against_mean=True)


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
    np.testing.assert_allclose(value("dice_soft", X, Y), [2 * products / sums], rtol=1e-6)
    np.testing.assert_allclose(1 - value("dice_soft", X, Y), [0.308571], atol=1e-6)


def test_dml_dice_of_the_worked_example():
    np.testing.assert_allclose(value("dice_dml", X, Y), [(1.6 + 1.9 - 0.3) / (1.6 + 1.9)], rtol=1e-6)
    np.testing.assert_allclose(1 - value("dice_dml", X, Y), [0.085714], atol=1e-6)


def test_soft_dice_prefers_a_wrong_prediction_where_labels_are_soft_and_the_dml_form_does_not():
    half, one = one_class(0.5, 0.5), one_class(1.0, 1.0)
    assert value("dice_soft", half, half) == pytest.approx(0.5)
    assert value("dice_soft", one, half) == pytest.approx(2 / 3)
    assert value("dice_dml", half, half) == 1 > value("dice_dml", one, half)


@given(SEEDS)
@PROPERTY
def test_both_soft_dice_agree_on_hard_references(seed: int):
    prediction, reference = random_case(seed)
    hard = (reference >= 0.5).astype(np.float32)
    np.testing.assert_allclose(value("dice_soft", prediction, hard), value("dice_dml", prediction, hard), rtol=1e-6)


def test_errors_of_the_worked_example():
    np.testing.assert_allclose(value("mse", X, Y), [(0.1**2 + 0.1**2 + 0.1**2) / 4], rtol=1e-5)
    np.testing.assert_allclose(value("mae", X, Y), [0.3 / 4], rtol=1e-6)


@given(SEEDS)
@PROPERTY
def test_mean_brier_over_raters_is_the_brier_of_their_mean_plus_their_disagreement(seed: int):
    generator = np.random.default_rng(seed)
    prediction = generator.random((2, 1, 4, 4))
    raters = (generator.random((5, 2, 1, 4, 4)) < 0.4).astype(float)
    mean = raters.mean(axis=0)
    over_raters = np.mean([value("brier", prediction, rater) for rater in raters], axis=0)
    np.testing.assert_allclose(over_raters, value("brier", prediction, mean) + (mean * (1 - mean)).mean())


def test_volume_counts_partial_voxels_and_a_positive_error_is_too_large():
    np.testing.assert_allclose(soft(X, Y, 0.5)["volume_true_mm3"], [(0.3 + 0.5 + 1.0 + 0.1) * 0.5], rtol=1e-6)
    np.testing.assert_allclose(value("volume_error", X, Y), [(1.6 - 1.9) / 1.9], rtol=1e-6)
    np.testing.assert_allclose(value("volume_difference_mm3", X, Y, 0.5), [(1.9 - 1.6) * 0.5], rtol=1e-6)
    assert value("volume_error", Y, X)[0] > 0


def test_classes_do_not_mix():
    prediction, reference = random_case(0)
    both = soft(prediction, reference, 1.0)
    for k in range(2):
        alone = soft(prediction[:, k : k + 1], reference[:, k : k + 1], 1.0)
        for name, values in both.items():
            np.testing.assert_allclose(values[k], alone[name][0], err_msg=name)


def test_sums_do_not_lose_small_values_to_float32():
    many = np.full((1, 1, 512, 512), 0.1, dtype=np.float32)
    np.testing.assert_allclose(soft(many, many, 1.0)["volume_pred_mm3"], [many.size * float(np.float32(0.1))], rtol=1e-12)


def test_the_volume_of_a_mask_is_measured_against_that_of_the_soft_reference():
    prediction, reference = one_class(0.9, 0.6, 0.2), one_class(1.0, 0.4, 0.1)
    counts = confusion(prediction, reference, (0.1, 0.5, 0.95))
    expected = [(3 - 1.5) / 1.5, (2 - 1.5) / 1.5, (0 - 1.5) / 1.5]
    np.testing.assert_allclose(mask_volume_error(counts, np.array([1.5])), [expected], rtol=1e-6)
    assert np.isnan(mask_volume_error(confusion(prediction, 0.4 * reference, (0.5,)), np.array([0.6]))).all()


def test_a_voxel_at_the_threshold_is_inside_on_both_sides():
    half = one_class(0.5, 0.5, 0.0)
    assert hard_metrics(half, half, 0.5)["dice"] == 1


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
        above = (prediction >= np.float32(tau)).swapaxes(0, 1).reshape(2, -1)
        np.testing.assert_array_equal(counts.tp[:, t], (above & hard).sum(axis=1))
        np.testing.assert_array_equal(counts.fp[:, t], (above & ~hard).sum(axis=1))
        np.testing.assert_array_equal(counts.fn[:, t], (~above & hard).sum(axis=1))
        np.testing.assert_array_equal(counts.tn[:, t], (~above & ~hard).sum(axis=1))


def test_dice_of_several_thresholds_is_that_at_each():
    prediction, reference = random_case(3)
    curve = hard_scores(confusion(prediction, reference, (0.7, 0.2)))["dice"]
    np.testing.assert_allclose(curve[:, 0], hard_metrics(prediction, reference, 0.7)["dice"])
    np.testing.assert_allclose(curve[:, 1], hard_metrics(prediction, reference, 0.2)["dice"])


def test_ece_is_the_weighted_gap_of_the_bins():
    prediction = one_class(0.91, 0.95, 0.55, 0.55)
    reference = one_class(1.0, 0.9, 0.0, 1.0)
    gap_high, gap_middle = abs((0.91 + 0.95) / 2 - (1.0 + 0.9) / 2), abs(0.55 - 0.5)
    np.testing.assert_allclose(value("ece", prediction, reference), [(2 * gap_high + 2 * gap_middle) / 4], atol=1e-7)


def test_ece_looks_only_at_the_neighbourhood_of_the_labels():
    prediction, reference = np.zeros((2, 1, 1, 13, 13))
    reference[..., 6, 6] = 1.0
    prediction[..., 6, 6] = 1.0
    prediction[..., 1, 1] = 0.3  # 5 mm away along both axes: just inside the 11 x 11 box
    prediction[..., 0, 0] = 0.3  # outside
    np.testing.assert_allclose(value("ece", prediction, reference), [0.3 / 121])
    np.testing.assert_allclose(value("ece_max", prediction, reference), [0.3])


def test_the_brier_skill_of_a_class_without_any_volume_is_refused():
    with pytest.raises(UserError, match="classes with a volume above 0"):
        METRICS["brier_skill"](X, Y, Scale(1.0, (0.0,), (1.0, 1.0)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_prefers_the_perfect_prediction_and_is_a_soft_metric(name: str):
    reference = blob(size=24, items=2, radius=6)
    scale = scale_of(reference, 0.25)
    worse = objective_score(METRICS[name], 0.5 * reference, reference, scale)
    assert objective_score(METRICS[name], reference, reference, scale) > worse
    assert worse == pytest.approx(TABLE[name].sign * soft(0.5 * reference, reference, 0.25)[name].mean())


def test_objectives_are_the_rows_that_need_no_threshold_and_know_what_is_perfect():
    expected = {"brier_skill", "brier_skill_case", "brier", "mse", "mae", "dice_dml", "volume_error_abs", "volume_difference_mm3"}
    assert set(OBJECTIVES) == expected | {"ece", "ece_max", "qubiq"}


def test_objective_leaves_out_classes_without_a_value():
    prediction, reference = random_case(1)
    reference[:, 1] = 0
    scale = scale_of(prediction, 1.0)
    assert objective_score(METRICS["dice_dml"], prediction, reference, scale) == value("dice_dml", prediction, reference)[0]
    assert np.isnan(objective_score(METRICS["dice_dml"], prediction, 0 * reference, scale))


class Sum(Metric):
    """The sum of the prediction, over all classes.

    More of it.
    """

    short = "sum"
    higher_is_better = False

    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        """One number, where one per class is asked for."""
        return prediction.sum()


def test_a_metric_of_the_user_has_a_line_of_the_table_and_comes_back_from_json():
    row = Sum().row
    assert (row.name, row.title, row.meaning, row.sign) == ("sum", "sum", "The sum of the prediction, over all classes.", -1)
    assert Metric.model_validate(Sum().model_dump(mode="json")) == Sum()


def test_a_metric_that_does_not_return_one_number_per_class_is_refused():
    with pytest.raises(UserError, match="metric sum must return one finite number or NaN for each of 1 classes"):
        objective_score(Sum(), X, Y, scale_of(X, 1.0))


def test_qubiq_is_the_mean_dice_over_the_levels_that_the_reference_reaches():
    prediction, reference = one_class(0.35, 0.9, 0.0), one_class(0.35, 0.25, 0.15)
    levels = [2 * 2 / (2 + 3), 2 * 2 / (2 + 2), 2 * 1 / (2 + 1)]  # .1, .2, .3
    assert value("qubiq", prediction, reference) == pytest.approx(np.mean(levels))
