"""The geometry of each spatial transform, in mm."""

from __future__ import annotations

import math

import pytest
import torch
from augmentation_samples import SPACES, augment, ball, every_space, frame_of, uniform
from pydantic import ValidationError
from torch import Tensor

from softseg_dist import Affine, Elastic, Flip, Spatial
from softseg_dist.numerics.augmentation import apply, draw_all
from softseg_dist.numerics.labels import LabelMode
from softseg_dist.numerics.transforms import Frame


def moved(transform: Spatial, frame: Frame, seeds: range) -> Tensor:
    """Where the values of each voxel come from, in mm [len(seeds) *S D]."""
    draws = [transform.draw(torch.Generator().manual_seed(seed), frame) for seed in seeds]
    return transform.move(frame.positions, torch.stack(draws), frame)


# ---------------------------------------------------------------- Affine


@every_space
def test_rotation_keeps_distances_in_mm(size: tuple[int, ...]) -> None:
    frame = frame_of(size, SPACES[size])
    points = moved(Affine(degrees=180, scale=0, shift=0), frame, range(4)).flatten(1, -2)[:, ::5].double()
    original = frame.positions.flatten(1, -2)[:, ::5].double()
    before, after = (torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") for x in (original, points))
    torch.testing.assert_close(after, before.expand(4, -1, -1), rtol=0, atol=1e-5)


@every_space
def test_rotation_reaches_its_largest_angle_and_not_more(size: tuple[int, ...]) -> None:
    frame = frame_of(size, SPACES[size])
    corner = frame.positions.flatten(1, -2)[:, :1]
    turned = moved(Affine(degrees=30, scale=0, shift=0), frame, range(200)).flatten(1, -2)[:, :1]
    cosine = (turned * corner).sum(-1) / corner.norm(dim=-1) ** 2
    assert math.cos(math.radians(30)) - 1e-5 <= cosine.min() < math.cos(math.radians(27))


def test_quarter_turn_of_square_voxels_is_exact() -> None:
    affine, frame = Affine(degrees=90, scale=0, shift=0), frame_of((7, 7), (2.0, 2.0))
    image = uniform(1, 1, 7, 7)
    parameters = torch.tensor([[1.0, 0, 0, 0, 0]])  # angle, scales, shifts as shares of their largest
    turned = frame.sample(image, affine.move(frame.positions, parameters, frame))
    torch.testing.assert_close(turned, image.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_a_ball_in_mm_stays_a_ball_under_rotation_of_anisotropic_voxels() -> None:
    frame = frame_of((40, 20, 14), (1.0, 2.0, 3.0))
    maps = ball(frame, radius_mm=12, border_mm=10).expand(4, 1, *frame.size)
    errors = {}
    for spacing_mm in (frame.spacing_mm, (1.0, 1.0, 1.0)):
        _, label = augment(maps, maps, (Affine(degrees=180, scale=0, shift=0),), range(4), "soft", spacing_mm)
        errors[spacing_mm] = ((label - maps).abs().mean() / maps.mean()).item()
    right, in_voxels = errors.values()
    assert right < 0.03 < 0.3 < in_voxels


def test_scale_and_shift_move_the_content_by_as_much() -> None:
    affine, frame = Affine(degrees=0, scale=0.2, shift=0.1), frame_of((10, 20), (1.0, 0.5))
    parameters = torch.tensor([[0.0, 1.0, -1.0, 1.0, -0.5]])
    x, y = affine.move(frame.positions, parameters, frame).unbind(-1)
    u, v = frame.positions.unbind(-1)
    torch.testing.assert_close(x, (u - 0.1 * 10) / 1.2)
    torch.testing.assert_close(y, (v + 0.05 * 10) / 0.8)


# ---------------------------------------------------------------- Flip


@pytest.mark.parametrize("mode", ["soft", "hard_each", "nearest"])
def test_flip_is_bit_exact(mode: LabelMode) -> None:
    image, target = uniform(16, 1, 5, 6), uniform(16, 1, 5, 6, seed=1).round()
    out, label = augment(image, target, (Flip(axes=(0,), p=0.5),), range(16), mode, (0.3, 0.7))
    kept = [torch.equal(a, b) for a, b in zip(out, image, strict=True)]
    for i, unchanged in enumerate(kept):
        assert torch.equal(out[i], image[i] if unchanged else image[i].flip(1))
        assert torch.equal(label[i], target[i] if unchanged else target[i].flip(1))
    assert 0 < sum(kept) < 16


@every_space
def test_flip_by_positions_equals_flip_by_indices(size: tuple[int, ...]) -> None:
    frame, flip, image = frame_of(size, SPACES[size]), Flip(axes=(0, 1), p=1), uniform(2, 1, *size)
    positions = moved(flip, frame, range(2))
    parameters = torch.stack([flip.draw(torch.Generator(), frame)] * 2)
    torch.testing.assert_close(frame.sample(image, positions), flip.mirror(image, parameters), rtol=0, atol=1e-5)
    assert torch.equal(flip.mirror(image, parameters), image.flip(2, 3))


# ---------------------------------------------------------------- Elastic


@pytest.mark.parametrize(("size", "spacing_mm"), [((61, 40), (0.5, 1.0)), ((21, 20, 10), (1.0, 1.5, 3.0))])
def test_elastic_displacement_has_its_std_in_mm(size: tuple[int, ...], spacing_mm: tuple[float, ...]) -> None:
    frame = frame_of(size, spacing_mm)
    displacement = moved(Elastic(spacing_mm=5, std_mm=0.7), frame, range(400)) - frame.positions
    rms = displacement.square().flatten(0, -2).mean(dim=0).sqrt()
    assert rms.tolist() == pytest.approx([0.7] * len(size), rel=0.05)
    assert displacement.flatten(0, -2).mean(dim=0).tolist() == pytest.approx([0] * len(size), abs=0.05)


def test_elastic_displacement_is_smooth() -> None:
    """Its slope is that of a cubic B-spline, and does not jump."""
    frame = frame_of((81, 81), (0.25, 0.25))
    displacement = moved(Elastic(spacing_mm=4, std_mm=0.5), frame, range(200)) - frame.positions
    slope = displacement.diff(dim=1).square().mean().sqrt() / 0.25
    curvature = displacement.diff(n=2, dim=1).abs().max() / 0.25**2
    assert slope.item() == pytest.approx(math.sqrt((2 / 3) / (151 / 315)) * 0.5 / 4, rel=0.05)
    assert curvature < 1  # per mm; a field linear between control points reaches 3


def test_elastic_does_not_fold_at_its_defaults() -> None:
    frame = frame_of((64, 64), (0.5, 0.5))
    positions = moved(Elastic(), frame, range(100))
    dx, dy = positions.diff(dim=1)[:, :, 1:], positions.diff(dim=2)[:, 1:]
    assert (dx[..., 0] * dy[..., 1] - dx[..., 1] * dy[..., 0]).min() > 0


def test_elastic_sampled_off_the_grid_agrees_with_the_spline_at_voxels() -> None:
    frame, elastic = frame_of((20, 24), (0.5, 0.5)), Elastic(spacing_mm=4, std_mm=0.5)
    parameters = torch.stack([elastic.draw(torch.Generator(), frame)])
    at_voxels = elastic.move(frame.positions, parameters, frame)
    torch.testing.assert_close(elastic.move(frame.positions.clone(), parameters, frame), at_voxels, atol=1e-5, rtol=0)


@every_space
def test_straight_transforms_in_a_row_are_one_and_the_elastic_one_between_them_is_felt(size: tuple[int, ...]) -> None:
    frame = frame_of(size, SPACES[size])
    image, label = uniform(2, 1, *size), uniform(2, 1, *size)
    transforms = Affine(shift=0.1), Flip(p=1), Affine(scale=0.3), Elastic(), Affine(degrees=90)
    drawn = draw_all(transforms, [3, 4], frame)
    positions = frame.positions
    for transform, parameters in reversed(drawn):
        assert isinstance(transform, Spatial)
        positions = transform.move(positions, parameters, frame)
    ours, _ = apply(image, label, drawn, "soft", frame)
    torch.testing.assert_close(ours, frame.sample(image, positions), rtol=0, atol=1e-4)


def test_elastic_that_would_fold_is_refused() -> None:
    with pytest.raises(ValidationError, match="std_mm=3 for spacing_mm=8"):
        Elastic(spacing_mm=8, std_mm=3)
