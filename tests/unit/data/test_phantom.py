"""The phantom: exact soft truth, binary raters that scatter around it, the same voxels everywhere."""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest

from softseg_dist.data.cases import CaseData
from softseg_dist.data.phantom import Body, Column, Ellipsoid, Phantom, PhantomCase, partial_volume
from softseg_dist.errors import UserError

KINDS = [Phantom(subjects=2, raters=3, shape=shape, dim=dim) for shape in ("cord", "lesions") for dim in (2, 3)]


def loaded(phantom: Phantom, index: int = 0) -> CaseData:
    return PhantomCase(phantom, index).load()


def volume_mm3(body: Body) -> float:
    """Of an ellipsoid 4/3 pi a b c; of a column the area pi (a_0^2 + sum_k (a_k^2 + b_k^2) / 2) of its section times height.

    The section is scaled by 1 + taper z / height, whose square has the mean 1 + taper^2 / 12.
    """
    if isinstance(body, Ellipsoid):
        return 4 / 3 * math.pi * math.prod(body.half_axes_mm)
    assert isinstance(body, Column)
    section = math.pi * (body.cosines[0] ** 2 + ((body.cosines[1:] ** 2).sum() + (body.sines[1:] ** 2).sum()) / 2)
    return float(math.prod(body.half_axes_mm) * section * body.height_mm * (1 + body.taper**2 / 12))


def soft_dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(1 - np.abs(one - other).sum() / (one.sum() + other.sum()))


@pytest.mark.parametrize("phantom", KINDS, ids=str)
def test_the_soft_truth_has_the_analytic_volume(phantom: Phantom) -> None:
    for index in range(phantom.subjects):
        case = PhantomCase(phantom, index)
        bodies, _ = case.bodies()
        expected = sum(map(volume_mm3, bodies))
        share = partial_volume(bodies, phantom.grid, phantom.spacing_mm)
        assert share.sum(dtype=float) * np.prod(phantom.spacing_mm) == pytest.approx(expected, rel=0.005)


def test_partial_volumes_are_those_of_dense_sampling() -> None:
    ball = [Ellipsoid((0.2, -0.1, 0.3), (1.9, 1.7, 2.3))]
    shape, spacing = (6, 6, 6), (1.0, 1.0, 1.0)
    fine = [(np.arange(n * 16) + 0.5) / 16 - n / 2 for n in shape]
    points = np.stack(np.meshgrid(*fine, indexing="ij"), -1).reshape(-1, 3)
    inside = ball[0].inside(points, None).reshape([axis for n in shape for axis in (n, 16)])
    dense = inside.mean(axis=(1, 3, 5))
    assert np.abs(partial_volume(ball, shape, spacing) - dense).max() < 0.03


def test_a_constant_wobble_grows_a_ball_by_that_distance() -> None:
    ball = [Ellipsoid((0, 0, 0), (3, 3, 3))]
    share = partial_volume(ball, (10, 10, 10), (1, 1, 1), wobble=lambda directions: np.full(len(directions), 0.5))
    assert share.sum() == pytest.approx(4 / 3 * np.pi * 3.5**3, rel=0.005)


@pytest.mark.parametrize("phantom", KINDS, ids=str)
def test_raters_are_binary_scatter_around_the_truth_and_differ(phantom: Phantom) -> None:
    data = loaded(phantom)
    assert set(np.unique(data.raters)) == {0.0, 1.0}
    assert data.truth is not None
    assert ((data.truth > 0) & (data.truth < 1)).sum() > 50
    assert soft_dice(data.raters.mean(0), data.truth) > 0.7
    for one, other in itertools.combinations(data.raters, 2):
        assert 0.4 < soft_dice(one, other) < 0.99


def test_the_mean_of_raters_is_nearer_to_the_truth_than_each_of_them() -> None:
    for index in range(2):
        data = loaded(Phantom(), index)
        assert data.truth is not None
        assert soft_dice(data.raters.mean(0), data.truth) > max(soft_dice(rater, data.truth) for rater in data.raters)


def test_raters_have_their_biases_in_every_case() -> None:
    phantom = Phantom(size=(32, 32), num_slices=4)
    volumes = np.mean([loaded(phantom, i).raters.sum(axis=(1, 2, 3, 4)) for i in range(4)], axis=0)
    assert list(volumes) == sorted(volumes)
    assert sum(phantom.rater_biases_mm()) == pytest.approx(0)
    assert Phantom(raters=1).rater_biases_mm() == [0.0]


def test_raters_who_agree_draw_the_truth_at_one_half() -> None:
    data = loaded(Phantom(disagreement_mm=0))
    assert data.truth is not None
    clear = np.abs(data.truth - 0.5) > 0.15  # a rater's mask is sampled less densely
    assert all(np.array_equal(rater[clear], data.truth[clear] > 0.5) for rater in data.raters)


@pytest.mark.parametrize("phantom", KINDS, ids=str)
def test_the_label_stays_off_the_border_in_plane(phantom: Phantom) -> None:
    for index in range(2):
        label = PhantomCase(phantom, index).mask(phantom.classes[0])
        assert not label[[0, -1]].any()
        assert not label[:, [0, -1]].any()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"noise": 0.2}, {"bias_field": 0.0}, {"disagreement_mm": 0.4}], ids=str)
def test_each_field_changes_the_voxels_and_the_sources(changes: dict[str, Any]) -> None:
    one = Phantom(size=(24, 24), num_slices=2)
    other = one.replace(**changes)
    assert PhantomCase(one, 0).sources() != PhantomCase(other, 0).sources()
    a, b = loaded(one), loaded(other)
    assert not (np.array_equal(a.image, b.image) and np.array_equal(a.raters, b.raters))


def test_more_people_do_not_change_those_there_were() -> None:
    assert PhantomCase(Phantom(subjects=5), 2).sources() == PhantomCase(Phantom(subjects=50), 2).sources()


def test_the_masks_are_the_same_on_every_machine() -> None:
    masks = loaded(Phantom(subjects=1)).raters.astype(np.uint8)
    assert hashlib.sha256(masks.tobytes()).hexdigest()[:12] == "6431d257995e"


def test_sites_alternate_and_the_second_has_less_contrast_to_noise() -> None:
    phantom = Phantom(subjects=4, raters=1)
    assert [case.site for case in phantom.cases(None)][:4] == ["site1", "site2", "site1", "site2"]
    ratio: dict[int, list[float]] = {0: [], 1: []}
    for index in range(4):
        data = loaded(phantom, index)
        assert data.truth is not None
        cord = PhantomCase(phantom, index).mask("cord") == 1
        gray, white = data.image[0][cord & (data.truth[0] == 1)], data.image[0][cord & (data.truth[0] == 0)]
        ratio[index % 2].append((gray.mean() - white.mean()) / white.std())
    assert np.mean(ratio[0]) > 1.2 * np.mean(ratio[1]) > 0


def test_masks_to_centre_on_are_the_class_and_the_cord() -> None:
    case = PhantomCase(Phantom(), 0)
    assert case.mask("cord").sum() > case.mask("GM").sum() > 0
    with pytest.raises(UserError, match=r"no mask 'brain'; there are GM, cord"):
        case.mask("brain")


def test_size_must_fit_the_dimension() -> None:
    assert Phantom(size=(32, 40), num_slices=3).grid == (32, 40, 3)
    assert Phantom(dim=3, size=(32, 40, 24)).grid == (32, 40, 24)
    with pytest.raises(ValueError, match="size needs 3 numbers"):
        Phantom(dim=3, size=(32, 32))
