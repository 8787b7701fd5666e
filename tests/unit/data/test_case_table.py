"""Tables of cases: columns are found by their titles; a row that cannot be read is named, never left out."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from softseg_dist.data.case_table import Table
from softseg_dist.errors import UserError

SHAPE = (4, 3, 2)
IMAGE = np.arange(24, dtype=np.int16).reshape(SHAPE)
MAP = (IMAGE % 3).astype(np.uint8)
ROWS = ["case,age,image,GM", "a,30,a.nii.gz,a_gm.nii.gz", "b,40,b.nii.gz,b_gm.nii.gz"]


def table(root: Path, *lines: str, labels: tuple[str, ...] = ("GM",), name: str = "cases.csv") -> Table:
    for stem in "abc":
        for end in ("", "_t2", "_gm", "_x", "_y"):
            nib.save(nib.Nifti1Image(MAP // 2 if end == "_gm" else MAP if end else IMAGE, np.eye(4)), root / f"{stem}{end}.nii.gz")
    (root / name).write_text("\n".join(lines) + "\n")
    return Table(str(root / name), labels=labels)


def lacks(data: Table, root: Path) -> dict[str, tuple[str, ...]]:
    return {case.name: tuple(text.replace(str(root), "ROOT") for text in case.missing()) for case in data.scan(None)}


def message(data: Table, root: Path) -> str:
    with pytest.raises(UserError) as refused:
        data.scan(None)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(str(root), "ROOT")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_rows_are_cases_whatever_separates_the_cells(tmp_path: Path, mark: str) -> None:
    lines = ["\ufeffcase,subject, site ,image,GM,age", "b,p1,UCL,b.nii.gz,b_gm.nii.gz,30", "a,,NA, a.nii.gz ,a_gm.nii.gz,", ",,,,,"]
    cases = table(tmp_path, *(line.replace(",", mark) for line in lines)).cases(None)
    assert [(case.name, case.subject, case.site, case.rater_names) for case in cases] == [
        ("a", "a", "", ("rater",)),
        ("b", "p1", "UCL", ("rater",)),
    ]
    loaded = cases[0].load()
    assert np.array_equal(loaded.image, [IMAGE])
    assert np.array_equal(loaded.raters, [[MAP // 2]])
    assert np.array_equal(cases[0].mask("GM"), MAP // 2)


def test_channels_raters_and_values_of_an_integer_map(tmp_path: Path) -> None:
    lines = [
        "image:t2,case,image:t1,GM:anna,GM:ben,cord",
        "a_t2.nii.gz,a,a.nii.gz,a_x.nii.gz:1,a_y.nii.gz:2,a_x.nii.gz:1+2",
        f"{tmp_path}/b_t2.nii.gz,b,b.nii.gz,,b_y.nii.gz:2,b_x.nii.gz:1+2",
    ]
    one, two = table(tmp_path, *lines, labels=("GM", "cord")).cases(None)
    loaded = one.load()
    assert np.array_equal(loaded.image, [MAP, IMAGE])
    assert np.array_equal(loaded.raters, [[MAP == 1, MAP > 0], [MAP == 2, MAP > 0]])
    assert (one.rater_names, two.rater_names) == (("anna", "ben"), ("ben",))


def test_a_column_names_the_voxels_that_nobody_labelled(tmp_path: Path) -> None:
    data = table(tmp_path, "case,image,GM,ignore", "a,a.nii.gz,a_x.nii.gz:1,a_x.nii.gz:3+4", "b,b.nii.gz,b_x.nii.gz:1,")
    one, other = (case.load().raters[0, 0] for case in data.cases(None))
    assert np.array_equal(one, np.where(MAP > 2, np.nan, MAP == 1), equal_nan=True)
    assert np.array_equal(other, MAP == 1)
    absent = table(tmp_path, "case,image,GM,ignore", "a,a.nii.gz,a_x.nii.gz:1,absent.nii.gz")
    assert lacks(absent, tmp_path) == {
        "a": ("case a: there is no file ROOT/absent.nii.gz, as the column ignore of ROOT/cases.csv says",)
    }


def test_cells_may_name_volumes_of_a_4d_file_and_an_image_takes_no_values(tmp_path: Path) -> None:
    data = table(
        tmp_path, "case,image:t1,image:t2,GM", "a,x.nii.gz[1],x.nii.gz[0],x.nii.gz[2]:1", "b,x.nii.gz:1,a.nii.gz,a_gm.nii.gz"
    )
    nib.save(nib.Nifti1Image(np.stack([IMAGE, IMAGE + 1, MAP], axis=-1), np.eye(4)), tmp_path / "x.nii.gz")
    assert lacks(data, tmp_path) == {
        "a": (),
        "b": ("case b: only masks have values, got 'x.nii.gz:1' in the column image:t1 of ROOT/cases.csv",),
    }
    loaded = data.replace(exclude=("b",)).cases(None)[0].load()
    assert np.array_equal(loaded.image, [IMAGE + 1, IMAGE])
    assert np.array_equal(loaded.raters, [[MAP == 1]])


def test_cells_may_name_pictures_and_the_table_says_their_size(tmp_path: Path) -> None:
    data = table(tmp_path, "case,image:red,image:blue,GM", "a,p.png[0],p.png[2],m.png").replace(spacing_mm=(0.5, 0.25))
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    Image.fromarray(pixels[..., 0] > 9).save(tmp_path / "m.png")
    loaded = data.cases(None)[0].load()
    assert np.array_equal(loaded.image[:, :, ::-1, 0], pixels[..., [0, 2]].T)
    assert np.array_equal(loaded.raters[0, 0, :, ::-1, 0], pixels[..., 0].T > 9)
    assert loaded.geometry.spacing_mm == (0.5, 0.25, 1)


def test_the_table_lies_below_the_data_root(tmp_path: Path) -> None:
    table(tmp_path, *ROWS)
    cases = Table(f"{tmp_path.name}/cases.csv", labels=("GM",), exclude=("b",)).cases(tmp_path.parent)
    assert [case.name for case in cases] == ["a"]
    with pytest.raises(UserError, match="--data-root"):
        Table("cases.csv", labels=("GM",)).cases(None)


def test_what_a_row_lacks_is_named(tmp_path: Path) -> None:
    lines = [
        "case,image:t1,image:t2,GM",
        "a,a.nii.gz,,a_gm.nii.gz",
        "b,b.nii.gz,b_t2.nii.gz,",
        "c,c.nii.gz,gone.nii.gz,c_x.nii.gz:one",
    ]
    assert lacks(table(tmp_path, *lines), tmp_path) == {
        "a": ("case a has no image:t2 in ROOT/cases.csv",),
        "b": ("case b has no mask of GM in ROOT/cases.csv",),
        "c": (
            "case c: there is no file ROOT/gone.nii.gz, as the column image:t2 of ROOT/cases.csv says",
            'case c: what follows ":" must be an integer of at most 7 digits, or several as in "1+2+4", '
            "got 'c_x.nii.gz:one' in the column GM of ROOT/cases.csv",
            "case c: there is no file ROOT/c_x.nii.gz:one, as the column GM of ROOT/cases.csv says",
        ),
    }


def test_a_rater_of_one_class_only_is_named(tmp_path: Path) -> None:
    lines = ["case,image,GM:anna,GM:ben,WM:anna,WM:ben", "a,a.nii.gz,a_gm.nii.gz,a_gm.nii.gz,a_gm.nii.gz,"]
    assert "case a has no mask of WM by rater ben" in lacks(table(tmp_path, *lines, labels=("GM", "WM")), tmp_path)["a"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["name,image,GM", "a,a.nii.gz,a_gm.nii.gz"], "needs a column for case, image, GM, got no case; there are name, image, GM"),
        (["case,image", "a,a.nii.gz"], "got no GM; there are case, image"),
        ([*ROWS, "a,50,c.nii.gz,c_gm.nii.gz"], "each case must have a name of its own, got a"),
        ([*ROWS, "c,50,c.nii.gz"], "must have 4 cells, got 3 in row 4"),
        (["case,image,GM,GM", "a,a.nii.gz,a_gm.nii.gz,a_gm.nii.gz"], "different titles"),
        (
            ["case,image,GM,GM:anna", "a,a.nii.gz,a_gm.nii.gz,a_gm.nii.gz"],
            "needs a column GM, or one for each rater, got GM, GM:anna",
        ),
        ([*ROWS, ",50,c.nii.gz,c_gm.nii.gz"], "needs rows, each with the name of its case"),
        (["case,image,GM", 'a,"a.nii.gz,a_gm.nii.gz'], "a table must be CSV in UTF-8"),
        (ROWS[:1], "ROOT/cases.csv needs rows"),
        ([], "got no case, image, GM; there are "),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, lines: list[str], said: str) -> None:
    assert said in message(table(tmp_path, *lines), tmp_path)


def test_a_table_that_is_absent_or_in_another_encoding_is_named(tmp_path: Path) -> None:
    data = table(tmp_path, *ROWS)
    (tmp_path / "cases.csv").write_text("\n".join(ROWS), encoding="utf-16")
    assert "a table must be CSV in UTF-8, got ROOT/cases.csv" in message(data, tmp_path)
    (tmp_path / "cases.csv").unlink()
    assert "there is no table ROOT/cases.csv" in message(data, tmp_path)


def test_a_table_needs_a_class() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        Table("cases.csv", labels=())
