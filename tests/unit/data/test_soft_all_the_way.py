"""A label stays soft from the file to the loss: NIfTI, layout, preprocessing, store, fusion, augmentation, batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist import Affine, Bids, Elastic, Flip, Noise, Preprocess, Recipe
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.store import Store, build_store
from softseg_dist.data.volume import write_volume
from softseg_dist.training.batches import Batches
from softseg_dist.training.evaluation import mean_reference

SHAPE = (9, 8, 3)
MOVES = (Affine(degrees=20, scale=0.1, shift=0.03), Elastic(spacing_mm=6, std_mm=0.5))


def data_set(folder: Path, labels: list[np.ndarray], affine: np.ndarray) -> Bids:
    """One subject whose raters drew `labels` [X Y Z], stored as NIfTI with `affine`."""
    geometry = Geometry(SHAPE, affine)
    image = np.random.default_rng(0).normal(size=geometry.canonical_shape).astype(np.float32)
    write_volume(folder / "set/sub-1/anat/sub-1_T2w.nii.gz", image, geometry)
    for rater, label in enumerate(labels):
        path = folder / f"set/derivatives/labels/sub-1/anat/sub-1_T2w_label-GM_desc-r{rater}_mask.nii.gz"
        write_volume(path, label, geometry)
    return Bids("set", image="T2w", labels={"GM": "label-GM_desc-{rater}_mask"})


def batches(folder: Path, data: Bids, preprocess: Preprocess, recipe: Recipe) -> Batches:
    store = Store.open(build_store(folder / "stores", data.cases(folder), data, preprocess))
    return Batches(store, recipe, tuple((0, item) for item in range(store.cases[0].num_items)), seed=0)


def soft_labels(count: int) -> st.SearchStrategy[list[np.ndarray]]:
    seeds = st.integers(0, 2**32 - 1)
    return seeds.map(lambda s: list(np.random.default_rng(s).random((count, *SHAPE), dtype=np.float32)))


@given(labels=soft_labels(2), flips=st.tuples(*[st.sampled_from((-1.0, 1.0))] * 3))
@settings(max_examples=10)
def test_nothing_interpolates_so_the_target_is_bit_exact(
    tmp_path_factory: pytest.TempPathFactory, labels: list[np.ndarray], flips: tuple[float, ...]
) -> None:
    folder = tmp_path_factory.mktemp("soft")
    data = data_set(folder, labels, np.diag([*(0.5 * f for f in flips), 1.0]))
    ready = batches(folder, data, Preprocess(dim=2), Recipe(label="soft", augment=(Noise(std=0.3),)))
    _, target = ready.batch(0, [0, 1, 2], "cpu")
    mean = torch.stack([torch.from_numpy(label) for label in labels]).mean(0)
    assert torch.equal(target[:, 0], mean.permute(2, 0, 1))
    assert np.array_equal(mean_reference(ready.store.sample(0))[:, 0], target[:, 0].numpy())


@pytest.mark.parametrize("preprocess", [Preprocess(dim=2, spacing_mm=(0.7, 0.6)), Preprocess(dim=3, spacing_mm=(1, 1, 1))])
@pytest.mark.parametrize("label_resampling", ["linear", "area"])
@given(labels=soft_labels(1))
@settings(max_examples=5)
def test_resampled_and_augmented_it_stays_in_0_to_1_and_soft(
    tmp_path_factory: pytest.TempPathFactory, preprocess: Preprocess, label_resampling: str, labels: list[np.ndarray]
) -> None:
    folder = tmp_path_factory.mktemp("soft")
    data = data_set(folder, labels, np.diag([0.5, 0.5, 1.0, 1.0]))
    prepared = preprocess.replace(label_resampling=label_resampling)
    _, target = batches(folder, data, prepared, Recipe(label="soft", augment=MOVES)).batch(0, [0], "cpu")
    assert float(target.min()) >= 0
    assert float(target.max()) <= 1
    assert ((target > 0) & (target < 1)).float().mean() > 0.5


@given(labels=soft_labels(3))
@settings(max_examples=5)
def test_hard_is_the_soft_target_rounded_once_and_last(tmp_path_factory: pytest.TempPathFactory, labels: list[np.ndarray]) -> None:
    folder = tmp_path_factory.mktemp("soft")
    data, prepared = data_set(folder, labels, np.diag([0.5, 0.5, 1.0, 1.0])), Preprocess(dim=2, spacing_mm=(0.7, 0.6))
    pair = [batches(folder, data, prepared, Recipe(label=mode, augment=MOVES)) for mode in ("soft", "hard")]
    (image, soft), (same, hard) = (ready.batch(3, [0, 2], "cpu") for ready in pair)
    assert torch.equal(image, same)
    assert torch.equal(hard, (soft >= 0.5).float())


def test_image_and_label_share_their_field(tmp_path: Path) -> None:
    """Where the label is the image itself, what reaches the network and what reaches the loss are the same."""
    geometry = Geometry(SHAPE, np.eye(4))
    blob = np.zeros(SHAPE, dtype=np.float32)
    blob[3:6, 2:6] = np.random.default_rng(1).random((3, 4, 3), dtype=np.float32)
    write_volume(tmp_path / "set/sub-1/anat/sub-1_T2w.nii.gz", blob, geometry)
    write_volume(tmp_path / "set/derivatives/labels/sub-1/anat/sub-1_T2w_label-GM_mask.nii.gz", blob, geometry)
    data = Bids("set", image="T2w", labels={"GM": "label-GM_mask"})
    recipe = Recipe(label="soft", augment=(*MOVES, Flip()))
    image, target = batches(tmp_path, data, Preprocess(dim=2, normalize="none"), recipe).batch(1, [0, 1, 2], "cpu")
    assert torch.allclose(image, target, atol=1e-6)
    assert not torch.equal(target[:, 0], torch.from_numpy(blob).permute(2, 0, 1))
