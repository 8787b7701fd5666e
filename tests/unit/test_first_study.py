"""The study file that `softseg init` writes loads, checks and runs as it is, and suits what was found."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from typer.testing import CliRunner

from softseg_dist import KFold, MonteCarlo, Patch, Preprocess, Study, UserError
from softseg_dist.cli.main import app
from softseg_dist.study_file import load_study
from softseg_dist.words import next_command


def folder_of(
    root: Path, count: int, size: tuple[int, ...], spacing_mm: tuple[float, ...] = (1, 1, 1), grow: int = 0, soft: bool = False
) -> Path:
    """A BIDS-like folder; every subject has `grow` more voxels along x than the one before."""
    generator = np.random.default_rng(0)
    for number in range(count):
        subject, shape = f"sub-{number:02d}", (size[0] + grow * number, *size[1:])
        mask = np.zeros(shape)
        mask[tuple(slice(n // 4, n // 2 + 1) for n in shape)] = 0.75 if soft else 1
        for path, data in (
            (root / subject / "anat" / f"{subject}_T2w.nii.gz", generator.normal(size=shape) + 3 * mask),
            (root / "derivatives/labels" / subject / "anat" / f"{subject}_T2w_seg.nii.gz", mask),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*spacing_mm, 1])), path)
    return root


def study_of(folder: Path, file: Path) -> Study:
    written = CliRunner().invoke(app, ["init", str(folder), "--out", str(file)])
    assert written.exception is None, written.exception
    assert f"wrote {file}; look at the data next: {next_command('check', file)}" in written.output.replace("\n", "")
    return load_study(file).study


def test_thick_slices_are_trained_on_one_by_one_and_sizes_become_equal(tmp_path: Path) -> None:
    study = study_of(folder_of(tmp_path / "ds", 4, (20, 18, 6), (0.5, 0.5, 4), grow=1), tmp_path / "thick.py")
    assert study.preprocess.dim == 2
    assert study.preprocess.spacing_mm is None  # all have the same
    assert study.preprocess.crop == (24, 24)
    assert study.splits == KFold(folds=4)
    assert study.name == "thick"


def test_thick_slices_are_cut_across_the_axis_that_is_thick_in_each_image(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "ds", 4, (20, 18, 6), (0.5, 0.5, 4))
    for number in (1, 2, 3):
        for path in folder.rglob(f"sub-{number:02d}_*.nii.gz"):
            sagittal = nib.load(path).get_fdata(dtype=np.float32).transpose(2, 0, 1)
            nib.save(nib.Nifti1Image(sagittal, np.diag([4, 0.5, 0.5 + 0.1 * (number > 1), 1])), path)
    study = study_of(folder, tmp_path / "turned.py")
    assert study.preprocess == Preprocess(axis="auto", spacing_mm=(0.5, 0.55), crop=(24, 24))
    assert "slices are thick (in 3 cases not across z), so they are trained on one by one" in (tmp_path / "turned.py").read_text()
    sizes = {study.preprocess.apply(case).image.shape for case in study.data.cases(None)}
    assert sizes == {(6, 1, 24, 24)}


def test_large_volumes_are_trained_on_by_patches(tmp_path: Path) -> None:
    study = study_of(folder_of(tmp_path / "ds", 12, (80, 16, 16), soft=True), tmp_path / "large.py")
    assert study.preprocess.dim == 3
    assert study.preprocess.crop is None
    assert study.candidates["soft"].patch == Patch(size=(64, 16, 16))
    assert study.splits == MonteCarlo(count=10)
    assert "soft labels come from masks with values between 0 and 1" in (tmp_path / "large.py").read_text()


def test_other_voxel_sizes_are_resampled_to_the_median(tmp_path: Path) -> None:
    folder_of(tmp_path / "ds", 6, (20, 20, 16))
    for number in range(2):
        for path in (tmp_path / "ds").rglob(f"sub-{number:02d}_*.nii.gz"):
            image = nib.load(path)
            nib.save(nib.Nifti1Image(image.get_fdata(), np.diag([2, 2, 2, 1])), path)
    study = study_of(tmp_path / "ds", tmp_path / "study.py")
    assert study.preprocess.spacing_mm == (1, 1, 1)
    assert study.preprocess.crop == (40, 40, 32)


def test_too_few_persons_and_a_file_that_exists_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "ds", 2, (16, 16, 16))
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "ds"), "--out", str(tmp_path / "s.py")])
    assert isinstance(refused.exception, UserError)
    assert "at least 3 persons" in str(refused.exception)
    (tmp_path / "s.py").write_text("mine")
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "ds"), "--out", str(tmp_path / "s.py")])
    assert "exists already" in str(refused.exception)
    assert (tmp_path / "s.py").read_text() == "mine"
