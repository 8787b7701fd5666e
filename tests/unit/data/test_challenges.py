"""Known layouts on trees with their exact names, and what goes wrong in them: everything is a case, or is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from softseg_dist.data.cases import DataSet
from softseg_dist.data.challenges import MSSEG, SCGM, BraTS, Decathlon, NnUNet, classes_of
from softseg_dist.errors import UserError

SHAPE = (4, 3, 2)
IMAGE = np.arange(24, dtype=np.int16).reshape(SHAPE)
MAP = (IMAGE % 5).astype(np.uint8)  # values 0 to 4


def save(root: Path, files: Mapping[str, np.ndarray]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.eye(4)), root / name)


def lacks(data: DataSet, root: Path) -> dict[str, tuple[str, ...]]:
    """What each case of a scan lacks, without the folder's name."""
    return {case.name: tuple(text.replace(str(root), "ROOT") for text in case.missing()) for case in data.scan(None)}


def message(data: DataSet, root: Path) -> str:
    with pytest.raises(UserError) as refused:
        data.scan(None)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(str(root), "ROOT")


# --- nnU-Net ---


def nnunet(root: Path, cases: tuple[str, ...] = ("la_003", "la_007"), **facts: Any) -> NnUNet:
    described = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "left": 1, "right": 2},
        "numTraining": len(cases),
    }
    described |= {"file_ending": ".nii.gz"} | facts
    for case in cases:
        save(root, {f"imagesTr/{case}_000{c}.nii.gz": IMAGE * (c + 1) for c in range(len(described["channel_names"]))})
        save(root, {f"labelsTr/{case}.nii.gz": MAP})
    (root / "dataset.json").write_text(json.dumps(described))
    return NnUNet(str(root), labels=tuple(name for name in described["labels"] if name != "background"))


def test_nnunet_channels_and_labels_are_those_of_dataset_json(tmp_path: Path) -> None:
    cases = nnunet(tmp_path).cases(None)
    assert [(case.name, case.subject, case.site, case.rater_names) for case in cases] == [
        ("la_003", "la_003", "", ("rater",)),
        ("la_007", "la_007", "", ("rater",)),
    ]
    loaded = cases[0].load()
    assert np.array_equal(loaded.image, [IMAGE, 2 * IMAGE])
    assert np.array_equal(loaded.raters[0], [MAP == 1, MAP == 2])


def test_nnunet_regions_are_unions_in_any_order(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [3, 1, 2], "core": [2, 3], "inner": 3}
    data = nnunet(tmp_path, labels=labels, regions_class_order=[1, 2, 3])
    loaded = data.cases(None)[0].load()
    assert np.array_equal(loaded.raters[0], [(MAP > 0) & (MAP < 4), (MAP == 2) | (MAP == 3), MAP == 3])
    assert NnUNet(str(tmp_path), labels=("inner", "whole")).cases(None)[0].load().raters.shape[1] == 2


def test_the_label_ignore_of_nnunet_is_no_class_but_what_nobody_labelled(tmp_path: Path) -> None:
    data = nnunet(tmp_path, labels={"background": 0, "left": 1, "whole": [1, 2], "ignore": 4}).replace(labels=("left", "whole"))
    assert classes_of(tmp_path) == data.classes
    loaded = data.cases(None)[0].load()
    expected = np.where(MAP == 4, np.nan, [MAP == 1, (MAP == 1) | (MAP == 2)])
    assert np.array_equal(loaded.raters[0], expected, equal_nan=True)


@pytest.mark.parametrize("colours", [True, False])
def test_nnunet_has_pictures_whose_channels_are_files_or_colours_of_one(tmp_path: Path, colours: bool) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    facts = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1, "ignore": 2}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"file_ending": ".png"}))
    channels = {"0000": rgb} if colours else {f"000{c}": rgb[..., c] for c in range(3)}
    files = {f"imagesTr/a_{name}.png": pixels for name, pixels in channels.items()} | {"labelsTr/a.png": rgb[..., 0] % 3}
    for name, pixels in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    data = NnUNet(str(tmp_path), labels=("road",))
    with pytest.raises(UserError, match="give spacing_mm"):
        data.cases(None)[0].load()
    loaded = data.replace(spacing_mm=(0.5, 0.5)).cases(None)[0].load()
    assert np.array_equal(loaded.image[..., 0], np.moveaxis(rgb[::-1], 2, 0).swapaxes(1, 2))
    mask = (rgb[::-1, :, 0] % 3).T
    assert np.array_equal(loaded.raters[0, 0, ..., 0], np.where(mask == 2, np.nan, mask), equal_nan=True)
    assert loaded.geometry.spacing_mm == (0.5, 0.5, 1.0)


def test_nnunet_1_says_values_by_name_and_modalities(tmp_path: Path) -> None:
    data = nnunet(tmp_path, modality={"0": "MR"}, labels={"0": "background", "1": "left", "2": "right"})
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "MR"}, "labels": {"0": "background", "2": "right"}}))
    loaded = data.replace(labels=("right",)).cases(None)[0].load()
    assert np.array_equal(loaded.image, [IMAGE])
    assert np.array_equal(loaded.raters[0], [MAP == 2])


def test_nnunet_names_what_a_case_lacks(tmp_path: Path) -> None:
    data = nnunet(tmp_path, ("la_003", "la_007", "la_010", "la_011", "la_020"))
    (tmp_path / "imagesTr/la_003_0000.nii.gz").unlink()
    (tmp_path / "imagesTr/la_007_0001.nii.gz").unlink()
    (tmp_path / "labelsTr/la_010.nii.gz").unlink()
    for channel in range(2):
        (tmp_path / f"imagesTr/la_011_000{channel}.nii.gz").unlink()
    save(tmp_path, {"imagesTr/._la_020_0000.nii.gz": IMAGE, "imagesTs/la_099_0000.nii.gz": IMAGE})
    assert lacks(data, tmp_path) == {
        "la_003": ("case la_003 has no image imagesTr/la_003_0000.nii.gz in ROOT",),
        "la_007": ("case la_007 has no image imagesTr/la_007_0001.nii.gz in ROOT",),
        "la_010": tuple(f"case la_010 has no mask labelsTr/la_010.nii.gz of {name} in ROOT" for name in ("left", "right")),
        "la_011": ("case la_011 has no image imagesTr/la_011_0000.nii.gz in ROOT, but a mask: ROOT/labelsTr/la_011.nii.gz",),
        "la_020": (),
    }
    assert data.warnings(None) == ()
    save(tmp_path, {"imagesTr/la_020_0002.nii.gz": IMAGE})
    assert data.warnings(None) == (f"no pattern fits 1 file in {tmp_path}: imagesTr/la_020_0002.nii.gz",)
    kept = data.replace(exclude=("la_003", "la_007", "la_010", "la_011"), person=r"la_(\d)").cases(None)
    assert [(case.name, case.subject) for case in kept] == [("la_020", "0")]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"labels": {"background": 0, "right": 1}}, "got left; there are right"),
        ({"labels": {"background": 0, "left": "one"}}, "must be integers, or lists of them"),
        ({"labels": ["left"]}, 'needs "labels"'),
        ({"channel_names": {}}, 'needs "channel_names" (or "modality")'),
        ({"file_ending": ".mha"}, "must be .nii.gz, .nii, .png or .tif, got '.mha' in ROOT/dataset.json"),
        ({"dataset": {"left": {}}}, 'a list of files under "dataset" is not supported'),
    ],
    ids=str,
)
def test_a_dataset_json_that_says_something_else_is_refused(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    data = nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(json.loads((tmp_path / "dataset.json").read_text()) | facts))
    assert said in message(data.replace(labels=("left",)), tmp_path)


def test_a_dataset_json_that_is_absent_or_broken_is_named(tmp_path: Path) -> None:
    data = nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": ')
    assert "cannot read ROOT/dataset.json" in message(data, tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert "there is no file ROOT/dataset.json" in message(data, tmp_path)
    assert "there are imagesTr/la_003_0000.nii.gz" in message(data, tmp_path)


# --- Decathlon ---


def decathlon(root: Path, numbers: tuple[int, ...] = (1, 3, 4), **facts: Any) -> Decathlon:
    """Numbers of the real tasks have gaps."""
    names = [f"hippocampus_{number:03d}.nii.gz" for number in numbers]
    for name in names:
        save(root, {f"imagesTr/{name}": IMAGE, f"labelsTr/{name}": MAP})
    training = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names]
    described = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "training": training}
    (root / "dataset.json").write_text(json.dumps(described | {"numTraining": len(names), "tensorImageSize": "3D"} | facts))
    return Decathlon(str(root), labels=("Anterior", "Posterior"))


def test_decathlon_reads_the_masks_by_the_values_of_dataset_json(tmp_path: Path) -> None:
    cases = decathlon(tmp_path).cases(None)
    assert [case.name for case in cases] == ["hippocampus_001", "hippocampus_003", "hippocampus_004"]
    assert np.array_equal(cases[1].load().raters[0], [MAP == 1, MAP == 2])


def test_decathlon_names_what_is_on_disk_or_in_the_list_alone(tmp_path: Path) -> None:
    data = decathlon(tmp_path, (1, 3, 4, 6))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder / "hippocampus_003.nii.gz").unlink()
    (tmp_path / "imagesTr/hippocampus_004.nii.gz").unlink()
    save(tmp_path, {f"{folder}/hippocampus_007.nii.gz": IMAGE for folder in ("imagesTr", "labelsTr")})
    save(tmp_path, {"imagesTr/._hippocampus_001.nii.gz": IMAGE, "imagesTs/hippocampus_002.nii.gz": IMAGE})
    found = lacks(data, tmp_path)
    assert [name[-3:] for name in found] == ["001", "003", "004", "006", "007"]
    assert [len(lines) for lines in found.values()] == [0, 1, 1, 0, 1]
    assert found["hippocampus_003"][0].endswith("is in the list training of ROOT/dataset.json, but has no image and no mask")
    assert "but a mask: ROOT/labelsTr/hippocampus_004.nii.gz" in found["hippocampus_004"][0]
    assert "lies in ROOT, but the list training of dataset.json does not name it" in found["hippocampus_007"][0]


def test_decathlon_images_of_4_dimensions_have_the_channels_of_dataset_json(tmp_path: Path) -> None:
    data = decathlon(tmp_path, modality={"0": "T2", "1": "ADC"})
    for number, name in enumerate(("001", "003", "004"), start=1):
        save(tmp_path, {f"imagesTr/hippocampus_{name}.nii.gz": np.stack([IMAGE * number, IMAGE + number], axis=-1)})
    cases = data.cases(None)
    assert [case.name for case in cases] == ["hippocampus_001", "hippocampus_003", "hippocampus_004"]
    assert np.array_equal(cases[1].load().image, [IMAGE * 2, IMAGE + 2])
    assert len(set(cases[0].sources()[:2])) == 2, "the order of the channels is part of the content"


@pytest.mark.parametrize(
    ("modality", "volumes", "said"),
    [
        ({"0": "T2"}, 2, "images must have 3 dimensions, got 4 x 3 x 2 x 2 in ROOT"),
        ({"0": "T2", "1": "ADC"}, 1, r"there is no volume [1] in ROOT/imagesTr/hippocampus_001.nii.gz, which has 1"),
        ({"0": "T2", "1": "ADC", "2": "DCE"}, 2, "there is no volume [2] in ROOT"),
    ],
)
def test_decathlon_images_that_lack_channels_of_dataset_json_or_have_others_are_refused(
    tmp_path: Path, modality: dict[str, str], volumes: int, said: str
) -> None:
    data = decathlon(tmp_path, modality=modality)
    save(tmp_path, {"imagesTr/hippocampus_001.nii.gz": np.stack([IMAGE] * volumes, axis=-1)})
    with pytest.raises(UserError) as refused:
        data.cases(None)[0].load()
    assert said in str(refused.value).replace(str(tmp_path), "ROOT")


def test_decathlon_needs_its_list_of_cases(tmp_path: Path) -> None:
    assert 'needs a list "training"' in message(decathlon(tmp_path, training=[["a", "b"]]), tmp_path)


# --- SCGM ---


def scgm(root: Path) -> SCGM:
    for site, case in ((1, 1), (1, 2), (2, 1), (4, 10)):
        stem = f"site{site}-sc{case:02d}"
        save(root, {f"{stem}-image.nii.gz": IMAGE} | {f"{stem}-mask-r{r}.nii.gz": (MAP + r) % 3 for r in range(1, 5)})
        (root / f"{stem}-levels.txt").write_text("C3")
    return SCGM(str(root))


def test_scgm_has_four_raters_four_sites_and_the_cord_as_union(tmp_path: Path) -> None:
    data = scgm(tmp_path)
    cases = data.cases(None)
    assert [(case.name, case.site) for case in cases] == [
        ("site1-sc01", "site1"),
        ("site1-sc02", "site1"),
        ("site2-sc01", "site2"),
        ("site4-sc10", "site4"),
    ]
    assert cases[0].rater_names == data.rater_names == ("r1", "r2", "r3", "r4")
    third = (MAP + 3) % 3
    assert np.array_equal(cases[0].load().raters[2], [third == 1, third == 2, third > 0])
    assert np.array_equal(cases[0].mask("cord"), (MAP + 1) % 3 > 0)
    assert data.replace(labels=("cord", "GM")).classes == ("cord", "GM")


def test_scgm_names_a_rater_and_an_image_that_are_not_there(tmp_path: Path) -> None:
    data = scgm(tmp_path)
    (tmp_path / "site1-sc02-mask-r3.nii.gz").unlink()
    (tmp_path / "site2-sc01-image.nii.gz").unlink()
    save(tmp_path, {"site4-sc10-mask-r2.nii": MAP})
    found = lacks(data, tmp_path)
    assert found["site1-sc02"] == ("case site1-sc02 has no mask of rater r3",)
    assert found["site2-sc01"][0].startswith(
        "case site2-sc01 has no image site2-sc01-image.nii.gz in ROOT, but a mask: ROOT/site2-"
    )
    assert "has 2 files for its mask" in found["site4-sc10"][0]
    assert found["site1-sc01"] == ()


# --- MSSEG ---


def patient(root: Path, at: str, raters: str = "1234567") -> None:
    images = {f"{at}/Preprocessed_Data/{name}_preprocessed.nii.gz": IMAGE for name in ("FLAIR", "T1", "T2", "DP", "GADO")}
    masks = {f"{at}/Masks/ManualSegmentation_{rater}.nii.gz": MAP // 4 for rater in raters}
    save(root, images | masks | {f"{at}/Masks/Consensus.nii.gz": MAP // 3, f"{at}/Raw_Data/FLAIR.nii.gz": IMAGE})


@pytest.mark.parametrize(
    ("folders", "names", "sites"),
    [
        (
            ("Training/Center_01/Patient_01", "Testing/Center_01/Patient_01", "Testing/Center_03/Patient_02"),
            ["Testing-01-Patient_01", "Testing-03-Patient_02", "Training-01-Patient_01"],
            ["Center_01", "Center_03", "Center_01"],
        ),
        (("Center_07/Patient_01", "Center_08/Patient_01"), ["07-Patient_01", "08-Patient_01"], ["Center_07", "Center_08"]),
        (("Training/Patient_01", "Testing/Patient_01"), ["Testing-Patient_01", "Training-Patient_01"], ["", ""]),
        (("Patient_01", "Patient_05"), ["Patient_01", "Patient_05"], ["", ""]),
    ],
)
def test_msseg_in_each_of_its_forms(tmp_path: Path, folders: tuple[str, ...], names: list[str], sites: list[str]) -> None:
    for folder in folders:
        patient(tmp_path, folder)
    data = MSSEG(str(tmp_path), image=("FLAIR", "GADO"))
    cases = data.cases(None)
    assert [case.name for case in cases] == names
    assert [case.site for case in cases] == sites
    assert cases[0].rater_names == data.rater_names == tuple("1234567")
    loaded = cases[0].load()
    assert loaded.image.shape == (2, *SHAPE)
    assert np.array_equal(loaded.raters[6, 0], MAP // 4)


def test_msseg_names_a_contrast_a_rater_and_an_image_that_are_not_there(tmp_path: Path) -> None:
    for number in range(1, 5):
        patient(tmp_path, f"Training/Center_01/Patient_0{number}", "123456" if number == 3 else "1234567")
    at = tmp_path / "Training/Center_01"
    (at / "Patient_01/Preprocessed_Data/GADO_preprocessed.nii.gz").unlink()
    (at / "Patient_02/Preprocessed_Data/FLAIR_preprocessed.nii.gz").unlink()
    found = lacks(MSSEG(str(tmp_path)), tmp_path)
    assert [len(lines) for lines in found.values()] == [0, 1, 1, 0]
    assert "has no image Training/Center_01/Patient_02/Preprocessed_Data/FLAIR_preprocessed" in found["Training-01-Patient_02"][0]
    assert found["Training-01-Patient_03"] == ("case Training-01-Patient_03 has no mask of rater 7",)
    both = lacks(MSSEG(str(tmp_path), image=("FLAIR", "GADO")), tmp_path)
    assert "Patient_01/Preprocessed_Data/GADO_preprocessed" in both["Training-01-Patient_01"][0]


# --- BraTS ---

OLD, NEW = ("flair", "t1", "t1ce", "t2"), ("t2f", "t1n", "t1c", "t2w")


def brats(root: Path, case: str, names: tuple[str, ...], at: str = "", end: str = ".nii.gz") -> None:
    mark = "_" if names == OLD else "-"
    images = {f"{at}{case}/{case}{mark}{name}{end}": IMAGE * number for number, name in enumerate(names, start=1)}
    save(root, images | {f"{at}{case}/{case}{mark}seg{end}": MAP})


@pytest.mark.parametrize(
    ("case", "names", "at", "end", "enhancing"),
    [
        ("BraTS20_Training_001", OLD, "", ".nii", 4),
        ("BraTS19_CBICA_AAB_1", OLD, "HGG/", ".nii.gz", 4),
        ("BraTS-GLI-00002-000", NEW, "", ".nii.gz", 3),
    ],
)
def test_brats_regions_by_the_values_of_their_year(
    tmp_path: Path, case: str, names: tuple[str, ...], at: str, end: str, enhancing: int
) -> None:
    brats(tmp_path, case, names, at, end)
    (found,) = BraTS(str(tmp_path)).cases(None)
    loaded = found.load()
    assert found.name == case
    assert np.array_equal(loaded.image, [IMAGE * number for number in (1, 2, 3, 4)])
    whole, core = np.isin(MAP, (1, 2, enhancing)), np.isin(MAP, (1, enhancing))
    assert np.array_equal(loaded.raters[0], [whole, core, enhancing == MAP])
    assert np.array_equal(BraTS(str(tmp_path), image=("t2",), labels=("core",)).cases(None)[0].load().image, [4 * IMAGE])


def test_brats_scans_of_one_patient_from_2023_are_one_person(tmp_path: Path) -> None:
    for case in ("BraTS-GLI-00008-000", "BraTS-GLI-00008-001", "BraTS-GLI-00009-000"):
        brats(tmp_path, case, NEW)
    data = BraTS(str(tmp_path))
    assert [case.subject for case in data.cases(None)] == ["BraTS-GLI-00008"] * 2 + ["BraTS-GLI-00009"]
    assert [case.subject for case in data.replace(person=r"\d{3}$").cases(None)] == ["000", "001", "000"]


def test_brats_names_what_a_case_lacks_and_knows_the_misnamed_mask(tmp_path: Path) -> None:
    for number in (1, 2, 3, 355):
        brats(tmp_path, f"BraTS20_Training_{number:03d}", OLD, end=".nii")
    at = tmp_path / "BraTS20_Training_355"
    (at / "BraTS20_Training_355_seg.nii").rename(at / "W39_1998.09.19_Segm.nii")
    assert BraTS(str(tmp_path)).warnings(None) == ()
    (tmp_path / "BraTS20_Training_001/BraTS20_Training_001_t1ce.nii").unlink()
    (tmp_path / "BraTS20_Training_002/BraTS20_Training_002_seg.nii").unlink()
    for name in OLD:
        (tmp_path / f"BraTS20_Training_003/BraTS20_Training_003_{name}.nii").unlink()
    (tmp_path / "name_mapping.csv").touch()
    data = BraTS(str(tmp_path))
    found = lacks(data, tmp_path)
    assert [len(lines) for lines in found.values()] == [1, 3, 1, 0]
    assert "has no image BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz in ROOT" in found["BraTS20_Training_001"][0]
    assert "but a mask" in found["BraTS20_Training_003"][0]
    kept = data.replace(exclude=tuple(f"BraTS20_Training_00{number}" for number in (1, 2, 3))).cases(None)
    assert np.array_equal(kept[0].load().raters[0, 2], MAP == 4)


def test_a_folder_of_another_layout_says_which_reader_it_is_for(tmp_path: Path) -> None:
    patient(tmp_path, "Center_01/Patient_01")
    assert message(BraTS(str(tmp_path)), tmp_path).endswith('such names are read by MSSEG("ROOT")')
    assert message(SCGM(str(tmp_path)), tmp_path).endswith('such names are read by MSSEG("ROOT")')
