"""What a notebook calls: a run as typed tables, a model that predicts images in memory as `softseg predict` does on disk."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from model_folders import RECIPE, card_of, model_of, saved
from sealed_files import put
from synthetic_run import CELLS, write_run
from synthetic_search import nest
from test_prediction import OBLIQUE, ORIENTATIONS, SHAPE, random_model, scan, write

import softseg_dist
from softseg_dist import Preprocess, UNet, UserError, load, load_model
from softseg_dist.api import FITS, RANKING, RESULTS, TESTS
from softseg_dist.pipeline import numbers_of
from softseg_dist.prediction import predict_images
from softseg_dist.report.ranking import BESIDE
from softseg_dist.report.scores import RULES

HEADER = ("qform_code", "sform_code", "quatern_b", "srow_x", "pixdim", "xyzt_units")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("api") / "s002", CELLS[:5], num_splits=3, failed=[("soft-sigmoid-dice", 2)], proposed=["trial-000"]
    )


def test_the_tables_of_a_run_have_the_documented_columns_and_types(folder: Path) -> None:
    run = load(folder)
    for table, schema in ((run.results, RESULTS), (run.ranking, RANKING), (run.tests, TESTS), (run.fits, FITS)):
        assert {name: str(kind) for name, kind in table.dtypes.items()} == schema
        assert table.index.equals(pd.RangeIndex(len(table)))
        assert len(table) > 0
    assert {*BESIDE, *(f"{what}_{rule}" for what in ("dice_at", "threshold") for rule in RULES)} < set(RANKING)


def test_the_tables_hold_the_numbers_of_the_report(folder: Path) -> None:
    run, numbers = load(folder), numbers_of(folder)
    assert run.answer == numbers["answer"]
    assert run.outcome is None
    for row, standing in zip(run.ranking.itertuples(), numbers["ranking"], strict=True):
        assert (row.candidate, row.rank, row.proposed) == (standing["name"], standing["rank"], standing["proposed"])
        assert (row.mean, row.sd, row.num_subjects) == (standing["mean"], standing["sd"], standing["num_subjects"])
        assert row.dice_at_grid == standing["dice"]["grid"]
        assert row.threshold_dice_optimal == standing["thresholds"]["dice_optimal"]
        assert row.brier == standing["beside"]["brier"]
        assert row.num_undefined == standing["undefined"]
    for row, test in zip(run.tests.itertuples(), numbers["comparisons"], strict=True):
        assert (row.candidate, row.reference, row.p_holm) == (test["candidate"], test["reference"], test["p_holm"])
        assert (row.difference, row.p, row.num_pairs) == (*(test["crossed"][n] for n in ("mean", "p", "num_pairs")),)
        assert (row.p_wilcoxon, row.bootstrap_high) == (test["wilcoxon"]["p"], test["bootstrap"][1])
    fits = run.fits.set_index(["candidate", "split"])
    assert fits.loc[("soft-sigmoid-dice", 2), "state"] == "failed"
    assert fits["score"].isna().sum() == fits["best_epoch"].isna().sum() == 1
    scores = run.results.query("metric == 'dice_dml' and reference == 'mean' and candidate == 'hard-sigmoid-dice'")
    means = scores.groupby(["split", "subject"], observed=True)["value"].mean()
    assert run.ranking.set_index("candidate").loc["hard-sigmoid-dice", "mean"] == pytest.approx(means.mean())


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path)


def test_a_nested_study_has_its_outer_results_and_names_its_runs(tmp_path: Path) -> None:
    nest(tmp_path, gain=0.02)
    put(tmp_path / "splits.json", [])
    run = load(tmp_path)
    assert {name: str(kind) for name, kind in run.results.dtypes.items()} == RESULTS
    assert "outer" in run.answer
    with pytest.raises(UserError, match="outer/000"):
        _ = run.ranking


def test_the_model_of_a_run_is_the_winners_or_that_of_a_named_candidate(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", CELLS[:1], num_splits=1)
    for name, candidate in (("model", "soft"), ("model-hard", "hard")):
        card = card_of(Preprocess(dim=2), candidate=candidate)
        saved(run / name, card, model_of(card))
    assert load(run).model().card.candidate == "soft"
    assert load(run).model("hard").card.candidate == "hard"
    with pytest.raises(UserError, match="holds no model of other"):
        load(run).model("other")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_in_memory_is_predicted_as_its_file_is(tmp_path: Path, orientation: str) -> None:
    folder = random_model(tmp_path / "model", Preprocess(dim=2, spacing_mm=(1.1, 0.6)))
    path = scan(tmp_path / "image.nii.gz", orientation)
    (done,) = predict_images(folder, [[path]], tmp_path / "out")
    written, model = nib.load(done.maps["GM"]), load_model(folder)
    soft = model.predict(nib.load(path))
    assert np.array_equal(soft.affine, nib.load(path).affine)
    assert np.array_equal(soft.get_fdata(), written.get_fdata())
    assert soft.get_data_dtype() == np.float32
    for field in HEADER:
        assert np.array_equal(soft.header[field], written.header[field]), field
    voxels, affine = nib.load(path).get_fdata(), nib.load(path).affine
    assert np.array_equal(model.predict(voxels, affine), written.get_fdata(dtype=np.float32)[None])


def test_channels_and_classes_of_an_image_in_memory_are_those_of_files(tmp_path: Path) -> None:
    recipe = RECIPE.replace(network=UNet(filters=(2, 3)))
    card = card_of(Preprocess(dim=3), recipe, channels=2, classes=("gray matter", "lesion"))
    folder = saved(tmp_path / "model", card, model_of(card, recipe))
    paths = [scan(tmp_path / f"{name}.nii.gz", "LPI", seed) for seed, name in enumerate(("T1w", "T2w"))]
    (done,) = predict_images(folder, [paths], tmp_path / "out")
    written = np.stack([nib.load(done.maps[name]).get_fdata(dtype=np.float32) for name in card.classes])
    model, images = load_model(folder), [nib.load(path) for path in paths]
    assert model.classes == card.classes
    assert np.array_equal(model.predict(images).get_fdata(dtype=np.float32), np.moveaxis(written, 0, -1))
    array = np.stack([image.get_fdata() for image in images])
    assert np.array_equal(model.predict(array, images[0].affine), written)
    with pytest.raises(UserError, match="takes 2 channels per image, in the order of training, got 1"):
        model.predict(images[0])
    moved = nib.Nifti1Image(array[1], images[0].affine + np.eye(4)[:, [3, 3, 3, 0]] * 5)
    with pytest.raises(UserError, match="must lie on one grid"):
        model.predict([images[0], moved])


def test_a_crop_in_memory_needs_its_mask_and_warns_of_what_it_leaves_out(tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", Preprocess(dim=2, crop=(8, 8), center="dseg:2"))
    path, values = scan(tmp_path / "image.nii.gz"), np.ones(SHAPE, dtype=np.uint8)
    values[9:11, 3:5] = 2
    mask = write(tmp_path / "mask.nii.gz", values)
    (done,) = predict_images(folder, [[path]], tmp_path / "out", center_masks=[mask])
    model = load_model(folder)
    with pytest.warns(UserWarning, match=r"covers 38.1% of the image"):
        soft = model.predict(nib.load(path), center_mask=nib.load(mask))
    assert np.array_equal(soft.get_fdata(), nib.load(done.maps["GM"]).get_fdata())
    with pytest.raises(UserError, match="give it as center_mask"):
        model.predict(nib.load(path))


def test_what_is_not_an_image_is_refused_in_plain_words(tmp_path: Path) -> None:
    model = load_model(random_model(tmp_path / "model", Preprocess(dim=2)))
    voxels = np.zeros(SHAPE, dtype=np.float32)
    bad = voxels.copy()
    bad[1, 1, 1] = np.nan
    singular = np.diag([1.0, 1.0, 0.0, 1.0])
    refusals = [
        ((voxels,), "an array needs an affine"),
        ((bad, OBLIQUE), "got 1 NaN or infinite"),
        ((voxels, singular), "affine must be finite, invertible"),
        ((voxels, np.eye(3)), "4 x 4 numbers"),
        ((voxels.astype(complex), OBLIQUE), "3 dimensions of real numbers, got 14 x 12 x 10 of complex128"),
        ((nib.Nifti1Image(np.zeros((8, 8, 8, 3)), OBLIQUE),), "3 dimensions of real numbers, got 8 x 8 x 8 x 3"),
        ((nib.Nifti1Image(np.zeros(SHAPE, dtype=np.complex64), OBLIQUE),), "of complex64"),
        (("image.nii.gz",), "nibabel images or a numpy array with its affine, got str"),
        ((voxels + 1, OBLIQUE), "image is constant"),
    ]
    for arguments, message in refusals:
        with pytest.raises(UserError, match=message):
            model.predict(*arguments)
    image = nib.Nifti1Image(np.random.default_rng(0).random(SHAPE), OBLIQUE)
    image.header.set_qform(np.eye(4), code=1)
    with pytest.raises(UserError, match="sform and qform disagree"):
        model.predict(image)


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def without(blocked: str, code: str, *arguments: object) -> str:
    """What `code` prints in a Python that cannot import the `blocked` packages."""
    program = BLOCKED.format(blocked=blocked.split()) + textwrap.dedent(code)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.engine
def test_predicting_imports_no_ray_mlflow_or_optuna(tmp_path: Path) -> None:
    folder, path = random_model(tmp_path / "model", Preprocess(dim=2)), scan(tmp_path / "image.nii.gz")
    ours = """
        import nibabel, softseg_dist
        print(softseg_dist.load_model(sys.argv[1]).predict(nibabel.load(sys.argv[2])).shape)
    """
    assert without("ray mlflow optuna", ours, folder, path).strip() == str(SHAPE)
    command = "from softseg_dist.cli.main import main; main()"
    printed = without("ray mlflow optuna", command, "predict", folder, path, "--out", tmp_path / "out")
    assert Path(printed.strip()) == tmp_path / "out" / "image_label-GM_softseg.nii.gz"


@pytest.mark.engine
def test_loading_a_run_imports_no_ray_or_mlflow(folder: Path) -> None:
    ours = """
        import softseg_dist
        run = softseg_dist.load(sys.argv[1])
        print(len(run.results) > len(run.ranking) > 0, run.answer != "")
    """
    assert without("ray mlflow", ours, folder).strip() == "True True"


def test_the_demonstration_is_the_quickstart_study() -> None:
    package = Path(softseg_dist.__file__).parent
    assert (package / "demo.py").read_text() == (package.parent / "studies/s001_quickstart.py").read_text()
