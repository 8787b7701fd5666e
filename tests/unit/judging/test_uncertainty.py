"""How sure a prediction is: every measure by hand, nothing said where nothing can be compared, memory of a few maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from softseg_dist import Scale
from softseg_dist.judging.uncertainty import Spread, entropy, uncertainty_rows
from softseg_dist.numerics.metrics import METRICS

NAN = float("nan")
SCALE = Scale(1.0, (1.0,), (2.0, 2.0))
shares = st.floats(0, 1, width=32)


def maps(*values: list[float]) -> list[np.ndarray]:
    """Soft maps [1 1 1 W], one item of one class, from the values of their voxels."""
    return [np.array(v, dtype=np.float32).reshape(1, 1, 1, -1) for v in values]


def raters(*values: list[float]) -> np.ndarray:
    """[N R K *S] of one item and one class."""
    return np.stack([one[:, 0] for one in maps(*values)], axis=1)[:, :, None]


def of(method: str, spread: Spread, theirs: np.ndarray) -> dict[tuple[str, str], float]:
    return {(row.reference, row.metric): row.value for row in uncertainty_rows(method, spread, theirs, ("GM",), SCALE)}


@given(shares)
def test_entropy_is_one_bit_at_a_half_and_nothing_at_the_ends(p: float) -> None:
    value = entropy(np.array(p))
    assert 0 <= value <= 1
    assert value == pytest.approx(entropy(np.array(1 - p)))
    assert entropy(np.array([0.0, 0.5, 1.0])).tolist() == [0, 1, 0]
    assert entropy(np.array(0.25)) == pytest.approx(0.25 * 2 + 0.75 * math.log2(4 / 3))


def test_voxel_wise_measures_by_hand() -> None:
    spread = Spread.of(maps([0, 0.5, 0.25], [1, 0.5, 0.75]))
    assert spread.num_samples == 2
    assert spread.mean.ravel().tolist() == [0.5, 0.5, 0.5]
    assert spread.entropy.ravel().tolist() == [1, 1, 1]
    of_a_quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert spread.expected_entropy.ravel() == pytest.approx([0, 1, of_a_quarter])
    assert spread.mutual_information.ravel() == pytest.approx([1, 0, 1 - of_a_quarter])
    assert spread.variance.ravel() == pytest.approx([0.25, 0, 0.0625])


def test_structure_wise_measures_by_hand() -> None:
    spread = Spread.of(maps([1, 1, 0, 0], [1, 1, 1, 0], [1, 0.49, 0, 0]))  # 0.49 is below the cut
    volumes = [2, 3, 1.49]
    assert spread.volume_cv == pytest.approx(np.std(volumes, ddof=1) / np.mean(volumes))
    assert spread.pairwise_dice == pytest.approx((2 * 2 / 5 + 2 * 1 / 3 + 2 * 1 / 4) / 3)
    assert spread.samples_iou == pytest.approx(1 / 3)


def test_classes_and_items_are_kept_apart() -> None:
    one, other = np.zeros((2, 2, 4, 3), np.float32), np.zeros((2, 2, 4, 3), np.float32)
    one[0, 0, 0], other[1, 0, 0] = 1, 1  # class 0: the same place of two items
    one[:, 1], other[:, 1] = 1, 1
    spread = Spread.of([one, other])
    assert spread.pairwise_dice.tolist() == [0, 1]
    assert spread.volume_cv.tolist() == [0, 0]


@given(arrays(np.float32, (2, 2, 3, 5), elements=shares), st.integers(2, 5))
def test_samples_that_are_equal_leave_no_doubt_about_the_model(sample: np.ndarray, count: int) -> None:
    spread = Spread.of([sample] * count)
    assert np.array_equal(spread.mean, sample)
    assert spread.mutual_information == pytest.approx(0, abs=1e-12)
    assert spread.variance == pytest.approx(0, abs=1e-12)
    assert np.nan_to_num(spread.volume_cv) == pytest.approx(0, abs=1e-12)
    assert set(np.nan_to_num(spread.pairwise_dice, nan=1)) == set(np.nan_to_num(spread.samples_iou, nan=1)) == {1}
    assert spread.entropy == pytest.approx(entropy(sample))


@given(arrays(np.float32, (4, 1, 1, 6), elements=shares))
def test_doubt_lies_between_nothing_and_a_bit_and_splits_into_its_two_parts(samples: np.ndarray) -> None:
    spread = Spread.of(samples[:, None])
    assert spread.entropy.min() >= 0
    assert spread.entropy.max() <= 1
    assert spread.mutual_information.min() >= 0
    assert spread.mutual_information + spread.expected_entropy == pytest.approx(spread.entropy, abs=1e-9)
    assert spread.variance.max() <= 0.25 + 1e-12


def test_one_sample_says_nothing_about_the_spread() -> None:
    rows = of("m", Spread.of(maps([1, 0.25, 0])), raters([1, 1, 0], [1, 0, 0]))
    compared = ("mutual_information", "variance", "volume_cv", "pairwise_dice", "samples_iou")
    assert [rows["mean", f"m_{name}"] for name in compared] == pytest.approx([NAN] * 5, nan_ok=True)
    assert rows["mean", "m_entropy"] == pytest.approx((0 + entropy(np.array(0.25)) + 0) / 3)


def test_empty_samples_have_no_size_to_vary() -> None:
    spread = Spread.of(maps([0, 0], [0, 0]))
    measured = (spread.volume_cv, spread.pairwise_dice, spread.samples_iou)
    assert np.isnan(measured).all()
    some = Spread.of(maps([0, 0], [0, 0], [1, 0]))
    assert some.pairwise_dice == 0, "an empty sample against one that is not; the pair of empty ones is left out"


def test_ged_by_hand() -> None:
    spread = Spread.of(maps([1, 1, 0], [1, 0, 0]))
    theirs = raters([1, 1, 0], [0, 1, 1])
    across = (0 + 2 / 3 + 1 / 2 + 1) / 4  # 1 - IoU of every sample with every rater
    among, between = (0 + 1 / 2 + 1 / 2 + 0) / 4, (0 + 2 / 3 + 2 / 3 + 0) / 4
    assert spread.ged2(theirs) == pytest.approx(2 * across - among - between)


@given(arrays(np.float32, (3, 1, 2, 5), elements=shares))
def test_samples_that_are_the_raters_are_at_no_distance(samples: np.ndarray) -> None:
    samples = (samples >= 0.5).astype(np.float32)
    assert Spread.of(samples[:, None]).ged2(np.moveaxis(samples, 0, 1)[:, :, None]) == pytest.approx(0, abs=1e-12)


def test_the_mean_map_is_measured_like_any_other_prediction() -> None:
    generator = np.random.default_rng(0)
    samples, theirs = generator.random((3, 2, 2, 9, 8)), generator.integers(0, 2, (2, 3, 2, 9, 8)).astype(np.float32)
    spread, mean = Spread.of(samples), theirs.mean(axis=1)
    scale = Scale(1.0, (1.0, 1.0), (2.0, 2.0))
    rows = uncertainty_rows("tta", spread, theirs, ("a", "b"), scale)
    for k, name in enumerate(("a", "b")):
        values = {row.metric: row.value for row in rows if row.class_name == name}
        for metric in ("dice_dml", "brier", "ece"):
            assert values[f"tta_{metric}"] == METRICS[metric](samples.mean(axis=0), mean, scale)[k]


def test_rows_have_the_names_that_are_documented() -> None:
    spread = Spread.of(maps([1, 0.4, 0], [1, 0.2, 0]))
    names = [
        "entropy", "expected_entropy", "mutual_information", "variance", "volume_cv", "pairwise_dice", "samples_iou",
        "dice_dml", "brier", "ece",
    ]  # fmt: skip
    alone = uncertainty_rows("m", spread, raters([1, 1, 0]), ("GM",), SCALE)
    assert [(row.reference, row.metric, row.threshold) for row in alone] == [("mean", f"m_{n}", None) for n in names]
    several = uncertainty_rows("m", spread, raters([1, 1, 0], [1, 0, 0]), ("GM",), SCALE)
    assert [row.metric for row in several if row.reference == "raters"] == ["m_ged2"]


def test_entropy_far_from_every_object_does_not_count() -> None:
    wide = [1.0] * 2 + [0.25] * 3 + [0.4] * 40  # 3 voxels around the object count
    rows = of("m", Spread.of(maps(wide, wide)), raters([1.0] * 2 + [0.0] * 43))
    assert rows["mean", "m_entropy"] == pytest.approx(3 / 5 * entropy(np.array(0.25)))
