"""One suite over all data sets: what preparation relies on, whatever the layout of the files."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from public_classes import assert_covered

from softseg_dist.data.case_table import Table
from softseg_dist.data.cases import Case, DataSet, LabelledCase, MaskFile, Pool
from softseg_dist.data.challenges import MSSEG, SCGM, BraTS, Decathlon, NnUNet
from softseg_dist.data.files import Files
from softseg_dist.data.layouts import Bids, Each
from softseg_dist.data.phantom import Phantom

MASKS = "derivatives/d/{subject}/anat/{subject}"
BIDS = {"label-GM": "label-GM_mask", "two raters": "label-GM_desc-{rater}_mask"}
DATA_SETS: list[DataSet] = [
    *(Bids("set", image="T2w", labels={"GM": part}, person="sub-(.)") for part in BIDS.values()),
    Bids("set", image=("T1w", "T2w"), labels={"GM": "label-GM_mask", "edge": "dseg:2"}),
    Bids("set", image=Each("T1w", "T2w"), labels={"GM": "label-GM_mask"}),
    Files("set", image="{subject}/anat/{subject}_{contrast}.nii.gz", labels={"GM": f"{MASKS}_label-GM_mask.nii.gz"}),
    Files(
        "set",
        image="{subject}/anat/{subject}_{channel}.nii.gz",
        channels=("T1w", "T2w"),
        labels={"GM": f"{MASKS}_label-GM_desc-{{rater}}_mask.nii.gz", "edge": f"{MASKS}_dseg.nii.gz:1+2"},
        person="sub-(.)",
    ),
    NnUNet("nnunet", labels=("left", "right")),
    Decathlon("decathlon", labels=("right",)),
    SCGM("scgm"),
    MSSEG("msseg", image=("FLAIR", "T1")),
    BraTS("brats", image=("t1",)),
    Table("tables/cases.csv", labels=("GM", "edge")),
    Pool(Bids("set", image="T1w", labels={"right": "dseg:1", "left": "dseg:2"}), NnUNet("nnunet", labels=("left", "right"))),
    Phantom(subjects=4, raters=2, size=(16, 16), num_slices=2),
    Phantom(subjects=3, shape="lesions", dim=3, raters=2, size=(16, 16, 16)),
]
every_data_set = pytest.mark.parametrize("data", DATA_SETS, ids=str)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the data sets above can read, three cases each; for `Bids` three sessions of two people, two contrasts, two raters."""
    folder, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    for subject in ("sub-a1", "sub-a2", "sub-b1"):
        masks = {f"label-GM{rater}_mask": rng.integers(0, 2, (6, 5, 4)) for rater in ("", "_desc-x", "_desc-y")}
        labels = masks | {"dseg": rng.integers(0, 3, (6, 5, 4))}
        images = {contrast: rng.integers(0, 99, (6, 5, 4)) for contrast in ("T1w", "T2w")}
        files = {f"set/{subject}/anat/{subject}_{name}": voxels for name, voxels in images.items()}
        files |= {f"set/derivatives/d/{subject}/anat/{subject}_{name}": voxels for name, voxels in labels.items()}
        for name, voxels in files.items():
            write(folder / f"{name}.nii.gz", voxels)
    described = {"labels": {"background": 0, "left": 1, "right": [1, 2]}, "channel_names": {"0": "T1w"}}
    for name in ("nnunet", "decathlon"):
        (folder / name / "imagesTr").mkdir(parents=True)
        training = [{"image": f"./imagesTr/c{number}.nii.gz"} for number in range(3)]
        (folder / name / "dataset.json").write_text(json.dumps(described | {"training": training}))
    (folder / "tables").mkdir()
    rows = [f"{n},c{n}.nii.gz,{','.join(f'c{n}_{rater}.nii.gz:1' for rater in 'xy')},c{n}_x.nii.gz:1+2" for n in range(3)]
    (folder / "tables/cases.csv").write_text("\n".join(["case,image,GM:x,GM:y,edge", *rows]))
    for n in range(3):
        patient = f"msseg/Training/Center_0{n}/Patient_01"
        images = [f"nnunet/imagesTr/c{n}_0000", f"decathlon/imagesTr/c{n}", f"scgm/site{n}-sc01-image", f"tables/c{n}"]
        images += [f"{patient}/Preprocessed_Data/{name}_preprocessed" for name in ("FLAIR", "T1")] + [f"brats/b{n}/b{n}_t1"]
        masks = [f"nnunet/labelsTr/c{n}", f"decathlon/labelsTr/c{n}", f"brats/b{n}/b{n}_seg", *(f"tables/c{n}_{r}" for r in "xy")]
        masks += [f"scgm/site{n}-sc01-mask-r{rater}" for rater in range(1, 5)]
        binary = [f"{patient}/Masks/ManualSegmentation_{rater}" for rater in range(1, 8)]
        for names, most in ((images, 99), (masks, 3), (binary, 2)):
            for name in names:
                write(folder / f"{name}.nii.gz", rng.integers(0, most, (6, 5, 4)))
    return folder


def write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels.astype(np.uint8), np.diag([0.5, 0.5, 2, 1])), path)


def test_the_suite_runs_over_every_public_data_set() -> None:
    assert_covered(DataSet, DATA_SETS)


@every_data_set
def test_data_set_comes_back_from_json(data: DataSet) -> None:
    again = DataSet.model_validate_json(data.model_dump_json())
    assert again == data
    assert again.classes == data.classes


@every_data_set
def test_cases_are_sorted_by_a_name_that_is_unique(data: DataSet, root: Path) -> None:
    cases = data.cases(root)
    names = [case.name for case in cases]
    assert names == sorted(set(names))
    assert len(names) >= 3
    assert all(case.subject for case in cases)


@every_data_set
def test_voxels_have_the_shapes_and_ranges_that_preparation_relies_on(data: DataSet, root: Path) -> None:
    for case in data.cases(root):
        voxels = case.load()
        shape = voxels.image.shape[1:]
        assert voxels.raters.shape == (len(case.rater_names), len(data.classes), *shape)
        assert voxels.image.dtype == voxels.raters.dtype == np.float32
        assert np.isfinite(voxels.image).all()
        labels = [voxels.raters] if voxels.truth is None else [voxels.raters, voxels.truth]
        assert all(0 <= label.min() <= label.max() <= 1 for label in labels)
        assert voxels.raters.any()
        assert abs(np.linalg.det(voxels.affine[:3, :3])) > 0


@every_data_set
def test_raters_that_are_known_beforehand_are_those_of_the_cases(data: DataSet, root: Path) -> None:
    found = {name for case in data.cases(root) for name in case.rater_names}
    assert data.rater_names is None or set(data.rater_names) == found


@every_data_set
def test_the_same_cases_are_found_and_read_again(data: DataSet, root: Path) -> None:
    for case, again in zip(data.cases(root), data.scan(root), strict=True):
        assert (case.name, case.subject, case.site) == (again.name, again.subject, again.site)
        assert case.sources() == again.sources() != ()
        one, other = case.load(), again.load()
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.raters, other.raters)


@every_data_set
def test_cases_differ_in_their_sources_and_voxels(data: DataSet, root: Path) -> None:
    cases = data.cases(root)
    assert len({case.sources() for case in cases}) == len(cases)
    assert len({case.load().image.tobytes() for case in cases}) == len(cases)


class Reversed(Phantom):
    """A data set that finds its cases in another order."""

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        return super().scan(data_root)[::-1]


def test_cases_are_sorted_in_whatever_order_a_data_set_finds_them() -> None:
    assert [case.name for case in Reversed(subjects=3).cases(None)] == [case.name for case in Phantom(subjects=3).cases(None)]


def test_a_case_whose_subject_is_an_empty_text_says_so() -> None:
    nobody = LabelledCase("-x", [Path("-x.nii.gz")], subject="", site="", labels={}, problems=["it has no mask"])
    assert nobody.missing() == ("it has no mask", "case -x has no subject: its subject is an empty text")


def test_raters_who_drew_other_classes_or_are_called_as_a_reference_is_are_named() -> None:
    mask = MaskFile(Path("mask.nii"))
    labels = {"anna": {"GM": mask, "WM": mask}, "ben": {"WM": mask}, "mean": {"GM": mask, "WM": mask}}
    case = LabelledCase("x", [Path("x.nii.gz")], subject="x", site="", labels=labels)
    assert case.missing() == ("case x: ben has masks of WM, not GM, WM", "case x: a rater cannot be called mean, as a reference is")
