"""spacing_mm="median": numbers from the headers of a study's cases, found once, and the same wherever preprocessing is named."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import value_of
from typer.testing import CliRunner

import softseg_dist
from softseg_dist import Bids, Phantom, Preprocess, Study
from softseg_dist.cli.main import app
from softseg_dist.data.cases import Case, CaseData
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.source_files import Digest, sha256_of
from softseg_dist.data.store import fingerprint
from softseg_dist.engine.cautions import inspect_first
from softseg_dist.engine.context import prepare
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions
from softseg_dist.prediction import load_model
from softseg_dist.study_file import load_study

SIZE = (16, 16, 6)
MEDIAN = Preprocess(spacing_mm="median", crop=(16, 16))
STUDY = """
from softseg_dist import Bids, MonteCarlo, Optim, Preprocess, Recipe, Study, UNet

BASE = Recipe(network=UNet(filters=(2, 4)), optim=Optim(epochs=1))
STUDY = Study(
    name="m",
    question="?",
    data=Bids("ds", image="T2w", labels={"GM": "seg"}),
    preprocess=Preprocess(spacing_mm="median", crop=(16, 16)),
    splits=MonteCarlo(count=2),
    candidates={"a": BASE},
)
"""


def put(root: Path, number: int, spacing_mm: Sequence[float]) -> None:
    """A case in the layout of BIDS; all have as many voxels."""
    subject, mask = f"sub-{number}", np.zeros(SIZE, np.float32)
    mask[4:10, 5:11, 1:5] = 1
    image = np.random.default_rng(number).normal(size=SIZE).astype(np.float32) + 3 * mask
    for part, voxels in (("T2w", image), ("T2w_seg", mask)):
        path = root / ("ds" if part == "T2w" else "ds/derivatives/labels") / subject / "anat" / f"{subject}_{part}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([*spacing_mm, 1])), path)


def mixed(root: Path, sizes: Sequence[Sequence[float]] = ((0.5, 0.6, 3), (0.5, 0.7, 4), (0.8, 0.8, 2), (0.75, 1, 3))) -> Study:
    for number, spacing_mm in enumerate(sizes):
        put(root, number, spacing_mm)
    (root / "m.py").write_text(STUDY)
    return load_study(root / "m.py").study


class Empty(Case):
    """A case in memory, of voxels of this size."""

    site, rater_names = "", ("a",)

    def __init__(self, number: int, spacing_mm: Sequence[float]) -> None:
        self.name = self.subject = f"sub-{number}"
        self.spacing_mm = spacing_mm

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        return (self.name,)

    def load(self) -> CaseData:
        geometry, zeros = Geometry((2, 2, 2), np.diag([*self.spacing_mm, 1])), np.zeros((1, 1, 2, 2, 2), np.float32)
        return CaseData(zeros[0], zeros, None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        raise AssertionError(part)


@given(sizes=st.lists(st.tuples(*[st.floats(0.2, 5)] * 3), min_size=1, max_size=9), data=st.data())
def test_it_is_the_median_along_each_axis_in_any_order_of_the_cases(
    sizes: list[tuple[float, float, float]], data: st.DataObject
) -> None:
    cases = [Empty(number, spacing_mm) for number, spacing_mm in enumerate(sizes)]
    found = Preprocess(dim=3, spacing_mm="median").resolved(cases)
    assert found.spacing_mm == pytest.approx(tuple(map(statistics.median, zip(*sizes, strict=True))), rel=1e-5)
    assert Preprocess(dim=3, spacing_mm="median").resolved(data.draw(st.permutations(cases))) == found
    for number, axis in enumerate("xyz"):
        in_plane = Preprocess(axis=axis, spacing_mm="median").resolved(cases).spacing_mm  # type: ignore[arg-type]
        assert in_plane == tuple(mm for each, mm in enumerate(found.spacing_mm or ()) if each != number)
    assert found.resolved(cases) is found


def test_axes_outside_of_an_item_do_not_count(tmp_path: Path) -> None:
    cases = mixed(tmp_path).data.cases(tmp_path)
    assert MEDIAN.resolved(cases) == Preprocess(spacing_mm=(0.625, 0.75), crop=(16, 16))
    assert MEDIAN.resolved(cases[:3]).spacing_mm == (0.5, 0.7)
    assert Preprocess(dim=3, spacing_mm="median").resolved(cases).spacing_mm == (0.625, 0.75, 3)
    assert Preprocess(axis="x", spacing_mm="median").resolved(cases).spacing_mm == (0.75, 3)
    put(tmp_path, 9, (4, 0.6, 0.6))  # across x, so that y and z are in plane
    cases = Bids("ds", image="T2w", labels={"GM": "seg"}).cases(tmp_path)
    assert Preprocess(axis="auto", spacing_mm="median").resolved(cases).spacing_mm == (0.6, 0.7)


def test_files_that_cannot_be_read_do_not_count(tmp_path: Path) -> None:
    study = mixed(tmp_path)
    image = tmp_path / "ds/sub-3/anat/sub-3_T2w.nii.gz"
    image.write_bytes(image.read_bytes()[:20])
    cases = study.data.cases(tmp_path)
    assert MEDIAN.resolved(cases).spacing_mm == (0.5, 0.7)
    assert MEDIAN.resolved(cases[3:]).spacing_mm is None
    with pytest.raises(UserError, match=r"sub-3_T2w\.nii\.gz"):
        prepare(study, tmp_path, tmp_path / "stores", print)


def test_one_case_alone_has_no_median() -> None:
    with pytest.raises(UserError, match=r"is that of several cases: take Preprocess\(\.\.\.\)\.resolved\(cases\)"):
        MEDIAN.apply(Phantom(subjects=1).cases(None)[0])
    with pytest.raises(ValueError, match="spacing_mm"):
        Preprocess(spacing_mm="mean")


def test_check_and_plan_answer_before_anything_is_prepared(tmp_path: Path) -> None:
    study, seen = mixed(tmp_path), tmp_path / "m.png"
    done = CliRunner().invoke(
        app, ["check", str(tmp_path / "m.py"), "--data-root", str(tmp_path), "--picture", str(seen), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert seen.exists()
    assert not [problem for problem in inspect_first(study, tmp_path) if problem.level == "error"]


def test_the_store_is_that_of_the_numbers(tmp_path: Path) -> None:
    study, lines = mixed(tmp_path), []  # type: tuple[Study, list[str]]
    prepared = prepare(study, tmp_path, tmp_path / "stores", lines.append)
    assert 'spacing_mm="median" of 4 cases is (0.625, 0.75) mm' in lines
    named = MEDIAN.replace(spacing_mm=(0.625, 0.75))
    assert prepared.store.preprocess == named
    assert prepared.fingerprint == fingerprint(study.data.cases(tmp_path), study.data, named)
    assert prepared.resolved(study) == study.replace(preprocess=named)
    assert {prepared.store.sample(index).spacing_mm for index in range(4)} == {(0.625, 0.75)}
    assert prepare(study, tmp_path, tmp_path / "stores", lines.append).uri == prepared.uri
    put(tmp_path, 4, (1.5, 1.5, 3))
    assert prepare(study, tmp_path, tmp_path / "stores", lines.append).store.preprocess.spacing_mm == (0.75, 0.8)


@pytest.mark.engine
def test_a_run_its_model_and_its_restart_have_the_numbers_and_new_cases_are_seen(tmp_path: Path) -> None:
    mixed(tmp_path)
    options = RunOptions(data_root=tmp_path, out=tmp_path / "runs", stores=tmp_path / "stores", local=True)
    run = softseg_dist.run(tmp_path / "m.py", options=options)
    assert value_of(tmp_path / "runs/m/study.json")["preprocess"]["spacing_mm"] == [0.625, 0.75]
    assert "0.625" in (tmp_path / "runs/m/report/index.html").read_text()
    assert softseg_dist.run(tmp_path / "m.py", options=options).results.equals(run.results)
    predictor = load_model(tmp_path / "runs/m")
    assert predictor.card.preprocess == MEDIAN.replace(spacing_mm=(0.625, 0.75))
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=SIZE), np.diag([0.6, 0.6, 3, 1]))
    assert predictor.predict(image).shape == SIZE
    put(tmp_path, 4, (1.5, 1.5, 3))
    with pytest.raises(UserError, match=r"preprocess\.spacing_mm: \(0\.625, 0\.75\) -> \(0\.75, 0\.8\)"):
        softseg_dist.run(tmp_path / "m.py", options=options)
