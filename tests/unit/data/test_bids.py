"""BIDS-like folders: masks are found whatever their order of words; what does not fit is refused by name."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from softseg_dist.data.cases import DataSet, ImageCase, MaskFile, VolumeCase
from softseg_dist.data.layouts import Bids, Each
from softseg_dist.data.volume import read_volume
from softseg_dist.errors import UserError

SHAPE = (6, 5, 4)
MASK = np.zeros(SHAPE, np.uint8)
MASK[2:4, 2:4, 1:3] = 1
IMAGE = np.arange(120, dtype=np.int16).reshape(SHAPE)


def put(root: Path, name: str, data: np.ndarray = MASK, affine: np.ndarray | None = None) -> Path:
    path = root / "set" / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def simple(root: Path, mask: str = "sub-01_T2w_label-GM_mask", **fields: Any) -> Bids:
    put(root, "sub-01/anat/sub-01_T2w", IMAGE)
    put(root, f"derivatives/labels/sub-01/anat/{mask}")
    return Bids(**({"folder": "set", "image": "T2w", "labels": {"GM": "label-GM_mask"}} | fields))


@pytest.mark.parametrize(
    "mask", ["sub-01_T2w_label-GM_mask", "sub-01_label-GM_T2w_mask", "label-GM_sub-01_T2w_mask", "sub-01_label-GM_mask"]
)
def test_a_mask_is_found_by_the_words_of_its_name_in_any_order(tmp_path: Path, mask: str) -> None:
    (case,) = simple(tmp_path, mask).cases(tmp_path)
    data = case.load()
    assert (case.name, case.subject, case.site, case.rater_names) == ("sub-01", "sub-01", "", ("rater",))
    assert np.array_equal(data.image[0], IMAGE)
    assert np.array_equal(data.raters[0, 0], MASK)
    assert data.truth is None


@pytest.mark.parametrize("mask", ["sub-01_T2w_label-GM_desc-x_mask", "sub-01_T1w_label-GM_mask", "sub-02_T2w_label-GM_mask"])
def test_a_mask_with_other_words_does_not_belong(tmp_path: Path, mask: str) -> None:
    with pytest.raises(UserError, match="no mask"):
        simple(tmp_path, mask).cases(tmp_path)


def test_the_name_with_the_contrast_wins_over_the_one_without(tmp_path: Path) -> None:
    data = simple(tmp_path)
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_label-GM_mask", np.zeros_like(MASK))
    assert data.cases(tmp_path)[0].load().raters.any()


def test_two_masks_that_fit_equally_are_refused_and_derivatives_tells_which(tmp_path: Path) -> None:
    data = simple(tmp_path)
    put(tmp_path, "derivatives/other/sub-01/anat/sub-01_T2w_label-GM_mask")
    with pytest.raises(UserError, match=r"sub-01: 2 masks fit 'label-GM_mask'.*derivatives"):
        data.cases(tmp_path)
    assert data.replace(derivatives="other").cases(tmp_path)[0].load().raters.any()


def test_sessions_runs_and_people(tmp_path: Path) -> None:
    for session in ("a1", "a2", "b1"):
        for run in ("1", "2"):
            folder, stem = f"sub-{session}/ses-x/anat", f"sub-{session}_ses-x_run-{run}"
            put(tmp_path, f"{folder}/{stem}_T2w", IMAGE)
            put(tmp_path, f"derivatives/d/{folder}/{stem}_T2w_seg")
    cases = Bids("set", image="T2w", labels={"c": "seg"}, person=r"sub-([a-z]+)\d").cases(tmp_path)
    assert [case.name for case in cases][:2] == ["sub-a1_ses-x_run-1", "sub-a1_ses-x_run-2"]
    assert [case.subject for case in cases] == ["a"] * 4 + ["b"] * 2
    with pytest.raises(UserError, match=r"has 'sub-a1', which person='nobody' does not match"):
        Bids("set", image="T2w", labels={"c": "seg"}, person="nobody").cases(tmp_path)


def test_cases_and_subjects_are_left_out_by_name_and_only_those_that_there_are(tmp_path: Path) -> None:
    for stem in ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1", "sub-03_ses-1"):
        put(tmp_path, f"{stem.split('_')[0]}/anat/{stem}_T2w", IMAGE)
    for stem in ("sub-01_ses-1", "sub-02_ses-1"):
        put(tmp_path, f"derivatives/d/{stem.split('_')[0]}/anat/{stem}_T2w_seg")
    data = Bids("set", image="T2w", labels={"c": "seg"})
    kept = data.replace(exclude=("sub-01_ses-2", "sub-03")).cases(tmp_path)  # what is incomplete may be left out, too
    assert [case.name for case in kept] == ["sub-01_ses-1", "sub-02_ses-1"]
    assert [case.name for case in data.replace(exclude=("sub-01", "sub-03")).cases(tmp_path)] == ["sub-02_ses-1"]
    with pytest.raises(UserError, match=r"exclude names sub-04, but the cases are sub-01_ses-1"):
        data.replace(exclude=("sub-01", "sub-04")).cases(tmp_path)


def test_raters_are_found_by_name_and_may_be_absent_from_a_case(tmp_path: Path) -> None:
    for subject, raters in (("01", "ab"), ("02", "b")):
        put(tmp_path, f"sub-{subject}/anat/sub-{subject}_T2w", IMAGE)
        for rater in raters:
            put(
                tmp_path,
                f"derivatives/labels/sub-{subject}/anat/sub-{subject}_T2w_label-GM_desc-{rater}_mask",
                MASK * (rater == "b"),
            )
    data = Bids("set", image="T2w", labels={"GM": "label-GM_desc-{rater}_mask"})
    assert data.rater_names is None
    one, two = data.cases(tmp_path)
    assert (one.rater_names, two.rater_names) == (("a", "b"), ("b",))
    assert one.load().raters.any(axis=(1, 2, 3, 4)).tolist() == [False, True]
    assert np.array_equal(one.mask("label-GM_desc-b_mask"), MASK)


def test_a_rater_may_be_part_of_a_word(tmp_path: Path) -> None:
    simple(tmp_path, "sub-01_T2w_lesion-manual-rater3")
    data = Bids("set", image="T2w", labels={"lesion": "_lesion-manual-{rater}"})
    assert data.cases(tmp_path)[0].rater_names == ("rater3",)


def test_a_rater_without_all_classes_is_refused(tmp_path: Path) -> None:
    simple(tmp_path, "sub-01_T2w_label-GM_desc-a_mask")
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_label-WM_desc-a_mask")
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_desc-b_mask")
    parts = {"GM": "label-GM_desc-{rater}_mask", "WM": "label-WM_desc-{rater}_mask"}
    with pytest.raises(UserError, match="sub-01 has no mask of WM by rater b"):
        Bids("set", image="T2w", labels=parts).cases(tmp_path)


def test_a_class_without_raters_counts_for_each_of_those_of_another(tmp_path: Path) -> None:
    data = simple(tmp_path, "sub-01_T2w_label-GM_desc-a_mask", labels={"cord": "dseg:1", "GM": "label-GM_desc-{rater}_mask"})
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_desc-b_mask", np.zeros_like(MASK))
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg")
    (case,) = data.cases(tmp_path)
    assert (data.rater_names, case.rater_names) == (None, ("a", "b"))
    assert case.load().raters.any(axis=(2, 3, 4)).tolist() == [[True, True], [True, False]]


def test_values_of_an_integer_map_become_classes(tmp_path: Path) -> None:
    data = simple(tmp_path, "sub-01_T2w_dseg", labels={"one": "dseg:1", "two": "dseg:2", "nine": "dseg:9"})
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg", MASK * 2)
    raters = data.cases(tmp_path)[0].load().raters
    assert [int(label.sum()) for label in raters[0]] == [0, int(MASK.sum()), 0]
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg", MASK * np.float32(0.5))
    with pytest.raises(UserError, match=f"value 1 needs a map of integers, got {int(MASK.sum())} other voxels, such as 0.5, in"):
        data.cases(tmp_path)[0].load()


def scaled(path: Path, values: np.ndarray, dtype: str) -> Path:
    """The file with these values stored as integers and a scale, as nibabel does for a header of integers."""
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_data_dtype(dtype)
    nib.save(image, path)
    assert nib.load(path).dataobj.slope != 1
    return path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int8"])
def test_a_map_of_integers_that_is_stored_with_a_scale_is_read_within_rounding(tmp_path: Path, dtype: str) -> None:
    data = simple(tmp_path, "sub-01_T2w_dseg", labels={"one": "dseg:1", "seven": "dseg:7"})
    values = MASK * 7.0
    values[0] = 1
    path = scaled(tmp_path / "set/derivatives/labels/sub-01/anat/sub-01_T2w_dseg.nii.gz", values, dtype)
    assert (nib.load(path).get_fdata(dtype=np.float32) != values).any()
    raters = data.cases(tmp_path)[0].load().raters[0]
    assert np.array_equal(raters, np.stack([values == 1, values == 7]))


def test_what_a_scale_makes_of_0_and_1_is_no_label_and_a_label(tmp_path: Path) -> None:
    data = simple(tmp_path)
    stored = np.where(MASK, 32767, -32768).astype(np.int16)
    stored[0, 0, 0] = -8519
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1.5259020e-05, 0.5000077)
    path = tmp_path / "set/derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_mask.nii.gz"
    nib.save(image, path)
    assert 0 < abs(nib.load(path).get_fdata()[5, 4, 3]) < 1e-6
    label = data.cases(tmp_path)[0].load().raters[0, 0]
    assert label[0, 0, 0] == pytest.approx(0.37, abs=1e-4)
    label[0, 0, 0] = 0
    assert np.array_equal(label, MASK)


def test_a_mask_on_the_same_voxels_in_another_axis_order_is_turned(tmp_path: Path) -> None:
    affine = np.diag([1.0, 2, 3, 1])
    image = put(tmp_path, "sub-01/anat/sub-01_T2w", IMAGE, affine)
    name = "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_mask"
    odd = (IMAGE % 7 == 0).astype(np.uint8)
    stored = nib.Nifti1Image(odd, affine)
    data = Bids("set", image="T2w", labels={"GM": "label-GM_mask"})
    for code in ("LPI", "PIR", "SAL"):
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(code))
        turned = stored.as_reoriented(turn)
        put(tmp_path, name, np.asarray(turned.dataobj), turned.affine)
        (case,) = data.cases(tmp_path)
        assert np.array_equal(case.load().raters[0, 0], odd)
        assert np.array_equal(case.mask("label-GM_mask"), odd)
        ImageCase("x", [image], center_mask=MaskFile(tmp_path / f"set/{name}.nii.gz")).check_headers()
    put(tmp_path, name, np.ascontiguousarray(odd.transpose(1, 0, 2)), affine)  # the same axes: another grid
    with pytest.raises(UserError, match=r"on another grid than .*: shape 5 x 6 x 4 against 6 x 5 x 4"):
        data.cases(tmp_path)[0].load()


def test_several_values_of_an_integer_map_become_one_class(tmp_path: Path) -> None:
    data = simple(tmp_path, "sub-01_T2w_dseg", labels={"inner": "dseg:2", "whole": "dseg:1+2"})
    layers = MASK.copy()
    layers[2] *= 2
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg", layers)
    (case,) = data.cases(tmp_path)
    assert np.array_equal(case.load().raters[0], [layers == 2, layers > 0])
    assert np.array_equal(case.mask("dseg:1+2"), layers > 0)
    assert [line.split()[0] for line in case.sources()][1:] == ["sub-01_T2w_dseg.nii.gz:2", "sub-01_T2w_dseg.nii.gz:1+2"]
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg", layers * np.float32(0.5))
    with pytest.raises(UserError, match=r"value 1\+2 needs a map of integers, got 4 other voxels, such as 0.5, in .*dseg.nii.gz"):
        data.replace(labels={"whole": "dseg:1+2"}).cases(tmp_path)[0].load()


def test_voxels_that_nobody_labelled_are_those_of_a_mask_or_of_a_value(tmp_path: Path) -> None:
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_desc-unknown_mask", (IMAGE > 90).astype(np.uint8))
    of_mask = simple(tmp_path, ignore="desc-unknown_mask")
    expected = np.where(IMAGE > 90, np.nan, MASK)
    (case,) = of_mask.cases(tmp_path)
    assert np.array_equal(case.load().raters[0, 0], expected, equal_nan=True)
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_dseg", np.where(IMAGE > 90, 255, MASK))
    (other,) = of_mask.replace(labels={"GM": "dseg:1"}, ignore="dseg:255").cases(tmp_path)
    assert np.array_equal(other.load().raters[0, 0], expected, equal_nan=True)
    (plain,) = of_mask.replace(ignore=None).cases(tmp_path)
    assert len({case.sources(), other.sources(), plain.sources()}) == 3
    with pytest.raises(UserError, match="case sub-01 has no mask 'desc-x_mask'"):
        of_mask.replace(ignore="desc-x_mask").cases(tmp_path)


@pytest.mark.parametrize("ignore", ["", "desc-{rater}_mask"])
def test_what_is_ignored_is_one_mask_for_all_raters(tmp_path: Path, ignore: str) -> None:
    with pytest.raises(ValidationError, match="ignore must be the pattern of one mask"):
        simple(tmp_path, ignore=ignore)


def test_several_contrasts_become_channels(tmp_path: Path) -> None:
    data = simple(tmp_path, image=("T2w", "T1w"))
    with pytest.raises(UserError, match=r"sub-01 needs one image sub-01/anat/sub-01_T1w.nii.gz"):
        data.cases(tmp_path)
    put(tmp_path, "sub-01/anat/sub-01_T1w", IMAGE * 2)
    image = data.cases(tmp_path)[0].load().image
    assert np.array_equal(image[1], image[0] * 2)


def test_sites_come_from_participants_whatever_the_case_of_the_column(tmp_path: Path) -> None:
    data = simple(tmp_path)
    table = tmp_path / "set" / "participants.tsv"
    table.write_text("\ufeffparticipant_id\tage\tSITE\nsub-01\t30\tUCL\n", encoding="utf-8")
    assert data.cases(tmp_path)[0].site == "UCL"
    table.write_text("participant_id\tsite\nsub-01\tn/a\nsub-02\n")
    assert data.cases(tmp_path)[0].site == ""
    assert data.replace(site="centre").cases(tmp_path)[0].site == ""


def test_sources_are_the_files_and_follow_their_content(tmp_path: Path) -> None:
    data = simple(tmp_path)
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_seg")
    (case,) = data.cases(tmp_path)
    before = case.sources(("seg",))
    assert len(before) == 3
    assert len(case.sources()) == 2
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_seg", MASK * 0)
    assert [a == b for a, b in zip(before, case.sources(("seg",)), strict=True)] == [True, True, False]


# --- bad input: one line with rule, value and file ---


def message(data: DataSet, root: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        [case.load() for case in data.cases(root)]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in message(simple(tmp_path, folder="none"), tmp_path)
    assert "--data-root" in message(simple(tmp_path), None)


def test_an_empty_folder_and_an_unknown_contrast(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "there are no images" in message(simple(tmp_path, folder="empty"), tmp_path)
    assert "there are T2w" in message(simple(tmp_path, image="T1w"), tmp_path)


def test_an_unknown_part_lists_those_that_exist(tmp_path: Path) -> None:
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_seg-manual")
    text = message(simple(tmp_path, labels={"GM": "gmseg"}), tmp_path)
    assert "class GM" in text
    assert "'gmseg'" in text
    assert "there are label-GM_mask, seg-manual" in text


def test_a_case_without_a_mask_is_named_with_the_file_looked_for(tmp_path: Path) -> None:
    data = simple(tmp_path)
    put(tmp_path, "sub-02/anat/sub-02_T2w", IMAGE)
    text = message(data, tmp_path)
    assert "case sub-02" in text
    assert "sub-02/anat/sub-02_T2w_label-GM_mask.nii.gz" in text
    assert [len(case.missing()) for case in data.scan(tmp_path)] == [0, 1]


# --- nobody vanishes: everyone is a case, complete or not, or is warned of ---


def three(root: Path, *contrasts: str, mask: str = "seg") -> Bids:
    """Three people with an image of every contrast and a mask."""
    for subject in ("sub-01", "sub-02", "sub-03"):
        for contrast in contrasts:
            put(root, f"{subject}/anat/{subject}_{contrast}", IMAGE)
        put(root, f"derivatives/d/{subject}/anat/{subject}_{contrasts[0]}_{mask}")
    return Bids("set", image=contrasts, labels={"c": mask})


def lacks(data: Bids, root: Path) -> dict[str, str]:
    return {case.name: "; ".join(case.missing()) for case in data.scan(root)}


@pytest.mark.parametrize("lost", ["T1w", "T2w"])
def test_who_lacks_a_contrast_is_a_case_that_lacks_it(tmp_path: Path, lost: str) -> None:
    data = three(tmp_path, "T1w", "T2w")
    (tmp_path / f"set/sub-02/anat/sub-02_{lost}.nii.gz").unlink()
    found = lacks(data, tmp_path)
    assert list(found) == ["sub-01", "sub-02", "sub-03"]
    assert found["sub-01"] == found["sub-03"] == ""
    assert f"sub-02/anat/sub-02_{lost}.nii.gz in" in found["sub-02"]
    assert 'exclude=("sub-02",) leaves it out' in found["sub-02"]
    assert [case.name for case in data.replace(exclude=("sub-02",)).cases(tmp_path)] == ["sub-01", "sub-03"]
    assert data.warnings(tmp_path) == ()


@pytest.mark.parametrize("part", ["seg", "_seg", "label-c_desc-{rater}_mask"])
def test_a_mask_without_an_image_is_a_case_that_lacks_it(tmp_path: Path, part: str) -> None:
    data = three(tmp_path, "T2w", mask=part.replace("{rater}", "anna")).replace(labels={"c": part})
    (tmp_path / "set/sub-02/anat/sub-02_T2w.nii.gz").unlink()
    assert "needs one image sub-02/anat/sub-02_T2w.nii.gz" in lacks(data, tmp_path)["sub-02"]
    (tmp_path / "set/derivatives/d/sub-02/anat").rename(tmp_path / "set/derivatives/d/sub-02/func")  # wherever it lies
    assert "needs one image sub-02/func/sub-02_T2w.nii.gz" in lacks(data, tmp_path)["sub-02"]


def test_masks_of_other_contrasts_and_parts_make_no_case(tmp_path: Path) -> None:
    data = three(tmp_path, "T2w")
    for name in ("sub-04_T1w_seg", "sub-04_acq-x_T2w_seg", "sub-04_T2w_desc-old_seg", "sub-04_T2w_other", "sub-09_T2w_seg"):
        put(tmp_path, f"derivatives/d/sub-04/anat/{name}")
    assert list(lacks(data, tmp_path)) == ["sub-01", "sub-02", "sub-03"]


def test_an_image_of_two_fitting_contrasts_is_of_the_longer_one(tmp_path: Path) -> None:
    data = three(tmp_path, "T2w", "acq-x_T2w")
    for contrasts in (data.contrasts, data.contrasts[::-1]):
        assert lacks(data.replace(image=contrasts), tmp_path) == dict.fromkeys(("sub-01", "sub-02", "sub-03"), "")


@pytest.mark.parametrize("suffix", [".NII.GZ", ".nii.GZ", ".NII"])
def test_a_suffix_in_capital_letters_is_named(tmp_path: Path, suffix: str) -> None:
    data = three(tmp_path, "T2w")
    for file in ("set/sub-02/anat/sub-02_T2w", "set/derivatives/d/sub-03/anat/sub-03_T2w_seg"):
        (tmp_path / f"{file}.nii.gz").rename(tmp_path / f"{file}{suffix}")
    found = lacks(data, tmp_path)
    assert found["sub-01"] == ""
    for name, file in (("sub-02", f"sub-02_T2w{suffix}"), ("sub-03", f"sub-03_T2w_seg{suffix}")):
        assert found[name].startswith(f"case {name}: names end in .nii or .nii.gz, in small letters; rename ")
        assert found[name].endswith(file)


def test_two_files_and_two_folders_of_one_case_are_named_and_do_not_hide_the_others(tmp_path: Path) -> None:
    data = three(tmp_path, "T2w")
    (tmp_path / "set/sub-01/anat/sub-01_T2w.nii").write_bytes(b"")
    put(tmp_path, "sub-02/func/sub-02_T2w", IMAGE)
    found = lacks(data, tmp_path)
    assert "found " in found["sub-01"]
    assert "sub-01_T2w.nii, " in found["sub-01"]
    assert found["sub-02"] == "case sub-02 is in several folders: sub-02/anat, sub-02/func"
    assert found["sub-03"] == ""


def test_links_are_followed_and_those_that_lead_nowhere_or_up_are_no_trap(tmp_path: Path) -> None:
    data = three(tmp_path, "T2w")
    store = tmp_path / "store"
    (tmp_path / "set/sub-01/anat").rename(store)
    (tmp_path / "set/sub-01/anat").symlink_to(store)
    (tmp_path / "set/sub-02/anat/up").symlink_to(tmp_path / "set")
    image = tmp_path / "set/sub-03/anat/sub-03_T2w.nii.gz"
    image.unlink()
    image.symlink_to(tmp_path / "nowhere.nii.gz")
    (tmp_path / "set/sub-04").symlink_to(tmp_path / "nowhere")
    assert lacks(data, tmp_path) == dict.fromkeys(("sub-01", "sub-02", "sub-03"), "")
    one, two, three_ = data.scan(tmp_path)
    assert np.array_equal(one.load().image, two.load().image)
    with pytest.raises(UserError, match=r"sub-03_T2w.nii.gz; the link leads nowhere"):
        three_.load()
    assert data.warnings(tmp_path) == ("there is no image T2w in sub-04 (a link that leads nowhere): not in the study",)


def test_folders_without_an_image_and_rows_without_a_folder_are_warned_of(tmp_path: Path) -> None:
    data = three(tmp_path, "T2w")
    put(tmp_path, "sub-04/anat/sub-04_T1w", IMAGE)
    (tmp_path / "set/sub-05").mkdir()
    table = tmp_path / "set/participants.tsv"
    table.write_text("participant_id\tsite\n01\tA\n02\tB\n07\tB\n")
    assert [case.site for case in data.scan(tmp_path)] == ["A", "B", ""]
    assert data.warnings(tmp_path) == (
        "there is no image T2w in sub-04, sub-05: not in the study",
        "participants.tsv names 07: there is no such folder",
        "participants.tsv has sites for 2 of 5 persons; none for sub-03, sub-04, sub-05",
    )
    left = data.replace(exclude=("sub-04",))
    assert left.warnings(tmp_path)[0] == "there is no image T2w in sub-05: not in the study"
    table.write_text("participant_id\tage\n01\t30\n")
    assert data.replace(site="centre").warnings(tmp_path)[1].startswith("participants.tsv has no column 'centre'")


def test_names_with_composed_and_with_separate_accents_are_the_same(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "jérôme") for form in ("NFC", "NFD"))
    for number, (image, mask) in enumerate([(nfc, nfd), (nfd, nfc)]):
        put(tmp_path, f"sub-{image}{number}/anat/sub-{image}{number}_T2w", IMAGE)
        put(tmp_path, f"derivatives/d/sub-{mask}{number}/anat/sub-{mask}{number}_T2w_seg-{mask}")
    rows = f"sub-{nfc}1\t{nfd}\nsub-{nfd}0\t{nfc}\n"
    (tmp_path / "set/participants.tsv").write_text(f"participant_id\tsite\n{rows}", encoding="utf-8")
    (tmp_path / "set").rename(tmp_path / nfd)
    for form in (nfc, nfd):
        data = Bids(form, image="T2w", labels={"c": f"seg-{form}"})
        cases = data.cases(tmp_path)
        assert [(case.name, case.site) for case in cases] == [(f"sub-{nfc}0", nfc), (f"sub-{nfc}1", nfc)]
        assert all(case.load().raters.any() for case in cases)
        assert data.warnings(tmp_path) == ()
        assert len(data.replace(exclude=(f"sub-{form}0",)).cases(tmp_path)) == 1


def test_a_mask_on_another_grid(tmp_path: Path) -> None:
    data = simple(tmp_path)
    name = "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_mask"
    put(tmp_path, name, MASK[:5])
    text = message(data, tmp_path)
    assert "sub-01_T2w_label-GM_mask.nii.gz is on another grid than" in text
    assert "shape 5 x 5 x 4 against 6 x 5 x 4" in text
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    put(tmp_path, name, MASK, shifted)
    assert "0.5 mm apart" in message(data, tmp_path)
    shifted[0, 3] = 0.1
    put(tmp_path, name, MASK, shifted)
    assert data.cases(tmp_path)[0].load().raters.any()


@pytest.mark.parametrize("factor", [255.0, -1.0, 1.01])
def test_labels_outside_0_and_1(tmp_path: Path, factor: float) -> None:
    data = simple(tmp_path)
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_mask", MASK * np.float32(factor))
    text = message(data, tmp_path)
    assert f"labels must lie in [0, 1], got {factor:g} in" in text
    assert "sub-01_T2w_label-GM_mask.nii.gz" in text


def test_labels_that_leave_the_range_by_rounding_are_clipped(tmp_path: Path) -> None:
    data = simple(tmp_path)
    put(tmp_path, "derivatives/labels/sub-01/anat/sub-01_T2w_label-GM_mask", MASK * np.float32(1 + 5e-7))
    assert data.cases(tmp_path)[0].load().raters.max() == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": {}},
        {"labels": {"GM": ""}},
        {"image": ()},
        {"person": "("},
        {"labels": {"a": "x-{rater}_{rater}"}},
        {"labels": {"a": "seg:one"}},
        {"labels": {"a": "seg:1+"}},
        {"labels": {"a": "seg:1+2+1"}},
    ],
    ids=str,
)
def test_fields_that_make_no_sense_are_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|either|may"):
        Bids(**({"folder": "set", "image": "T2w", "labels": {"GM": "seg"}} | fields))


def test_a_layout_survives_json() -> None:
    data = Bids("set", image=("T1w", "T2w"), labels={"b": "x", "a": "y:2"}, person="sub-(.)")
    again = DataSet.model_validate_json(data.model_dump_json())
    assert again == data
    assert again.classes == ("b", "a")


def test_an_image_alone_is_a_case_without_raters(tmp_path: Path) -> None:
    path = put(tmp_path, "any_name", IMAGE)
    case = ImageCase("any_name", [path])
    data = case.load()
    assert np.array_equal(data.image[0], IMAGE)
    assert data.raters.shape == (0, 0, *SHAPE)
    with pytest.raises(UserError, match="an image alone has no mask 'seg'"):
        case.mask("seg")
    with pytest.raises(UserError, match="an image alone has no mask 'seg'"):
        case.sources(("seg",))


def test_an_image_alone_takes_the_mask_that_centres_its_crop_from_any_file(tmp_path: Path) -> None:
    mask = put(tmp_path, "elsewhere", MASK + 1)
    case = ImageCase("any_name", [put(tmp_path, "any_name", IMAGE)], center_mask=MaskFile(mask, (2,)))
    case.check_headers()
    assert np.array_equal(case.mask("seg"), MASK)
    assert len(case.sources(("seg",))) == len(case.sources()) + 1
    small = put(tmp_path, "small", IMAGE[:-1])
    with pytest.raises(UserError, match=r"small.nii.gz is on another grid than .*any_name"):
        ImageCase("any_name", case.images, center_mask=MaskFile(small)).check_headers()


def test_an_image_in_memory_takes_values_of_its_mask_as_a_file_does(tmp_path: Path) -> None:
    image, mask = (read_volume(put(tmp_path, name, data)) for name, data in (("a", IMAGE), ("b", MASK + IMAGE % 2)))
    assert np.array_equal(VolumeCase("x", [image], mask).mask("dseg:2"), MASK + IMAGE % 2 == 2)
    assert np.array_equal(VolumeCase("x", [image], mask).mask("dseg:1+2"), MASK + IMAGE % 2 > 0)


@pytest.mark.data
def test_gray_matter_challenge(real_data: Path) -> None:
    data = Bids("gm_challenge", image="T2starw", labels={"GM": "gmseg-manual"}, person=r"sub-(\d+)")
    cases = data.cases(real_data)
    assert len(cases) == 8
    assert len({case.subject for case in cases}) == 6
    assert {case.site for case in cases} == {"CEITEC", "NWU", "UCL", "Milan", "Juntendo", "Philips"}
    assert sum(int(case.load().raters.any(axis=(0, 1, 2, 3)).sum()) for case in cases) == 144  # slices, as its README says


@pytest.mark.data
def test_hippocampus(real_data: Path) -> None:
    parts = {"anterior": "label-hippocampus_dseg:1", "posterior": "label-hippocampus_dseg:2"}
    cases = Bids("hippocampus_msd", image="T1w", labels=parts).cases(real_data)
    assert len(cases) == 120
    raters = cases[0].load().raters
    assert raters.shape[:2] == (1, 2)
    assert raters.sum(axis=1).max() == 1


def both(root: Path, **fields: Any) -> Bids:
    """Two people: sub-01 has both contrasts with one mask, sub-02 a T2w with a mask of its own."""
    for name in ("01/anat/sub-01_T1w", "01/anat/sub-01_T2w", "02/anat/sub-02_T2w"):
        put(root, f"sub-{name}", IMAGE + int(name[-2]))
    put(root, "derivatives/d/sub-01/anat/sub-01_label-GM_mask")
    put(root, "derivatives/d/sub-02/anat/sub-02_T2w_label-GM_mask")
    return Bids(**({"folder": "set", "image": Each("T1w", "T2w"), "labels": {"GM": "label-GM_mask"}} | fields))


def test_each_contrast_is_a_case_of_its_own_of_one_person(tmp_path: Path) -> None:
    data = both(tmp_path)
    cases = data.cases(tmp_path)
    assert [(case.name, case.subject) for case in cases] == [
        ("sub-01_T1w", "sub-01"),
        ("sub-01_T2w", "sub-01"),
        ("sub-02_T2w", "sub-02"),
    ]
    loaded = [case.load() for case in cases]
    assert [float(each.image[0, 0, 0, 0]) for each in loaded] == [1, 2, 2]
    assert all(np.array_equal(each.raters[0, 0], MASK) for each in loaded)
    assert data.warnings(tmp_path) == ()
    assert [case.name for case in data.replace(exclude=("sub-01_T1w",)).cases(tmp_path)] == ["sub-01_T2w", "sub-02_T2w"]
    assert [case.name for case in data.replace(exclude=("sub-01",)).cases(tmp_path)] == ["sub-02_T2w"]
    assert data.replace(image=("T2w",)) != data == DataSet.model_validate_json(data.model_dump_json())


def test_contrasts_in_folders_of_their_own_are_cases_and_no_contradiction(tmp_path: Path) -> None:
    data = both(tmp_path, image=Each("T1w", "rec-mean_dwi"))
    put(tmp_path, "sub-02/dwi/sub-02_rec-mean_dwi", IMAGE)
    put(tmp_path, "derivatives/d/sub-02/dwi/sub-02_rec-mean_dwi_label-GM_mask")
    assert [case.name for case in data.cases(tmp_path)] == ["sub-01_T1w", "sub-02_rec-mean_dwi"]


@pytest.mark.parametrize(
    ("names", "case", "problem"),
    [
        (["sub-03/anat/sub-03_T1w"], "sub-03_T1w", r"case sub-03_T1w has no mask 'label-GM_mask'.*sub-03/anat/sub-03_T1w_label-GM"),
        (
            ["sub-03/anat/sub-03_T2w", "derivatives/d/sub-03/anat/sub-03_T1w_label-GM_mask"],
            "sub-03_T1w",
            r'one image sub-03/anat/sub-03_T1w.nii.gz in .*, found none; exclude=\("sub-03_T1w",\)',
        ),
        (["derivatives/d/sub-03/anat/sub-03_label-GM_mask"], "sub-03", r"one image sub-03/anat/sub-03_T1w.nii.gz .* found none"),
        (["sub-01/extra/sub-01_T1w"], "sub-01_T1w", "case sub-01_T1w is in several folders: sub-01/anat, sub-01/extra"),
    ],
    ids=["no mask of a contrast", "a mask of a contrast that is not there", "a mask alone", "one contrast twice"],
)
def test_what_a_contrast_lacks_is_said_of_its_case(tmp_path: Path, names: list[str], case: str, problem: str) -> None:
    data = both(tmp_path)
    for name in names:
        put(tmp_path, name)
    lacking = {each.name: each.missing() for each in data.scan(tmp_path) if each.missing()}
    assert case in lacking
    assert re.search(problem, " ".join(lacking[case]))


def test_a_person_without_any_contrast_is_a_warning_and_a_contrast_of_nobody_is_refused(tmp_path: Path) -> None:
    data = both(tmp_path)
    put(tmp_path, "sub-04/anat/sub-04_FLAIR")
    assert data.warnings(tmp_path) == ("there is no image T1w or T2w in sub-04: not in the study",)
    with pytest.raises(UserError, match=r"no image sub-\*_T2star.nii.gz in .*; there are FLAIR, T1w, T2w"):
        data.replace(image=Each("T1w", "T2star")).scan(tmp_path)
    with pytest.raises(ValidationError, match="at least one contrast"):
        data.replace(image=Each("T1w", ""))
