"""The grid of a case: slices become the volume that they are."""

from __future__ import annotations

import numpy as np
import pytest

from softseg_dist.judging.judge import Grid, bounding_box


def test_a_volume_stays_as_it_is():
    grid, items = Grid((1.0, 2.0, 3.0), 6.0), np.ones((1, 4, 5, 6))
    assert grid.case(items) is items
    assert grid.scale(()).spacing_mm == (1.0, 2.0, 3.0)


def test_slices_are_as_far_apart_as_the_volume_of_a_voxel_says():
    grid, items = Grid((0.5, 0.5), 0.625, slices=(3, 4, 5)), np.ones((3, 4, 5))
    assert grid.case(items).shape == (1, 3, 4, 5)
    assert grid.scale(()).spacing_mm == pytest.approx((2.5, 0.5, 0.5))


def test_slices_that_were_left_out_are_empty_and_keep_the_others_apart():
    items = np.arange(1, 4)[:, None, None] * np.ones((3, 2, 2))
    (volume,) = Grid((1.0, 1.0), 4.0, slices=(2, 3, 6)).case(items)
    np.testing.assert_array_equal(volume[:, 0, 0], [1, 2, 0, 0, 3])
    (two,) = Grid((1.0, 1.0), 4.0, slices=(2, 3, 6)).case(np.stack([items, -items], axis=1))
    np.testing.assert_array_equal(two[:, :, 0, 0], [[1, 2, 0, 0, 3], [-1, -2, 0, 0, -3]])


def test_a_single_slice_is_a_plane():
    grid = Grid((1.0, 2.0), 10.0, slices=(4,))
    assert grid.case(np.ones((1, 4, 5))).shape == (1, 4, 5)
    assert grid.scale(()).spacing_mm == (1.0, 2.0)


def test_bounding_box_holds_all_voxels_and_no_more():
    mask = np.zeros((5, 6), dtype=bool)
    assert mask[bounding_box(mask)].size == 0
    mask[1, 2] = mask[3, 5] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 6))
