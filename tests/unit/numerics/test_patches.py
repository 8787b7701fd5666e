"""Patches: where they lie follows from seeds alone, they are the image's own voxels, and the map of a whole comes from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_folders import RECIPE, card_of, model_of, passing_model, saved
from pydantic import ValidationError
from torch import Tensor

from softseg_dist import (
    TTA,
    Affine,
    Bids,
    Elastic,
    Flip,
    Mixup,
    MonteCarlo,
    Noise,
    NormReLU,
    Optim,
    Patch,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Study,
    UNet,
)
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.numerics.augmentation import moves
from softseg_dist.numerics.patches import Window, filled_up
from softseg_dist.numerics.transforms import Augmentation
from softseg_dist.record.changes import study_changes
from softseg_dist.record.ledger import json_of
from softseg_dist.training import batches as kept_targets
from softseg_dist.training.batches import Batches, labelled_voxels
from softseg_dist.training.fit import fit
from softseg_dist.training.inference import predict_sample, sample_maps
from softseg_dist.training.model import Model
from softseg_dist.training.preflight import check_recipes
from softseg_dist.training.saved_model import read_card, read_model
from softseg_dist.training.task import FitTask, Interrupted, Worker, weights_path

SHAPE = (18, 15, 13)
PATCH = Patch(size=(6, 8, 5))
MOVES = (Flip(), Affine(degrees=20))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three volumes with a small lesion and a wide "tissue", which is everything; the last volume has no lesion."""
    folder, rng, geometry = tmp_path_factory.mktemp("patches"), np.random.default_rng(0), Geometry(SHAPE, np.eye(4))
    for number in (1, 2, 3):
        lesion = np.zeros(SHAPE, np.float32)
        lesion[2, 12, 5 : 5 + 2 * (number < 3)] = 1
        stem = f"sub-{number}/anat/sub-{number}_T2w"
        write_volume(folder / f"set/{stem}.nii.gz", rng.normal(size=SHAPE).astype(np.float32), geometry)
        for part, label in {"lesion": lesion, "tissue": np.ones(SHAPE, np.float32)}.items():
            write_volume(folder / f"set/derivatives/labels/{stem}_{part}.nii.gz", label, geometry)
    data = Bids("set", image="T2w", labels={"lesion": "lesion", "tissue": "tissue"})
    return Store.open(build_store(folder / "stores", data.cases(folder), data, Preprocess(dim=3)))


def batches_of(store: Store, recipe: Recipe, per_item: int = 1) -> Batches:
    return Batches(store, recipe, tuple((case.index, 0) for case in store.cases for _ in range(per_item)), seed=5)


def draws(patch: Patch, labelled: list[list[int]], size: tuple[int, ...], count: int = 400) -> list[Window]:
    voxels = [np.array(of_class, dtype=np.int32) for of_class in labelled]
    return [patch.draw(torch.Generator().manual_seed(seed), size, voxels) for seed in range(count)]


def holds(window: Window, voxel: int, size: tuple[int, ...]) -> bool:
    at = np.unravel_index(voxel, size)
    return all(first <= x < last for first, x, last in zip(window.start, at, window.stop, strict=True))


@given(
    seed=st.integers(0, 2**40),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=3),
    foreground=st.floats(0, 1),
    data=st.data(),
)
def test_a_patch_lies_within_its_image_and_follows_from_its_seed(
    seed: int, sizes: list[tuple[int, int]], foreground: float, data: st.DataObject
) -> None:
    patch = Patch(size=tuple(n for n, _ in sizes), foreground=foreground)
    size = tuple(n + more for n, more in sizes)
    labelled = [np.array(data.draw(st.lists(st.integers(0, int(np.prod(size)) - 1), max_size=3)), dtype=np.int32)]
    window = patch.draw(torch.Generator().manual_seed(seed), size, labelled)
    assert window == patch.draw(torch.Generator().manual_seed(seed), size, labelled)
    assert all(first >= 0 and last <= n for first, last, n in zip(window.start, window.stop, size, strict=True))
    assert tuple(last - first for first, last in zip(window.start, window.stop, strict=True)) == patch.size


@pytest.mark.parametrize("foreground", [0.0, 0.33, 0.75, 1.0])
def test_the_share_of_patches_that_holds_labelled_voxels_is_the_one_asked_for(foreground: float) -> None:
    size, corner = (40, 40), 40 * 40 - 1  # hardly any patch that lies anywhere reaches the corner
    windows = draws(Patch(size=(8, 8), foreground=foreground), [[corner]], size, count=1000)
    by_chance = (1 / 33) ** 2
    share = sum(holds(window, corner, size) for window in windows) / len(windows)
    assert share == pytest.approx(foreground + (1 - foreground) * by_chance, abs=0.04)
    assert foreground < 1 or share == 1


def test_a_rare_class_is_seen_as_often_as_a_wide_one_and_an_absent_one_is_not_waited_for() -> None:
    size, rare, wide = (30, 30), 0, list(range(450, 900))
    windows = draws(Patch(size=(5, 5), foreground=1), [[rare], wide, []], size)
    assert sum(holds(window, rare, size) for window in windows) / len(windows) == pytest.approx(0.5, abs=0.08)


def test_patches_of_an_item_without_labels_lie_anywhere() -> None:
    windows = draws(Patch(size=(4, 4), foreground=1), [[], []], (7, 6))
    assert {window.start for window in windows} == {(x, y) for x in range(4) for y in range(3)}


def test_so_many_voxels_that_not_all_are_remembered_still_lie_everywhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    few, tissue = labelled_voxels(store, 0, 0)
    assert few.tolist() == [int(np.ravel_multi_index((2, 12, z), SHAPE)) for z in (5, 6)]
    assert len(tissue) == np.prod(SHAPE)
    monkeypatch.setattr(kept_targets, "MOST_VOXELS", 13 * 15)
    _, some = labelled_voxels.__wrapped__(store, 0, 0)
    assert len(set(some.tolist())) == 13 * 15
    assert [len(set(at)) for at in np.unravel_index(some, SHAPE)] == list(SHAPE)
    assert np.array_equal(some, labelled_voxels.__wrapped__(store, 0, 0)[1])


def test_what_lies_beyond_the_border_is_the_minimum_of_a_channel_and_no_label() -> None:
    maps = np.stack([np.arange(12.0).reshape(3, 4), np.arange(12.0).reshape(3, 4) + 100])
    window = Window((-1, 1), (2, 6))
    first, second = window.of(maps, np.array([0.0, 100.0]))
    assert first.tolist() == [[0, 0, 0, 0, 0], [1, 2, 3, 0, 0], [5, 6, 7, 0, 0]]
    assert np.array_equal(second, first + 100)
    assert window.of(maps)[1].tolist() == [[0, 0, 0, 0, 0], [101, 102, 103, 0, 0], [105, 106, 107, 0, 0]]
    assert np.array_equal(Window((0, 1), (3, 3)).of(maps), maps[:, :, 1:3])


def test_smaller_items_are_filled_up_by_their_own_minima() -> None:
    image = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    filled, place = filled_up(image, (4, 7))
    assert filled.shape == (2, 3, 5, 7)
    assert torch.equal(filled[place], image)
    outside = torch.ones(5, 7, dtype=torch.bool)
    outside[place[1:]] = False
    assert torch.equal(filled[:, :, outside], image.amin((2, 3))[..., None].expand(2, 3, 15))
    assert filled_up(image, (5, 3))[0] is image


@pytest.mark.parametrize("fusion", ["mean", "soft_staple"])
def test_a_training_patch_is_a_part_of_the_image_with_its_labels(store: Store, fusion: str) -> None:
    plain, patched = Recipe(fusion=fusion), Recipe(fusion=fusion, patch=PATCH)
    whole, part = (batches_of(store, recipe).batch(3, [2, 0], "cpu") for recipe in (plain, patched))
    assert part[0].shape == (2, 1, *PATCH.size)
    for row in range(2):
        (at,) = np.argwhere(whole[0][row, 0].numpy() == part[0][row, 0, 0, 0, 0].item())  # no two voxels are alike
        window = (slice(None), *(slice(first, first + n) for first, n in zip(at, PATCH.size, strict=True)))
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one[row], other[row][window])


@pytest.mark.parametrize("moved", [(), MOVES, (*MOVES, Mixup(alpha=1))], ids=["still", "moved", "mixed"])
def test_a_patch_depends_on_seed_epoch_and_item_alone(store: Store, moved: tuple[Augmentation, ...]) -> None:
    recipe = Recipe(patch=PATCH, augment=(*moved, Noise()))
    batches = batches_of(store, recipe, per_item=2)
    together = batches.batch(1, [4, 0, 3, 1], "cpu")
    for row, member in enumerate([4, 0, 3, 1]):
        for whole, alone in zip(together, batches_of(store, recipe, 2).batch(1, [member], "cpu"), strict=True):
            assert torch.equal(whole[row : row + 1], alone)
    assert not torch.equal(together[0][1], together[0][3]), "two patches of one item"
    assert not torch.equal(together[0], batches.batch(2, [4, 0, 3, 1], "cpu")[0])
    assert not torch.equal(together[0], replace(batches, seed=6).batch(1, [4, 0, 3, 1], "cpu")[0])
    hard = batches_of(store, recipe.replace(label="hard_each", fusion="staple", activation=NormReLU()), 2)
    assert torch.equal(together[0], hard.batch(1, [4, 0, 3, 1], "cpu")[0]), "every candidate sees the same patches"


def test_augmentation_sees_what_lies_around_a_patch(store: Store) -> None:
    turn = Affine(degrees=20, scale=0, shift=0)
    batches, inner = batches_of(store, Recipe(patch=Patch(size=(6, 6, 6), foreground=0), augment=(turn,))), 0
    for epoch in range(12):
        _, target = batches.batch(epoch, [0, 1, 2], "cpu")
        for row in range(3):
            window = batches.window(epoch, row)
            assert window is not None
            if min(window.start) >= 0 and all(last <= n for last, n in zip(window.stop, SHAPE, strict=True)):
                assert target[row, 1].min() > 0.999, "tissue is everywhere, in the corners too"
                inner += 1
    assert inner > 3


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [((), False), ((Flip(), Noise(), Mixup()), False), ((Affine(),), True), ((Flip(), Elastic()), True),
     ((Affine(degrees=0, scale=0, shift=0), Elastic(std_mm=0)), False)],
    ids=str,
)  # fmt: skip
def test_only_what_turns_or_bends_reads_more_than_the_patch(
    store: Store, transforms: tuple[Augmentation, ...], expected: bool
) -> None:
    assert moves(transforms) is expected
    window = batches_of(store, Recipe(patch=PATCH, augment=transforms)).window(0, 0)
    assert window is not None
    assert (window.stop[0] - window.start[0] > PATCH.size[0]) is expected


def test_an_epoch_takes_as_many_patches_of_each_item_as_asked(store: Store, task: FitTask) -> None:
    patch = Patch(size=(8, 8, 8), per_item=3)
    once, thrice = (
        Batches.of(task.replace(recipe=task.recipe.replace(patch=p)), Store.open(task.store))
        for p in (patch.replace(per_item=1), patch)
    )
    assert len(thrice.items) == 3 * len(once.items) == 3 * len(set(thrice.items))
    assert thrice.steps_per_epoch == -(-len(thrice.items) // task.recipe.optim.batch_size)
    assert sorted(thrice.order(0)) == list(range(len(thrice.items)))
    assert torch.equal(once.mean_label(), thrice.mean_label())
    assert torch.equal(once.mean_label(), replace(once, recipe=task.recipe.replace(patch=None)).mean_label())


def test_a_partner_is_a_patch_of_another_item(store: Store) -> None:
    mixed, plain = (batches_of(store, Recipe(patch=PATCH, augment=a)) for a in ((*MOVES, Mixup(alpha=1)), MOVES))
    image, _ = mixed.batch(0, [1], "cpu")
    own, other = (plain.batch(0, [member], "cpu")[0] for member in (1, mixed.partner(0, 1)))
    share = ((image - other) / (own - other)).median()
    torch.testing.assert_close(image, share * own + (1 - share) * other, rtol=0, atol=1e-4)


def pointwise(image: Tensor) -> Tensor:
    """What a network of 1x1 convolutions does: two logits of every voxel by itself."""
    return torch.cat([2 * image - 0.3, 0.5 - image.square()], dim=1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("size", "whole"),
    [((4, 4), (9, 11)), ((4, 5), (4, 5)), ((8, 6), (5, 13)), ((4, 6, 3), (9, 7, 5)), ((4, 6, 8), (9, 4, 5))],
    ids=str,
)
def test_the_map_of_a_pointwise_network_is_the_one_without_patches(
    size: tuple[int, ...], whole: tuple[int, ...], overlap: float
) -> None:
    image = torch.randn(3, 1, *whole, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    stitched = Patch(size=size, overlap=overlap).stitch(pointwise, image)
    torch.testing.assert_close(stitched.sigmoid(), pointwise(image).sigmoid(), rtol=0, atol=1e-6)
    assert torch.equal(image, before)


def test_a_network_at_inference_sees_patches_only_and_the_border_of_a_patch_counts_least() -> None:
    shapes: list[tuple[int, ...]] = []

    def network(image: Tensor) -> Tensor:
        shapes.append(tuple(image.shape[1:]))
        border = torch.ones_like(image)
        border[..., 1:-1, 1:-1] = 0
        return border

    logits = Patch(size=(8, 8)).stitch(network, torch.zeros(2, 1, 20, 17))
    assert set(shapes) == {(1, 8, 8)}
    assert logits[..., 2:-2, 2:-2].max() < 0.25


@pytest.mark.parametrize("over", ["sample", "batch", "running"])
def test_the_activation_sees_the_whole_case(store: Store, over: str) -> None:
    activation, sample = NormReLU.model_validate({"over": over}), store.sample(0)
    card = card_of(Preprocess(dim=3), classes=("a",))
    whole, patched = (passing_model(card) for _ in range(2))  # logits = image
    for model in (whole, patched):
        model.activation = activation.build(1)
        for buffer in model.activation.buffers():
            buffer.fill_(2.0)
    patched.patch = PATCH
    np.testing.assert_allclose(predict_sample(patched, sample), predict_sample(whole, sample), atol=1e-6)


@pytest.mark.parametrize("patch", [None, PATCH])
def test_a_network_that_changes_its_input_in_place_changes_no_image(store: Store, patch: Patch | None) -> None:
    sample = store.sample(0)
    sample = replace(sample, image=np.array(sample.image))  # one that may be written is not copied
    before, model = sample.image.copy(), passing_model(card_of(Preprocess(dim=3), classes=("a",)))
    model.patch, model.activation = patch, NormReLU().build(1)
    model.network.register_forward_pre_hook(lambda network, given: (given[0].mul_(2),))
    prediction = predict_sample(model, sample)
    assert np.array_equal(sample.image, before)
    np.testing.assert_allclose(prediction, np.clip(before / before.max(), 0, 1), atol=1e-6)


def test_uncertainty_asks_about_patches_too(store: Store) -> None:
    card, sample = card_of(Preprocess(dim=3)), store.sample(1)
    whole, patched = model_of(card), model_of(card)
    patched.patch = PATCH
    tta = TTA(transforms=(Flip(p=1),), samples=2)
    one, other = (next(sample_maps(model, sample, tta, seed=0)) for model in (whole, patched))
    assert one.shape == other.shape
    assert np.abs(one - other).max() > 1e-3, "a patch's border is none of the image's"
    assert np.array_equal(other, next(sample_maps(patched, sample, tta, seed=0)))


def test_a_saved_model_predicts_from_patches_and_one_of_an_earlier_version_from_whole_images(store: Store, tmp_path: Path) -> None:
    recipe = RECIPE.replace(patch=PATCH)
    card = card_of(Preprocess(dim=3), recipe)
    model = Model(recipe, 1, 1, SHAPE).eval()
    folder = saved(tmp_path / "model", card, model)
    loaded = read_model(folder, read_card(folder))
    assert loaded.patch == PATCH
    assert np.array_equal(predict_sample(loaded, store.sample(0)), predict_sample(model, store.sample(0)))
    before = {name: value for name, value in card.recipe.items() if name != "patch"}
    assert Model.of_json(before, 1, 1, SHAPE).patch is None


def test_images_smaller_than_a_patch_are_padded(store: Store) -> None:
    split = Split(index=0, train=tuple(case.subject for case in store.cases))
    recipe = Recipe(network=UNet(filters=(2, 4)), patch=Patch(size=(8, 18, 8)))
    check_recipes({"c": recipe}, store, split)
    image, target = batches_of(store, recipe).batch(0, [0, 1, 2], "cpu")
    lowest = image.amin((1, 2, 3, 4))[:, None, None, None]
    assert (image[:, :, :, [0, 1, -1]] == lowest[..., None]).all(), "of 3 rows more than the image has, 2 lie before it"
    assert target[:, 1].sum((1, 2, 3)).tolist() == [8 * 15 * 8] * 3, "padding is no label"


def study(recipe: Recipe) -> Study:
    return Study(name="s", question="?", data=Phantom(subjects=6), splits=MonteCarlo(count=2), candidates={"a": recipe})


@pytest.mark.parametrize("size", [(8,), (8, 8, 8, 8), (0, 8)], ids=str)
def test_a_patch_has_the_axes_of_its_images(size: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        Patch(size=size)
    with pytest.raises(ValidationError, match=r"candidate a: a patch needs 2 numbers for Preprocess\(dim=2\), got \(96"):
        study(Recipe(patch=Patch()))


def test_a_recipe_with_a_patch_goes_to_json_and_back_and_is_another_one() -> None:
    recipe = Recipe(patch=PATCH)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert study_changes(json_of(study(Recipe())), json_of(study(Recipe(patch=Patch(size=(8, 8))))), [], [])[0]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    data, preprocess = Phantom(subjects=5, size=(16, 16), num_slices=10), Preprocess(dim=3)
    cases = data.cases(None)
    store = Store.open(build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess))
    return FitTask(
        study="s", seed=0, candidate="c", split=MonteCarlo(count=1).make({c.subject: c.site for c in cases}, 0)[0],
        objective="dice_dml", store=str(store.path), store_fingerprint=store.fingerprint, folder="",
        recipe=Recipe(
            network=UNet(filters=(2, 4), norm="instance"), activation=Sigmoid(), augment=MOVES,
            patch=Patch(size=(8, 8, 8), per_item=2), optim=Optim(lr=5e-3, epochs=2, batch_size=2),
        ),
    )  # fmt: skip


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 10**6))
    return lambda: next(asked) >= steps


def test_a_fit_on_patches_goes_on_exactly_where_it_was_stopped(task: FitTask, tmp_path: Path) -> None:
    straight, parts = task.replace(folder=str(tmp_path / "straight")), task.replace(folder=str(tmp_path / "parts"))
    result = fit(straight)
    assert result.state == "finished"
    assert result.score is not None
    with pytest.raises(Interrupted):
        fit(parts, Worker(stop=stop_after(4)))
    resumed = fit(parts)
    assert resumed.resumed_epoch is not None
    assert (resumed.score, resumed.test_score, resumed.thresholds) == (result.score, result.test_score, result.thresholds)
    assert weights_path(straight.folder).read_bytes() == weights_path(parts.folder).read_bytes()
