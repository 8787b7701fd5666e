"""Files by patterns: what placeholders mean, raters and values per class; nothing that lies there vanishes."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from softseg_dist.data.cases import DataSet, check_apart
from softseg_dist.data.check import check_cases
from softseg_dist.data.files import Files
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.errors import UserError

SHAPE = (4, 3, 2)
IMAGE = np.arange(24, dtype=np.int16).reshape(SHAPE)
MAP = (IMAGE % 5).astype(np.uint8)  # values 0 to 4


def put(root: Path, *names: str) -> None:
    """Empty files: a scan looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def save(root: Path, name: str, data: np.ndarray = MAP) -> None:
    put(root, name)
    nib.save(nib.Nifti1Image(data, np.eye(4)), root / name)


def files(root: Path, image: Any = "{case}_t1.nii.gz", mask: str = "{case}_seg.nii.gz", **fields: Any) -> Files:
    return Files(str(root), image=image, **({"labels": {"lesion": mask}} | fields))


def lacks(data: DataSet, root: Path) -> dict[str, tuple[str, ...]]:
    """What each case of a scan lacks, without the folder's name."""
    return {case.name: tuple(text.replace(str(root), "ROOT") for text in case.missing()) for case in data.scan(None)}


def message(data: DataSet) -> str:
    with pytest.raises(UserError) as refused:
        data.scan(None)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_nobody_labelled_has_a_pattern_and_a_case_without_it_or_all_of_it_is_named(tmp_path: Path) -> None:
    for case in "abc":
        save(tmp_path, f"{case}_t1.nii.gz", IMAGE)
        save(tmp_path, f"{case}_seg.nii.gz")
    save(tmp_path, "a_ignored.nii.gz")
    save(tmp_path, "b_ignored.nii.gz", np.ones_like(MAP))
    data = files(tmp_path, mask="{case}_seg.nii.gz:1", ignore="{case}_ignored.nii.gz:1+2")
    assert data.warnings(None) == ()
    mask = "mask c_ignored.nii.gz of voxels to ignore"
    assert lacks(data, tmp_path) == {"a": (), "b": (), "c": (f"case c has no {mask} in ROOT",)}
    one, other, _ = data.scan(None)
    assert np.array_equal(one.load().raters[0, 0], np.where((MAP == 1) | (MAP == 2), np.nan, 0), equal_nan=True)
    with pytest.raises(UserError, match="b: every voxel is to be ignored; exclude="):
        Preprocess(dim=2).apply(other)
    assert "no mask of voxels to ignore {case}_x.nii.gz" in message(data.replace(ignore="{case}_x.nii.gz"))


def test_placeholders_of_the_image_name_case_site_and_subject_and_masks_follow_them(tmp_path: Path) -> None:
    for site, case in (("A", "01"), ("A", "02"), ("B", "01")):
        save(tmp_path, f"{site}-{case}/{case}_image.nii.gz", IMAGE)
        for value, rater in enumerate(("anna", "ben"), start=1):
            save(tmp_path, f"{site}-{case}/{case}_mask-{rater}.nii.gz", MAP // value)
    data = files(tmp_path, "{site}-{case}/{case}_image.nii.gz", "{site}-{case}/{case}_mask-{rater}.nii.gz:1", person=r"(.)$")
    cases = data.cases(None)
    assert [(case.name, case.site, case.subject) for case in cases] == [("A-01", "A", "1"), ("A-02", "A", "2"), ("B-01", "B", "1")]
    assert data.rater_names is None
    assert cases[0].rater_names == ("anna", "ben")
    loaded = cases[2].load()
    assert np.array_equal(loaded.image, IMAGE[None])
    assert np.array_equal(loaded.raters[:, 0], [MAP == 1, MAP // 2 == 1])
    assert data.replace(site="").cases(None)[0].site == ""
    assert data.replace(site="centre {site}").cases(None)[2].site == "centre B"


def test_the_subject_is_a_placeholder_or_the_case_and_person_finds_the_person_in_it(tmp_path: Path) -> None:
    put(tmp_path, *(f"{name}/{day}_{kind}.nii.gz" for name in ("p1", "p2") for day in ("d1", "d2") for kind in ("t1", "seg")))
    data = files(tmp_path, "{subject}/{day}_t1.nii.gz", "{subject}/{day}_seg.nii.gz")
    assert [(case.name, case.subject) for case in data.cases(None)][:3] == [("p1-d1", "p1"), ("p1-d2", "p1"), ("p2-d1", "p2")]
    put(tmp_path / "flat", "p1a_t1.nii.gz", "p1b_t1.nii.gz", "p1a_seg.nii.gz", "p1b_seg.nii.gz")
    flat = files(tmp_path / "flat", person=r"p\d")
    assert [(case.name, case.subject) for case in flat.cases(None)] == [("p1a", "p1"), ("p1b", "p1")]
    assert lacks(flat.replace(person="a$"), tmp_path)["p1b"] == ("case p1b has 'p1b', which person='a$' does not match",)


@pytest.mark.parametrize(
    ("image", "channels"), [(("{case}_t1.nii.gz", "{case}_t2.nii.gz"), ()), ("{case}_{channel}.nii.gz", ("t1", "t2"))]
)
def test_channels_come_in_the_order_in_which_they_are_named(tmp_path: Path, image: Any, channels: tuple[str, ...]) -> None:
    for number, name in enumerate(("t1", "t2", "t3"), start=1):
        save(tmp_path, f"x_{name}.nii.gz", IMAGE * number)
    save(tmp_path, "x_seg.nii.gz", MAP // 4)
    (case,) = files(tmp_path, image, channels=channels).cases(None)
    assert np.array_equal(case.load().image, [IMAGE, 2 * IMAGE])


def test_one_class_may_have_raters_and_another_none_which_counts_for_each(tmp_path: Path) -> None:
    save(tmp_path, "x_t1.nii.gz", IMAGE)
    save(tmp_path, "x_map.nii.gz")
    for value, rater in enumerate("ab", start=1):
        save(tmp_path, f"x_seg-{rater}.nii.gz", (value == MAP).astype(np.uint8))
    labels = {"lesion": "{case}_seg-{rater}.nii.gz", "brain": "{case}_map.nii.gz:1+2+4"}
    data = files(tmp_path, labels=labels)
    (case,) = data.cases(None)
    assert case.rater_names == ("a", "b")
    brain = np.isin(MAP, (1, 2, 4))
    assert np.array_equal(case.load().raters, [[MAP == 1, brain], [MAP == 2, brain]])
    put(tmp_path, "y_t1.nii.gz", "y_map.nii.gz", "y_seg-b.nii.gz", "z_t1.nii.gz", "z_map.nii.gz")
    assert [case.rater_names for case in data.scan(None)] == [("a", "b"), ("b",), ("rater",)]
    assert [len(lines) for lines in lacks(data, tmp_path).values()] == [0, 0, 1]


def test_a_rater_of_one_class_only_is_named(tmp_path: Path) -> None:
    put(tmp_path, "x_t1.nii.gz", "x_GM-a.nii.gz", "x_WM-a.nii.gz", "x_GM-b.nii.gz")
    labels = {name: f"{{case}}_{name}-{{rater}}.nii.gz" for name in ("GM", "WM")}
    assert "case x has no mask of WM by rater b" in lacks(files(tmp_path, labels=labels), tmp_path)["x"]


def test_a_mask_may_belong_to_several_images_and_a_star_stands_for_text_within_one_part_of_the_path(tmp_path: Path) -> None:
    put(tmp_path, "p/day1/scan_3.nii.gz", "p/day2/scan_17.nii.gz", "p/mask.nii.gz", "p/day1/deeper/scan_1.nii.gz")
    data = files(tmp_path, "{subject}/day{day}/scan_*.nii.gz", "{subject}/mask.nii.gz")
    assert [case.name for case in data.cases(None)] == ["p-1", "p-2"]


def test_a_placeholder_takes_as_much_as_it_can_from_left_to_right(tmp_path: Path) -> None:
    put(tmp_path, "i/a_b.nii.gz", "i/a.nii.gz", "m/a_b_c.nii.gz", "m/a_expert_1.nii.gz")
    found = {case.name: case for case in files(tmp_path, "i/{case}.nii.gz", "m/{case}_{rater}.nii.gz").scan(None)}
    assert found["a_b"].rater_names == ("c",)
    assert [len(case.missing()) for case in found.values()] == [1, 0, 1]
    assert "but a mask" in found["a_expert"].missing()[0]
    assert files(tmp_path, "i/{case}.nii.gz", "m/{case}_expert_{rater}.nii.gz").scan(None)[0].rater_names == ("1",)


def test_a_file_belongs_to_the_pattern_with_the_most_fixed_text(tmp_path: Path) -> None:
    put(tmp_path, "a.nii.gz", "a_t2.nii.gz", "a_seg.nii.gz", "a_seg_x.nii.gz")
    image, labels = ("{case}.nii.gz", "{case}_t2.nii.gz"), {"GM": "{case}_seg.nii.gz:1", "WM": "{case}_seg.nii.gz:2"}
    assert lacks(files(tmp_path, image, labels=labels | {"x": "{case}_seg_{rater}.nii.gz"}), tmp_path) == {"a": ()}
    put(tmp_path, "b/a_0000.nii.gz", "b/a.nii.gz")
    assert lacks(files(tmp_path / "b", "{case}_0000.nii.gz", "{case}.nii.gz"), tmp_path) == {"a": ()}


VOLUMES = np.stack([IMAGE, IMAGE + 1, MAP], axis=-1)


def test_volumes_of_a_4d_file_are_channels_and_classes_and_may_have_values(tmp_path: Path) -> None:
    save(tmp_path, "x_t1.nii.gz", VOLUMES)
    save(tmp_path, "x_seg.nii.gz", np.stack([MAP == 3, MAP / 4, MAP], axis=-1).astype(np.float32))
    labels = {"GM": "{case}_seg.nii.gz[1]", "WM": "{case}_seg.nii.gz[0]", "cord": "{case}_seg.nii.gz[2]:1+2"}
    expected = np.stack([MAP / 4, MAP == 3, np.isin(MAP, (1, 2))]).astype(np.float32)
    for image, channels in (("{case}_t1.nii.gz[{channel}]", ("1", "0")), (("{case}_t1.nii.gz[1]", "{case}_t1.nii.gz[0]"), ())):
        (case,) = files(tmp_path, image, labels=labels, channels=channels).cases(None)
        assert np.array_equal(case.load().image, [IMAGE + 1, IMAGE])
        assert np.array_equal(case.load().raters, expected[None])
        assert np.array_equal(case.mask("cord"), expected[2])
        assert np.array_equal(case.mask("{case}_seg.nii.gz[2]:1+2"), expected[2])
        assert [line.split()[0] for line in case.sources()] == [
            "x_t1.nii.gz[1]",
            "x_t1.nii.gz[0]",
            "x_seg.nii.gz[1]",
            "x_seg.nii.gz[0]",
            "x_seg.nii.gz[2]:1+2",
        ]


@pytest.mark.parametrize(
    ("image", "mask", "said"),
    [
        ("{case}_t1.nii.gz", "{case}_seg.nii.gz", "4 x 3 x 2 x 3 in ROOT/x_t1.nii.gz; x_t1.nii.gz[0] to [2] are its volumes"),
        ("{case}_t1.nii.gz[3]", "{case}_seg.nii.gz", "no volume [3] in ROOT/x_t1.nii.gz, which has 3"),
        ("{case}_t1.nii.gz[0]", "{case}_seg.nii.gz:2", "4 x 3 x 2 x 2 in ROOT/x_seg.nii.gz"),  # :2 is a value, not a volume
        ("{case}_t1.nii.gz[0]", "{case}_seg.nii.gz[0]", "rater rater, class lesion: labels must lie in [0, 1], got 23 in ROOT"),
    ],
)
def test_a_4d_file_is_never_read_by_a_guess(tmp_path: Path, image: str, mask: str, said: str) -> None:
    save(tmp_path, "x_t1.nii.gz", VOLUMES)
    save(tmp_path, "x_seg.nii.gz", VOLUMES[..., :2])
    with pytest.raises(UserError) as refused:
        files(tmp_path, image, mask).cases(None)[0].load()
    assert said in str(refused.value).replace(str(tmp_path), "ROOT")


def test_two_volumes_of_a_file_are_other_images_and_one_volume_of_equal_files_is_not(tmp_path: Path) -> None:
    for name in "xy":
        save(tmp_path, f"{name}_t1.nii.gz", VOLUMES)
        save(tmp_path, f"{name}_seg.nii.gz")
    x, y = files(tmp_path, "{case}_t1.nii.gz[0]").cases(None)
    with pytest.raises(UserError, match=r"the images of x .* and y .* are equal"):
        check_apart([x, y], [x.sources(), y.sources()])
    (other,) = files(tmp_path, "{case}_t1.nii.gz[1]", exclude=("x",)).cases(None)
    check_apart([x, other], [x.sources(), other.sources()])


def draw(root: Path, name: str, *pages: np.ndarray, **options: Any) -> None:
    """A picture of rows and columns: its pixels are the transposed slices of what is read, upside down."""
    put(root, name)
    first, *others = [Image.fromarray(page) for page in pages]
    first.save(root / name, **options | ({"append_images": others, "save_all": True} if others else {}))


ROWS = np.arange(12, dtype=np.uint8).reshape(3, 4)  # 3 rows, 4 columns
RGB = np.stack([ROWS, ROWS + 50, ROWS + 100], axis=-1)


def read(pixels: np.ndarray) -> np.ndarray:
    """What a picture of these pixels is, as a volume."""
    return pixels.T[:, ::-1, None].astype(np.float32)


@pytest.mark.parametrize("end", ["png", "tif", "PNG"])
def test_pictures_have_colours_as_channels_and_masks_of_0_and_255_or_of_integers(tmp_path: Path, end: str) -> None:
    draw(tmp_path, f"x.{end}", RGB, dpi=(254, 254))
    draw(tmp_path, f"x_edge-a.{end}", (ROWS > 5).astype(np.uint8) * 255, dpi=(72, 72))
    draw(tmp_path, f"x_edge-b.{end}", ROWS > 6)
    draw(tmp_path, f"x_map.{end}", ROWS % 4)
    pattern = end.lower()
    labels = {"edge": f"{{case}}_edge-{{rater}}.{pattern}", "cells": f"{{case}}_map.{pattern}:1+3"}
    data = files(tmp_path, f"{{case}}.{pattern}[{{channel}}]", channels=("0", "1", "2"), labels=labels)
    (case,) = data.cases(None)
    loaded = case.load()
    assert np.array_equal(loaded.image, [read(RGB[..., colour]) for colour in range(3)])
    cells = read(ROWS % 2)
    assert np.array_equal(loaded.raters, [[read(ROWS > 5), cells], [read(ROWS > 6), cells]])
    assert np.allclose(loaded.geometry.spacing_mm, (0.1, 0.1, 1))
    assert np.array_equal(case.mask("edge"), read(ROWS > 5))
    assert data.warnings(None) == ()
    given = data.replace(spacing_mm=(0.25, 0.5)).cases(None)[0]
    assert given.load().geometry.spacing_mm == (0.25, 0.5, 1)
    assert given.sources() == (*case.sources(), "spacing_mm 0.25 x 0.5"), "other voxels are other content"
    assert [problem.rule for problem in check_cases([given], Preprocess(dim=2))] == []


def test_a_stack_has_its_pages_as_slices_and_needs_their_distance(tmp_path: Path) -> None:
    draw(tmp_path, "x.tif", ROWS.astype(np.float32) / 7, ROWS.astype(np.float32))
    draw(tmp_path, "x_seg.tif", ROWS > 3, ROWS > 4)
    data = files(tmp_path, "{case}.tif", "{case}_seg.tif", spacing_mm=(0.5, 0.5, 2.0))
    loaded = data.cases(None)[0].load()
    assert np.array_equal(loaded.image[0], np.dstack([read(ROWS.astype(np.float32) / 7), read(ROWS)]))
    assert np.array_equal(loaded.raters[0, 0], np.dstack([read(ROWS > 3), read(ROWS > 4)]))
    with pytest.raises(UserError, match=r"x.tif does not say the size of a voxel in mm"):
        data.replace(spacing_mm=(0.5, 0.5)).cases(None)[0].load()
    assert Files.model_validate_json(data.model_dump_json()) == data


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        ((ROWS > 5).astype(np.uint8) * 254, "labels must lie in [0, 1], got 254 in ROOT/x_seg.png"),
        (ROWS * 20, "labels must lie in [0, 1], got 220"),  # parts of 255 or values of a map? that is not guessed
        (ROWS[:2] > 5, "ROOT/x_seg.png is on another grid than ROOT/x.png: shape 4 x 2 x 1 against 4 x 3 x 1"),
        (ROWS.T > 5, "shape 3 x 4 x 1 against 4 x 3 x 1"),
        (RGB, "got 4 x 3 x 1 x 3 in ROOT/x_seg.png; x_seg.png[0] to [2] are its colours"),
    ],
    ids=["254", "gray", "smaller", "turned", "coloured"],
)
def test_a_picture_that_is_no_mask_of_the_image_is_refused(tmp_path: Path, pixels: np.ndarray, said: str) -> None:
    draw(tmp_path, "x.png", ROWS, dpi=(254, 254))
    draw(tmp_path, "x_seg.png", pixels, dpi=(254, 254))
    with pytest.raises(UserError) as refused:
        files(tmp_path, "{case}.png", "{case}_seg.png").cases(None)[0].load()
    assert said in str(refused.value).replace(str(tmp_path), "ROOT")
    assert "\n" not in str(refused.value)


def test_pictures_beside_nifti_files_are_no_warning_and_beside_pictures_all_files_are(tmp_path: Path) -> None:
    put(tmp_path, "a_t1.nii.gz", "a_seg.nii.gz", "quality.png", "a_t1.tif")
    assert files(tmp_path).warnings(None) == ()
    put(tmp_path, "a.png", "a_seg.png")
    data = files(tmp_path, "{case}.png", "{case}_seg.png", exclude=("quality",))
    number = f"no pattern fits 3 files in {tmp_path}: a_seg.nii.gz, a_t1.nii.gz, a_t1.tif"
    assert data.warnings(None) == (number,)
    assert lacks(data.replace(exclude=()), tmp_path)["quality"] == ("case quality has no mask quality_seg.png of lesion in ROOT",)


@pytest.mark.parametrize("center", ["lesion", "{case}_cord.nii.gz:2", "{case}_c*.nii.gz:2"])
def test_a_class_or_another_pattern_centres_the_crop(tmp_path: Path, center: str) -> None:
    save(tmp_path, "x_t1.nii.gz", IMAGE)
    save(tmp_path, "x_seg.nii.gz")
    save(tmp_path, "x_cord.nii")
    (case,) = files(tmp_path, mask="{case}_seg.nii.gz:2").cases(None)
    assert np.array_equal(case.mask(center), MAP == 2)
    assert len(case.sources((center,))) == 2 + (center != "lesion")


@pytest.mark.parametrize("center", ["{case}_none.nii.gz", "GM", "{other}_cord.nii.gz", "/x.nii.gz"])
def test_what_cannot_centre_a_crop_is_refused_with_the_case(tmp_path: Path, center: str) -> None:
    put(tmp_path, "x_t1.nii.gz", "x_seg.nii.gz")
    with pytest.raises(UserError, match=r"(one mask x_none.nii.gz in .*, got none|center must be a class \(lesion\) or a pattern)"):
        files(tmp_path).cases(None)[0].mask(center)


# --- everything that lies there is a case, or is named ---


def test_every_case_is_there_with_what_it_lacks(tmp_path: Path) -> None:
    put(tmp_path, "a_t1.nii.gz", "a_t2.nii", "a_seg.nii.gz")  # .nii is as good as .nii.gz
    put(tmp_path, "b_t1.nii.gz", "b_t2.nii.gz", "c_t2.nii.gz", "c_seg.nii.gz", "d_seg.nii.gz")
    put(
        tmp_path,
        "e_t1.nii.gz",
        "e_t1.nii",
        "e_t2.nii.gz",
        "e_seg.nii.gz",
        "f_T1.nii.gz",
        "notes.txt",
        ".a_t1.nii.gz",
        "._g_t1.nii.gz",
    )
    data = files(tmp_path, ("{case}_t1.nii.gz", "{case}_t2.nii.gz"))
    assert lacks(data, tmp_path) == {
        "a": (),
        "b": ("case b has no mask b_seg.nii.gz of lesion in ROOT",),
        "c": ("case c has no image c_t1.nii.gz in ROOT",),
        "d": ("case d has no image d_t1.nii.gz in ROOT, but a mask: ROOT/d_seg.nii.gz",),
        "e": ("case e has 2 files for its image e_t1.nii.gz: ROOT/e_t1.nii, ROOT/e_t1.nii.gz",),
    }
    assert list(lacks(data.replace(exclude=("b", "c", "d", "e")), tmp_path)) == ["a"]
    assert "exclude names f, but the cases are a, b, c, d, e" in message(data.replace(exclude=("f",)))


def test_files_beside_them_that_fit_no_pattern_are_a_warning(tmp_path: Path) -> None:
    put(
        tmp_path, "A-01/01_t1.nii.gz", "A-01/01_seg.nii.gz", "A-02/2_t1.nii.gz", "A-02/2_seg.nii.gz", "A-01/notes.txt", "B/x.nii.gz"
    )
    data = files(tmp_path, "{site}-{case}/{case}_t1.nii.gz", "{site}-{case}/{case}_seg.nii.gz")
    assert data.warnings(None) == (f"no pattern fits 2 files in {tmp_path}: A-02/2_seg.nii.gz, A-02/2_t1.nii.gz",)
    assert files(tmp_path, "{site}-*/{case}_t1.nii.gz", "{site}-*/{case}_seg.nii.gz").warnings(None) == ()


def test_a_suffix_in_capital_letters_is_a_problem_that_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, "a_t1.NII.GZ", "a_seg.nii.gz", "b_t1.nii.gz", "b_seg.Nii")
    rule = "has a file whose name must end in small letters, .nii or .nii.gz, to be read: rename ROOT"
    assert lacks(files(tmp_path), tmp_path) == {"a": (f"case a {rule}/a_t1.NII.GZ",), "b": (f"case b {rule}/b_seg.Nii",)}


def test_the_same_letters_in_two_encodings_are_the_same(tmp_path: Path) -> None:
    put(tmp_path, unicodedata.normalize("NFD", "müller_t1.nii.gz"), unicodedata.normalize("NFC", "müller_seg.nii.gz"))
    assert [len(names) for names in lacks(files(tmp_path), tmp_path).values()] == [0]
    assert [case.name for case in files(tmp_path, "mü{case}_t1.nii.gz", "mü{case}_seg.nii.gz").cases(None)] == ["ller"]


def test_linked_folders_are_read_and_links_in_a_circle_end(tmp_path: Path) -> None:
    put(tmp_path / "store", "x/t1.nii.gz", "x/seg.nii.gz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "p1").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "data" / "p2").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "p3").symlink_to(tmp_path / "data" / "p3")
    assert [case.name for case in files(tmp_path / "data", "{case}/t1.nii.gz", "{case}/seg.nii.gz").cases(None)] == ["p1"]


def test_only_folders_that_a_pattern_names_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "images/a.nii.gz", "images/deeper/b.nii.gz", "masks/a.nii.gz", "other/a.nii.gz")
    opened, scandir = list[Path](), os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (opened.append(folder), scandir(folder))[1])
    assert [case.name for case in files(tmp_path, "images/{case}.nii.gz", "masks/{case}.nii.gz").cases(None)] == ["a"]
    assert sorted(opened) == [tmp_path, tmp_path / "images", tmp_path / "masks"]


def test_a_thousand_cases_are_found_in_a_second(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for number in range(1000):
            (tmp_path / folder / f"case_{number:04d}.nii.gz").touch()
    begun = time.process_time()
    assert len(files(tmp_path, "images/{case}.nii.gz", "masks/{case}.nii.gz").cases(None)) == 1000
    assert time.process_time() - begun < 1


PLACES = ("t1", "t2", "GM-a", "GM-b", "WM")
ENDS = (".nii.gz", ".nii", ".NII.GZ")


@settings(max_examples=60, deadline=None, database=None)
@given(
    tree=st.sets(
        st.tuples(st.sampled_from("AB"), st.sampled_from("123"), st.sampled_from(PLACES), st.sampled_from(ENDS)), min_size=1
    )
)
def test_every_file_of_a_random_tree_is_used_or_belongs_to_a_case_that_says_what_is_wrong(tree: set[tuple[str, ...]]) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        put(
            root,
            *(
                f"{site}/{case}_{place}{end}"
                for site, case, place, end in {*tree, *((c, "0", p, ".nii") for c in "AB" for p in PLACES)}
            ),
        )
        labels = {"GM": "{site}/{case}_GM-{rater}.nii.gz", "WM": "{site}/{case}_WM.nii.gz:1"}
        found = {
            case.name: case
            for case in files(root, ("{site}/{case}_t1.nii.gz", "{site}/{case}_t2.nii.gz"), labels=labels).scan(None)
        }
        assert found.keys() == {f"{site}-{case}" for site, case, _, _ in tree} | {"A-0", "B-0"}
        for site, case, place, end in tree:
            of_case = found[f"{site}-{case}"]
            used = {*of_case.images, *(mask.path for masks in of_case.labels.values() for mask in masks.values())}
            assert root / site / f"{case}_{place}{end}" in used or of_case.missing()
        for name, of_case in found.items():
            own = [(place, end) for site, case, place, end in tree if f"{site}-{case}" == name]
            places = [place for place, _ in own]
            whole = len({*places}) == len(places) and {"t1", "t2", "WM"} <= {*places} and {"GM-a", "GM-b"} & {*places}
            assert bool(of_case.missing()) != bool(name.endswith("0") or (whole and all(end != ".NII.GZ" for _, end in own)))


# --- where nothing fits ---


def test_a_pattern_without_a_file_says_what_lies_there(tmp_path: Path) -> None:
    assert message(files(tmp_path)) == f"no image {{case}}_t1.nii.gz in {tmp_path}: nothing lies there"
    put(tmp_path, *(f"{number}_flair.nii.gz" for number in range(9)), "participants.csv")
    assert message(files(tmp_path)).endswith(": there are 0_flair.nii.gz, participants.csv")
    data = files(tmp_path, "{case}_flair.nii.gz")
    assert "no mask of lesion {case}_seg.nii.gz in" in message(data)
    put(tmp_path, "0_seg.nii.gz")
    two = files(tmp_path, ("{case}_flair.nii.gz", "{case}_t1.nii.gz"))
    assert "no image {case}_t1.nii.gz in" in message(two)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz", 'Bids("ROOT")'),
        ("derivatives/a/sub-01/anat/sub-01_T2w_seg.nii.gz sub-01/anat/sub-01_T2w.nii.gz", 'Bids("ROOT")'),
        ("imagesTr/GM_001_0000.nii.gz", 'NnUNet("ROOT")'),
        ("Task04/imagesTr/hippocampus_001.nii.gz", 'Decathlon("ROOT/Task04")'),
        ("site1-sc01-image.nii.gz", 'SCGM("ROOT")'),
        ("Training/Center_01/Patient_01/Preprocessed_Data/T1_preprocessed.nii.gz", 'MSSEG("ROOT")'),
        ("HGG/BraTS19_1/BraTS19_1_flair.nii.gz", 'BraTS("ROOT/HGG")'),
        ("BraTS-GLI-00000-000/BraTS-GLI-00000-000-t2f.nii.gz", 'BraTS("ROOT")'),
    ],
)
def test_the_reader_of_a_known_layout_is_named(tmp_path: Path, name: str, reader: str) -> None:
    put(tmp_path, *name.split())
    assert message(files(tmp_path)).endswith(f"such names are read by {reader}".replace("ROOT", str(tmp_path)))


def test_a_folder_that_is_not_there_and_one_without_a_data_root(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in message(files(tmp_path / "none"))
    assert "--data-root" in message(files(Path("below")))


def test_two_cases_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a-b/c_t1.nii.gz", "a/b-c_t1.nii.gz", "a-b/c_seg.nii.gz")
    assert "a name of its own, got a-b-c" in message(files(tmp_path, "{site}/{case}_t1.nii.gz", "{site}/{case}_seg.nii.gz"))


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"labels": {}}, "at least one pattern and one class"),
        ({"image": ()}, "at least one pattern"),
        ({"image": "t1.nii.gz"}, "must have a placeholder such as {case}"),
        ({"image": "{case}_{rater}.nii.gz"}, "but not {rater}"),
        ({"image": "{case}_{channel}.nii.gz"}, "names that {channel} stands for"),
        ({"channels": ("t1",)}, "names that {channel} stands for"),
        ({"image": ("{case}.nii.gz", "{site}_{case}.nii.gz")}, "the same placeholders"),
        ({"image": "{case}{site}.nii.gz"}, "text or / between two"),
        ({"image": "**/{case}.nii.gz"}, r"no \*\*"),
        ({"image": "{Case}.nii.gz"}, "small letters"),
        ({"image": "{case.nii.gz"}, "small letters"),
        ({"image": "{case}.jpg"}, "ends in .nii.gz"),
        ({"image": "{case}.nii.gz[a]"}, "ends in .nii.gz"),
        ({"image": "{case}.nii.gz[0]:1"}, "ends in .nii.gz"),
        ({"image": "/data/{case}.nii.gz"}, "path below the folder"),
        ({"image": "../{case}.nii.gz"}, "path below the folder"),
        ({"labels": {"a": "{other}.nii.gz"}}, "placeholders of its image"),
        ({"labels": {"a": "{rater}.nii.gz"}}, "placeholders of its image"),
        ({"labels": {"a": "{case}.nii.gz:one"}}, "must be an integer"),
        ({"image": "{case}.png", "spacing_mm": (0.5,)}, "spacing_mm"),
        ({"image": "{case}.png", "spacing_mm": (0.5, 0.0)}, "greater than 0"),
        ({"image": "{case}.png", "spacing_mm": (0.5, float("inf"))}, "finite number"),
        ({"spacing_mm": (0.5, 0.5)}, "spacing_mm is of PNG and TIFF files"),
        ({"site": "{site}"}, "site may have placeholders of the image"),
        ({"person": "("}, "regular expression"),
    ],
    ids=str,
)
def test_fields_that_make_no_sense_are_refused_at_once(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule.replace("{", r"\{").replace("}", r"\}")):
        files(Path("set"), **fields)
