"""STAPLE: it finds the planted raters and truth, and what it cannot find it does not invent."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softseg_dist.numerics.labels import MARGIN, MAX_STEPS, START, TOLERANCE, Consensus, fuse, harden, staple

SENSITIVITY, SPECIFICITY, PREVALENCE, VOXELS = (0.9, 0.8, 0.95), (0.98, 0.95, 0.90), 0.2, 20_000


def planted(seed: int = 0, voxels: int = VOXELS, raters: Sequence[int] = (0, 1, 2)) -> tuple[Tensor, Tensor]:
    """A random truth [V] and what raters of known quality make of it [R V]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(voxels, generator=generator) < PREVALENCE
    chance = torch.rand(3, voxels, generator=generator)
    masks = [torch.where(truth, chance[r] < SENSITIVITY[r], chance[r] >= SPECIFICITY[r]) for r in raters]
    return truth.float(), torch.stack(masks).float()


def plain_posterior(decisions: Tensor) -> Tensor:
    """The formulas of Warfield 2004 (docs/training.md), voxel by voxel, for raters better than chance."""
    d = decisions.double()
    p = q = torch.full((len(d), 1), START, dtype=torch.float64)
    prior = d.mean()
    for _ in range(MAX_STEPS):
        before = torch.cat([p, q])
        a = prior * (p**d * (1 - p) ** (1 - d)).prod(0)
        b = (1 - prior) * (q ** (1 - d) * (1 - q) ** d).prod(0)
        w = a / (a + b)
        p = (w * d).sum(1, keepdim=True) / w.sum()
        q = ((1 - w) * (1 - d)).sum(1, keepdim=True) / (1 - w).sum()
        if (torch.cat([p, q]) - before).abs().max() < TOLERANCE:
            break
    a = prior * (p**d * (1 - p) ** (1 - d)).prod(0)
    b = (1 - prior) * (q ** (1 - d) * (1 - q) ** d).prod(0)
    return (a / (a + b)).float()


def assert_same(one: Consensus, other: Consensus, raters: Sequence[int]) -> None:
    torch.testing.assert_close(one.posterior, other.posterior, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.sensitivity[list(raters)], other.sensitivity, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.specificity[list(raters)], other.specificity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_planted_sensitivities_and_specificities_come_back(seed: int) -> None:
    truth, masks = planted(seed)
    found = staple(masks)
    assert 0 < found.steps < MAX_STEPS
    torch.testing.assert_close(found.sensitivity, torch.tensor(SENSITIVITY), atol=0.02, rtol=0)
    torch.testing.assert_close(found.specificity, torch.tensor(SPECIFICITY), atol=0.02, rtol=0)
    wrong = (harden(found.posterior) != truth).float().mean()
    assert wrong < min((mask != truth).float().mean() for mask in masks)


@pytest.mark.parametrize("softness", [0.0, 0.3, 1.0])
def test_grouping_voxels_by_pattern_equals_the_plain_formula(softness: float) -> None:
    _, masks = planted(voxels=2000)
    generator = torch.Generator().manual_seed(1)
    blurred = (0.1 + 0.8 * masks) + 0.1 * (torch.rand(masks.shape, generator=generator) * 2 - 1)
    masks = torch.where(torch.rand(masks.shape, generator=generator) < softness, blurred, masks)
    torch.testing.assert_close(staple(masks).posterior, plain_posterior(masks), atol=1e-5, rtol=0)


@given(st.permutations((0, 1, 2)))
@settings(max_examples=6)
def test_the_order_of_raters_does_not_matter(order: list[int]) -> None:
    _, masks = planted(voxels=1000)
    assert_same(staple(masks), staple(masks[order]), order)


def test_space_of_any_shape_gives_the_same_voxels() -> None:
    _, masks = planted(voxels=8 * 9 * 10)
    flat, cube = staple(masks), staple(masks.reshape(3, 8, 9, 10))
    assert torch.equal(flat.posterior, cube.posterior.flatten())


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("num_raters", [1, 2, 5])
def test_raters_who_agree_everywhere_are_believed(value: float, num_raters: int) -> None:
    constant = torch.full((num_raters, 6, 7), value)
    mixed = constant.clone()
    mixed[:, 2:4, 3] = 1 - value
    for masks in (constant, mixed, mixed * 0.6):
        found = staple(masks)
        assert torch.equal(found.posterior, masks[0])
        assert found.sensitivity.tolist() == found.specificity.tolist() == [1.0] * num_raters


def test_a_rater_with_an_empty_mask_is_told_from_those_who_drew() -> None:
    truth, masks = planted()
    found = staple(torch.cat([masks, torch.zeros(1, VOXELS)]))
    assert found.sensitivity[3] < 1e-5
    assert found.specificity[3] > 1 - 1e-5
    assert (harden(found.posterior) != truth).float().mean() < 0.05


def test_all_raters_but_one_empty_gives_numbers() -> None:
    masks = torch.zeros(3, 12, 12)
    masks[0, 4:8, 4:8] = 1
    found = staple(masks)
    assert all(t.isfinite().all() for t in (found.posterior, found.sensitivity, found.specificity))


def test_an_inverted_rater_has_no_say() -> None:
    truth, masks = planted()
    found = staple(torch.cat([masks, 1 - truth[None]]))
    quality = found.sensitivity + found.specificity
    assert quality[3] < 0.3  # seen for what he is
    assert quality[:3].min() > 1.6
    assert (harden(found.posterior) != truth).float().mean() < 0.05


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_truth_and_background_never_change_roles(seed: int) -> None:
    """Two raters contradicted by one: whatever comes out, it is a number, and what all labelled stays labelled."""
    masks = torch.rand(3, 400, generator=torch.Generator().manual_seed(seed)).round()
    masks[2] = 1 - masks[0]
    masks[:, :20], masks[:, 20:200] = 1, 0
    posterior = staple(masks).posterior
    assert posterior.isfinite().all()
    assert posterior[:20].min() >= posterior[20:200].max()


def test_outside_the_dilated_box_nothing_is_labelled_and_the_field_of_view_does_not_matter() -> None:
    _, masks = planted(voxels=1000)
    masks = masks.reshape(3, 10, 10, 10)
    small = torch.nn.functional.pad(masks, (MARGIN,) * 6)
    large = torch.nn.functional.pad(masks, (MARGIN + 5,) * 6)
    one, other = staple(small), staple(large)
    assert torch.equal(one.sensitivity, other.sensitivity)
    inner = (slice(5, -5),) * 3
    assert torch.equal(one.posterior, other.posterior[inner])
    outside = torch.ones_like(other.posterior)
    outside[inner] = 0
    assert not (other.posterior * outside).any()


def test_a_soft_vote_pulls_the_posterior_its_way() -> None:
    _, masks = planted()
    alone = (masks[0] == 1) & (masks[1] == 0) & (masks[2] == 0)
    first = int(alone.nonzero()[0])
    votes = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        masks[1, first] = value
        votes.append(float(staple(masks).posterior[first]))
    assert votes == sorted(votes)
    assert len(set(votes)) == 5


def test_staple_is_to_soft_staple_as_a_mask_to_its_probability() -> None:
    _, masks = planted(voxels=900)
    raters = masks.reshape(3, 1, 30, 30)
    soft = fuse(raters, "soft_staple", ("a", "b", "c"))
    assert torch.equal(fuse(raters, "staple", ("a", "b", "c")), harden(soft))
    assert ((soft > 0.01) & (soft < 0.99)).any()


def test_every_class_is_fused_on_its_own_and_all_items_together() -> None:
    raters = torch.stack([planted(seed, voxels=800)[1].reshape(3, 2, 20, 20) for seed in (1, 2)], dim=2)  # [R N K *S]
    fused = fuse(raters.movedim(1, 2), "soft_staple", ("a", "b", "c")).movedim(1, 0)
    assert fused.shape == (2, 2, 20, 20)
    for k in range(2):
        assert torch.equal(fused[:, k], staple(raters[:, :, k]).posterior)
    by_slice = fuse(raters[:, 0], "soft_staple", ("a", "b", "c"))
    assert not torch.allclose(fused[0], by_slice, atol=1e-3)
