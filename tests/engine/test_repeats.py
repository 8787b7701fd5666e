"""A study with repeats: each split is trained with several seeds, the same for all candidates; a repeat more extends it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import softseg_dist
from softseg_dist import KFold, MCDropout, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet, factorial
from softseg_dist.engine.finalists import MEMBERS
from softseg_dist.report.comparison import compare
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.scores import soft_rows, soft_scores

pytestmark = pytest.mark.engine
BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs=2, batch_size=8))
STUDY = Study(
    name="tiny",
    question="Is it the seed or the split?",
    data=Phantom(subjects=8, size=(16, 16), num_slices=2, raters=2),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2),
    candidates=factorial(BASE, label=("hard", "soft")),
    control="hard",
    holdout=0.25,
)


def run(folder: Path, repeats: int) -> softseg_dist.Run:
    return softseg_dist.run(STUDY.replace(repeats=repeats), out=folder, local=True)


def test_a_repeat_more_extends_a_study_and_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    once = run(tmp_path / "runs", 1)
    fits = Path(once.folder) / "fits"
    before = {path: path.read_bytes() for path in fits.glob("*/*.json")}
    first = once.results

    twice = run(tmp_path / "runs", 2)
    assert {path: path.read_bytes() for path in before} == before
    assert twice.outcome.finished == 2 * once.outcome.finished == 8
    assert sorted(path.name for path in fits.glob("hard/*.json")) == [
        "000-r1.json", "000.json", "001-r1.json", "001.json", "candidate.json"
    ]  # fmt: skip
    table = twice.results
    pd.testing.assert_frame_equal(table[table["repeat"] == 0].reset_index(drop=True), first.reset_index(drop=True))
    assert sorted(table["repeat"].unique()) == [0, 1]
    assert twice.fits.groupby("candidate")["repeat"].apply(sorted).to_dict() == {"hard": [0, 0, 1, 1], "soft": [0, 0, 1, 1]}

    alone = run(tmp_path / "alone", 2).results  # both repeats in one session: the same numbers
    keys = ["candidate", "split", "repeat", "case", "class", "reference", "metric", "threshold"]
    values = [rows.astype({"case": str}).sort_values(keys)["value"].to_numpy() for rows in (table, alone)]
    np.testing.assert_array_equal(*values)

    loaded = load_run(Path(twice.folder))
    rows = soft_rows(loaded.results, STUDY.objective)
    by_fit = rows.groupby(["candidate", "split", "subject", "repeat"], observed=True)["value"].mean()
    assert (by_fit.xs(0, level="repeat") != by_fit.xs(1, level="repeat")).any(), "another seed trains another model"
    scores, means = soft_scores(loaded.results, STUDY.objective), by_fit.groupby(["candidate", "split", "subject"]).mean()
    for name in ("hard", "soft"):
        for (i, j), score in np.ndenumerate(scores.of(name)):
            key = (name, scores.splits[j], scores.subjects[i])
            assert score == pytest.approx(means[key]) if key in means.index else np.isnan(score)
    assert loaded.holdout is not None
    assert loaded.holdout.groupby("candidate", observed=True)["repeat"].nunique().eq(2).all(), "every fit predicts who is held out"
    opened = json.loads((Path(twice.folder) / "holdout.json").read_text())["opened"]
    assert {"hard/000-r1", "hard/001-r1"} <= {*opened[-1]["fits"]}


def test_ensemble_model_and_comparison_take_all_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = BASE.replace(network=UNet(filters=(4, 8), dropout=0.2))
    study = STUDY.replace(candidates=factorial(recipe, label=("hard", "soft")), holdout=None, uncertainty=(MCDropout(samples=2),))
    folders = [softseg_dist.run(study.replace(repeats=n), out=tmp_path / f"runs{n}", local=True).folder for n in (1, 2)]
    once, twice = (load_run(Path(folder)) for folder in folders)

    assert twice.ensemble is not None
    members = twice.ensemble[twice.ensemble["metric"] == MEMBERS]
    times = {subject: 2 * sum(subject in split.test for split in twice.splits) for subject in twice.tested}
    assert {row.subject: row.value for row in members.itertuples()} == {s: float(n) for s, n in times.items()}

    card = json.loads((Path(folders[1]) / "model/model.json").read_text())
    fits = [fit for fit in twice.finished if fit.candidate == card["candidate"]]
    assert len(fits) == 4
    assert card["epochs"] == max(1, round(np.median([fit.best_epoch or 1 for fit in fits])))
    assert card["test_score"] == pytest.approx(np.mean([fit.test_score for fit in fits]))
    assert card["thresholds"]["grid"] == pytest.approx(np.mean([fit.thresholds["grid"] for fit in fits]))

    (contrast,) = compare((once, twice), ("once", "twice"), ("hard", "hard")).contrasts
    scores = [soft_scores(run.results, STUDY.objective).of("hard") for run in (once, twice)]
    assert contrast.paired_by == "subject and split"
    assert contrast.test.num_pairs == np.isfinite(scores[0]).sum() == np.isfinite(scores[1]).sum()
    assert contrast.b.mean - contrast.a.mean == pytest.approx(np.nanmean(scores[1]) - np.nanmean(scores[0]))


def test_an_outer_split_is_measured_by_all_repeats_of_its_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = STUDY.replace(holdout=None, nested=KFold(folds=3, count=1), repeats=2)
    nested = softseg_dist.run(study, out=tmp_path / "runs", local=True)
    inner = load_run(Path(nested.folder) / "outer/000")
    assert inner.holdout is not None
    own = inner.holdout[(inner.holdout["candidate"] == "hard") & (inner.holdout["grid"] == "own")]
    assert own.groupby("candidate", observed=True)[["split", "repeat"]].apply(lambda of: len(of.drop_duplicates())).item() == 4
    score = soft_scores(inner.holdout, STUDY.objective).of("hard")
    record = json.loads((Path(nested.folder) / "outer.json").read_text())["outer"][0]
    assert record["control_holdout_score"] == pytest.approx(np.nanmean(score))
    outer = soft_rows(nested.results, STUDY.objective)
    assert outer[outer["candidate"] == "hard"]["value"].mean() == pytest.approx(np.nanmean(score))
