"""Voxels that nobody labelled: whatever a mask has there, no fit and no measurement depends on it, nor does a prediction there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from device_fits import EVERYTHING, assert_equal_to_the_host

from softseg_dist import SVLS, AdaptiveWing, Files, NormReLU, Optim, Patch, Preprocess, Recipe, Sigmoid, UNet
from softseg_dist.data.cases import CaseData
from softseg_dist.data.check import check_cases
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.judging.judge import Yardstick, judge
from softseg_dist.numerics.labels import FUSIONS, LabelMode, prepare_target
from softseg_dist.training.batches import Batches
from softseg_dist.training.fit import fit
from softseg_dist.training.preflight import check_recipes
from softseg_dist.training.task import FitTask, cases_path, history_path

SIZE = (16, 14, 6)
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
FROM = 9  # along x: the first of the voxels to ignore
SPLIT = Split(index=0, train=("a", "b", "c"), validation=("d",), test=("e",))
RECIPE = Recipe(network=UNet(filters=(4, 8)), activation=Sigmoid(), optim=Optim(epochs=2, batch_size=3, precision="float32"))
EVERY_WAY = {
    "soft": RECIPE.replace(activation=NormReLU(), loss=AdaptiveWing(), augment=EVERYTHING, smoothing=SVLS()),
    "hard": RECIPE.replace(label="hard", augment=EVERYTHING[:3]),
    "staple": RECIPE.replace(label="hard_each", fusion="staple"),
    "one of them": RECIPE.replace(label="nearest", fusion="random_rater"),
}


def store_of(folder: Path, below: float, *, ignored: bool = True, slices: int = 0, **preprocess: object) -> Store:
    """Five cases of two raters, whose masks are `below` in half of the voxels to ignore, and in slices; "b" has none of these."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        label = np.zeros(SIZE, np.float32)
        label[3:11, 4:9, 1:5] = 1
        files = {"image": (label + rng.random(SIZE)).astype(np.float32), "known": np.zeros(SIZE, np.float32)}
        if name != "b":
            files["known"][FROM:] = 255
            label[FROM:], label[FROM:, ::2] = 0, below
            files["known"][..., :slices] = 255
            label[..., :slices] = below
        files |= {"by-anna": label, "by-ben": np.roll(label, 1, axis=1)}
        for file, values in files.items():
            write_volume(folder / f"set/{name}_{file}.nii.gz", values, Geometry(SIZE, AFFINE))
    ignore = "{case}_known.nii.gz:255" if ignored else None
    data = Files(str(folder / "set"), image="{case}_image.nii.gz", labels={"GM": "{case}_by-{rater}.nii.gz"}, ignore=ignore)
    cases, prepared = data.cases(None), Preprocess.model_validate(preprocess)
    assert [problem.detail for problem in check_cases(cases, prepared) if problem.level == "error"] == []
    return Store.open(build_store(folder / "stores", cases, data, prepared))


def fitted(store: Store, recipe: Recipe, folder: Path) -> tuple[list[float], pd.DataFrame]:
    """The losses of a fit, and its rows of the results table."""
    task = FitTask(
        study="s", seed=0, candidate="c", recipe=recipe, split=SPLIT, objective="brier_skill", store=str(store.path),
        store_fingerprint=store.fingerprint, folder=str(folder),
    )  # fmt: skip
    assert fit(task).state == "finished"
    epochs = map(json.loads, history_path(folder).read_text().splitlines())
    return [epoch["loss"] for epoch in epochs], pd.read_parquet(cases_path(folder))


@pytest.mark.parametrize("way", EVERY_WAY)
def test_a_fit_does_not_depend_on_labels_that_are_to_be_ignored(tmp_path: Path, way: str) -> None:
    recipe = EVERY_WAY[way]
    stores = [store_of(tmp_path / str(below), below, dim=3) for below in (0.0, 1.0)]
    check_recipes({"c": recipe}, stores[0], SPLIT)
    (losses, rows), (others, other_rows) = (fitted(store, recipe, store.path.parent / "fit") for store in stores)
    assert losses == others
    assert np.isfinite(losses).all()
    pd.testing.assert_frame_equal(rows, other_rows)
    kept = fitted(store_of(tmp_path / "all", 1.0, ignored=False, dim=3), recipe, tmp_path / "all/fit")
    assert kept[0] != losses


def test_a_fit_of_patches_of_resampled_slices_does_not_either(tmp_path: Path) -> None:
    recipe = RECIPE.replace(patch=Patch(size=(8, 8), foreground=0.5), augment=EVERYTHING[:2])
    stores = [store_of(tmp_path / str(below), below, slices=2, dim=2, spacing_mm=(1.3, 0.8)) for below in (0.0, 1.0)]
    (losses, rows), (others, other_rows) = (fitted(store, recipe, store.path.parent / "fit") for store in stores)
    assert losses == others
    assert np.isfinite(losses).all()
    pd.testing.assert_frame_equal(rows, other_rows)


@pytest.mark.parametrize("sent", [False, True])
def test_a_device_makes_the_batches_of_the_host(tmp_path: Path, sent: bool) -> None:
    store = store_of(tmp_path, 1.0, dim=3)
    items = tuple((case, 0) for case in range(3))
    batches = Batches(store, EVERY_WAY["soft"], items, seed=0)
    assert_equal_to_the_host(batches, sent, [(0, [0, 1, 2]), (1, [2, 0, 1])])


def test_a_voxel_that_touches_one_to_ignore_is_ignored_and_no_loss_has_a_gradient_there(tmp_path: Path) -> None:
    store = store_of(tmp_path, 1.0, dim=3, spacing_mm=(2.0, 1.0, 2.0))
    assert store.has_ignored
    raters = store.sample(0).raters[0]  # of 8 voxels along x; the fifth holds 8 and 9 of the file
    assert np.isnan(raters).any(axis=(0, 1, 3, 4)).tolist() == [False] * 4 + [True] * 4
    batches = Batches(store, RECIPE, ((0, 0), (1, 0)), seed=0)
    _, target = batches.batch(0, [0, 1], "cpu")
    assert target.isnan().flatten(1).any(1).tolist() == [True, False]
    prediction = torch.full_like(target, 0.7).requires_grad_()
    loss = RECIPE.loss(*batches.known(prediction, target))
    (slope,) = torch.autograd.grad(loss, prediction)
    assert slope[target.isnan()].eq(0).all()
    assert slope[~target.isnan()].ne(0).all()
    assert batches.mean_label() == (target[0].nanmean() + target[1].mean()) / 2


@pytest.mark.parametrize("fusion", [*FUSIONS, "rater:b"])
@pytest.mark.parametrize("mode", ["soft", "hard", "nearest", "hard_each"])
def test_targets_are_nan_there_and_else_those_of_the_known_voxels(mode: LabelMode, fusion: str) -> None:
    raters = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    unknown = raters.clone()
    raters[..., :2, :], unknown[..., :2, :] = 0, torch.nan
    made = prepare_target(unknown, None, mode, fusion, ("a", "b"), draw=0)
    assert made[:, :2].isnan().all()
    torch.testing.assert_close(made[:, 2:], prepare_target(raters, None, mode, fusion, ("a", "b"), draw=0)[:, 2:], rtol=0, atol=0)


def test_maps_are_judged_as_if_the_image_ended_there() -> None:
    rng, yardstick = np.random.default_rng(1), Yardstick(("GM",), (30.0,))
    raters = (rng.random((2, 1, *SIZE)) > 0.7).astype(np.float32)
    maps = rng.random((1, *SIZE)).astype(np.float32)
    cut = [values[..., :FROM, :, :] for values in (raters, maps)]
    raters[:, :, FROM:] = np.nan

    def rows(drawn: np.ndarray, soft: np.ndarray) -> dict[tuple[object, ...], float]:
        size = drawn.shape[2:]
        own = OwnMasks.of(CaseData(drawn[0], drawn, None, AFFINE, Geometry(size, AFFINE)))
        return {row[:-1]: row.value for row in judge(soft, own, ("a", "b"), yardstick, (0.5,))}

    known, of_cut = rows(raters, maps), rows(*cut)
    assert known.keys() == of_cut.keys()
    for key, value in of_cut.items():
        np.testing.assert_allclose(known[key], value, rtol=1e-12, err_msg=str(key))
    maps[:, FROM:] = 0.99
    assert rows(raters, maps) == known
