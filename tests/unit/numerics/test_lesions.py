"""Lesions: what touches, what counts as found, bins of size, and the counts by hand."""

from __future__ import annotations

import numpy as np
import pytest

from softseg_dist.numerics.structures import components, lesion_metrics


def measured(prediction: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return lesion_metrics(components(prediction), components(reference))


def line(*lengths: int, rows: int = 1) -> np.ndarray:
    """Lesions of the given numbers of voxels, one after the other in a plane, a gap of one voxel between them."""
    mask = np.zeros((rows, sum(lengths) + len(lengths)), dtype=bool)
    start = 0
    for length in lengths:
        mask[0, start : start + length] = True
        start += length + 1
    return mask


@pytest.mark.parametrize("corner", [(1, 1), (1, 1, 1), (0, 1, 1), (0, 0, 1)])
def test_voxels_that_touch_by_a_corner_are_one_lesion(corner: tuple[int, ...]):
    mask = np.zeros((4,) * len(corner), dtype=bool)
    mask[(1,) * len(corner)] = mask[tuple(1 + step for step in corner)] = True
    assert components(mask).sizes.tolist() == [2]


def test_a_gap_of_one_voxel_makes_two_lesions():
    assert components(line(2, 5)).sizes.tolist() == [2, 5]


@pytest.mark.parametrize(("size", "overlap", "found"), [(1, 1, 1), (2, 1, 0), (2, 2, 1), (3, 2, 0), (9, 2, 0), (9, 3, 1)])
def test_a_pair_needs_three_common_voxels_or_all_of_the_smaller_lesion(size: int, overlap: int, found: int):
    reference, prediction = line(size, rows=2), np.zeros((2, size + 4), dtype=bool)
    prediction[:, size - overlap : size + 3] = reference.shape[1] > 0
    prediction[1, :size] = False
    reference = np.pad(reference, [(0, 0), (0, 3)])
    found_now = measured(prediction, reference)
    assert found_now["lesions_found"] == found_now["lesions_predicted"] - found_now["false_lesions"] == found


def test_a_small_prediction_inside_a_large_lesion_finds_it():
    reference, prediction = line(9), np.zeros((1, 10), dtype=bool)
    prediction[0, 4] = True
    assert measured(prediction, reference)["lesions_found"] == 1


def test_true_lesions_are_counted_by_their_size():
    reference = line(1, 19, 20, 100, 101)
    found = measured(reference, reference)
    assert [found[f"lesions_true_{size}"] for size in ("lt20", "20to100", "gt100")] == [2, 2, 1]
    assert found["lesions_true"] == found["lesions_found"] == 5
    assert (found["lesion_sensitivity"], found["lesion_fdr"]) == (1, 0)


def test_found_lesions_are_counted_by_the_size_of_the_true_lesion():
    reference = line(5, 30, 150)
    prediction = reference.copy()
    prediction[0, 6:36] = False  # the middle one is missed
    prediction[0, 40:] = False  # of the last one 3 voxels are left
    found = measured(prediction, reference)
    assert {name: found[f"lesions_found_{name}"] for name in ("lt20", "20to100", "gt100")} == {"lt20": 1, "20to100": 0, "gt100": 1}
    assert (found["lesions_true"], found["lesions_found"]) == (3, 2)
    assert found["lesion_sensitivity"] == 2 / 3


def test_a_predicted_lesion_that_hits_none_is_false():
    reference, prediction = line(4, 4, 4), line(4, 4, 4)
    reference[0, 5:9] = False
    found = measured(prediction, reference)
    assert (found["lesions_predicted"], found["false_lesions"], found["lesion_fdr"]) == (3, 1, 1 / 3)


def test_one_blob_over_everything_finds_one():
    found = measured(np.ones_like(line(4, 5)), line(4, 5))
    assert (found["lesions_found"], found["lesions_predicted"], found["false_lesions"]) == (1, 1, 0)
    assert (found["lesion_sensitivity"], found["lesion_fdr"], found["lesion_f1"]) == (1 / 2, 0, 2 / 3)
    assert (found["lesions_found_lt20"], found["false_lesions_lt20"]) == (1, 0)


def test_pairs_are_taken_by_falling_overlap_and_each_lesion_once():
    """A blob covers 5 voxels of the first lesion and 4 of the second; a second prediction covers 3 of the first one alone."""
    reference, prediction = np.zeros((3, 20), dtype=bool), np.zeros((3, 20), dtype=bool)
    reference[0, :9] = reference[0, 10:14] = True
    prediction[0, 4:14] = True
    prediction[0, :3] = True
    found = measured(prediction, reference)
    assert (found["lesions_found"], found["false_lesions"]) == (1, 1)  # greedy: the other way round would match two pairs
    assert found["lesion_f1"] == 2 * 1 / (2 + 2)


def test_false_lesions_are_counted_by_their_own_size():
    reference, prediction = line(30, 5), line(30, 5)
    reference[:] = False
    found = measured(prediction, reference)
    assert (found["false_lesions"], found["false_lesions_20to100"], found["false_lesions_lt20"]) == (2, 1, 1)


def test_without_lesions_in_the_reference_the_ratios_are_nan_and_the_counts_stay():
    empty, full = np.zeros((4, 4, 4), dtype=bool), np.ones((4, 4, 4), dtype=bool)
    ratios = "lesion_sensitivity", "lesion_fdr", "lesion_f1"
    nothing = measured(empty, empty)
    assert all(np.isnan(nothing[name]) for name in ratios)
    assert not any(value for name, value in nothing.items() if name not in ratios)
    assert all(np.isnan(measured(full, empty)[name]) for name in ratios)
    assert measured(full, empty)["false_lesions"] == 1
    assert [measured(empty, full)[name] for name in ratios] == [0, 0, 0]
