"""One suite over all augmentations, then the geometry of each."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from softseg_dist.errors import UserError
from softseg_dist.numerics.augmentation import (
    Affine,
    Augmentation,
    Elastic,
    Flip,
    Frame,
    Gamma,
    Noise,
    Spatial,
    augment,
)
from softseg_dist.numerics.labels import LabelMode, harden

Chain = tuple[Augmentation, ...]
CHAINS: list[Chain] = [
    (Affine(),),
    (Affine(degrees=180, scale=0.5, shift=0.3),),
    (Flip(axes=(0, 1)),),
    (Elastic(),),
    (Noise(),),
    (Gamma(),),
    (Flip(), Affine(), Elastic(), Noise(), Gamma()),
    (Elastic(), Affine(), Flip(axes=(1,))),
]
IDLE: Chain = (Affine(degrees=0, scale=0, shift=0), Flip(p=0), Flip(axes=()), Elastic(std_mm=0), Noise(std=0))
SPACES = {(17, 24): (0.5, 0.7), (9, 12, 7): (1.0, 0.8, 3.0)}  # size: spacing in mm
MODES: tuple[LabelMode, ...] = get_args(LabelMode)

every_chain = pytest.mark.parametrize("chain", CHAINS, ids=lambda c: "-".join(x.short for x in c))
every_space = pytest.mark.parametrize("size", SPACES, ids=str)
every_mode = pytest.mark.parametrize("mode", MODES)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def frame_of(size: tuple[int, ...], spacing_mm: tuple[float, ...]) -> Frame:
    return Frame(1, size, spacing_mm, torch.device("cpu"))


def moved(transform: Spatial, frame: Frame, seeds: range) -> Tensor:
    """Where the values of each voxel come from, in mm [len(seeds) *S D]."""
    draws = [transform.draw(torch.Generator().manual_seed(seed), frame) for seed in seeds]
    return transform.move(frame.positions, torch.stack(draws), frame)


def ball(frame: Frame, radius_mm: float, border_mm: float) -> Tensor:
    """A ball about the centre whose border falls off linearly over `border_mm` [1 1 *S]."""
    return ((radius_mm - frame.positions.norm(dim=-1)) / border_mm + 0.5).clamp(0, 1)[:, None]


# ---------------------------------------------------------------- all augmentations


@every_chain
@every_space
@every_mode
def test_result_of_a_sample_depends_on_its_seed_only(chain: Chain, size: tuple[int, ...], mode: LabelMode) -> None:
    image, target = uniform(5, 2, *size), uniform(5, 3, *size, seed=1).round()
    seeds = [3, 1, 4, 1, 5]
    together = augment(image, target, chain, seeds, mode, SPACES[size])
    reordered = augment(image.flip(0), target.flip(0), chain, seeds[::-1], mode, SPACES[size])
    for i, seed in enumerate(seeds):
        alone = augment(image[i : i + 1], target[i : i + 1], chain, [seed], mode, SPACES[size])
        for batch, back, single in zip(together, reordered, alone, strict=True):
            assert torch.equal(batch[i : i + 1], single)
            assert torch.equal(back[4 - i : 5 - i], single)


@every_chain
def test_different_seeds_differ_and_global_state_is_left_alone(chain: Chain) -> None:
    image = uniform(1, 1, 17, 24).expand(8, 1, 17, 24)
    state = torch.get_rng_state()
    out, _ = augment(image, image, chain, range(8), "soft", (0.5, 0.7))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(sample.flatten().tolist()) for sample in out}) > 1


@every_space
@every_mode
@given(seed=st.integers(0, 2**63 - 1), chain=st.sampled_from(CHAINS))
@settings(max_examples=15, deadline=None)
def test_target_stays_in_0_to_1_and_is_binary_unless_soft(
    size: tuple[int, ...], mode: LabelMode, seed: int, chain: Chain
) -> None:
    soft = mode in ("soft", "hard")
    target = uniform(2, 2, *size, seed=seed % 97) if soft else uniform(2, 2, *size, seed=seed % 97).round()
    image, out = augment(uniform(2, 1, *size), target, chain, [seed, 0], mode, SPACES[size])
    assert out.shape == target.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert image.isfinite().all()
    if mode != "soft":
        assert torch.equal(out, harden(out))


@every_space
def test_a_full_label_stays_at_most_one(size: tuple[int, ...]) -> None:
    full = torch.ones(20, 1, *size)
    _, out = augment(full, full, (Affine(), Elastic()), range(20), "soft", SPACES[size])
    assert out.max() == 1


@every_chain
def test_hard_is_soft_rounded_once_at_the_end(chain: Chain) -> None:
    image, target = uniform(4, 1, 17, 24), uniform(4, 1, 17, 24, seed=1)
    _, soft = augment(image, target, chain, range(4), "soft", (0.5, 0.7))
    _, hard = augment(image, target, chain, range(4), "hard", (0.5, 0.7))
    assert torch.equal(hard, harden(soft))


@every_space
@pytest.mark.parametrize("mode", ["soft", "hard_each", "nearest"])
def test_idle_transforms_are_bit_exact(size: tuple[int, ...], mode: LabelMode) -> None:
    image = uniform(3, 1, *size)
    target = uniform(3, 1, *size, seed=1) if mode == "soft" else uniform(3, 1, *size, seed=1).round()
    for chain in ((), IDLE, (*IDLE, Gamma(range=(1, 1)))):
        out, label = augment(image, target, chain, range(3), mode, SPACES[size])
        assert torch.equal(out, image)
        assert torch.equal(label, target)


def test_intensity_transforms_leave_the_soft_label_bit_exact() -> None:
    target = uniform(3, 1, 8, 8)
    _, label = augment(uniform(3, 1, 8, 8), target, (Noise(), Gamma()), range(3), "soft", (1, 1))
    assert torch.equal(label, target)


@pytest.mark.parametrize("chain", [c for c in CHAINS if isinstance(c[0], Spatial) and len(c) < 4], ids=str)
@every_space
def test_image_and_label_share_one_field(chain: Chain, size: tuple[int, ...]) -> None:
    maps = torch.zeros(6, 1, *size)
    inner = tuple(slice(2, n - 2) for n in size)
    maps[(..., *inner)] = uniform(6, 1, *(n - 4 for n in size))  # 0 at the border, where image and label differ outside
    image, label = augment(maps, maps, chain, range(6), "soft", SPACES[size])
    torch.testing.assert_close(image, label, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chain", [c for c in CHAINS if isinstance(c[0], Spatial) and len(c) < 4], ids=str)
def test_nearest_and_hard_follow_the_same_field_as_soft(chain: Chain) -> None:
    frame = frame_of((40, 40), (1.0, 1.0))
    target = harden(ball(frame, radius_mm=12, border_mm=1)).expand(6, 1, 40, 40)
    soft, *others = (
        augment(target, target, chain, range(6), mode, (1, 1))[1] for mode in ("soft", "hard", "nearest", "hard_each")
    )
    for other in others:
        assert (other - soft).abs().mean() < 0.05 < soft.mean()


def test_settings_of_one_transform_do_not_change_the_draws_of_another() -> None:
    image = uniform(4, 1, 8, 8)
    mirrored, _ = augment(image, image, (Flip(),), range(4), "soft", (1, 1))
    for noise in (Noise(std=0.0), Noise(std=1e-6)):
        out, _ = augment(image, image, (Flip(), noise), range(4), "soft", (1, 1))
        torch.testing.assert_close(out, mirrored, rtol=0, atol=1e-5)


@every_chain
def test_augmentation_comes_back_from_json(chain: Chain) -> None:
    for transform in chain:
        assert Augmentation.model_validate(transform.model_dump(mode="json")) == transform


@pytest.mark.parametrize("size", [(1, 8), (8, 1), (5, 5, 1)])
def test_a_size_of_one_voxel_is_no_trouble(size: tuple[int, ...]) -> None:
    maps = uniform(2, 1, *size)
    image, label = augment(maps, maps, (Affine(), Elastic(), Gamma()), range(2), "soft", (1.0,) * len(size))
    assert image.isfinite().all()
    assert label.isfinite().all()


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


def test_flip_of_an_axis_that_the_images_lack_is_refused() -> None:
    image = uniform(1, 1, 8, 8)
    with pytest.raises(UserError, match="axes must lie in 0 to 1 for these images, got 2"):
        augment(image, image, (Flip(axes=(2,)),), [0], "soft", (1, 1))


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


def test_elastic_that_would_fold_is_refused() -> None:
    with pytest.raises(ValidationError, match="std_mm=3 for spacing_mm=8"):
        Elastic(spacing_mm=8, std_mm=3)


# ---------------------------------------------------------------- intensity


def test_noise_has_at_most_its_std() -> None:
    image = torch.zeros(200, 2, 16, 16)
    noise, _ = augment(image, image, (Noise(std=0.3),), range(200), "soft", (1, 1))
    stds = noise.flatten(1).std(dim=1)
    assert stds.max() < 0.3 * 1.1
    assert stds.mean().item() == pytest.approx(0.15, rel=0.15)


def test_gamma_keeps_extremes_and_order_per_channel() -> None:
    image = uniform(8, 2, 6, 6) * 5 - 2
    out, _ = augment(image, image, (Gamma(range=(0.5, 2)),), range(8), "soft", (1, 1))
    for reduce in (torch.amin, torch.amax):
        torch.testing.assert_close(reduce(out, (2, 3)), reduce(image, (2, 3)))
    assert torch.equal(out.flatten(2).argsort(dim=2), image.flatten(2).argsort(dim=2))


def test_gamma_leaves_a_constant_image_alone() -> None:
    image = torch.full((1, 1, 4, 4), -3.0)
    out, _ = augment(image, image, (Gamma(),), [0], "soft", (1, 1))
    assert torch.equal(out, image)


@pytest.mark.parametrize("fields", [{"axes": (0, 0)}, {"axes": (3,)}, {"p": 1.5}])
def test_impossible_flips_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Flip.model_validate(fields)


def test_gamma_range_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ValidationError, match="smallest, largest"):
        Gamma(range=(1.5, 0.7))
