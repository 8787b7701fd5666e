"""Targets in a batch: STAPLE over whole cases, a rater drawn per sample and epoch, smoothing last, raters that are missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from softseg_dist import SVLS, Affine, Bids, Brier, GeoLS, Mixup, MonteCarlo, Phantom, Preprocess, Recipe, UNet, UniformSmoothing
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.errors import UserError
from softseg_dist.numerics.labels import LabelMode, harden, staple
from softseg_dist.training import batches as kept_targets
from softseg_dist.training.batches import Batches
from softseg_dist.training.preflight import check_recipes

PHANTOM = Phantom(subjects=4, size=(24, 24), num_slices=4, raters=3)
SHAPE = (12, 10, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Resampled, so that masks are soft and `nearest` is kept."""
    preprocess = Preprocess(dim=2, spacing_mm=(0.6, 0.6), crop=(20, 20))
    return Store.open(build_store(tmp_path_factory.mktemp("stores"), PHANTOM.cases(None), PHANTOM, preprocess))


def store_of_raters(folder: Path, raters_of: Sequence[str]) -> Store:
    """A store whose case number i has the raters named by the letters of `raters_of[i]`."""
    generator, geometry = np.random.default_rng(0), Geometry(SHAPE, np.eye(4))
    for number, names in enumerate(raters_of, start=1):
        write_volume(
            folder / f"set/sub-{number}/anat/sub-{number}_T2w.nii.gz", generator.normal(size=SHAPE).astype(np.float32), geometry
        )
        truth = np.zeros(SHAPE, dtype=np.float32)
        truth[3:8, 2:7] = 1
        for name in names:
            path = folder / f"set/derivatives/labels/sub-{number}/anat/sub-{number}_T2w_label-GM_desc-{name}_mask.nii.gz"
            write_volume(path, np.where(generator.random(SHAPE) < 0.1, 1 - truth, truth), geometry)
    data = Bids("set", image="T2w", labels={"GM": "label-GM_desc-{rater}_mask"})
    return Store.open(build_store(folder / "stores", data.cases(folder), data, Preprocess(dim=2)))


def batches(store: Store, recipe: Recipe, seed: int = 0) -> Batches:
    items = tuple((case.index, item) for case in store.cases for item in range(case.num_items))
    return Batches(store, recipe, items, seed)


def all_targets(ready: Batches, epoch: int = 0) -> Tensor:
    return ready.batch(epoch, range(len(ready.items)), "cpu")[1]


def split_of(store: Store) -> Split:
    return MonteCarlo(count=1).make({case.subject: case.site for case in store.cases}, 0)[0]


@pytest.mark.parametrize("mode", get_args(LabelMode))
def test_staple_sees_the_whole_case_and_an_item_gets_its_slice(store: Store, mode: LabelMode) -> None:
    target = all_targets(batches(store, Recipe(label=mode, fusion="soft_staple")))
    expected = []
    for case in store.cases:
        sample = store.sample(case.index)
        raters = torch.from_numpy(np.array(sample.raters))
        assert sample.nearest is not None
        masks = {
            "soft": raters,
            "hard": raters,
            "hard_each": harden(raters),
            "nearest": torch.from_numpy(np.array(sample.nearest)).float(),
        }[mode]
        posterior = staple(masks[:, :, 0].movedim(1, 0)).posterior
        expected.append(posterior if mode == "soft" else harden(posterior))
    assert torch.equal(target[:, 0], torch.cat(expected))


def test_targets_that_were_dropped_are_made_again_alike(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = batches(store, Recipe(fusion="soft_staple"))
    kept = all_targets(ready)
    limit = kept.nbytes // 2  # two of four cases
    monkeypatch.setattr(kept_targets, "KEPT_BYTES", limit)
    monkeypatch.setattr(kept_targets, "_kept", type(kept_targets._kept)())
    for _ in range(2):
        assert torch.equal(all_targets(ready), kept)
        assert 0 < sum(target.nbytes for target in kept_targets._kept.values()) <= limit


def test_fits_of_one_process_share_what_staple_found_unless_mode_or_fusion_differ(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_targets, "_kept", type(kept_targets._kept)())
    for recipe in (Recipe(fusion="staple"), Recipe(fusion="staple", augment=(Affine(),)), Recipe(fusion="mean")):
        all_targets(batches(store, recipe))
    assert len(kept_targets._kept) == len(store.cases)
    all_targets(batches(store, Recipe(fusion="staple", label="nearest")))
    assert len(kept_targets._kept) == 2 * len(store.cases)


def test_a_rater_is_drawn_for_every_sample_and_epoch_and_the_same_in_every_fit(store: Store) -> None:
    ready = batches(store, Recipe(fusion="random_rater"))
    raters = torch.cat([torch.from_numpy(np.array(store.sample(case.index).raters)) for case in store.cases])
    drawn = []
    for epoch in range(12):
        target = all_targets(ready, epoch)
        is_rater = (raters == target[:, None]).flatten(2).all(dim=2)  # [items R]
        assert is_rater.any(dim=1).all()
        drawn.append(is_rater.float().argmax(dim=1))
        assert torch.equal(target, all_targets(batches(store, Recipe(fusion="random_rater", loss=Brier())), epoch))
    chosen = torch.stack(drawn)  # [epochs items]
    assert all(len(of_item.unique()) > 1 for of_item in chosen.T)
    assert all(len(of_epoch.unique()) > 1 for of_epoch in chosen)
    counts = torch.bincount(chosen.flatten(), minlength=3) / chosen.numel()
    assert counts.min() > 0.2
    assert not torch.equal(all_targets(ready), all_targets(batches(store, Recipe(fusion="random_rater"), seed=1)))


@pytest.mark.parametrize("smoothing", [UniformSmoothing(epsilon=0.2), SVLS(), GeoLS(alpha=0.3)], ids=str)
@pytest.mark.parametrize("mode", get_args(LabelMode))
def test_smoothing_is_the_last_thing_that_happens_to_a_target(
    store: Store, mode: LabelMode, smoothing: UniformSmoothing | SVLS | GeoLS
) -> None:
    recipe = Recipe(label=mode, augment=(Affine(degrees=20, scale=0.1, shift=0.03),))
    (image, target), (same, smooth) = (
        batches(store, r).batch(2, [0, 5, 9], "cpu") for r in (recipe, recipe.replace(smoothing=smoothing))
    )
    assert torch.equal(image, same)
    assert torch.equal(smooth, smoothing(target, image, store.sample(0).spacing_mm))
    assert not torch.equal(smooth, target)


def test_partners_are_smoothed_each_by_its_own_image_before_they_are_joined(store: Store) -> None:
    recipe = Recipe(smoothing=GeoLS(alpha=0.3))
    mixed = batches(store, recipe.replace(augment=(Mixup(),)))
    target = mixed.batch(1, [3], "cpu")[1]
    one, other = (batches(store, recipe).batch(1, [member], "cpu")[1] for member in (3, mixed.partner(1, 3)))
    share = ((target - other) * (one - other)).sum() / (one - other).square().sum()
    torch.testing.assert_close(target, share * one + (1 - share) * other)


def test_a_case_uses_the_raters_it_has(tmp_path: Path) -> None:
    mixed = store_of_raters(tmp_path, ["abc", "ab", "b"])
    for fusion in ("staple", "soft_staple", "random_rater", "majority", "mean", "rater:b"):
        recipe = Recipe(fusion=fusion, network=UNet(filters=(4, 8)))
        check_recipes({"c": recipe}, mixed, split_of(mixed))
        only_rater = torch.from_numpy(np.array(mixed.sample(2).raters[:, 0]))
        assert torch.equal(all_targets(batches(mixed, recipe))[-SHAPE[2] :], only_rater)


@pytest.mark.parametrize("fusion", ["staple", "soft_staple", "random_rater"])
def test_one_rater_per_case_is_refused_where_several_are_fused(tmp_path: Path, fusion: str) -> None:
    alone = store_of_raters(tmp_path, ["a", "b", "a"])
    with pytest.raises(UserError, match=f"candidate c: fusion '{fusion}' needs several raters, but no case has more than one"):
        check_recipes({"c": Recipe(fusion=fusion)}, alone, split_of(alone))
