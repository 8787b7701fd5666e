"""BIDS trees and participants.tsv damaged at random: each kind of damage says beforehand how it must end, and none hangs.

A person is complete (""), is a case with an error that has certain words, or is no case but named by a warning.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from softseg_dist.data.check import check_cases
from softseg_dist.data.layouts import Bids
from softseg_dist.data.preprocess import Preprocess

DATA = Bids("ds", image=("T1w", "T2w"), labels={"GM": "seg"})
PERSONS = tuple(f"sub-0{number}" for number in range(1, 7))
SITES = dict(zip(PERSONS, ("Zürich", "UCL") * 3, strict=True))
ROWS = "".join(f"{person}\t30\t{site}\n" for person, site in SITES.items())
TABLE = f"participant_id\tage\tsite\n{ROWS}"
LIMIT_S = 20  # of one tree, which takes a tenth of a second

AFFINE = np.diag([1.0, 1, 2, 1])
IMAGE = np.arange(8 * 7 * 4, dtype=np.float32).reshape(8, 7, 4) % 23
MASK = np.zeros((8, 7, 4), np.uint8)
MASK[2:5, 2:5, 1:3] = 1


def nifti(data: np.ndarray, affine: np.ndarray = AFFINE, *changes: tuple[int, str, float]) -> bytes:
    """A file as bytes; `changes` of its header are (position, layout, value)."""
    image = nib.Nifti1Image(data, affine)
    image.set_qform(affine, code=1)
    raw = bytearray(image.to_bytes())
    for position, layout, value in changes:
        struct.pack_into(layout, raw, position, value)
    return gzip.compress(bytes(raw), 1)


def image_of(root: Path, person: str, contrast: str = "T1w") -> Path:
    return root / person / "anat" / f"{person}_{contrast}.nii.gz"


def mask_of(root: Path, person: str) -> Path:
    return root / "derivatives/labels" / person / "anat" / f"{person}_T2w_seg.nii.gz"


def plant(root: Path) -> None:
    for number, person in enumerate(PERSONS):
        for contrast in ("T1w", "T2w"):
            image_of(root, person, contrast).parent.mkdir(parents=True, exist_ok=True)
            image_of(root, person, contrast).write_bytes(nifti(IMAGE + number))
        mask_of(root, person).parent.mkdir(parents=True)
        mask_of(root, person).write_bytes(nifti(MASK))


def replaced(make: Callable[[Path], object], kind: Callable[[Path, str], Path] = image_of) -> Callable[[Path, str], None]:
    """A damage: the file of a person is removed, and something is made in its place."""

    def damage(root: Path, person: str) -> None:
        path = kind(root, person)
        path.unlink()
        make(path)

    return damage


def content(text: bytes, kind: Callable[[Path, str], Path] = image_of) -> Callable[[Path, str], None]:
    return replaced(lambda path: path.write_bytes(text), kind)


def without(*parts: str) -> Callable[[Path, str], None]:
    def damage(root: Path, person: str) -> None:
        for part in parts:
            (mask_of(root, person) if part == "mask" else image_of(root, person, part)).unlink()

    return damage


def erased(root: Path, person: str) -> None:
    shutil.rmtree(root / person)
    mask_of(root, person).unlink()


def moved(source: str, to: str) -> Callable[[Path, str], None]:
    """A damage: a file gets another name, in which PERSON stands for the person."""

    def damage(root: Path, person: str) -> None:
        old, new = (root / name.replace("PERSON", person) for name in (source, to))
        new.parent.mkdir(exist_ok=True)
        old.rename(new)

    return damage


PIR = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt("PIR"))
TURNED = nib.Nifti1Image(MASK, AFFINE).as_reoriented(PIR)
T1W = "PERSON/anat/PERSON_T1w"
WARNED = "warning: "
GONE = f"{WARNED}there is no such folder"
DAMAGE: dict[str, tuple[Callable[[Path, str], object], str]] = {  # what is done -> how it ends
    "first contrast": (without("T1w"), "_T1w.nii.gz in"),
    "second contrast": (without("T2w"), "_T2w.nii.gz in"),
    "mask alone": (without("T1w", "T2w"), "needs one image"),
    "no mask": (without("mask"), "has no mask 'seg'"),
    "empty folder": (without("T1w", "T2w", "mask"), f"{WARNED}there is no image T1w or T2w in"),
    "erased": (erased, GONE),
    "capital suffix": (moved(f"{T1W}.nii.gz", f"{T1W}.NII.GZ"), "rename"),
    "other folder": (moved(f"{T1W}.nii.gz", "PERSON/func/PERSON_T1w.nii.gz"), "several folders"),
    "gzip called plain": (moved(f"{T1W}.nii.gz", f"{T1W}.nii"), ""),
    "plain called gzip": (content(gzip.decompress(nifti(IMAGE + 50))), ""),
    "dead link": (replaced(lambda path: path.symlink_to("nowhere")), "leads nowhere"),
    "link to itself": (replaced(lambda path: path.symlink_to(path)), "symbolic links"),
    "device": (replaced(lambda path: path.symlink_to("/dev/zero")), "got a device"),
    "pipe": (replaced(os.mkfifo, mask_of), "got a pipe"),
    "folder": (replaced(Path.mkdir), "_T1w.nii.gz in"),
    "annex": (content(b"/annex/objects/MD5E-s115--0cc.nii.gz\n"), "git annex get"),
    "lfs": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", mask_of), "git lfs pull"),
    "cut off": (content(nifti(IMAGE)[:150]), "cut off"),
    "text": (content(b"hello" * 99), "not a NIfTI file"),
    "qfac 0": (content(nifti(IMAGE + 60, AFFINE, (76, "<f", 0))), ""),
    "micrometres": (content(nifti(IMAGE + 70, np.diag([1e3, 1e3, 2e3, 1]), (123, "<B", 3))), ""),
    "no rotation": (content(nifti(IMAGE + 80, AFFINE, (256, "<f", 2))), ""),
    "forms disagree": (content(nifti(IMAGE, AFFINE, (268, "<f", 12))), "disagree by up to 12 mm"),
    "not measured": (content(nifti(np.where(IMAGE > 0, IMAGE, np.finfo(np.float32).min))), "not measured"),
    "constant": (content(nifti(IMAGE * 0)), "constant"),
    "255": (content(nifti(MASK * 255), mask_of), "[0, 1], got 255"),
    "other grid": (content(nifti(MASK[:5]), mask_of), "another grid"),
    "other axes": (content(nifti(np.asarray(TURNED.dataobj), TURNED.affine), mask_of), ""),
}
EVERYONE = frozenset(PERSONS)
TABLES: dict[str, tuple[str | bytes, frozenset[str], str]] = {  # its damage -> the table, who has no site then, a warning
    "intact": (TABLE, frozenset(), ""),
    "without sub-": (TABLE.replace("sub-", ""), frozenset(), ""),
    "without zeros": (TABLE.replace("sub-0", ""), frozenset(), ""),
    "commas": (TABLE.replace("\t", ","), frozenset(), ""),
    "UTF-16": (TABLE.encode("utf-16"), frozenset(), ""),
    "Latin-1": (TABLE.encode("latin-1"), frozenset(), ""),
    "stray quote": (TABLE.replace("sub-03", '"sub-03'), frozenset(), ""),
    "no titles": (ROWS, EVERYONE, "its first line is one of a person"),
    "cut off": (TABLE[: TABLE.index("sub-03")], EVERYONE - {"sub-01", "sub-02"}, "has sites for 2 of 6 persons"),
    "short row": (TABLE.replace("sub-02\t30\tUCL", "sub-02"), frozenset({"sub-02"}), "none for sub-02"),
    "two sites": (f"{TABLE}sub-05\t31\tBerlin\n", frozenset(), "gives sub-05 the sites Zürich and Berlin"),
    "one more": (f"{TABLE}sub-77\t31\tBerlin\n", frozenset(), "sub-77: there is no such folder"),
    "noise": (random.Random(0).randbytes(3000), EVERYONE, "no site is known"),
    "nothing": (b"", EVERYONE, "no site is known"),
}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_tree(folder: Path, seed: int) -> None:
    """Damage a tree as the seed says, and compare how it ends."""
    draw, root = random.Random(seed), folder / "ds"
    plant(root)
    kinds = dict(zip(draw.sample(PERSONS, 3), draw.sample([*DAMAGE], 3), strict=True))
    for person, kind in kinds.items():
        DAMAGE[kind][0](root, person)
    name = draw.choice([*TABLES])
    table, siteless, table_warning = TABLES[name]
    (root / "participants.tsv").write_bytes(table.encode() if isinstance(table, str) else table)
    with time_limit(LIMIT_S):
        cases, warnings = DATA.scan(folder), DATA.warnings(folder)
        problems = check_cases(cases, Preprocess(dim=3))
    errors = {case.name: [p.detail for p in problems if p.case == case.name and p.level == "error"] for case in cases}
    what = f"seed {seed}: {kinds}, table: {name}, errors {errors}, warnings {warnings}"
    assert all("\n" not in text for text in (*warnings, *(problem.detail for problem in problems))), what
    for person in PERSONS:
        end = DAMAGE[kinds[person]][1] if person in kinds else ""
        if end.startswith(WARNED):
            assert person not in errors, what
            is_known = end == GONE and person in siteless  # an unread table does not name who is gone
            named = rf"\b(sub-)?0?{person[-1]}\b"  # as the table names them
            assert is_known or any(re.search(named, text) and end.removeprefix(WARNED) in text for text in warnings), what
        else:
            assert any(end in text for text in errors[person]) if end else errors[person] == [], (person, what)
    assert {case.name: case.site for case in cases} == {p: "" if p in siteless else SITES[p] for p in errors}, what
    if "erased" not in kinds.values():  # else the table names others, or fewer
        assert any(table_warning in text for text in warnings) or not table_warning, what


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 500), marks=[pytest.mark.engine, pytest.mark.long])], ids=len)
def test_damaged_trees_end_as_they_must(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        check_tree(tmp_path / str(seed), seed)
        shutil.rmtree(tmp_path / str(seed))
