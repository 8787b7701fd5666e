"""docs/extending.md: every file on the page is written as printed, loads as a study, and trains one image of every candidate."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import pytest
from extending_files import FILES

from softseg_dist import Phantom, Study
from softseg_dist.data.store import Store, build_store
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.study_file import load_study
from softseg_dist.training.preflight import check_recipes

STUDIES = [name for name, text in FILES.items() if "STUDY = Study(" in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and the images that its data layout describes."""
    root = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for case in Phantom(subjects=4, raters=2).cases(None):
        data = case.load()
        maps = {"images": data.image[0]} | {f"masks/{rater}": data.raters[r, 0] for r, rater in enumerate("AB")}
        for place, voxels in maps.items():
            (root / "data/spine" / place).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, data.affine), root / "data/spine" / place / f"{case.name}.nii.gz")
    return root


def test_the_page_shows_every_kind_of_extension() -> None:
    kinds = ("Loss", "Activation", "Network", "Intensity", "Spatial", "Smoothing", "Splits", "DataSet", "Metric")
    shown = "\n".join(FILES.values())
    assert [kind for kind in kinds if f"({kind}):" not in shown] == []
    assert "def propose(" in shown
    assert "from boundaries import" in shown
    assert set(FILES) - set(STUDIES) == {"with_helper/boundaries.py"}


@pytest.mark.engine
@pytest.mark.parametrize("name", STUDIES)
def test_a_file_of_the_page_is_a_study_whose_candidates_can_be_trained(name: str, folder: Path) -> None:
    study = load_study(folder / name).study
    assert Study.model_validate(study.model_dump(mode="json")) == study
    cases = study.data.cases(folder / "data")
    store = Store.open(build_store(folder / "stores", cases, study.data, study.preprocess))
    splits = study.make_splits({case.subject: case.site for case in cases})
    check_recipes({**study.candidates, **sample_proposals(study)}, store, splits[0])


def test_a_file_of_the_page_names_what_it_takes_by_public_names_alone() -> None:
    for name, text in FILES.items():
        inside = re.findall(r"softseg_dist\.\S+ import|import softseg_dist\.", text)
        assert not inside, f"{name}: {inside}"
