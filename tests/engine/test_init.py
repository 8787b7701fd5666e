"""From a folder of any known layout to a report, without an edit: softseg init, check, run --debug; the tutorial as printed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import softseg, softseg_here

pytestmark = pytest.mark.engine

SIZE, SPACING_MM = (20, 18, 6), (1.0, 1.0, 4.0)
PERSONS = range(1, 7)


def scan(number: int, channel: int = 0) -> np.ndarray:
    return np.random.default_rng(10 * number + channel).normal(size=SIZE) + 3 * (drawn(number) > 0)


def drawn(number: int, rater: int = 0, values: tuple[int, ...] = (1,)) -> np.ndarray:
    """A block, one stripe for each of the values; raters move its edge."""
    mask = np.zeros(SIZE)
    for at, value in enumerate(values):
        mask[4 + 3 * at : 7 + 3 * at, 4 : 10 + rater % 2 + number % 3, 1:5] = value
    return mask


def save(path: Path, data: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*SPACING_MM, 1])), path)


def bids(root: Path) -> None:
    for n in PERSONS:
        save(root / f"sub-{n:02d}/anat/sub-{n:02d}_T2w.nii.gz", scan(n))
        for rater in (1, 2):
            name = f"sub-{n:02d}_T2w_label-GM_desc-rater{rater}_mask.nii.gz"
            save(root / f"derivatives/labels/sub-{n:02d}/anat/{name}", drawn(n, rater))


def bids_of_sessions(root: Path) -> None:
    for n in PERSONS:
        for session in (1, 2):
            name = f"sub-{n}Ses{session}"
            save(root / name / "anat" / f"{name}_T2starw.nii.gz", scan(n, session))
            save(root / "derivatives/labels" / name / "anat" / f"{name}_T2starw_dseg.nii.gz", drawn(n, 0, (1, 2)))
    rows = "".join(f"sub-{n}Ses{session}\t{'AB'[n % 2]}\n" for n in PERSONS for session in (1, 2))
    (root / "participants.tsv").write_text("participant_id\tsite\n" + rows)


def nnunet(root: Path) -> None:
    for n in PERSONS:
        for channel in (0, 1):
            save(root / f"imagesTr/la_{n:03d}_{channel:04d}.nii.gz", scan(n, channel))
        mask = drawn(n, 0, (1, 2))
        mask[..., :2] = 3  # nobody looked at these slices
        save(root / f"labelsTr/la_{n:03d}.nii.gz", mask)
    facts = {"channel_names": {"0": "T2", "1": "ADC"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}}
    (root / "dataset.json").write_text(json.dumps(facts | {"numTraining": 6, "file_ending": ".nii.gz"}))


def nnunet_1(root: Path) -> None:
    nnunet(root)
    facts = {"modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background", "1": "PZ", "2": "TZ"}}
    (root / "dataset.json").write_text(json.dumps(facts))


def decathlon(root: Path) -> None:
    for n in PERSONS:
        save(root / f"imagesTr/hippocampus_{n:03d}.nii.gz", scan(n))
        save(root / f"labelsTr/hippocampus_{n:03d}.nii.gz", drawn(n, 0, (1, 2)))
    listed = [
        {"image": f"./imagesTr/hippocampus_{n:03d}.nii.gz", "label": f"./labelsTr/hippocampus_{n:03d}.nii.gz"} for n in PERSONS
    ]
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    (root / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "labels": labels, "training": listed, "test": []}))


def scgm(root: Path) -> None:
    for n in PERSONS:
        save(root / f"site{n % 2 + 1}-sc{n:02d}-image.nii.gz", scan(n))
        for rater in range(1, 5):
            save(root / f"site{n % 2 + 1}-sc{n:02d}-mask-r{rater}.nii.gz", drawn(n, rater, (1, 2)))


def msseg(root: Path) -> None:
    for n in PERSONS:
        at = root / f"Training/Center_0{n % 2 + 1}/Patient_{n:02d}"
        for contrast in ("FLAIR", "T1"):
            save(at / f"Preprocessed_Data/{contrast}_preprocessed.nii.gz", scan(n))
        save(at / "Masks/Consensus.nii.gz", drawn(n))
        for rater in range(1, 8):
            save(at / f"Masks/ManualSegmentation_{rater}.nii.gz", drawn(n, rater))


def brats(root: Path) -> None:
    for n in PERSONS:
        for channel, name in enumerate(("flair", "t1", "t1ce", "t2")):
            save(root / f"BraTS20_Training_{n:03d}/BraTS20_Training_{n:03d}_{name}.nii.gz", scan(n, channel))
        save(root / f"BraTS20_Training_{n:03d}/BraTS20_Training_{n:03d}_seg.nii.gz", drawn(n, 0, (1, 2, 4)))


def brats_2023(root: Path) -> None:
    for n in PERSONS:
        name = f"BraTS-GLI-{n:05d}-000"
        for channel, contrast in enumerate(("t2f", "t1n", "t1c", "t2w")):
            save(root / name / f"{name}-{contrast}.nii.gz", scan(n, channel))
        save(root / name / f"{name}-seg.nii.gz", drawn(n, 0, (1, 2, 3)))


def table(root: Path) -> None:
    rows = ["case,subject,site,image,GM:ann,GM:ben,age"]
    for n in PERSONS:
        save(root / f"scans/{n}.nii.gz", scan(n))
        for rater, who in enumerate(("ann", "ben")):
            save(root / f"masks/{n}_{who}.nii.gz", drawn(n, rater))
        rows.append(f"c{n},p{n},A,scans/{n}.nii.gz,masks/{n}_ann.nii.gz,masks/{n}_ben.nii.gz,40")
    (root / "cases.csv").write_text("\n".join(rows))


LAYOUTS: dict[Callable[[Path], None], str] = {
    bids: "BIDS",
    bids_of_sessions: "BIDS",
    nnunet: "nnU-Net",
    nnunet_1: "nnU-Net",
    decathlon: "Decathlon",
    scgm: "SCGM",
    msseg: "MSSEG",
    brats: "BraTS",
    brats_2023: "BraTS",
    table: "table",
}


@pytest.mark.long
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_a_folder_becomes_a_report_without_an_edit(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    told = softseg_here("init", "set", "--out", "first.py", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert f"{LAYOUTS[make]}: " in told.stdout
    assert "wrote first.py; look at the data next: " in told.stdout
    for command in (["check"], ["run", "--debug"]):
        ended = softseg_here(*command, "first.py", cwd=tmp_path)
        assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    assert (tmp_path / "runs/first-debug/report/index.html").is_file()


def tutorial(folder: Path) -> list[list[str]]:
    """The commands that it prints, and the folder that it begins with: hippocampi in the form of their release."""
    decathlon(folder / "Task04_Hippocampus")
    text = (Path(__file__).parents[2] / "docs/tutorial.md").read_text(encoding="utf-8")
    return [shlex.split(line) for line in re.findall(r"^ {4}softseg (.*)$", text, re.MULTILINE)]


def test_the_tutorial_leads_to_a_plan_of_the_study(tmp_path: Path) -> None:
    for words in tutorial(tmp_path)[:4]:
        ended = softseg_here(*words, cwd=tmp_path)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
    assert words[0] == "plan"
    assert "hippocampus: 2 candidates, each on 5 splits: 10 fits" in ended.stdout
    assert (tmp_path / "montage.png").is_file()


@pytest.mark.long
def test_the_tutorial_leads_to_a_report_and_to_soft_maps(tmp_path: Path) -> None:
    for words in (commands := tutorial(tmp_path)):
        ended = softseg(*words, cwd=tmp_path)
        assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
        if words[0] == "init":  # as step 3 of it says for what takes too long
            study = tmp_path / "hippocampus.py"
            study.write_text(study.read_text().replace("epochs=50", "epochs=3"))
    assert [words[0] for words in commands] == ["init", "check", "run", "plan", "run", "report", "predict"]
    assert (tmp_path / "runs/hippocampus/report/index.html").is_file()
    assert len([*(tmp_path / "maps").glob("*.nii.gz")]) == 2
