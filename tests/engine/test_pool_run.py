"""A study of two folders at once: a BIDS folder, each contrast of it, and an nnU-Net folder, read by a class of the study file."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from commands import softseg_here

import softseg_dist

pytestmark = pytest.mark.engine

STUDY = '''"""Does it run on two folders?"""
from softseg_dist import BCE, Bids, Dice, Each, KFold, NnUNet, Optim, Pool, Preprocess, Recipe, Study, UNet, factorial


class Renamed(NnUNet):
    """A reader of the study file."""


BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs=1, batch_size=8))
STUDY = Study(
    name="two",
    question="Does it run on two folders?",
    data=Pool(
        Bids("spine", image=Each("T1w", "T2w"), labels={"GM": "label-GM_mask"}),
        Renamed("Dataset001", labels=("GM",)),
        names=("spine", "head"),
        site="set",
    ),
    preprocess=Preprocess(crop=(16, 16), center="GM"),
    splits=KFold(folds=3),
    candidates=factorial(BASE, loss=(Dice(), BCE())),
    control="dice",
)
'''


def put(path: Path, mask: np.ndarray, seed: int | None = None) -> None:
    """The mask, or with a seed an image of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = mask if seed is None else np.random.default_rng(seed).normal(size=mask.shape) + 3 * mask
    nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([1, 1, 3, 1])), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people in each folder; volumes differ in size, and the third of BIDS has one contrast."""
    folder = tmp_path_factory.mktemp("two")
    for n in range(1, 4):
        body, head = np.zeros((20, 18 + n, 4)), np.zeros((24, 24, 3))
        body[5:12, 6:12, 1:3] = head[8:15, 9 : 14 + n, :] = 1
        for contrast in ("T1w", "T2w")[: 2 if n < 3 else 1]:
            put(folder / f"spine/sub-{n}/anat/sub-{n}_{contrast}.nii.gz", body, 10 * n + len(contrast) + (contrast == "T1w"))
        put(folder / f"spine/derivatives/d/sub-{n}/anat/sub-{n}_label-GM_mask.nii.gz", body)
        put(folder / f"Dataset001/imagesTr/c{n}_0000.nii.gz", head, n)
        put(folder / f"Dataset001/labelsTr/c{n}.nii.gz", 2 * head)
    facts = {"labels": {"background": 0, "WM": 1, "GM": 2}, "channel_names": {"0": "T1w"}}
    (folder / "Dataset001/dataset.json").write_text(json.dumps(facts))
    (folder / "two.py").write_text(STUDY)
    return folder


def test_a_pool_is_checked_run_and_reported_as_any_data_set(folder: Path) -> None:
    checked = softseg_here("check", "two.py", "--data-root", folder, cwd=folder)
    assert checked.returncode == 0, checked.stdout
    assert "8 cases" in checked.stdout
    ran = softseg_here("run", "two.py", "--data-root", folder, "--debug", "--local", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    run = softseg_dist.load(folder / "runs/two-debug")
    assert {name.partition("-")[0] for name in run.results["case"].astype(str)} == {"head", "spine"}
    data = json.loads((folder / "runs/two-debug/run.json").read_text())["data"]
    assert {data["site_of"][name] for name in ("c1", "sub-1")} == {"head", "spine"}
    of_sets = json.loads((folder / "runs/two-debug/study.json").read_text())["data"]["sets"]
    assert [each["type"] for each in of_sets] == ["Bids", "two:Renamed"]
    assert (folder / "runs/two-debug/report/index.html").is_file()
    (folder / "two.py").write_text(STUDY.replace('"""A reader of the study file."""', '"""Changed."""\n\n    raters = ("rater",)'))
    again = softseg_here("run", "two.py", "--data-root", folder, "--debug", "--local", cwd=folder)
    assert again.returncode == 2
    assert "Renamed" in again.stderr
