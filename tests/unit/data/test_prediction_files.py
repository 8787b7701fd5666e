"""Predictions of other programs: each file goes to its case and class, and what does not fit is refused in a line that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from softseg_dist.data.cases import LabelledCase, MaskFile, named_values
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.phantom import Phantom
from softseg_dist.data.prediction_files import Found, find_predictions, label_values, read_maps
from softseg_dist.errors import UserError

AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])  # LAS: canonical order is another one
SHAPE = (5, 4, 3)
GRID = Geometry(SHAPE, AFFINE)
CLASSES = ("anterior", "posterior part")
VALUES = {"anterior": (1,), "posterior part": (2,)}


def case(name: str = "sub-01", image: str = "sub-01_T1w.nii.gz") -> LabelledCase:
    return LabelledCase(name, [Path(image)], name, "", {"rater": {"anterior": MaskFile(Path("mask.nii"))}})


CASES = (case(), case("sub-02", "sub-02_T1w_0000.nii.gz"))


def save(path: Path, data: Any, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def found(folder: Path, *names: str, pattern: str = "", classes: tuple[str, ...] = CLASSES) -> Found:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return find_predictions(folder, CASES, classes, pattern)


@pytest.mark.parametrize(
    "name", ["sub-01.nii.gz", "sub-01.nii", "sub-01.npz", "sub-01_T1w.nii.gz", "sub-01_T1w.npz"]
)  # as nnU-Net and others name them
def test_one_file_for_all_classes_is_named_as_the_case_or_its_image(tmp_path: Path, name: str) -> None:
    assert found(tmp_path, name).files == {"sub-01": (tmp_path / name,)}


def test_the_number_of_a_channel_in_the_name_of_the_image_may_be_left_out(tmp_path: Path) -> None:
    assert found(tmp_path, "sub-02_T1w.nii.gz").files == {"sub-02": (tmp_path / "sub-02_T1w.nii.gz",)}


def test_a_name_that_the_images_of_several_cases_have_says_nothing_and_the_name_of_a_case_wins(tmp_path: Path) -> None:
    cases = [case("p1", "p1/flair.nii.gz"), case("p2", "p2/flair.nii.gz"), case("p3", "p3/p1.nii.gz")]
    for name in ("flair.nii.gz", "p1.nii.gz", "p2.nii.gz", "p3.nii.gz"):
        (tmp_path / name).touch()
    result = find_predictions(tmp_path, cases, CLASSES)
    assert result.files == {name: (tmp_path / f"{name}.nii.gz",) for name in ("p1", "p2", "p3")}
    assert result.surplus == (tmp_path / "flair.nii.gz",)


def test_files_per_class_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    names = ["sub-01_label-posterior-part_softseg.nii.gz", "sub-01_label-anterior_softseg.nii.gz"]
    assert found(tmp_path, *names).files == {"sub-01": (tmp_path / names[1], tmp_path / names[0])}


def test_soft_maps_come_before_the_masks_that_were_cut_from_them(tmp_path: Path) -> None:
    soft = [f"sub-01_label-{label}_softseg.nii.gz" for label in ("anterior", "posterior-part")]
    others = ["sub-01_label-anterior_mask.nii.gz", "sub-01_label-anterior_entropy.nii.gz", "sub-02.npz", "sub-02.nii.gz"]
    assert found(tmp_path, *soft, *others) == Found(
        {"sub-01": tuple(tmp_path / name for name in soft), "sub-02": (tmp_path / "sub-02.npz",)}, (), ()
    )


@pytest.mark.parametrize("pattern", ["{case}/{class}.nii.gz", "seg_{class}_{case}.nii.gz", "{class}{case}.nii"])
def test_a_pattern_says_where_case_and_class_stand(tmp_path: Path, pattern: str) -> None:
    names = [pattern.format(**{"case": "sub-01", "class": label}) for label in CLASSES]
    assert found(tmp_path, *names, pattern=pattern).files == {"sub-01": tuple(tmp_path / name for name in names)}


def test_files_of_no_case_are_named_and_other_files_are_not(tmp_path: Path) -> None:
    assert found(tmp_path, "sub-03.nii.gz", "plans.json", ".sub-01.nii.gz").surplus == (tmp_path / "sub-03.nii.gz",)


@pytest.mark.parametrize(
    "names",
    [("sub-01.nii", "sub-01.nii.gz"), ("sub-01.nii.gz", "sub-01_T1w.nii.gz"), ("sub-01.npz", "sub-01_label-anterior_mask.nii")],
)
def test_two_files_for_one_case_are_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    result = found(tmp_path, *names)
    assert not result.files
    (problem,) = result.problems
    assert problem.startswith("case sub-01: one file, or one per class, got ")
    assert all(str(tmp_path / name) in problem for name in names)


def test_a_class_that_one_case_lacks_is_named_with_the_case(tmp_path: Path) -> None:
    names = ["sub-01_label-posterior-part_mask.nii", "sub-01_label-anterior_mask.nii", "sub-02_label-anterior_mask.nii"]
    assert found(tmp_path, *names).problems == (f"case sub-02 has no file of class posterior part in {tmp_path}",)


def test_a_class_in_no_file_is_named_once(tmp_path: Path) -> None:
    names = [f"{name}_label-anterior_mask.nii" for name in ("sub-01", "sub-02")]
    result = found(tmp_path, *names)
    assert result.problems == (f"class posterior part is in no file of {tmp_path}; there are anterior",)
    assert not result.files


def test_a_folder_that_is_not_there_and_a_pattern_without_a_case_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of predictions"):
        find_predictions(tmp_path / "none", CASES, CLASSES)
    with pytest.raises(UserError, match=r'a pattern has \{case\}.*got "\{class\}.nii"'):
        find_predictions(tmp_path, CASES, CLASSES, "{class}.nii")


def test_values_are_those_of_the_data_set_where_it_names_them_all() -> None:
    def values(*parts: str) -> list[tuple[int, ...]]:
        named = (named_values(part) for part in parts)
        masks = dict(zip("ab", (MaskFile(Path(name), of_one) for name, of_one in named), strict=True))
        cases = [LabelledCase(name, [Path("x.nii")], name, "", {"rater": masks}) for name in ("one", "two")]
        found = label_values(("a", "b"), cases)
        assert list(found) == ["a", "b"]
        return list(found.values())

    assert values("dseg:5", "dseg:3") == [(5,), (3,)]
    assert values("dseg:1+2", "dseg:2") == [(1, 2), (2,)]
    assert values("a_mask", "b_mask") == values("dseg:5", "b_mask") == values("a_dseg:4", "b_dseg:4") == [(1,), (2,)]
    assert label_values(("a", "b"), Phantom(subjects=3).cases(None)) == {"a": (1,), "b": (2,)}


RAMP = np.linspace(0, 1, 60, dtype=np.float32).reshape(SHAPE)  # along the stored axes


def test_a_soft_map_of_one_class_comes_back_in_canonical_order(tmp_path: Path) -> None:
    maps = read_maps([save(tmp_path / "a.nii.gz", RAMP)], GRID, {"GM": (1,)})
    assert np.array_equal(maps[0], RAMP[::-1])


def test_another_axis_order_of_the_same_voxels_is_accepted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(RAMP, AFFINE).as_reoriented(np.array([[1, 1], [2, -1], [0, -1]]))
    nib.save(image, tmp_path / "a.nii.gz")
    assert image.shape != SHAPE
    assert np.array_equal(read_maps([tmp_path / "a.nii.gz"], GRID, {"GM": (1,)})[0], RAMP[::-1])


def test_an_integer_map_is_read_by_value(tmp_path: Path) -> None:
    whole = np.arange(60).reshape(SHAPE) % 3
    maps = read_maps([save(tmp_path / "a.nii", whole)], GRID, {"a": (2,), "b": (1,)})
    assert np.array_equal(maps, np.stack([whole == 2, whole == 1])[:, ::-1].astype(np.float32))
    assert np.array_equal(read_maps([save(tmp_path / "b.nii", 4 * (whole == 1))], GRID, {"a": (4,)})[0], (whole == 1)[::-1])


@pytest.mark.parametrize("key", ["probabilities", "softmax"])
def test_probabilities_of_nnunet_have_the_axes_of_simpleitk_and_the_background_first(tmp_path: Path, key: str) -> None:
    soft = np.stack([RAMP, 1 - RAMP]) / 2
    np.savez(tmp_path / "a.npz", **{key: np.concatenate([1 - soft.sum(axis=0)[None], soft]).transpose(0, 3, 2, 1)})
    assert np.array_equal(read_maps([tmp_path / "a.npz"], GRID, VALUES), soft[:, ::-1])
    np.savez(tmp_path / "b.npz", **{key: soft.transpose(0, 3, 2, 1)})  # of regions: no background
    assert np.array_equal(read_maps([tmp_path / "b.npz"], GRID, VALUES), soft[:, ::-1])
    turned = dict(reversed(VALUES.items()))  # channels come in the order of the values, whatever order the classes have
    assert np.array_equal(read_maps([tmp_path / "b.npz"], GRID, turned), soft[::-1, ::-1])


def test_regions_of_an_integer_map_overlap_and_their_probabilities_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    whole, regions = np.arange(60).reshape(SHAPE) % 3, {"inner": (2,), "all": (1, 2)}
    maps = read_maps([save(tmp_path / "a.nii", whole)], GRID, regions)
    assert np.array_equal(maps, np.stack([whole == 2, whole > 0])[:, ::-1].astype(np.float32))
    with pytest.raises(UserError, match=r"the integers 0, 2 \(inner\), 1\+2 \(all\), got 4 in one of 60 other voxels"):
        read_maps([save(tmp_path / "b.nii", whole * 0 + 4)], GRID, regions)
    soft = np.stack([RAMP / 2, RAMP])
    np.savez(tmp_path / "a.npz", probabilities=soft.transpose(0, 3, 2, 1))
    assert np.array_equal(read_maps([tmp_path / "a.npz"], GRID, regions), soft[:, ::-1])


def bad(tmp_path: Path, kind: str) -> list[Path]:
    path = tmp_path / "a.nii.gz"
    if kind.startswith("npz"):
        path = tmp_path / "a.npz"
        arrays = {"npz key": {"map": RAMP}, "npz grid": {"softmax": np.zeros((3, *SHAPE))}}
        arrays["npz text"] = {"softmax": np.full((3, *SHAPE), "many")}
        nan = {"softmax": np.full((3, *SHAPE[::-1]), np.nan)}
        np.savez(path, **arrays.get(kind, nan))
        if kind == "npz cut":
            path.write_bytes(path.read_bytes()[:200])
        if kind == "npz npy":
            with path.open("wb") as file:
                np.save(file, RAMP)
        return [path]
    voxel = RAMP.copy()
    voxel[1, 2, 1] = {"nan": np.nan, "above": 1.5, "below": -0.25}.get(kind, 0)
    if kind in ("above", "below"):  # a file per class
        return [save(path, voxel), save(tmp_path / "b.nii.gz", RAMP)]
    if kind == "unknown value":
        voxel = np.arange(60).reshape(SHAPE) % 4
    return [save(path, voxel[:4] if kind == "shape" else voxel, np.diag([-1, 1, 3.0, 1]) if kind == "spacing" else AFFINE)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "finite numbers, got 1 NaN"),
        ("above", r"must lie in \[0, 1\], got 1.5"),
        ("below", r"must lie in \[0, 1\], got -0.25"),
        ("fractions", r"integers 0, 1 \(anterior\), 2 \(posterior part\), got 0.8.* in one of 57 other voxels"),
        ("unknown value", "got 3 in one of 15 other voxels"),
        ("shape", "on the grid of its image: shape 4 x 4 x 3 against 5 x 4 x 3"),
        ("spacing", "on the grid of its image: affines put one corner 2 mm apart"),
        ("npz key", "probabilities or softmax, got map"),
        ("npz grid", r"\[classes \+ 1, Z, Y, X\] .* 3 x 3 x 4 x 5, got 3 x 5 x 4 x 3"),
        ("npz nan", r"must lie in \[0, 1\], got nan"),
        ("npz cut", "cut off"),
        ("npz text", "cannot read .*a.npz, or it is cut off: could not convert string to float"),
        ("npz npy", "cannot read"),
    ],
)
def test_what_is_no_prediction_is_refused_by_rule_value_and_file(tmp_path: Path, kind: str, message: str) -> None:
    files = bad(tmp_path, kind)
    with pytest.raises(UserError, match=message) as refused:
        read_maps(files, GRID, VALUES)
    assert str(files[0]) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rounding_errors_are_clipped(tmp_path: Path) -> None:
    maps = read_maps([save(tmp_path / "a.nii", RAMP + np.float32(5e-7))], GRID, {"GM": (1,)})
    assert maps.max() == 1
