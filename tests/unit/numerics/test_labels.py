"""Fusion of raters and the four label modes."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from augmentation_samples import augment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softseg_dist import Affine, Phantom, Preprocess
from softseg_dist.errors import UserError
from softseg_dist.numerics.labels import LabelMode, check_fusion, fuse, harden, prepare_target

NAMES = ("ann", "bob", "cas")
RATERS = torch.tensor([[[0.6, 0.2, 1.0, 0.5]], [[0.6, 0.9, 1.0, 0.4]], [[0.2, 0.1, 0.7, 0.0]]])  # [R=3 K=1 X=4]
every_mode = pytest.mark.parametrize("mode", get_args(LabelMode))
ITEM_FUSIONS = ("mean", "majority", "intersection", "union", "random_rater", "rater:bob")
FUSIONS = (*ITEM_FUSIONS, "staple", "soft_staple")
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def random_raters(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [*FUSIONS, "rater:a name: with colon"])
def test_known_fusions_pass_unchanged(value: str) -> None:
    assert check_fusion(value) == value


@pytest.mark.parametrize("value", ["", "Mean", "STAPLE", "rater", "rater:", "rater: ", "random_rater:ann", "staple:ann"])
def test_unknown_fusion_is_refused_and_the_message_names_what_there_is(value: str) -> None:
    with pytest.raises(
        ValueError, match=r'mean, majority, intersection, union, staple, soft_staple, random_rater or "rater:<name>", got'
    ):
        check_fusion(value)


@pytest.mark.parametrize(
    ("fusion", "expected"),
    [
        ("mean", [1.4 / 3, 1.2 / 3, 2.7 / 3, 0.9 / 3]),
        ("majority", [0.0, 0, 1, 0]),
        ("intersection", [0.2, 0.1, 0.7, 0.0]),
        ("union", [0.6, 0.9, 1.0, 0.5]),
        ("rater:bob", [0.6, 0.9, 1.0, 0.4]),
    ],
)
def test_fusion_has_the_values_of_its_definition(fusion: str, expected: list[float]) -> None:
    torch.testing.assert_close(fuse(RATERS, fusion, NAMES), torch.tensor([expected]))


@pytest.mark.parametrize("fusion", ITEM_FUSIONS)
def test_fusing_items_together_equals_fusing_them_one_by_one(fusion: str) -> None:
    items = random_raters(4, 3, 2, 5, 5)
    together = fuse(items.movedim(0, 2), fusion, NAMES, draw=7).movedim(1, 0)
    assert torch.equal(together, torch.stack([fuse(item, fusion, NAMES, draw=7) for item in items]))


@every_fusion
@every_mode
@given(num_raters=st.integers(1, 7), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=5, deadline=None)
def test_target_lies_in_0_to_1(fusion: str, mode: LabelMode, num_raters: int, seed: int) -> None:
    names = ("bob", *(f"r{i}" for i in range(1, num_raters)))
    target = prepare_target(random_raters(num_raters, 2, 4, 4, seed=seed % 100), None, mode, fusion, names, draw=seed)
    assert target.shape == (2, 4, 4)
    assert target.min() >= 0
    assert target.max() <= 1
    if mode in ("nearest", "hard_each"):
        assert torch.equal(target, harden(target))


@pytest.mark.parametrize("num_raters", range(1, 9))
def test_unanimous_raters_give_exactly_zero_and_one(num_raters: int) -> None:
    unanimous = random_raters(1, 1, 9).round().expand(num_raters, 1, 9)
    names = [str(i) for i in range(num_raters)]
    for mode in get_args(LabelMode):
        assert torch.equal(prepare_target(unanimous, None, mode, "mean", names), unanimous[0])


@every_mode
def test_one_rater_alone_is_fused_into_his_own_mask(mode: LabelMode) -> None:
    alone = random_raters(1, 2, 5, 5)
    for fusion in ("mean", "intersection", "union", "soft_staple", "random_rater"):
        assert torch.equal(fuse(alone, fusion, ["a"], draw=3), alone[0])
    for fusion in ("majority", "staple"):
        assert torch.equal(fuse(alone, fusion, ["a"]), harden(alone[0]))
    if mode in ("nearest", "hard_each"):
        targets = [prepare_target(alone, None, mode, f, ["a"], draw=3) for f in FUSIONS if f != "rater:bob"]
        assert all(torch.equal(target, harden(alone[0])) for target in targets)


@pytest.mark.parametrize("mode", ["nearest", "hard_each"])
def test_masks_rounded_before_staple_make_its_soft_form_the_hard_one(mode: LabelMode) -> None:
    raters = random_raters(3, 1, 30, 30)
    soft, hard = (prepare_target(raters, None, mode, fusion, NAMES) for fusion in ("soft_staple", "staple"))
    assert torch.equal(soft, hard)
    assert 0 < hard.mean() < 1


def test_random_rater_is_one_whole_rater_chosen_by_the_seed_alone() -> None:
    raters = random_raters(3, 2, 4, 4)
    draws = [fuse(raters, "random_rater", NAMES, draw=seed) for seed in range(300)]
    counts = [sum(torch.equal(draw, rater) for draw in draws) for rater in raters]
    assert sum(counts) == 300  # all classes come from the same rater
    assert min(counts) > 300 / 3 - 4 * (300 * 1 / 3 * 2 / 3) ** 0.5
    assert torch.equal(draws[5], fuse(raters, "random_rater", NAMES, draw=5))


def test_rater_who_did_not_label_the_case_is_named_in_the_error() -> None:
    with pytest.raises(UserError, match="fusion 'rater:dan' names no rater of this case; its raters are ann, bob, cas"):
        fuse(RATERS, "rater:dan", NAMES)


def test_soft_is_bit_exact_and_hard_is_not_rounded_before_augmentation() -> None:
    for mode in ("soft", "hard"):
        assert torch.equal(prepare_target(RATERS, None, mode, "rater:ann", NAMES), RATERS[0])
        assert torch.equal(prepare_target(RATERS, None, mode, "mean", NAMES), RATERS.mean(dim=0))


def test_modes_differ_where_raters_or_interpolation_disagree() -> None:
    nearest = torch.tensor([[[0, 1, 1, 1]], [[1, 1, 1, 0]], [[0, 0, 1, 1]]], dtype=torch.uint8)
    majority_of_rounded, all_of_rounded = torch.tensor([[1.0, 0, 1, 0]]), torch.tensor([[0.0, 0, 1, 0]])
    assert torch.equal(prepare_target(RATERS, nearest, "hard_each", "mean", NAMES), majority_of_rounded)
    assert torch.equal(prepare_target(RATERS, nearest, "hard_each", "intersection", NAMES), all_of_rounded)
    majority_of_nearest = torch.tensor([[0.0, 1, 1, 1]])
    assert torch.equal(prepare_target(RATERS, nearest, "nearest", "mean", NAMES), majority_of_nearest)
    assert torch.equal(prepare_target(RATERS, nearest, "nearest", "rater:bob", NAMES), nearest[1].float())


@every_mode
def test_a_target_grows_from_intersection_by_majority_to_union(mode: LabelMode) -> None:
    raters = random_raters(4, 1, 16, 16)
    fused = [harden(prepare_target(raters, None, mode, f, list("abcd"))) for f in ("intersection", "majority", "union")]
    assert all((small <= large).all() and small.sum() < large.sum() for small, large in pairwise(fused))


def test_hard_each_of_the_intersection_is_the_floored_mean_of_rounded_masks_that_ivadomed_made() -> None:
    raters = random_raters(4, 1, 16, 16)
    floored = harden(raters).mean(dim=0).floor()
    assert torch.equal(prepare_target(raters, None, "hard_each", "intersection", list("abcd")), floored)


@pytest.mark.engine
def test_it_is_the_intersection_that_takes_volume_not_rounding_after_every_step() -> None:
    """12 phantom subjects, 4 raters, one turn: the volume of the target relative to that of the soft mean."""
    phantom = Phantom(shape="lesions", subjects=12, disagreement_mm=0.4)
    prepared = [Preprocess(spacing_mm=(0.75, 0.75), crop=(32, 32)).apply(case) for case in phantom.cases(None)]

    def volume(mode: LabelMode, fusion: str) -> float:
        total = 0.0
        for number, sample in enumerate(prepared):
            raters = torch.from_numpy(sample.raters)
            target = prepare_target(raters.movedim(0, 2), None, mode, fusion, sample.rater_names, draw=number).movedim(1, 0)
            seeds = range(len(target) * number, len(target) * (number + 1))
            turn = (Affine(degrees=20, scale=0.1, shift=0.03),)
            total += float(augment(torch.zeros_like(target), target, turn, seeds, mode, sample.spacing_mm)[1].double().sum())
        return total

    soft = volume("soft", "mean")
    assert volume("hard_each", "intersection") / soft == pytest.approx(0.43, abs=0.03)
    assert volume("hard_each", "majority") / soft == pytest.approx(1.09, abs=0.05)
    assert volume("hard_each", "random_rater") / volume("soft", "random_rater") == pytest.approx(0.94, abs=0.03)
    assert volume("hard", "mean") / soft == pytest.approx(0.87, abs=0.03)
    assert volume("hard", "majority") / soft == pytest.approx(0.91, abs=0.03)


def test_nearest_without_resampling_is_the_rounded_raters() -> None:
    assert torch.equal(prepare_target(RATERS, None, "nearest", "rater:ann", NAMES), harden(RATERS[0]))


def test_a_half_rounds_up() -> None:
    assert torch.equal(harden(torch.tensor([0.0, 0.4999, 0.5, 1.0])), torch.tensor([0.0, 0, 1, 1]))
