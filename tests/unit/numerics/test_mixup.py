"""Mixup: the mixture itself, and who is mixed with whom in the batches of a fit."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from augmentation_samples import frame_of
from hypothesis import given
from hypothesis import strategies as st

from softseg_dist import Affine, Bids, Flip, Mixup, Noise, Pairing, Preprocess, Recipe
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.numerics.labels import LabelMode
from softseg_dist.training.batches import Batches
from softseg_dist.training.preflight import check_recipes

SHAPE = (16, 12, 3)
SPACINGS_MM = {"sub-1": (0.5, 0.5, 2.0), "sub-2": (0.5, 1.5, 2.0)}  # a rotation differs between them
MOVES = (Flip(), Affine(), Noise())
numbers = st.floats(0, 1, width=32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two subjects of three slices each, whose voxels differ in size."""
    folder, rng = tmp_path_factory.mktemp("mixup"), np.random.default_rng(0)
    for subject, spacing_mm in SPACINGS_MM.items():
        geometry = Geometry(SHAPE, np.diag([*spacing_mm, 1.0]))
        stem = f"{subject}/anat/{subject}_T2w"
        write_volume(folder / f"set/{stem}.nii.gz", rng.normal(size=SHAPE).astype(np.float32), geometry)
        label = rng.random(SHAPE).astype(np.float32)
        write_volume(folder / f"set/derivatives/labels/{stem}_label-GM_mask.nii.gz", label, geometry)
    data = Bids("set", image="T2w", labels={"GM": "label-GM_mask"})
    return Store.open(build_store(folder / "stores", data.cases(folder), data, Preprocess(dim=2)))


def batches_of(store: Store, recipe: Recipe) -> Batches:
    items = tuple((case.index, item) for case in store.cases for item in range(case.num_items))
    return Batches(store, recipe, items, seed=5)


@given(first=numbers, second=numbers, share=numbers)
def test_a_mixture_lies_between_what_it_is_made_of(first: float, second: float, share: float) -> None:
    a, b, parameters = (torch.tensor([value]) for value in (first, second, share))
    mixed = Mixup().mix(a.reshape(1, 1, 1, 1), b.reshape(1, 1, 1, 1), parameters)
    assert mixed.item() == pytest.approx(share * first + (1 - share) * second, abs=1e-6)
    assert 0 <= mixed <= 1
    same = Mixup().mix(a.reshape(1, 1, 1, 1), a.reshape(1, 1, 1, 1), parameters)
    assert same.item() == a.item()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_have_the_moments_of_a_beta_distribution(alpha: float) -> None:
    draws = [Mixup(alpha=alpha).draw(torch.Generator().manual_seed(seed), frame_of((4, 4), (1, 1))) for seed in range(2000)]
    shares = torch.stack(draws)
    assert shares.mean().item() == pytest.approx(1 / 2, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("mode", get_args(LabelMode))
def test_a_batch_is_a_mixture_of_items_each_augmented_in_its_own_spacing(store: Store, mode: LabelMode) -> None:
    mixup, members = Mixup(alpha=1), [0, 1, 2, 3, 4, 5]
    mixed = batches_of(store, Recipe(label=mode, augment=(*MOVES, mixup)))
    plain = batches_of(store, Recipe(label=mode, augment=MOVES))
    partners = [mixed.partner(2, member) for member in members]
    assert {(member < 3) == (partner < 3) for member, partner in zip(members, partners, strict=True)} == {True, False}
    made = mixed.batch(2, members, "cpu")
    own, other = plain.batch(2, members, "cpu"), plain.batch(2, partners, "cpu")
    shares = torch.stack([((x - b) / (a - b)).median() for x, a, b in zip(made[0], own[0], other[0], strict=True)])
    assert ((shares > 0) & (shares < 1)).all()
    for x, a, b in zip(made, own, other, strict=True):
        expected = shares.reshape(-1, 1, 1, 1) * a + (1 - shares).reshape(-1, 1, 1, 1) * b
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)
    assert ((made[1] > 0) & (made[1] < 1)).any()  # soft, whatever the mode


def test_what_happens_to_an_item_depends_neither_on_its_batch_nor_on_the_order(store: Store) -> None:
    batches = batches_of(store, Recipe(augment=(*MOVES, Mixup(alpha=1))))
    together = batches.batch(1, [0, 5, 3, 2], "cpu")
    for row, member in enumerate([0, 5, 3, 2]):
        for whole, alone in zip(together, batches.batch(1, [member], "cpu"), strict=True):
            assert torch.equal(whole[row : row + 1], alone)
    assert not torch.equal(together[0], batches.batch(2, [0, 5, 3, 2], "cpu")[0])


def test_an_idle_mixup_changes_no_batch_and_none_changes_the_mean_label(store: Store) -> None:
    plain, idle = (batches_of(store, Recipe(augment=a)) for a in (MOVES, (*MOVES, Mixup(alpha=0))))
    for x, y in zip(plain.batch(0, [0, 4], "cpu"), idle.batch(0, [0, 4], "cpu"), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(plain.mean_label(), batches_of(store, Recipe(augment=(*MOVES, Mixup()))).mean_label())


def test_partners_are_all_the_other_items_and_change_with_the_epoch(store: Store) -> None:
    batches = batches_of(store, Recipe(augment=(Mixup(),)))
    partners = [[batches.partner(epoch, member) for epoch in range(60)] for member in range(6)]
    assert [set(seen) for seen in partners] == [set(range(6)) - {member} for member in range(6)]


def test_a_single_item_is_mixed_with_itself_and_its_recipe_can_be_tried(store: Store) -> None:
    recipe = Recipe(augment=(Mixup(alpha=1),))
    single, plain = (Batches(store, r, ((0, 1),), seed=5) for r in (recipe, Recipe()))
    for x, y in zip(single.batch(0, [0], "cpu"), plain.batch(0, [0], "cpu"), strict=True):
        assert torch.equal(x, y)
    check_recipes({"mixed": recipe}, store, Split(index=0, train=(store.cases[0].subject,)))


def test_a_pairing_of_a_study_file_sees_image_and_target_of_the_partner(store: Store) -> None:
    class Swap(Pairing):
        @property
        def idle(self) -> bool:
            return False

        def draw(self, generator: torch.Generator, frame: object) -> torch.Tensor:
            return torch.empty(0)

        def mix(self, maps: torch.Tensor, partners: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
            return partners

    swapped, plain = (batches_of(store, Recipe(augment=a)) for a in ((*MOVES, Swap()), MOVES))
    partners = [swapped.partner(0, member) for member in (1, 4)]
    for x, y in zip(swapped.batch(0, [1, 4], "cpu"), plain.batch(0, partners, "cpu"), strict=True):
        assert torch.equal(x, y)
