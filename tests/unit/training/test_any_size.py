"""Items of several sizes: what a patch or a padded batch sees of them, on the host as on a device, and a fit from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from device_fits import EVERYTHING, assert_equal_to_the_host
from torch import Tensor, nn

from softseg_dist import Files, Mixup, Optim, Patch, Preprocess, Recipe, Sigmoid, UNet
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.numerics.patches import Window
from softseg_dist.training.batches import Batches
from softseg_dist.training.fit import fit, validation_interval
from softseg_dist.training.gpu.device_batches import DeviceBatches, Resident, device_batches
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model
from softseg_dist.training.preflight import check_recipes
from softseg_dist.training.task import FitTask, cases_path

CPU = torch.device("cpu")
SIZES = {"a": (18, 15, 6), "b": (12, 20, 4), "c": (11, 9, 5), "d": (18, 20, 4), "e": (16, 12, 5)}
SPLIT = Split(index=0, train=("a", "b", "c"), validation=("d",), test=("e",))
PATCHES = {2: Patch(size=(12, 10), foreground=0.5, per_item=2), 3: Patch(size=(12, 10, 5), foreground=0.5, per_item=2)}
RECIPE = Recipe(network=UNet(filters=(4, 8)), activation=Sigmoid(), optim=Optim(epochs=2, batch_size=3))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Store]:
    folder, rng = tmp_path_factory.mktemp("sizes"), np.random.default_rng(0)
    for name, size in SIZES.items():
        grid = Geometry(size, np.eye(4))
        label = np.zeros(size, np.float32)
        label[2:6, 3:7, 1:3] = 1
        write_volume(folder / f"set/{name}_image.nii.gz", (1 + rng.random(size) + label).astype(np.float32), grid)
        write_volume(folder / f"set/{name}_anna.nii.gz", label, grid)
        write_volume(folder / f"set/{name}_ben.nii.gz", np.roll(label, 1, axis=0), grid)
    data = Files("set", image="{case}_image.nii.gz", labels={"GM": "{case}_{rater}.nii.gz"})
    cases = data.cases(folder)
    return {dim: Store.open(build_store(folder / "stores", cases, data, Preprocess(dim=dim))) for dim in (2, 3)}


def task_of(store: Store, recipe: Recipe, folder: Path) -> FitTask:
    return FitTask(
        study="s", seed=0, candidate="c", recipe=recipe, split=SPLIT, objective="brier_skill", store=str(store.path),
        store_fingerprint=store.fingerprint, folder=str(folder),
    )  # fmt: skip


def batches_of(store: Store, recipe: Recipe) -> Batches:
    return Batches.of(task_of(store, recipe, Path()), store)


def test_a_store_knows_the_size_of_each_case_and_the_largest(stores: dict[int, Store]) -> None:
    assert {case.name: case.size for case in stores[3].cases} == SIZES
    assert {case.name: (*case.size, case.num_items) for case in stores[2].cases} == SIZES
    assert (stores[3].size, stores[2].size) == ((18, 20, 6), (18, 20))
    assert stores[3].sizes_differ
    assert stores[3].sample(1).image.shape == (1, 1, *SIZES["b"])


@pytest.mark.parametrize("dim", [2, 3])
def test_without_a_patch_an_item_lies_in_the_middle_of_the_largest_size(stores: dict[int, Store], dim: int) -> None:
    store = stores[dim]
    batches = batches_of(store, RECIPE)
    image, target = batches.batch(0, list(range(len(batches.items))), "cpu")
    assert image.shape == (len(batches.items), 1, *store.size)
    for row, (case, item) in enumerate(batches.items):
        sample = store.sample(case)
        shift = [(n - whole) // 2 for whole, n in zip(store.size, store.cases[case].size, strict=True)]
        inner = (..., *(slice(-first, -first + n) for first, n in zip(shift, store.cases[case].size, strict=True)))
        assert np.array_equal(image[row][inner], sample.image[item])
        assert np.array_equal(target[row][inner], sample.raters[item].mean(axis=0))
        assert target[row].sum() == pytest.approx(float(sample.raters[item].mean(axis=0).sum()), rel=1e-6), "padding is no label"
        outside = torch.ones(image[row].shape, dtype=torch.bool)
        outside[inner] = False
        assert (image[row][outside] == float(sample.image[item].min())).all()


@pytest.mark.parametrize("dim", [2, 3])
def test_a_patch_lies_in_its_own_item_or_holds_it_in_its_middle(stores: dict[int, Store], dim: int) -> None:
    batches = batches_of(stores[dim], RECIPE.replace(patch=PATCHES[dim]))
    seen = set()
    for epoch in range(20):
        for member, (case, _) in enumerate(batches.items):
            window = batches.window(epoch, member)
            assert window is not None
            assert window.size == PATCHES[dim].size
            for first, last, whole in zip(window.start, window.stop, stores[dim].cases[case].size, strict=True):
                is_smaller = whole < last - first
                assert first == (whole - (last - first)) // 2 if is_smaller else 0 <= first <= last <= whole
                seen.add(is_smaller)
    assert seen == {True, False}


@pytest.mark.parametrize("sent", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("patch", [False, True], ids=["whole", "patches"])
@pytest.mark.parametrize("augment", [(), EVERYTHING], ids=["still", "augmented"])
@pytest.mark.parametrize("fusion", ["mean", "random_rater", "staple"])
@pytest.mark.parametrize("dim", [2, 3])
def test_batches_of_a_device_are_those_of_the_host_bit_for_bit(
    stores: dict[int, Store], dim: int, fusion: str, augment: tuple[Mixup, ...], patch: bool, sent: bool
) -> None:
    recipe = RECIPE.replace(patch=PATCHES[dim] if patch else None, augment=augment, fusion=fusion)
    batches = batches_of(stores[dim], recipe)
    assert_equal_to_the_host(batches, sent, [(0, [0, 2, 1]), (2, [2, 1, 0])])


def test_the_device_holds_each_item_once_and_unpadded(stores: dict[int, Store]) -> None:
    made, _ = device_batches(batches_of(stores[3], RECIPE), CPU)
    assert isinstance(made, DeviceBatches)
    assert isinstance(made.source, Resident)
    assert made.source.images.buffer.numel() == sum(int(np.prod(size)) for size in SIZES.values())


def test_a_batch_copies_little_more_of_the_store_than_its_patches(
    stores: dict[int, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    window_of = Window.of

    def counted(window: Window, maps: np.ndarray, outside: np.ndarray | float = 0) -> np.ndarray:
        part = window_of(window, maps, outside)
        copied.append(part.nbytes)
        return part

    monkeypatch.setattr(Window, "of", counted)
    batches = batches_of(stores[3], RECIPE.replace(patch=PATCHES[3]))
    image, target = batches.batch(0, [0, 3, 5], "cpu")
    assert 0 < sum(copied) <= 1.1 * (image.nbytes + 2 * target.nbytes), "the image, and the masks of two raters"


@pytest.mark.parametrize("patch", [False, True], ids=["whole", "patches"])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_fit_is_judged_on_the_grid_of_each_file(stores: dict[int, Store], dim: int, patch: bool, tmp_path: Path) -> None:
    task = task_of(stores[dim], RECIPE.replace(patch=PATCHES[dim] if patch else None), tmp_path)
    check_recipes({"c": task.recipe}, stores[dim], SPLIT)
    result = fit(task)
    assert result.state == "finished"
    rows = pd.read_parquet(cases_path(task.folder))
    assert set(rows["case"]) == {"d", "e"}
    assert {"own", "prepared"} == set(rows["grid"])
    assert np.isfinite(rows[rows["metric"] == "brier_skill"]["value"]).all()


def test_voxels_are_counted_in_their_own_sizes_to_choose_when_to_validate(stores: dict[int, Store]) -> None:
    batches = batches_of(stores[3], RECIPE.replace(patch=PATCHES[3]))
    trained, validated = 2 * 3 * 12 * 10 * 5, 18 * 20 * 4
    assert validation_interval(batches, SPLIT.validation) == -(-10 * validated // (3 * trained))


@pytest.mark.parametrize("patch", [False, True], ids=["whole", "patches"])
@pytest.mark.parametrize("dim", [2, 3])
def test_a_small_image_is_predicted_as_it_was_trained_on_in_the_middle_of_its_minimum(
    stores: dict[int, Store], dim: int, patch: bool
) -> None:
    store, recipe = stores[dim], RECIPE.replace(patch=PATCHES[dim] if patch else None)
    model, seen = Model(recipe, 1, 1, store.size), []
    model.network = Seeing(seen)
    smallest = store.sample(2)
    map_ = predict_sample(model, smallest)
    assert map_.shape[2:] == smallest.image.shape[2:]
    assert {tuple(shape) for shape in seen} == {PATCHES[dim].size if patch else store.size}
    np.testing.assert_allclose(map_[:, 0], 1 / (1 + np.exp(-smallest.image[:, 0])), atol=1e-6)


class Seeing(nn.Module):
    """Returns its image, and remembers the size."""

    def __init__(self, seen: list[torch.Size]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, image: Tensor) -> Tensor:
        """[B 1 *S] as it is."""
        self.seen.append(image.shape[2:])
        return image
