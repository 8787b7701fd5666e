"""One suite over all augmentations: what each of them, and any chain of them, must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from augmentation_samples import SPACES, augment, ball, every_space, frame_of, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from public_classes import assert_covered
from pydantic import ValidationError
from torch import Tensor

from softseg_dist import (
    Affine,
    Augmentation,
    BiasField,
    Blur,
    Contrast,
    Elastic,
    Flip,
    Frame,
    Gamma,
    Intensity,
    LowResolution,
    Mixup,
    Noise,
    Pairing,
    Spatial,
)
from softseg_dist.errors import UserError
from softseg_dist.numerics.augmentation import draw_all, join, pairs
from softseg_dist.numerics.labels import LabelMode, harden

Chain = tuple[Augmentation, ...]
CHAINS: list[Chain] = [
    (Affine(),),
    (Affine(degrees=180, scale=0.5, shift=0.3),),
    (Flip(axes=(0, 1)),),
    (Elastic(),),
    (Noise(),),
    (Gamma(),),
    (Contrast(),),
    (BiasField(),),
    (Blur(),),
    (LowResolution(range=(1, 3)),),
    (Mixup(),),
    (Flip(), Affine(), Elastic(), Noise(), Gamma()),
    (Elastic(), Affine(), Flip(axes=(1,))),
    (Contrast(), Affine(), BiasField(), Blur(), LowResolution(axes=(1,)), Mixup(alpha=1)),
]
IDLE: Chain = (
    Affine(degrees=0, scale=0, shift=0),
    Flip(p=0),
    Flip(axes=()),
    Elastic(std_mm=0),
    Noise(std=0),
    Gamma(range=(1, 1)),
    Contrast(range=(1, 1)),
    BiasField(strength=1),
    Blur(sigma_mm=0),
    LowResolution(range=(1, 1)),
    LowResolution(axes=()),
    Mixup(alpha=0),
)
MODES: tuple[LabelMode, ...] = get_args(LabelMode)


def named(chain: Chain) -> str:
    return "-".join(transform.short for transform in chain)


every_chain = pytest.mark.parametrize("chain", CHAINS, ids=named)
every_spatial_chain = pytest.mark.parametrize("chain", [c for c in CHAINS if all(isinstance(t, Spatial) for t in c)], ids=named)
every_intensity = pytest.mark.parametrize(
    "transform", [c[0] for c in CHAINS if len(c) == 1 and isinstance(c[0], Intensity)], ids=lambda t: t.short
)
every_mode = pytest.mark.parametrize("mode", MODES)


def through(
    chain: Chain, image: Tensor, target: Tensor, seeds: Sequence[int], mode: LabelMode, spacing_mm: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Image and target after the whole chain; the partner of a sample has values of its own, by the sample's seed."""
    image, target = augment(image, target, chain, seeds, mode, spacing_mm)
    partners = [torch.stack([uniform(*maps.shape[1:], seed=seed % 997) for seed in seeds]).to(maps) for maps in (image, target)]
    return join(image, target, *partners, draw_all(chain, seeds, Frame.of(image, spacing_mm), (Pairing,)))


def test_the_suite_runs_over_every_public_augmentation() -> None:
    assert_covered(Augmentation, [chain[0] for chain in CHAINS if len(chain) == 1])
    assert_covered(Augmentation, IDLE)


@every_chain
@every_space
@every_mode
def test_result_of_a_sample_depends_on_its_seed_only(chain: Chain, size: tuple[int, ...], mode: LabelMode) -> None:
    image, target = uniform(5, 2, *size), uniform(5, 3, *size, seed=1).round()
    seeds = [3, 1, 4, 1, 5]
    together = through(chain, image, target, seeds, mode, SPACES[size])
    reordered = through(chain, image.flip(0), target.flip(0), seeds[::-1], mode, SPACES[size])
    for i, seed in enumerate(seeds):
        alone = through(chain, image[i : i + 1], target[i : i + 1], [seed], mode, SPACES[size])
        for batch, back, single in zip(together, reordered, alone, strict=True):
            assert torch.equal(batch[i : i + 1], single)
            assert torch.equal(back[4 - i : 5 - i], single)


@every_chain
def test_different_seeds_differ_and_global_state_is_left_alone(chain: Chain) -> None:
    image = uniform(1, 1, 17, 24).expand(8, 1, 17, 24)
    state = torch.get_rng_state()
    out, _ = through(chain, image, image, range(8), "soft", (0.5, 0.7))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(sample.flatten().tolist()) for sample in out}) > 1


@every_space
@every_mode
@given(seed=st.integers(0, 2**63 - 1), chain=st.sampled_from(CHAINS))
@settings(max_examples=15, deadline=None)
def test_target_stays_in_0_to_1_and_is_binary_unless_soft_or_mixed(
    size: tuple[int, ...], mode: LabelMode, seed: int, chain: Chain
) -> None:
    soft = mode in ("soft", "hard")
    target = uniform(2, 2, *size, seed=seed % 97) if soft else uniform(2, 2, *size, seed=seed % 97).round()
    image, out = through(chain, uniform(2, 1, *size), target, [seed, 0], mode, SPACES[size])
    assert out.shape == target.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert image.isfinite().all()
    if mode != "soft" and not pairs(chain):
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
    assert all(transform.idle for transform in IDLE)
    assert not pairs(IDLE)
    for chain in ((), IDLE):
        out, label = through(chain, image, target, range(3), mode, SPACES[size])
        assert torch.equal(out, image)
        assert torch.equal(label, target)


@every_intensity
@every_space
def test_intensity_transforms_leave_the_soft_label_bit_exact(transform: Intensity, size: tuple[int, ...]) -> None:
    target = uniform(3, 1, *size)
    _, label = augment(uniform(3, 1, *size), target, (transform,), range(3), "soft", SPACES[size])
    assert torch.equal(label, target)


@every_intensity
@every_space
def test_the_zero_of_the_image_means_nothing(transform: Intensity, size: tuple[int, ...]) -> None:
    """A z-score moves it, so what comes out must move along and not otherwise change."""
    image = uniform(4, 2, *size).double()
    out, moved = (augment(maps, image[:, :1], (transform,), range(4), "soft", SPACES[size])[0] for maps in (image, image - 7))
    torch.testing.assert_close(moved, out - 7, rtol=0, atol=1e-6)
    assert not torch.equal(out, image)


@every_chain
@every_space
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_images_and_empty_and_full_targets_give_finite_numbers(chain: Chain, size: tuple[int, ...], value: float) -> None:
    target = torch.stack([torch.zeros(3, *size), torch.ones(3, *size)])
    for mode in MODES:
        image, out = through(chain, torch.full((2, 1, *size), value), target, range(2), mode, SPACES[size])
        assert image.isfinite().all()
        assert ((out >= 0) & (out <= 1)).all()
        if not pairs(chain):
            assert out[0].max() == 0
    if not pairs(chain) and not any(isinstance(transform, Noise) for transform in chain):
        torch.testing.assert_close(image, torch.full_like(image, value))


@every_chain
@every_space
def test_single_and_double_precision_agree(chain: Chain, size: tuple[int, ...]) -> None:
    image, target = uniform(4, 2, *size), uniform(4, 3, *size, seed=1)
    single = through(chain, image, target, range(4), "soft", SPACES[size])
    double = through(chain, image.double(), target.double(), range(4), "soft", SPACES[size])
    for low, high in zip(single, double, strict=True):
        assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(low.double(), high, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "transform",
    [Flip(axes=(0, 1)), Noise(), Gamma(), Contrast(), Blur(), LowResolution(range=(1, 3)), Mixup()],
    ids=lambda t: t.short,
)
def test_a_plane_is_a_volume_of_one_slice(transform: Augmentation) -> None:
    """Of the others a volume needs more random numbers, for an axis more."""
    image, target = uniform(4, 2, 17, 24), uniform(4, 1, 17, 24, seed=1)
    flat = through((transform,), image, target, range(4), "soft", (0.5, 0.7))
    volume = through((transform,), image[..., None], target[..., None], range(4), "soft", (0.5, 0.7, 4.0))
    for plane, slices in zip(flat, volume, strict=True):
        torch.testing.assert_close(slices[..., 0], plane, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("transform", "low", "high"),
    [
        (Affine(), -1, 1),
        (Flip(), -1, 1),
        (Gamma(range=(0.5, 2)), 0.5, 2),
        (Contrast(range=(0.9, 1.3)), 0.9, 1.3),
        (LowResolution(range=(1.5, 4)), 1.5, 4),
        (Blur(sigma_mm=0.7), 0, 0.7),
        (Mixup(alpha=0.3), 0, 1),
        (Mixup(alpha=30), 0, 1),
        (Mixup(alpha=1e-6), 0, 1),
    ],
    ids=str,
)
@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=20)
def test_parameters_lie_within_their_ranges(transform: Augmentation, low: float, high: float, seed: int) -> None:
    parameters = transform.draw(torch.Generator().manual_seed(seed), frame_of((17, 24), (0.5, 0.7)))
    assert parameters.dtype == torch.float32
    assert low - 1e-6 <= parameters.min()
    assert parameters.max() <= high + 1e-6


@every_spatial_chain
@every_space
def test_image_and_label_share_one_field(chain: Chain, size: tuple[int, ...]) -> None:
    maps = torch.zeros(6, 1, *size)
    inner = tuple(slice(2, n - 2) for n in size)
    maps[(..., *inner)] = uniform(6, 1, *(n - 4 for n in size))  # 0 at the border, where image and label differ outside
    image, label = augment(maps, maps, chain, range(6), "soft", SPACES[size])
    torch.testing.assert_close(image, label, rtol=0, atol=1e-6)


@every_spatial_chain
def test_nearest_and_hard_follow_the_same_field_as_soft(chain: Chain) -> None:
    frame = frame_of((40, 40), (1.0, 1.0))
    target = harden(ball(frame, radius_mm=12, border_mm=1)).expand(6, 1, 40, 40)
    soft, *others = (augment(target, target, chain, range(6), mode, (1, 1))[1] for mode in ("soft", "hard", "nearest", "hard_each"))
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
    chains: list[Chain] = [(Affine(), Elastic(), Gamma()), (Contrast(), BiasField(), Blur(), LowResolution(), Mixup())]
    for chain in chains:
        image, label = through(chain, maps, maps, range(2), "soft", (1.0,) * len(size))
        assert image.isfinite().all()
        assert label.isfinite().all()


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Flip, {"axes": (0, 0)}, "axes must differ from each other, got \\(0, 0\\)"),
        (Flip, {"axes": (3,)}, "less than or equal to 2"),
        (Flip, {"p": 1.5}, "less than or equal to 1"),
        (Gamma, {"range": (1.5, 0.7)}, "smallest, largest\\), got \\(1.5, 0.7\\)"),
        (Gamma, {"range": (0, 1)}, "greater than 0"),
        (Contrast, {"range": (2, 1)}, "smallest, largest\\), got \\(2.0, 1.0\\)"),
        (Contrast, {"range": (-1, 1)}, "greater than 0"),
        (BiasField, {"strength": 0.9}, "greater than or equal to 1"),
        (BiasField, {"order": 0}, "greater than or equal to 1"),
        (BiasField, {"order": 9}, "less than or equal to 5"),
        (Blur, {"sigma_mm": -1}, "greater than or equal to 0"),
        (LowResolution, {"range": (0.5, 2)}, "begin at 1 or above, as it only downsamples, got \\(0.5, 2.0\\)"),
        (LowResolution, {"axes": (1, 1)}, "axes must differ"),
        (Mixup, {"alpha": -0.1}, "greater than or equal to 0"),
        (Mixup, {"alpha": float("inf")}, "finite"),
    ],
)
def test_impossible_settings_are_refused_with_rule_and_value(
    cls: type[Augmentation], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        cls.model_validate(fields)


@pytest.mark.parametrize("transform", [Flip(axes=(2,)), LowResolution(axes=(0, 2))])
def test_an_axis_that_the_images_lack_is_refused(transform: Augmentation) -> None:
    image = uniform(1, 1, 8, 8)
    with pytest.raises(UserError, match=f"{type(transform).__name__}'s axes must lie in 0 to 1 for these images, got 2"):
        augment(image, image, (transform,), [0], "soft", (1, 1))
