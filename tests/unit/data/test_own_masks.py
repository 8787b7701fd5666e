"""The raters' own masks: what was drawn comes back, voxel by voxel, from few bytes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from softseg_dist.data.cases import CaseData
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.phantom import Phantom

SHAPE = (7, 5, 6)
RNG = np.random.default_rng(0)


def data_of(raters: np.ndarray, truth: Float32 | None = None, affine: np.ndarray | None = None) -> CaseData:
    """A case of these masks [R K X Y Z]."""
    geometry = Geometry(raters.shape[2:], np.diag([0.5, 0.5, 2.0, 1.0]) if affine is None else affine)
    raters = raters.astype(np.float32)
    return CaseData(np.zeros((1, *raters.shape[2:]), np.float32), raters, truth, geometry.canonical_affine, geometry)


def full(own: OwnMasks, masks: np.ndarray) -> np.ndarray:
    """[... *box] -> [... X Y Z], 0 outside the box."""
    x, y, z = (slice(*edges) for edges in own.box)
    whole = np.zeros((*masks.shape[:-3], *own.geometry.canonical_shape), masks.dtype)
    whole[..., x, y, z] = masks
    return whole


def boxes(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Masks [2 2 X Y Z] whose union is the box 1..3, 2..4, 1..5 (the ends are in it)."""
    raters = np.zeros((2, 2, *shape), np.float32)
    raters[0, 0, 1:3, 2:4, 1:4] = 1
    raters[1, 1, 2:4, 3:5, 3:6] = 1
    return raters


@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_every_mask_comes_back_exactly(data: st.DataObject, num_raters: int, num_classes: int) -> None:
    kinds: list[Any] = [st.sampled_from((0.0, 1.0)), st.floats(0, 1, width=32), st.just(0.0)]
    masks = [
        data.draw(hnp.arrays(np.float32, SHAPE, elements=data.draw(st.sampled_from(kinds))))
        for _ in range(num_raters * num_classes)
    ]
    raters = np.stack(masks).reshape(num_raters, num_classes, *SHAPE)
    truth = data.draw(st.none() | hnp.arrays(np.float32, (num_classes, *SHAPE), elements=st.floats(0, 1, width=32)))
    own = OwnMasks.of(data_of(raters, truth))
    assert np.array_equal(full(own, own.raters), raters)
    assert (own.raters.dtype == bool) == bool(np.isin(raters, (0, 1)).all())
    assert (own.truth is None) == (truth is None)
    if truth is not None and own.truth is not None:
        assert np.array_equal(full(own, own.truth), truth)


def test_binary_masks_are_bits_in_the_box_around_all_of_them() -> None:
    own = OwnMasks.of(data_of(boxes()))
    assert own.box == ((1, 4), (2, 5), (1, 6))
    assert own.raters.dtype == bool
    assert own.packed.nbytes == 2 * 2 * math.ceil(3 * 3 * 5 / 8)


def test_one_soft_mask_leaves_the_others_bits() -> None:
    raters = boxes()
    raters[0, 0] *= 0.3
    own = OwnMasks.of(data_of(raters))
    assert own.packed.nbytes == 3 * math.ceil(45 / 8) + 4 * 45
    assert own.raters.dtype == np.float32
    assert np.array_equal(full(own, own.raters), raters)


def test_a_healthy_control_takes_no_byte() -> None:
    own = OwnMasks.of(data_of(np.zeros((3, 2, *SHAPE))))
    assert own.box == ((0, 0), (0, 0), (0, 0))
    assert (own.packed.nbytes, own.raters.shape, own.raters.dtype) == (0, (3, 2, 0, 0, 0), bool)
    assert own.mean_volumes_mm3 == (0, 0)
    whole = full(own, own.raters)
    assert whole.shape == (3, 2, *SHAPE)
    assert not whole.any()


def test_an_image_to_predict_has_no_masks() -> None:
    own = OwnMasks.of(data_of(np.zeros((0, 0, *SHAPE))))
    assert own.raters.shape == (0, 0, 0, 0, 0)
    assert own.mean_volumes_mm3 == ()


@pytest.mark.parametrize("corner", [(0, 0, 0), (6, 4, 5)], ids=str)
def test_a_label_at_the_border_of_the_image_is_kept(corner: tuple[int, int, int]) -> None:
    raters = np.zeros((1, 1, *SHAPE), np.float32)
    raters[0, 0][corner] = 1
    own = OwnMasks.of(data_of(raters))
    assert own.box == tuple((at, at + 1) for at in corner)
    assert np.array_equal(full(own, own.raters), raters)
    filled = OwnMasks.of(data_of(np.ones((1, 1, *SHAPE))))
    assert filled.box == tuple((0, n) for n in SHAPE)


def test_the_box_holds_the_truth_where_no_rater_drew() -> None:
    truth = np.zeros((2, *SHAPE), np.float32)
    truth[1, 6, 0, 0] = 0.25
    own = OwnMasks.of(data_of(boxes(), truth))
    assert own.box == ((1, 7), (0, 5), (0, 6))
    assert own.truth is not None
    assert np.array_equal(full(own, own.truth), truth)
    assert own.raters.dtype == bool


def test_volumes_are_means_over_the_raters_on_the_grid_of_the_file() -> None:
    own = OwnMasks.of(data_of(boxes()))
    voxel_mm3 = 0.5 * 0.5 * 2
    assert own.voxel_mm3 == pytest.approx(voxel_mm3)
    assert own.mean_volumes_mm3 == pytest.approx((2 * 2 * 3 * voxel_mm3 / 2, 2 * 2 * 3 * voxel_mm3 / 2))
    soft = OwnMasks.of(data_of(np.full((1, 1, *SHAPE), 0.25)))
    assert soft.mean_volumes_mm3 == pytest.approx((0.25 * 7 * 5 * 6 * voxel_mm3,))


def test_axes_are_canonical_however_the_file_is_stored() -> None:
    """Stored as z, x (to the left), y: 4 x 2 x 3 voxels."""
    affine = np.array([[0, -0.5, 0, 3], [0, 0, 0.7, 1], [2.0, 0, 0, 2], [0, 0, 0, 1]])
    geometry = Geometry((4, 2, 3), affine)
    raters = RNG.integers(0, 2, (1, 1, 2, 3, 4)).astype(np.float32)
    own = OwnMasks.of(CaseData(raters[0], raters, None, geometry.canonical_affine, geometry))
    assert own.geometry.canonical_shape == (2, 3, 4)
    assert own.geometry.spacing_mm == pytest.approx((0.5, 0.7, 2.0))
    assert own.voxel_mm3 == pytest.approx(0.5 * 0.7 * 2.0)
    assert np.array_equal(full(own, own.raters), raters)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_phantoms_own_grid_is_the_one_that_it_is_drawn_on(dim: Any) -> None:
    phantom = Phantom(subjects=1, dim=dim, raters=3)
    data = phantom.cases(None)[0].load()
    own = OwnMasks.of(data)
    assert (own.geometry.canonical_shape, own.geometry.spacing_mm) == (phantom.grid, phantom.spacing_mm)
    assert data.truth is not None
    assert own.truth is not None
    assert np.array_equal(full(own, own.raters), data.raters)
    assert np.array_equal(full(own, own.truth), data.truth)
    assert (own.raters.dtype, own.truth.dtype) == (bool, np.float32)
