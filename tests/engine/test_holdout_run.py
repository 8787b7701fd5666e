"""Held-out subjects and nested studies from the command line: opened once, never trained on, run again without running anything."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
from commands import softseg_here
from sealed_files import value_of

from softseg_dist.report.run_folder import load_outer, load_run

pytestmark = pytest.mark.engine

STUDY = '''"""Tiny."""
from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, Study, UNet, factorial

BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs=1, batch_size=8))
STUDY = Study(
    name="tiny", question="Is the winner honest?", data=Phantom(subjects=8, size=(16, 16), num_slices=2, raters=2),
    preprocess=Preprocess(dim=2), splits=MonteCarlo(count=2), {more},
    candidates=factorial(BASE, label=("hard", "soft")), control="hard",
)
'''


def write(folder: Path, more: str) -> Path:
    path = folder / "tiny.py"
    path.write_text(STUDY.replace("{more}", more))
    return path


def finished(ran: object) -> dict[str, object]:
    """The last line of a run that was asked for JSON and has ended well."""
    assert ran.returncode == 0, ran.stderr  # type: ignore[attr-defined]
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[attr-defined]


def files(folder: Path, *patterns: str) -> dict[Path, tuple[bytes, int]]:
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    assert found
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_a_holdout_is_opened_once_and_the_model_does_not_know_it(tmp_path: Path) -> None:
    study, run = write(tmp_path, "holdout=0.25"), tmp_path / "runs/tiny"
    first = softseg_here("run", study, "--local", "--json", cwd=tmp_path)
    assert finished(first)["finished"] == 4
    assert "opening 2 held-out subjects" in first.stdout
    loaded = load_run(run)
    assert loaded.holdout is not None
    assert loaded.holdout_record is not None
    winner = loaded.holdout_record.opened[0].winner
    assert set(loaded.holdout["candidate"]) == {winner, "hard"}
    assert set(loaded.holdout["subject"]) == set(loaded.holdout_record.subjects)
    assert not set(loaded.results["subject"]) & set(loaded.holdout_record.subjects)
    assert json.loads((run / "model/model.json").read_text())["num_subjects"] == 8 - 2

    before = files(run, "fits/*/*/holdout.parquet", "fits/*/*.json", "holdout.json")
    rows = pd.read_parquet(run / "holdout.parquet")
    again = softseg_here("run", study, "--local", "--json", cwd=tmp_path)
    assert finished(again)["finished"] == 4
    assert "held-out" not in again.stdout
    assert files(run, "fits/*/*/holdout.parquet", "fits/*/*.json", "holdout.json") == before
    pd.testing.assert_frame_equal(pd.read_parquet(run / "holdout.parquet"), rows)

    refused = softseg_here("run", write(tmp_path, "holdout=0.4"), cwd=tmp_path)
    assert refused.returncode == 2
    assert "holdout: 0.25 -> 0.4" in refused.stderr
    assert "held-out subjects: 2 (" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_a_nested_study_measures_every_inner_winner_on_subjects_that_its_search_has_not_seen(tmp_path: Path) -> None:
    study, run = write(tmp_path, "nested=MonteCarlo(count=2)"), tmp_path / "runs/tiny"
    first = finished(softseg_here("run", study, "--local", "--json", cwd=tmp_path))
    assert (first["finished"], first["planned"]) == (2 * 2 * 2, 2)
    outer = load_outer(run)
    assert outer is not None
    assert [found["run"] for found in outer.record["outer"]] == ["outer/000", "outer/001"]
    splits = value_of(run / "splits.json")
    for split, found in zip(splits, outer.record["outer"], strict=True):
        inner = load_run(run / found["run"])
        seen = {s for part in inner.splits for s in (*part.train, *part.validation, *part.test)}
        assert seen == {*split["train"], *split["validation"]}
        assert inner.holdout is not None
        ours = outer.results[outer.results["split"] == split["index"]]
        assert set(ours["subject"]) == set(split["test"])
        assert set(ours["candidate"]) == {"winner", "hard"}
        objective = {"metric": outer.record["objective"], "reference": "mean"}
        for label, name in (("winner", found["winner"]), ("hard", "hard")):
            theirs = inner.holdout[inner.holdout["candidate"] == name]
            parts = [
                rows[(rows["metric"] == objective["metric"]) & (rows["reference"] == objective["reference"])]["value"]
                for rows in (ours[ours["candidate"] == label], theirs)
            ]
            assert parts[0].mean() == pytest.approx(parts[1].mean())
            score = found["holdout_score" if label == "winner" else "control_holdout_score"]
            assert score == pytest.approx(parts[0].mean())
        keys = [name for name in ours.columns if name != "value"]
        assert not ours.duplicated(keys).any()
    assert not (run / "model").exists()

    before = files(run, "outer/*/fits/*/*.json", "outer/*/holdout.json", "outer/*/fits/*/*/holdout.parquet")
    told = (run / "outer.json").read_bytes(), pd.read_parquet(run / "outer.parquet")
    again = softseg_here("run", study, "--local", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sum(line.startswith("Outer split 00") for line in again.stdout.splitlines()) == 2
    assert "without nested=" in again.stdout
    assert files(run, "outer/*/fits/*/*.json", "outer/*/holdout.json", "outer/*/fits/*/*/holdout.parquet") == before
    assert (run / "outer.json").read_bytes() == told[0]
    pd.testing.assert_frame_equal(pd.read_parquet(run / "outer.parquet"), told[1])

    for command in (("status",), ("report", "--csv")):
        refused = softseg_here(command[0], run, *command[1:], cwd=tmp_path)
        assert refused.returncode == 2
        assert "outer/000" in refused.stderr
    page = unescape(Path(softseg_here("report", run, cwd=tmp_path).stdout.strip()).read_text())
    numbers = json.loads(softseg_here("report", run, "--json", cwd=tmp_path).stdout)
    assert numbers["answer"] in page
    assert numbers["difference"]["num_splits"] == 2
    assert "outer/001/report/index.html" in page
