"""softseg evaluate on real and simulated data: perfect maps are perfect, and a run stands beside folders in one report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import softseg_here
from sealed_files import value_of

import softseg_dist
from softseg_dist import Bids, DataSet, EvaluateOptions, MonteCarlo, Phantom, Recipe, Study
from softseg_dist.data.volume import write_volume
from softseg_dist.numerics.metrics import TABLE

pytestmark = pytest.mark.engine

HIPPOCAMPUS = Bids(
    "hippocampus_msd", image="T1w", labels={n: f"label-hippocampus_dseg:{k}" for k, n in ((1, "anterior"), (2, "posterior"))}
)
GRAY_MATTER = Bids("gm_challenge", image="T2starw", labels={"GM": "gmseg-manual"}, person=r"sub-(\d+)")
RATED = Phantom(subjects=6, size=(40, 40), num_slices=6, raters=4)


def predict(data: DataSet, root: Path | None, folder: Path, shift: int = 0) -> Path:
    """Files of the raters' mean of every case, moved by `shift` voxels, named as `softseg predict` names them."""
    for case in data.cases(root):
        loaded = case.load()
        for label, soft in zip(data.classes, loaded.raters.mean(axis=0), strict=True):
            path = folder / f"{case.name}_label-{label}_softseg.nii.gz"
            write_volume(path, np.roll(soft, shift, axis=0), loaded.geometry)
    return folder


@pytest.mark.parametrize("data", [GRAY_MATTER, HIPPOCAMPUS, RATED], ids=lambda data: getattr(data, "folder", "phantom"))
def test_the_references_as_predictions_are_perfect(data: DataSet, real_data: Path, tmp_path: Path) -> None:
    study = Study(
        name="perfect", question="Is perfect perfect?", data=data, splits=MonteCarlo(), candidates={"a": Recipe()}, subjects=12
    )
    maps = predict(data, real_data, tmp_path / "maps")
    run = softseg_dist.evaluate(
        {"itself": maps, "again": maps}, study, real_data, tmp_path, options=EvaluateOptions(control="again")
    )
    rows = run.results[run.results["reference"].isin(["mean", "raters"])]
    one_hard_rater = data != RATED
    for name, row in TABLE.items():
        if row.perfect in ("always", "at .5") or (row.perfect == "one hard rater" and one_hard_rater):
            values = rows.loc[(rows["metric"] == name) & (rows["threshold"].isna() | (rows["threshold"] == 0.5)), "value"].dropna()
            assert len(values), name
            assert np.allclose(values, row.best, rtol=0, atol=1e-6), (name, values[values != row.best].unique())
    assert run.tests["difference"].tolist() == [0.0]
    assert run.tests["p"].isna().all()
    assert "itself and the control again have equal scores" in run.answer
    assert run.report().exists()


STUDY = '''"""Tiny."""
from softseg_dist import Dice, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet, factorial

BASE = Recipe(network=UNet(filters=(4, 8)), loss=Dice(), optim=Optim(lr=5e-3, epochs=2, batch_size=8))
STUDY = Study(
    name="tiny", question="Does it run?", data=Phantom(subjects=SUBJECTS, size=(24, 24), num_slices=4, raters=2),
    preprocess=Preprocess(dim=2), splits=MonteCarlo(count=3), candidates=factorial(BASE, label=("hard", "soft")), control="hard",
)
'''


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study file, its run, and maps of its raters' means."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "tiny.py").write_text(STUDY.replace("SUBJECTS", "6"))
    (folder / "other.py").write_text(STUDY.replace("SUBJECTS", "7"))
    done = softseg_here("run", "tiny.py", "--local", cwd=folder)
    assert done.returncode == 0, done.stderr
    data = Phantom(subjects=6, size=(24, 24), num_slices=4, raters=2)
    for split, one in enumerate(value_of(folder / "runs/tiny/splits.json")):
        predict(data, None, folder / "maps" / f"fold_{split}", shift=1)
        for path in (folder / "maps" / f"fold_{split}").iterdir():
            if not any(path.name.startswith(subject) for subject in one["test"]):
                path.unlink()
    return folder


def rows_of(folder: Path, candidate: str) -> pd.DataFrame:
    table = softseg_dist.load(folder).results
    table = table[table["candidate"] == candidate].drop(columns=["study", "candidate"])
    key = [name for name in table.columns if name != "value"]
    return table.sort_values(key).reset_index(drop=True).astype(dict.fromkeys(key, str))


def test_a_run_beside_a_folder_per_split_keeps_its_rows_and_is_crossed(ran: Path) -> None:
    ended = softseg_here(
        *("evaluate", "tiny.py", "--predictions", "hard=runs/tiny/fits/hard", "--predictions", "moved=maps"),
        *("--splits", "runs/tiny/splits.json", "--name", "crossed", "--json"),
        cwd=ran,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (ran / told["report"]).is_file()
    assert "moved" in told["answer"]
    trained, kept = rows_of(ran / "runs/tiny", "hard"), rows_of(ran / "runs/crossed", "hard")
    of_one_fit = trained.merge(kept, how="left", indicator=True)["_merge"] == "left_only"
    pd.testing.assert_frame_equal(trained[~of_one_fit].reset_index(drop=True), kept)
    assert not trained.loc[of_one_fit, "threshold"].isin(["nan", "0.5"]).any()
    run = softseg_dist.load(ran / "runs/crossed")
    assert run.tests["num_splits"].tolist() == [3]
    assert run.tests["reference"].tolist() == ["hard"]
    for more in (["--csv"], ["--latex"], ["--json"]):
        assert softseg_here("report", "runs/crossed", *more, cwd=ran).returncode == 0
    assert "crossed: 6 of 6 fits finished, 0 failed" in softseg_here("status", "runs/crossed", cwd=ran).stdout
    compared = softseg_here("compare", "runs/tiny", "runs/crossed", "--candidate-a", "hard", "--candidate-b", "hard", cwd=ran)
    assert "has the same scores as" in compared.stdout, compared.stderr
    refused = softseg_here("refit", "runs/crossed", cwd=ran)
    assert (refused.returncode, refused.stderr) == (
        2,
        "error: runs/crossed: these predictions were made elsewhere: there is nothing to train\n",
    )


def test_without_splits_a_run_is_averaged_over_its_splits(ran: Path) -> None:
    run = softseg_dist.evaluate({"ours": ran / "runs/tiny/fits/soft", "moved": ran / "maps"}, ran / "tiny.py", out=ran / "runs")
    assert run.folder == str(ran / "runs/tiny-evaluation")
    trained = softseg_dist.load(ran / "runs/tiny").results
    trained = trained[(trained["candidate"] == "soft") & (trained["metric"] == "brier_skill") & (trained["reference"] == "mean")]
    judged = run.results[(run.results["candidate"] == "ours") & (run.results["metric"] == "brier_skill")]
    judged = judged[judged["reference"] == "mean"].set_index("case")["value"]
    expected = trained.groupby("case", observed=True)["value"].mean()
    assert {str(case): value for case, value in judged.items()} == pytest.approx(
        {str(c): v for c, v in expected.items()}, rel=1e-12
    )
    assert run.ranking["num_splits"].tolist() == [1, 1]
    assert not run.ranking["threshold_grid"].notna().any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["other.py", "--predictions", "ours=runs/tiny"],
            "ours: a run is compared if it was judged by the same masks: mean volumes",
        ),
        (["tiny.py", "--predictions", "maps"], "--predictions takes NAME=FOLDER, got 'maps'"),
        (["tiny.py", "--predictions", "a=maps", "--predictions", "a=maps"], "each candidate has its own name, got a, a"),
        (["tiny.py", "--predictions", "a=nowhere"], "there is no folder of predictions nowhere"),
        (["tiny.py", "--predictions", "a=maps", "--out", "s3://lab/runs"], "a folder of this machine, got s3://lab/runs"),
        (["tiny.py", "--predictions", "a=maps", "--name", "tiny"], "holds the run of a study"),
        (["tiny.py", "--predictions", "a=maps", "--splits", "three.json"], "cannot read the splits three.json"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line_and_exit_code_2(ran: Path, arguments: list[str], message: str) -> None:
    ended = softseg_here("evaluate", *arguments, cwd=ran)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
