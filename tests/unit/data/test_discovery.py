"""What lies in a folder is found out from names, headers and a few masks."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from softseg_dist import Bids, UserError
from softseg_dist.data.discovery import MASKS_READ, look_at, recognise

SIZE = (12, 10, 8)


def save(path: Path, data: np.ndarray, spacing_mm: tuple[float, ...] = (1, 1, 1)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(data, np.float32), np.diag([*spacing_mm, 1])), path)


def scan(size: tuple[int, ...] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=size)


def block(value: float = 1, size: tuple[int, ...] = SIZE) -> np.ndarray:
    mask = np.zeros(size)
    mask[2:6, 3:7, 2:5] = value
    return mask


def tree(root: Path, subjects: list[str], masks: dict[str, np.ndarray], contrasts: tuple[str, ...] = ("T2w",)) -> Path:
    """A BIDS-like folder: of each subject an image per contrast, and masks by what they have more in their names than the first."""
    for subject in subjects:
        for contrast in contrasts:
            save(root / subject / "anat" / f"{subject}_{contrast}.nii.gz", scan())
        for part, mask in masks.items():
            save(root / "derivatives/labels" / subject / "anat" / f"{subject}_{contrasts[0]}_{part}.nii.gz", mask)
    return root


def subjects(count: int) -> list[str]:
    return [f"sub-{number:02d}" for number in range(count)]


def data_of(root: Path) -> Bids:
    data = recognise(root)[1]
    assert isinstance(data, Bids)
    return data


def test_parts_that_most_images_have_become_classes(tmp_path: Path) -> None:
    tree(tmp_path, subjects(4), {"seg-manual": block(), "label-GM_mask": block()})
    save(tmp_path / "derivatives/labels/sub-00/anat/sub-00_T2w_lesion.nii.gz", block())
    assert data_of(tmp_path) == Bids(str(tmp_path), image="T2w", labels={"seg": "seg-manual", "GM": "label-GM_mask"})


def test_values_of_an_integer_map_become_classes(tmp_path: Path) -> None:
    whole = block()
    whole[8:10] = 3
    tree(tmp_path, subjects(4), {"dseg": whole})
    assert data_of(tmp_path).labels == {"dseg-1": "dseg:1", "dseg-3": "dseg:3"}


def test_names_that_differ_in_one_word_are_raters(tmp_path: Path) -> None:
    tree(tmp_path, subjects(4), {f"label-GM_desc-{who}_mask": block() for who in ("ann", "bob")})
    contents = look_at(tmp_path)
    assert data_of(tmp_path).labels == {"GM": "label-GM_desc-{rater}_mask"}
    assert contents.raters == ("ann", "bob")
    assert contents.mean_volumes_mm3 == {"GM": 48}
    assert not contents.soft


def test_the_contrast_with_masks_is_the_image_and_others_are_named(tmp_path: Path) -> None:
    tree(tmp_path, subjects(4), {"seg": block(0.5)}, contrasts=("T2w", "T1w"))
    contents = look_at(tmp_path)
    assert data_of(tmp_path).image == "T2w"
    assert contents.why == "4 folders sub-*, 1 folder below derivatives/; not used: T1w"
    assert contents.soft


def test_sessions_in_the_names_of_subjects_are_of_one_person(tmp_path: Path) -> None:
    contents = look_at(tree(tmp_path, ["sub-1Ses1", "sub-1Ses2", "sub-2", "sub-3"], {"seg": block()}))
    assert (len(contents.cases), contents.persons) == (4, 3)


def test_what_lacks_something_is_told_and_left_out(tmp_path: Path) -> None:
    tree(tmp_path, subjects(5), {"seg": block()})
    (tmp_path / "derivatives/labels/sub-01/anat/sub-01_T2w_seg.nii.gz").unlink()
    (tmp_path / "sub-02/anat/sub-02_T2w.nii.gz").write_bytes(b"no image")
    torn = tmp_path / "derivatives/labels/sub-03/anat/sub-03_T2w_seg.nii.gz"
    torn.write_bytes(torn.read_bytes()[:-20])
    contents = look_at(tmp_path)
    assert [case.name for case in contents.cases] == ["sub-00", "sub-04"]
    (lacking, broken, half) = contents.problems
    assert lacking.startswith("case sub-01 has no mask 'seg'")
    assert "sub-02_T2w.nii.gz" in broken
    assert str(torn) in half
    assert isinstance(contents.data, Bids)
    assert contents.data.exclude == ("sub-01", "sub-02", "sub-03")


def test_few_masks_are_read_and_from_every_site(tmp_path: Path) -> None:
    tree(tmp_path, subjects(16), {"seg": block()})
    rows = "".join(f"sub-{number:02d}\t{'B' if number == 15 else 'A'}\n" for number in range(16))
    (tmp_path / "participants.tsv").write_text("participant_id\tsite\n" + rows)
    contents = look_at(tmp_path)
    assert len(contents.volumes_mm3) == MASKS_READ
    assert "sub-15" in contents.volumes_mm3
    assert contents.sites == {"A": 15, "B": 1}


def test_a_folder_of_another_kind_is_described(tmp_path: Path) -> None:
    save(tmp_path / "scans" / "a.nii.gz", scan())
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"none of the layouts BIDS, nnU-Net.*: there are scans/a.nii.gz"):
        look_at(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        look_at(tmp_path / "gone")


def test_images_without_masks_are_named(tmp_path: Path) -> None:
    tree(tmp_path, subjects(3), {})
    with pytest.raises(UserError, match=r"no mask below derivatives/ belongs to half .* there are images T2w, masks of none"):
        look_at(tmp_path)
