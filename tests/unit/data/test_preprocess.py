"""Preprocessing: soft labels pass through, volumes are kept, crops are centred, and everything leads back."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.layouts import Bids
from softseg_dist.data.phantom import Phantom
from softseg_dist.data.preprocess import Placement, Preprocess, Sample
from softseg_dist.data.resampling import Axis, Method, resample, restore
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.errors import UserError

RNG = np.random.default_rng(0)
METHODS = get_args(Method)
unit = st.floats(0, 1, width=32, allow_subnormal=False)  # of subnormal numbers no sum is exact to 1e-6
lines = hnp.arrays(np.float32, st.integers(1, 40), elements=unit)
spacings = st.floats(0.3, 4.0)


class MemoryCase(Case):
    """A case that lies in memory."""

    def __init__(self, image: Float32, raters: Float32, spacing_mm: Sequence[float] = (1, 1, 1)) -> None:
        self.name = self.subject = "sub-1"
        self.site = ""
        self.rater_names = tuple(f"r{i}" for i in range(len(raters)))
        geometry = Geometry(image.shape, np.diag([*map(float, spacing_mm), 1.0]))
        self.data = CaseData(image[None], raters, None, geometry.canonical_affine, geometry)

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return ()

    def load(self) -> CaseData:
        return self.data

    def mask(self, part: str) -> Float32:
        return self.data.raters[0, 0]


def case_of(label: Float32, spacing_mm: Sequence[float] = (1, 1, 1)) -> MemoryCase:
    image = np.random.default_rng(0).normal(100, 20, label.shape).astype(np.float32)
    return MemoryCase(image, label[None, None], spacing_mm)


def ball(shape: tuple[int, ...], center: Sequence[float], radius: float) -> Float32:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return (np.linalg.norm(grid - center, axis=-1) <= radius).astype(np.float32)


# --- one axis ---


@pytest.mark.parametrize("method", METHODS)
@given(values=lines, spacing_in=spacings, spacing_out=spacings)
@settings(max_examples=60, deadline=None)
def test_resampled_labels_stay_between_the_smallest_and_largest(
    method: Method, values: Float32, spacing_in: float, spacing_out: float
) -> None:
    result = resample(values, [Axis.whole(len(values), spacing_in, spacing_out)], method)
    low = 0.0 if method == "area" else values.min()  # area: what lies outside counts as 0
    assert result.min() >= low
    assert result.max() <= values.max()


@given(values=lines, spacing_in=spacings, ratio=st.floats(0.1, 10))
@settings(max_examples=80, deadline=None)
def test_area_resampling_keeps_the_labelled_volume(values: Float32, spacing_in: float, ratio: float) -> None:
    axis = Axis.whole(len(values), spacing_in, ratio * spacing_in)
    result = resample(values, [axis], "area")
    before = values.sum(dtype=np.float64) * axis.spacing_in_mm
    assert result.sum(dtype=np.float64) * axis.spacing_mm == pytest.approx(before, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@given(value=unit, num=st.integers(1, 30), spacing_in=spacings)
@settings(max_examples=30, deadline=None)
def test_a_constant_stays_exactly_constant_inside(method: Method, value: float, num: int, spacing_in: float) -> None:
    axis = Axis.whole(2 * num, spacing_in, 2 * spacing_in)  # whole new voxels: nothing lies outside
    assert np.array_equal(resample(np.full(2 * num, value, np.float32), [axis], method), np.full(num, value, np.float32))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", [(1 + 0) / 2, (0 + 1) / 2, (1 + 1) / 2]),
        ("area", [0.5, 0.5, 1]),
        ("average", [0.5, 0.5, 1]),
        ("nearest", [0, 1, 1]),
    ],
)
def test_halving_the_resolution_of_a_line(method: Method, expected: list[float]) -> None:
    values = np.array([1, 0, 0, 1, 1, 1], dtype=np.float32)
    assert resample(values, [Axis.whole(6, 1.0, 2.0)], method).tolist() == expected


def test_a_voxel_that_reaches_beyond_the_border_is_counted_with_0_by_area_and_without_it_by_average() -> None:
    axis, values = Axis.whole(3, 1.0, 2.0), np.array([1, 1, 1], dtype=np.float32)  # 4 mm cover 3 mm
    assert resample(values, [axis], "area").tolist() == [1.5 / 2, 1.5 / 2]
    assert resample(values, [axis], "average").tolist() == [1, 1]


@given(values=lines, spacing_in=spacings, ratio=st.floats(0.1, 1))
@settings(max_examples=40, deadline=None)
def test_where_the_grid_gets_finer_average_is_linear(values: Float32, spacing_in: float, ratio: float) -> None:
    axis = Axis.whole(len(values), spacing_in, ratio * spacing_in)
    assert np.array_equal(resample(values, [axis], "average"), resample(values, [axis], "linear"))


def test_where_the_grid_gets_finer_area_is_the_mean_of_the_linear_interpolation() -> None:
    values = np.array([0, 1, 0.5, 0], dtype=np.float32)
    parts = resample(values, [Axis.whole(4, 1.0, 2 / 300)], "linear").reshape(6, 100)
    assert resample(values, [Axis.whole(4, 1.0, 2 / 3)], "area") == pytest.approx(parts.mean(axis=1), abs=1e-4)
    halves = Axis.whole(4, 1.0, 0.5)  # an old centre lies at a border of new voxels, where the interpolation is straight
    assert np.array_equal(resample(values, [halves], "area"), resample(values, [halves], "linear"))


def test_a_ramp_is_resampled_linearly_to_where_the_voxel_centres_are() -> None:
    mm = (np.arange(20) + 0.5) * 0.8
    axis = Axis.whole(20, 0.8, 0.5)  # 16 mm of field of view are 32 voxels of 0.5 mm
    result = resample(mm, [axis], "linear")
    inside = slice(1, -1)  # beyond the outermost centres the value stays
    assert np.allclose(result[inside], ((np.arange(32) + 0.5) * 0.5)[inside], atol=1e-6)


def test_the_field_of_view_is_covered_and_centred() -> None:
    axis = Axis.whole(35, 1.0, 2.0)
    assert axis.num_resampled == 18
    assert axis.centers()[[0, -1]].tolist() == [17 - 17.0, 17 + 17.0]


@given(num=st.integers(1, 60), spacing_in=spacings, spacing_out=spacings)
@settings(max_examples=100, deadline=None)
def test_new_voxel_centres_lie_in_the_old_field_of_view(num: int, spacing_in: float, spacing_out: float) -> None:
    axis = Axis.whole(num, spacing_in, spacing_out)
    assert axis.num_resampled * axis.spacing_mm >= num * spacing_in * (1 - 1e-5) or not axis.is_resampled
    assert axis.centers().min() >= -0.5 - 1e-6
    assert axis.centers().max() <= num - 0.5 + 1e-6


def test_a_spacing_that_is_equal_but_for_rounding_is_not_resampled() -> None:
    assert not Axis.whole(384, 0.49999998, 0.5).is_resampled
    assert Axis.whole(384, 0.498, 0.5).is_resampled


@given(num=st.integers(1, 30), size=st.integers(1, 40), share=st.floats(0, 1), values=st.data())
@settings(max_examples=80, deadline=None)
def test_cropping_and_going_back_is_exact_inside_and_zero_outside(num: int, size: int, share: float, values: st.DataObject) -> None:
    line = values.draw(hnp.arrays(np.float32, num, elements=unit))
    axis = Axis.whole(num, 1.0).window(size, share * (num - 1))
    begin, end = axis.kept
    cropped = np.pad(resample(line, [axis], "linear"), (axis.inside.start, axis.size - axis.inside.stop))
    assert len(cropped) == size
    back = restore(cropped, [axis])
    assert np.array_equal(back[begin:end], line[begin:end])
    assert not back[:begin].any()
    assert not back[end:].any()


@given(
    num=st.integers(2, 40), spacing_in=spacings, spacing_out=spacings, size=st.integers(1, 40), share=st.floats(0, 1), value=unit
)
@settings(max_examples=200, deadline=None)
def test_a_constant_comes_back_constant_inside_and_zero_outside(
    num: int, spacing_in: float, spacing_out: float, size: int, share: float, value: float
) -> None:
    axis = Axis.whole(num, spacing_in, spacing_out).window(size, share * (num - 1))
    back = restore(np.full(size, value, np.float32), [axis])
    assert back.dtype == np.float32
    begin, end = axis.kept
    places = axis.centers_back() if axis.is_resampled else np.arange(num)  # old voxels, as resampled indices
    half = 0.5 / axis.step if axis.step < 1 else 0.0  # of a larger voxel all must lie inside
    inside = (places - half >= begin - 0.5) & (places + half <= end - 0.5)
    outside = (places + half <= begin - 0.51) | (places - half >= end - 0.49)
    assert back[inside] == pytest.approx(value, rel=2e-6)
    assert not back[outside].any()
    assert back.max() <= value * (1 + 1e-6)


@given(values=lines, spacing_in=spacings, ratio=st.floats(0.2, 0.95))
@settings(max_examples=100, deadline=None)
def test_going_back_to_larger_voxels_keeps_the_volume(values: Float32, spacing_in: float, ratio: float) -> None:
    axis = Axis.whole(len(values), spacing_in, ratio * spacing_in)
    fine = np.zeros(axis.num_resampled, np.float32)
    fine[1:-1] = np.resize(values, max(axis.num_resampled - 2, 0))  # the outermost voxels reach beyond the old grid
    before = fine.sum(dtype=np.float64) * axis.spacing_mm
    assert restore(fine, [axis]).sum(dtype=np.float64) * spacing_in == pytest.approx(before, rel=1e-5, abs=1e-6)


def test_a_small_lesion_is_not_lost_on_the_way_back_to_larger_voxels() -> None:
    """One voxel of .5 mm in a file of 2 mm is a quarter of a voxel, wherever it lies; interpolation would lose or double it."""
    for at in range(4):
        fine = np.zeros(40, np.float32)
        fine[20 + at] = 1
        back = restore(fine, [Axis.whole(10, 2.0, 0.5)])
        assert back.tolist() == [0.25 if j == 5 else 0 for j in range(10)]


def test_going_back_to_smaller_voxels_is_linear() -> None:
    back = restore(np.array([0, 1, 0], np.float32), [Axis.whole(6, 1.0, 2.0)])
    assert back.tolist() == [0, 0.25, 0.75, 0.75, 0.25, 0]


# --- whole cases ---


@given(label=hnp.arrays(np.float32, (7, 6, 5), elements=unit), crop=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_soft_labels_pass_bit_exact_where_nothing_is_resampled(label: Float32, crop: int) -> None:
    sample = Preprocess(dim=3, crop=(crop, 6, 5)).apply(case_of(label))
    axis = sample.placement.axes[0]
    assert np.array_equal(sample.raters[0, 0, 0][axis.inside], label[slice(*axis.kept)])
    assert sample.nearest is None


@pytest.mark.parametrize("method", ["linear", "area"])
def test_resampled_labels_are_soft_and_nearest_is_binary(method: str) -> None:
    case = case_of(ball((20, 20, 12), (9.7, 9.2, 5.5), 5), (0.7, 0.7, 1.0))
    sample = Preprocess(dim=3, spacing_mm=(1.1, 1.1, 1.1), label_resampling=method).apply(case)  # type: ignore[arg-type]
    assert ((sample.raters > 0) & (sample.raters < 1)).sum() > 100
    assert sample.nearest is not None
    assert set(np.unique(sample.nearest)) == {0, 1}
    assert sample.voxel_mm3 == pytest.approx(1.1**3)
    volume = case.data.raters.sum() * 0.7 * 0.7 * 1.0
    assert sample.raters.sum(dtype=float) * sample.voxel_mm3 == pytest.approx(volume, rel=1e-6 if method == "area" else 0.05)


def test_a_lesion_of_1_mm3_at_half_a_mm_is_not_gone_at_2_mm() -> None:
    label = np.zeros((48, 48, 48), np.float32)
    label[23:25, 23:25, 23:25] = 1  # 8 voxels of .125 mm3, between the centres of the new voxels
    case = case_of(label, (0.5, 0.5, 0.5))
    kept = {}
    for method in ("area", "linear"):
        sample = Preprocess(dim=3, spacing_mm=(2, 2, 2), label_resampling=method).apply(case)
        kept[method] = sample.raters.sum(dtype=float) * sample.voxel_mm3
    assert kept == {"area": pytest.approx(1), "linear": 0}
    assert Preprocess().label_resampling == "area"


def test_volumes_of_small_lesions_are_kept_on_a_coarser_grid_by_area_but_not_by_linear_resampling() -> None:
    generator, ratios = np.random.default_rng(0), {"area": [], "linear": []}  # type: dict[str, list[float]]
    for _ in range(40):
        label = ball((40, 40, 40), generator.uniform(14, 26, 3), generator.uniform(0.5, 1.5) / 0.5)
        for method, found in ratios.items():
            sample = Preprocess(dim=3, spacing_mm=(3, 3, 3), label_resampling=method).apply(case_of(label, (0.5, 0.5, 0.5)))
            found.append(sample.raters.sum(dtype=float) * sample.voxel_mm3 / (label.sum(dtype=float) * 0.5**3))
    assert ratios["area"] == pytest.approx(np.ones(40), abs=1e-5)
    assert np.std(ratios["linear"]) > 0.5
    assert min(ratios["linear"]) < 0.1


def test_an_image_is_averaged_along_axes_that_get_coarser_and_not_aliased() -> None:
    stripes = np.zeros((36, 12, 4), np.float32)
    stripes[::3] = 3  # one bright voxel in three: the mean of any 6 in a row is 1
    case = MemoryCase(stripes, stripes[None, None] / 3)
    for method in ("area", "linear"):
        image = Preprocess(dim=3, spacing_mm=(6, 0.5, 1), normalize="none", label_resampling=method).apply(case).image
        assert image == pytest.approx(np.ones((1, 1, 6, 24, 4)), abs=1e-6)


def test_items_of_2d_are_axial_slices_resampled_in_plane_only() -> None:
    sample = Preprocess(dim=2, spacing_mm=(0.5, 0.5)).apply(case_of(ball((10, 12, 4), (5, 6, 2), 2), (1, 1, 3)))
    assert sample.image.shape == (4, 1, 20, 24)
    assert sample.raters.shape == (4, 1, 1, 20, 24)
    assert sample.spacing_mm == (0.5, 0.5)
    assert sample.voxel_mm3 == pytest.approx(0.5 * 0.5 * 3)


def test_items_of_3d_are_volumes() -> None:
    sample = Preprocess(dim=3).apply(case_of(ball((10, 12, 4), (5, 6, 2), 2)))
    assert sample.image.shape == (1, 1, 10, 12, 4)
    assert sample.placement.slices is None


@pytest.mark.parametrize("center", ["mask", "foreground"])
@pytest.mark.parametrize("spacing_mm", [None, (0.5, 0.8, 2.0)])
def test_the_crop_is_centred_on_a_mask_or_the_foreground(center: str, spacing_mm: tuple[float, ...] | None) -> None:
    label = ball((40, 40, 20), (28, 11, 8), 4)
    case = MemoryCase(label * 50 + 1, label[None, None])
    sample = Preprocess(dim=3, spacing_mm=spacing_mm, crop=(24, 16, 10), center=center).apply(case)
    weights = sample.raters[0, 0, 0]
    for axis in range(3):
        profile = weights.sum(axis=tuple({0, 1, 2} - {axis}), dtype=np.float64)
        middle = profile @ np.arange(len(profile)) / profile.sum()
        assert abs(middle - (len(profile) - 1) / 2) <= 0.51


def test_an_empty_mask_cannot_centre_the_crop() -> None:
    with pytest.raises(UserError, match=r"sub-1.*'mask', which is empty"):
        Preprocess(crop=(4, 4), center="mask").apply(case_of(np.zeros((8, 8, 2), np.float32)))


def test_padding_is_the_minimum_of_the_image_and_no_label() -> None:
    sample = Preprocess(dim=3, crop=(8, 8, 8)).apply(case_of(np.ones((4, 4, 4), np.float32)))
    border = np.ones((8, 8, 8), bool)
    border[2:6, 2:6, 2:6] = False
    assert np.all(sample.image[0, 0][border] == sample.image.min())
    assert not sample.raters[0, 0, 0][border].any()
    assert sample.raters[0, 0, 0][~border].all()


def test_zscore_has_mean_0_and_sd_1_in_the_crop_and_ignores_brightness() -> None:
    case = case_of(ball((10, 12, 4), (5, 6, 2), 2))
    sample = Preprocess(crop=(6, 6)).apply(case)
    assert sample.image.mean(dtype=float) == pytest.approx(0, abs=1e-6)
    assert sample.image.std(dtype=float) == pytest.approx(1, abs=1e-6)
    brighter = MemoryCase(case.data.image[0] * 7 + 1000, case.data.raters)
    assert np.allclose(Preprocess(crop=(6, 6)).apply(brighter).image, sample.image, atol=1e-4)


def test_percentile_lies_in_0_and_1_and_none_changes_nothing() -> None:
    case = case_of(ball((10, 12, 4), (5, 6, 2), 2))
    scaled = Preprocess(normalize="percentile").apply(case).image
    assert scaled.min() == 0
    assert scaled.max() == 1
    raw = Preprocess(dim=3, normalize="none").apply(case).image
    assert np.array_equal(raw[0], case.data.image)


def test_a_constant_image_cannot_be_normalised() -> None:
    case = MemoryCase(np.full((6, 6, 3), 7, np.float32), np.zeros((1, 1, 6, 6, 3), np.float32))
    with pytest.raises(UserError, match=r"sub-1, channel 0: the image is constant \(7\)"):
        Preprocess().apply(case)
    rounded = np.full((6, 6, 3), 0.1, np.float32)
    rounded[::2] = np.nextafter(np.float32(0.1), np.float32(1))  # what resampling makes of a constant
    for normalize in ("zscore", "percentile"):
        with pytest.raises(UserError, match=r"the image is constant \(0.1\)"):
            Preprocess(normalize=normalize).apply(MemoryCase(rounded, case.data.raters))


def test_an_image_of_almost_one_value_is_not_called_constant() -> None:
    image = np.full((20, 20, 3), 5, np.float32)
    image[3, 4, 1] = 9
    case = MemoryCase(image, np.zeros((1, 1, 20, 20, 3), np.float32))
    with pytest.raises(UserError, match=r"at least 99 % of the voxels within the crop are 5, so that percentiles cannot"):
        Preprocess(normalize="percentile").apply(case)
    assert Preprocess().apply(case).image.max() > 30


def test_percentiles_are_those_of_the_voxels_that_are_not_0_where_most_are() -> None:
    raters = np.zeros((1, 1, 20, 20, 5), np.float32)
    values = np.random.default_rng(0).normal(1000, 100, (20, 20, 5)).astype(np.float32)
    for share, is_sparse in ((0.7, False), (0.8, True), (0.996, True)):
        image = values.copy()
        image.flat[: int(share * image.size)] = 0
        scaled = Preprocess(dim=3, normalize="percentile").apply(MemoryCase(image, raters)).image[0, 0]
        low, high = np.percentile(image[image != 0] if is_sparse else image, (0.5, 99.5))
        assert np.allclose(scaled, ((image - low) / (high - low)).clip(0, 1), atol=1e-6)
    mask = (values > 1100).astype(np.float32)
    assert np.array_equal(Preprocess(dim=3, normalize="percentile").apply(MemoryCase(mask * 9, raters)).image[0, 0], mask)


def test_labelled_slices_are_kept_alone_and_go_back_to_their_place() -> None:
    label = ball((10, 12, 9), (5, 6, 3), 2)
    preprocess = Preprocess(slices="labelled")
    sample = preprocess.apply(case_of(label))
    assert sample.placement.slices == (1, 2, 3, 4, 5)
    assert np.array_equal(preprocess.restore(sample.raters[:, 0], sample.placement), label[None])
    with pytest.raises(UserError, match=r'keeps none.*"labelled\|all" keeps all.*exclude=\("sub-1",\)'):
        preprocess.apply(case_of(np.zeros_like(label)))


def test_a_healthy_control_has_a_way_on() -> None:
    label, empty = ball((10, 12, 9), (3, 6, 3), 2), np.zeros((10, 12, 9), np.float32)
    kept = Preprocess(slices="labelled|all")
    assert kept.apply(case_of(empty)).placement.slices == tuple(range(9))
    assert kept.apply(case_of(label)).placement.slices == (1, 2, 3, 4, 5)
    alone, named = (Preprocess(crop=(4, 4), center=center) for center in ("mask", "mask|image"))
    with pytest.raises(UserError, match=r"'mask', which is empty there; .*as in center=\"mask\|image\".*exclude=\(\"sub-1\",\)"):
        alone.apply(case_of(empty))
    assert named.mask_parts == ("mask",)
    middle = Preprocess(crop=(4, 4)).apply(case_of(empty)).placement
    assert named.apply(case_of(empty)).placement.axes == middle.axes
    assert named.apply(case_of(label)).placement.axes == alone.apply(case_of(label)).placement.axes != middle.axes


@pytest.mark.parametrize("center", ["", "mask|", "|image"])
def test_a_center_names_something(center: str) -> None:
    with pytest.raises(ValidationError, match="center"):
        Preprocess(crop=(4, 4), center=center)


SETTINGS: list[dict[str, Any]] = [
    {"dim": 2, "spacing_mm": (0.5, 0.5)},
    {"dim": 2, "spacing_mm": (0.9, 0.6), "crop": (30, 36), "center": "mask"},
    {"dim": 3, "spacing_mm": (0.6, 0.6, 1.0), "crop": (36, 36, 20), "center": "mask"},
    {"dim": 3, "spacing_mm": (0.5, 0.5, 0.5)},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_a_label_comes_back_on_its_original_grid(fields: dict[str, Any]) -> None:
    preprocess = Preprocess(**fields)
    label = ball((30, 34, 16), (13, 18, 8), 6)
    sample = preprocess.apply(case_of(label, (0.7, 0.7, 1.2)))
    back = preprocess.restore(sample.raters[:, 0], sample.placement)
    assert back.shape == (1, 30, 34, 16)
    assert back.min() >= 0
    assert back.max() <= 1
    assert 2 * ((back[0] >= 0.5) & (label > 0)).sum() / ((back[0] >= 0.5).sum() + label.sum()) > 0.97


@given(label=hnp.arrays(np.float32, (7, 6, 5), elements=unit), dim=st.sampled_from((2, 3)))
@settings(max_examples=20, deadline=None)
def test_a_label_comes_back_bit_exact_where_nothing_is_resampled(label: Float32, dim: int) -> None:
    preprocess = Preprocess(dim=dim, crop=(9, 8, 7)[:dim])  # type: ignore[arg-type]
    sample = preprocess.apply(case_of(label))
    assert np.array_equal(preprocess.restore(sample.raters[:, 0], sample.placement)[0], label)


def test_the_way_back_mixes_both_rules_axis_by_axis() -> None:
    """x: 1 mm -> .5 mm is coarser on the way back, y: 1 mm -> 2 mm finer, z: slices 0 and 2 of 3."""
    geometry = Geometry((4, 4, 3), np.eye(4))
    axes = (Axis.whole(4, 1.0, 0.5), Axis.whole(4, 1.0, 2.0), Axis.whole(3, 1.0))
    maps = np.zeros((2, 2, 8, 2), np.float32)
    maps[0, 0, 3] = 1  # one of the two halves of x = 1, all of y
    maps[1, 1, :, 1] = 3  # beyond 1: clipped
    back = Preprocess(spacing_mm=(0.5, 2.0)).restore(maps, Placement(geometry, axes, (0, 2)))
    assert back.dtype == np.float32
    assert back[0, :, :, 0].tolist() == [[0] * 4, [0.5] * 4, [0] * 4, [0] * 4]
    assert back[1, :, :, 2].tolist() == [[0, 0.75, 1, 1]] * 4
    assert not back[..., 1].any()
    assert not back[1, ..., 0].any()
    assert not back[0, ..., 2].any()


@pytest.mark.parametrize("spacing_mm", [(0.8, 0.9, 1.1), (1.5, 1.5, 1.5)])
def test_restoring_holds_float32_of_one_class_beside_the_result(spacing_mm: tuple[float, ...]) -> None:
    geometry = Geometry((60, 50, 40), np.eye(4))
    axes = tuple(map(Axis.whole, geometry.shape, (1.0, 1.0, 1.0), spacing_mm))
    maps = RNG.random((1, 6, *(axis.size for axis in axes)), dtype=np.float32)
    preprocess, placement = Preprocess(dim=3, spacing_mm=spacing_mm), Placement(geometry, axes, None)
    preprocess.restore(maps, placement)
    tracemalloc.start()
    back = preprocess.restore(maps, placement)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = max(maps[0, 0].nbytes, back[0].nbytes)
    assert peak < back.nbytes + 3 * one  # in float64, or of all classes at once, it would be more


def test_a_placement_survives_json() -> None:
    sample = Preprocess(crop=(8, 8), spacing_mm=(0.5, 0.5)).apply(case_of(ball((10, 12, 4), (5, 6, 2), 2)))
    again = Placement.from_dict(sample.placement.to_dict())
    assert again.axes == sample.placement.axes
    assert again.slices == sample.placement.slices
    assert again.geometry.difference(sample.placement.geometry) == ""


@pytest.mark.parametrize("fields", [{"dim": 3, "crop": (8, 8)}, {"spacing_mm": (1, 1, 1)}, {"crop": (0, 4)}], ids=str)
def test_numbers_that_do_not_fit_the_dimension_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs|greater"):
        Preprocess(**fields)
    with pytest.raises(ValueError, match="dim=2"):
        Preprocess(dim=3, slices="labelled")


def test_an_image_without_raters_can_be_prepared_for_prediction() -> None:
    case = MemoryCase(np.random.default_rng(0).random((6, 6, 3), np.float32), np.zeros((0, 0, 6, 6, 3), np.float32))
    sample = Preprocess(slices="labelled", spacing_mm=(0.5, 0.5)).apply(case)
    assert sample.image.shape == (3, 1, 12, 12)
    assert sample.raters.shape == (3, 0, 0, 12, 12)


def test_the_truth_of_a_phantom_is_resampled_like_its_raters() -> None:
    case = Phantom(subjects=1).cases(None)[0]
    sample: Sample = Preprocess(spacing_mm=(1, 1), crop=(24, 24), label_resampling="area").apply(case)
    truth = case.load().truth
    assert truth is not None
    assert sample.truth is not None
    assert sample.truth.sum(dtype=float) * sample.voxel_mm3 == pytest.approx(truth.sum(dtype=float) * 0.5 * 0.5 * 2.5)


@pytest.mark.data
def test_real_soft_labels_pass_bit_exact(real_data: Path) -> None:
    data = Bids("sct_tiny", image="T2star", labels={"GM": "label-GM_probseg", "WM": "label-WM_probseg"})
    case = next(case for case in data.scan(real_data) if not case.missing())
    sample = Preprocess().apply(case)
    assert ((sample.raters > 0) & (sample.raters < 1)).sum() > 300
    assert np.array_equal(np.moveaxis(sample.raters, 0, -1), case.load().raters)
