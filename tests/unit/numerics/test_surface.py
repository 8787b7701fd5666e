"""Surface distances: moved cubes by arithmetic, masks without a surface, and MONAI's own functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from softseg_dist.numerics.structures import SURFACE_METRICS, surface_metrics

SPACING_MM = (2.0, 0.5, 0.8)


def cube(start: tuple[int, ...], size: int = 6, shape: tuple[int, ...] = (16, 16, 16)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def test_equal_masks_have_no_distance():
    assert surface_metrics(cube((4, 4, 4)), cube((4, 4, 4)), SPACING_MM) == {"hd95_mm": 0.0, "asd_mm": 0.0, "surface_dice_1mm": 1.0}


@pytest.mark.parametrize("axis", range(3))
def test_a_plate_that_moves_is_as_far_away_as_it_moved_times_the_spacing(axis: int):
    plate = np.zeros((12, 12, 12), dtype=bool)
    plate[(slice(None),) * axis + (3,)] = True  # one voxel thick, from end to end: all of it is surface
    found = surface_metrics(np.roll(plate, 2, axis), plate, SPACING_MM)
    moved_mm = 2 * SPACING_MM[axis]
    assert found["hd95_mm"] == pytest.approx(moved_mm)
    assert found["asd_mm"] == pytest.approx(moved_mm)
    assert found["surface_dice_1mm"] == (1.0 if moved_mm <= 1 else 0.0)


def test_a_cube_that_moves_by_one_voxel_by_hand():
    """Squares of 4 x 4, one moved by 1 along x. Of 12 outline voxels 4 lie outside the other square, at 1 voxel of 2 mm; 2 lie
    inside of it, in the middle of an end, and are 1 voxel from the outline along x (2 mm) and 1 along y (0.5 mm); 6 coincide."""
    found = surface_metrics(cube((3, 3), 4, (10, 10)), cube((4, 3), 4, (10, 10)), (2.0, 0.5))
    assert found["asd_mm"] == pytest.approx((4 * 2.0 + 2 * 0.5 + 6 * 0) / 12)
    assert found["surface_dice_1mm"] == pytest.approx((2 + 6) / 12)
    assert found["hd95_mm"] == pytest.approx(2.0)


def test_distances_are_symmetric():
    a, b = cube((2, 3, 4)), cube((5, 3, 2), size=4)
    assert surface_metrics(a, b, SPACING_MM) == pytest.approx(surface_metrics(b, a, SPACING_MM))


def test_a_single_voxel_has_a_surface_and_a_full_image_has_its_ends():
    voxel = cube((3, 3, 3), size=1)
    assert surface_metrics(voxel, np.roll(voxel, 1, 0), SPACING_MM)["hd95_mm"] == pytest.approx(2.0)
    assert surface_metrics(np.ones_like(voxel), np.ones_like(voxel), SPACING_MM)["surface_dice_1mm"] == 1


def test_an_empty_reference_has_no_surface_so_everything_is_nan():
    empty, full = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    for pair in ((full, empty), (empty, empty), (empty[:0], empty[:0])):
        found = surface_metrics(*pair, (1.0, 1.0))
        assert tuple(found) == SURFACE_METRICS
        assert all(np.isnan(value) for value in found.values())


def test_a_missed_structure_is_as_far_away_as_the_image_is_long():
    missed = surface_metrics(np.zeros((16, 16, 8), dtype=bool), cube((5, 5, 2), 3, (16, 16, 8)), (1.0, 1.0, 2.0))
    diagonal = np.sqrt(16**2 + 16**2 + 16**2)
    assert missed == {"hd95_mm": pytest.approx(diagonal), "asd_mm": pytest.approx(diagonal), "surface_dice_1mm": 0.0}
    assert surface_metrics(cube((0, 0), 0, (2, 2)), cube((0, 0), 2, (2, 2)), (1.0, 1.0), diagonal_mm=7.0)["hd95_mm"] == 7


def test_two_voxels_two_thick_slices_apart_are_10_mm_apart():
    one, other = (cube((5, 5, z), 1, (16, 16, 8)) for z in (2, 4))
    assert surface_metrics(one, other, (0.5, 0.5, 5.0))["hd95_mm"] == 10


@pytest.mark.parametrize("share", [0.004, 0.2], ids=["a few voxels", "mostly surface"])
@pytest.mark.parametrize("shape", [(34, 35), (19, 20, 21)])
def test_distances_are_those_of_monai(shape: tuple[int, ...], share: float):
    generator = np.random.default_rng(0)
    spacing = SPACING_MM[: len(shape)]
    a, b = generator.random((2, *shape)) < share
    ours = surface_metrics(a, b, spacing)
    ta, tb = (torch.from_numpy(m)[None, None].float() for m in (a, b))
    theirs = {
        "hd95_mm": compute_hausdorff_distance(ta, tb, include_background=True, percentile=95, spacing=spacing),
        "asd_mm": compute_average_surface_distance(ta, tb, include_background=True, symmetric=True, spacing=spacing),
        "surface_dice_1mm": compute_surface_dice(ta, tb, [1.0], include_background=True, spacing=spacing),
    }
    assert ours == pytest.approx({name: value.item() for name, value in theirs.items()}, rel=1e-6)


def test_a_process_without_denormals_survives_a_surface_along_the_edge():
    """As in a fit. Most of the points that scipy's tree cuts in two halves are at 0 along the axis of the cut."""
    torch.set_flush_denormal(True)
    try:
        edge = np.zeros((80, 120), dtype=bool)
        edge[:, 0] = edge[0, 100] = True
        assert surface_metrics(edge, edge, (0.01, 1.0))["hd95_mm"] == 0
    finally:
        torch.set_flush_denormal(False)
