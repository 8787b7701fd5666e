"""Slices across any axis: items are the planes of the file, and maps go back on its grid exactly, however it lies in space."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image as pictures
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.check import check_cases
from softseg_dist.data.geometry import Affine4, Float32, Geometry
from softseg_dist.data.montage import montage
from softseg_dist.data.phantom import Phantom
from softseg_dist.data.preprocess import Placement, Preprocess
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.data.store import Store, build_store

AXES = ("x", "y", "z")
SAGITTAL = (4.0, 0.7, 0.7)
ORDERS = [*itertools.permutations(range(3))]


class Stored(Case):
    """A file in memory: `stored` [i j k] is its image and, scaled to [0, 1], the mask of its only rater."""

    def __init__(self, name: str, stored: NDArray[Any], affine: Affine4) -> None:
        self.name = self.subject = name
        self.site, self.rater_names = "", ("a",)
        self.stored, self.geometry = stored.astype(np.float32), Geometry(stored.shape, affine)  # type: ignore[arg-type]

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return (f"{self.name} {hash(self.stored.tobytes())}",)

    def load(self) -> CaseData:
        image = np.ascontiguousarray(self.geometry.to_canonical(self.stored))
        return CaseData(image[None], image[None, None] / 255, None, self.geometry.canonical_affine, self.geometry)

    def mask(self, part: str) -> Float32:
        mask: Float32 = self.load().raters[0, 0]
        return mask


def affine_of(spacing_mm: Sequence[float], order: Sequence[int], flips: Sequence[bool], angles: Sequence[float]) -> Affine4:
    """Voxels of `spacing_mm` along X, Y, Z; stored axis j runs along canonical axis order[j], turned by `angles` in degrees."""
    affine = np.eye(4)
    for stored, (canonical, flipped) in enumerate(zip(order, flips, strict=True)):
        affine[:3, stored] = np.eye(3)[canonical] * spacing_mm[canonical] * (-1 if flipped else 1)
    affine[:3, :3] = Rotation.from_euler("zxy", angles, degrees=True).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = (-31, 12, 4)
    return affine


def canonical(shape: Sequence[int], spacing_mm: Sequence[float] = (1, 1, 1), seed: int = 0, name: str = "sub-1") -> Stored:
    stored = np.random.default_rng(seed).integers(0, 256, shape)
    return Stored(name, stored, np.diag([*map(float, spacing_mm), 1.0]))


@st.composite
def files(draw: st.DrawFn) -> Stored:
    """Any order, direction and tilt of axes, and any voxel size."""
    shape = draw(st.tuples(*[st.integers(2, 8)] * 3))
    sizes = draw(st.tuples(*[st.sampled_from((0.4, 0.7, 1.0, 3.0, 4.5))] * 3))
    flips, angles = draw(st.tuples(*[st.booleans()] * 3)), draw(st.tuples(*[st.floats(-20, 20)] * 3))
    stored = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, shape)
    return Stored("sub-1", stored, affine_of(sizes, draw(st.sampled_from(ORDERS)), flips, angles))


@given(case=files(), axis=st.sampled_from((*AXES, "auto")), crop=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=200)
def test_maps_go_back_on_the_grid_of_the_file_bit_by_bit(case: Stored, axis: str, crop: tuple[int, int] | None) -> None:
    preprocess = Preprocess(axis=axis, crop=crop, normalize="none")  # type: ignore[arg-type]
    sample = preprocess.apply(case)
    back = preprocess.restore(sample.image / 255, sample.placement)
    inside = tuple(slice(*each.kept) for each in sample.placement.axes)
    expected = np.zeros(case.geometry.canonical_shape, np.float32)
    expected[inside] = case.load().raters[0, 0][inside]
    assert np.array_equal(case.geometry.from_canonical(back[0]), case.geometry.from_canonical(expected))
    if crop is None:
        assert np.array_equal(case.geometry.from_canonical(back[0]), case.stored / np.float32(255))


@given(case=files(), axis=st.sampled_from((*AXES, "auto")), spacing_mm=st.tuples(*[st.sampled_from((0.5, 1.0, 2.0))] * 2))
@settings(max_examples=100)
def test_across_any_axis_is_as_across_z_of_the_image_turned(case: Stored, axis: str, spacing_mm: tuple[float, float]) -> None:
    """What is true of axial slices is true of the others."""
    preprocess = Preprocess(axis=axis, spacing_mm=spacing_mm, crop=(7, 5), center="foreground", normalize="none")  # type: ignore[arg-type]
    across = preprocess.slice_axis(case.geometry)
    order = [*(each for each in range(3) if each != across), across]
    data, axial = case.load(), preprocess.replace(axis="z")
    image, raters = data.image.transpose(0, *(1 + n for n in order)), data.raters.transpose(0, 1, *(2 + n for n in order))
    turned = replace(data, image=image, raters=raters, affine=data.affine[:, [*order, 3]])
    one, other = preprocess.transform(case, data), axial.transform(case, turned)
    assert one.spacing_mm == other.spacing_mm
    assert one.voxel_mm3 == pytest.approx(other.voxel_mm3)
    for name in ("image", "raters"):
        assert np.allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5), name
    maps = one.raters[:, 0]
    back, again = preprocess.restore(maps, one.placement), axial.restore(maps, other.placement)
    assert np.allclose(back.transpose(0, *(1 + n for n in order)), again, atol=1e-5)


def test_a_sagittal_image_gives_slices_in_its_plane() -> None:
    case = canonical((9, 40, 44), SAGITTAL)
    assert Preprocess().apply(case).image.shape == (44, 1, 9, 40)
    sample = Preprocess(axis="auto").apply(case)
    assert sample.image.shape == (9, 1, 40, 44)
    assert sample.spacing_mm == (0.7, 0.7)
    assert sample.voxel_mm3 == pytest.approx(0.7 * 0.7 * 4)
    assert sample.placement.slices == tuple(range(9))
    assert np.array_equal(sample.raters[3, 0, 0], case.load().raters[0, 0, 3])
    resampled = Preprocess(axis="auto", spacing_mm=(1.4, 0.7), crop=(16, 48)).apply(case)
    assert resampled.image.shape == (9, 1, 16, 48)
    assert resampled.spacing_mm == (1.4, 0.7)


def test_across_y_items_have_the_axes_x_and_z() -> None:
    case = canonical((9, 5, 12), (1, 3, 1.5))
    for axis in ("y", "auto"):
        sample = Preprocess(axis=axis).apply(case)  # type: ignore[arg-type]
        assert sample.spacing_mm == (1, 1.5)
        assert np.array_equal(sample.raters[2, 0, 0], case.load().raters[0, 0, :, 2])


@pytest.mark.parametrize(
    ("spacing_mm", "shape", "axis"),
    [
        ((1, 1, 1), (8, 8, 8), 2),
        ((1.000001, 1, 0.999999), (8, 8, 8), 2),  # equal but for rounding
        ((2, 2, 1), (8, 8, 8), 1),
        ((2, 1, 2), (8, 8, 8), 2),
        ((2, 1.9, 1.9), (8, 8, 8), 0),
        ((0.5, 2, 2), (1, 8, 8), 0),  # one slice is a slice, whatever its thickness
        ((2, 2, 0.5), (8, 8, 1), 2),
    ],
)
def test_auto_is_the_thickest_axis(spacing_mm: Sequence[float], shape: Sequence[int], axis: int) -> None:
    for order, flips in itertools.product(ORDERS, ((False, False, False), (True, False, True))):
        stored = tuple(shape[canonical] for canonical in order)
        geometry = Geometry(stored, affine_of(spacing_mm, order, flips, (5, -4, 3)))  # type: ignore[arg-type]
        assert Preprocess(axis="auto").slice_axis(geometry) == axis


@pytest.mark.parametrize("across", range(3))
def test_labelled_slices_are_kept_alone_and_go_back_to_their_place(across: int) -> None:
    label = np.zeros((7, 6, 8))
    label[2:5, 1:4, 3:5] = 255
    kept = {0: (2, 3, 4), 1: (1, 2, 3), 2: (3, 4)}[across]
    preprocess = Preprocess(axis=AXES[across], slices="labelled", normalize="none")  # type: ignore[arg-type]
    sample = preprocess.apply(Stored("sub-1", label, np.eye(4)))
    assert sample.placement.slices == kept
    assert np.array_equal(preprocess.restore(sample.raters[:, 0], sample.placement)[0], label / np.float32(255))


def test_the_crop_is_centred_in_the_plane_of_the_slices() -> None:
    label = np.zeros((9, 40, 44))
    label[1:3, 29:32, 9:12] = 255  # its centre is (1.5, 30, 10)
    sample = Preprocess(axis="auto", crop=(5, 5), center="mask", normalize="none").apply(
        Stored("sub-1", label, np.diag([*SAGITTAL, 1]))
    )
    assert [axis.start for axis in sample.placement.axes] == [0, 28, 8]
    assert sample.raters[1, 0, 0].sum() == 9


def test_a_placement_survives_json() -> None:
    placement = Preprocess(axis="x").apply(canonical((5, 6, 7))).placement
    assert Placement.from_dict(placement.to_dict()).slice_axis == 0


def test_a_volume_is_not_cut() -> None:
    with pytest.raises(ValueError, match='axis="auto" is for dim=2; a volume is kept whole'):
        Preprocess(dim=3, axis="auto")


def test_a_store_keeps_the_axis_of_each_case(tmp_path: Path) -> None:
    cases = [
        canonical((6, 8, 9), (4, 1, 1), 0, "sagittal"),
        canonical((8, 6, 9), (1, 4, 1), 1, "coronal"),
        canonical((8, 9, 5), (1, 1, 4), 2),
    ]
    preprocess, data = Preprocess(axis="auto", normalize="none"), Phantom(subjects=3)
    store = Store.open(build_store(tmp_path, cases, data, preprocess))
    assert store.preprocess == preprocess
    assert [store.sample(index).placement.slice_axis for index in range(3)] == [0, 1, 2]
    assert [of.num_items for of in store.cases] == [6, 6, 5]
    for index, case in enumerate(cases):
        sample = store.sample(index)
        back = store.preprocess.restore(sample.raters[:, 0], sample.placement)
        assert np.array_equal(case.geometry.from_canonical(back[0]), case.stored / np.float32(255))
        assert sample.spacing_mm == (1, 1)


def test_each_axis_has_a_fingerprint_of_its_own() -> None:
    chosen = [Preprocess(axis=axis) for axis in (*AXES, "auto")]
    assert [Preprocess.model_validate(each.model_dump(mode="json")) for each in chosen] == chosen
    assert len({each.fingerprint for each in chosen}) == 4


def test_a_check_says_which_slices_are_cut_across_another_axis_than_the_others(tmp_path: Path) -> None:
    cases = [canonical((8, 8, 4), (1, 1, 4), seed, f"sub-{seed}") for seed in range(3)] + [
        canonical((4, 8, 8), SAGITTAL, 3, "turned")
    ]
    found = {(p.case, p.rule): p.detail for p in check_cases(cases, Preprocess(axis="auto", crop=(8, 8)))}
    assert found["turned", "slices"] == "cut across x, while 3 of 4 cases are cut across z"
    assert not any(p.rule == "slices" for p in check_cases(cases, Preprocess(crop=(8, 8))))


def test_a_montage_of_sagittal_slices_has_their_shape(tmp_path: Path) -> None:
    """Half as high as wide, front to the left: what is bright in front is in the left half of the picture."""
    image = np.zeros((5, 40, 40))
    image[:, 30:, :] = 255
    sample = Preprocess(axis="auto", crop=(40, 20)).apply(Stored("a", image, np.diag([4, 1, 1, 1])))
    montage([replace(sample, raters=np.zeros_like(sample.raters))], tmp_path / "m.png", ["GM"])
    dark = pictures.imread(tmp_path / "m.png")[..., :3].max(axis=-1) < 0.1
    dark[dark.sum(axis=1) < 40] = False  # letters
    rows, columns = np.nonzero(dark)
    assert columns.mean() > dark.shape[1] / 2
    assert np.ptp(columns) / np.ptp(rows) == pytest.approx(30 / 20, rel=0.05)
