"""softseg status: what a run folder says of itself, on this machine and on S3, without a lock and without torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from rich.console import Console
from s3_server import BUCKET

from softseg_dist import MonteCarlo, Optim, Phantom, Recipe, Search, Study, TuneEach
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.record.ledger import CandidateRecord, Ledger, RaceRecord, json_of
from softseg_dist.record.status import SEEMS_TO_RUN_S, CandidateStatus, show, status_of
from softseg_dist.training.task import FitResult

BASE = Recipe(optim=Optim(epochs=9))


def propose(trial):
    return BASE


STUDY = Study(
    name="tiny",
    question="How far is it?",
    data=Phantom(subjects=10),
    splits=MonteCarlo(count=2),
    candidates={"hard": BASE, "soft": BASE.replace(label="soft")},
    search=Search(propose, trials=3),
)


@pytest.fixture(params=["path", pytest.param("s3", marks=pytest.mark.engine)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path / "cache"))
    if request.param == "path":
        return str(tmp_path / "tiny")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/tiny"


def written(folder: str) -> Ledger:
    """hard: both splits ended, one of them failed; soft: one fit runs; trial-000 has failed, two trials are not asked yet."""
    ledger = Ledger(folder)
    ledger.open_study(STUDY, STUDY.splits.make({f"sub-{i}": "" for i in range(10)}, STUDY.seed))
    for number, name in enumerate(("hard", "soft", "trial-000")):
        origin = "proposed" if name.startswith("trial") else "fixed"
        ledger.write_candidate(CandidateRecord(name=name, origin=origin, number=number, recipe=json_of(BASE)))
    ledger.write_result(FitResult(candidate="hard", split=0, state="finished", score=0.75))
    ledger.write_result(FitResult(candidate="hard", split=1, state="failed", reason="nan"))
    ledger.write_result(FitResult(candidate="trial-000", split=0, state="failed", reason="nan"))
    (ledger.place / "fits/soft/000/history.jsonl").write(b'{"epoch": 1}\n{"epoch": 2}\n')
    return ledger


def test_every_fit_is_counted_once(folder: str) -> None:
    written(folder)
    status = status_of(folder)
    # hard and soft: 2 splits each; trial-000 has failed on its first and runs no other; 2 trials of 2 splits are to come
    assert (status.planned, status.finished, status.failed, status.left) == (2 + 2 + 1 + 4, 1, 2, 5)
    assert [(fit.key, fit.epochs) for fit in status.running] == [("soft/000", 2)]
    assert status.candidates == (
        CandidateStatus("hard", 1, 1, 2, 0.75, left=0),
        CandidateStatus("soft", 0, 0, 2, None, left=2),
        CandidateStatus("trial-000", 0, 1, 2, None, left=0),
    )
    assert 0 <= status.quiet_s < 60


def test_a_candidate_that_was_raced_out_has_nothing_left(folder: str) -> None:
    ledger = written(folder)
    ledger.write_candidate(CandidateRecord(name="trial-001", origin="proposed", number=1, recipe=json_of(BASE)))
    ledger.write_result(FitResult(candidate="trial-001", split=0, state="finished", score=0.25))
    before = status_of(folder)
    ledger.write_race(RaceRecord(candidate="trial-001", incumbent="hard", after=1, difference=-0.5, p=0.01))
    status = status_of(folder)
    assert (status.planned, status.left) == (before.planned - 1, before.left - 1)
    assert status.candidates[-1] == CandidateStatus("trial-001", 1, 0, 2, 0.25, left=0, raced_out=True)
    out = io.StringIO()
    show(status, Console(file=out, width=100, highlight=False))
    assert "trial-001  1/2, raced out  0.2500" in out.getvalue()


def test_trials_of_a_learning_rate_count_until_it_is_chosen(folder: str) -> None:
    ledger = Ledger(folder)
    study = STUDY.replace(search=None, tune_each=TuneEach(trials=2, splits=1))
    ledger.open_study(study, study.splits.make({f"sub-{i}": "" for i in range(10)}, study.seed))
    for number, name in enumerate(("hard~0", "hard~1", "soft~0", "soft~1")):
        ledger.write_candidate(CandidateRecord(name=name, origin="tuning", number=number, recipe=json_of(BASE)))
    ledger.write_result(FitResult(candidate="hard~0", split=0, state="finished", score=0.5))
    status = status_of(folder)
    assert (status.planned, status.finished, status.left) == (2 * 2 + 4, 1, 2 * 2 + 3)
    ledger.write_candidate(CandidateRecord(name="hard", origin="fixed", number=0, recipe=json_of(BASE)))
    status = status_of(folder)  # hard~1 was given up
    assert (status.planned, status.finished, status.left) == (2 * 2 + 3, 1, 2 * 2 + 2)
    assert [c.name for c in status.candidates] == ["hard", "soft", "hard~0", "hard~1", "soft~0", "soft~1"]


def test_a_fit_that_has_long_been_silent_does_not_run(tmp_path: Path) -> None:
    ledger = written(str(tmp_path))
    long_ago = time.time() - SEEMS_TO_RUN_S - 1
    os.utime(ledger.working / "fits/soft/000/history.jsonl", (long_ago, long_ago))
    assert status_of(str(tmp_path)).running == ()
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    assert status_of(str(tmp_path)).quiet_s > SEEMS_TO_RUN_S


def test_driver_and_waiting_records_are_told_and_nothing_is_written(folder: str) -> None:
    ledger = written(folder)
    (ledger.working / "mlflow_spool.jsonl").parent.mkdir(parents=True, exist_ok=True)
    (ledger.working / "mlflow_spool.jsonl").write_text('{"what": "open"}\n{"what": "close"}\n')
    with ledger.lock():
        before = ledger.place.walk()
        assert f"process {os.getpid()} on " in str(status_of(folder).driver)
        assert ledger.place.walk() == before
    status = status_of(folder)
    assert (status.driver, status.mlflow_waiting) == (None, 2)


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed_names_every_candidate(tmp_path: Path, terminal: bool) -> None:
    written(str(tmp_path))
    out = io.StringIO()
    show(status_of(str(tmp_path)), Console(file=out, force_terminal=terminal, width=100, highlight=False))
    text = out.getvalue()
    assert "tiny: 1 of 9 fits finished, 2 failed, 1 running, 5 left" in text
    assert "running soft/000: 2 epochs" in text
    assert all(part in text for part in ("hard", "2/2, 1 failed", "0.7500", "the same command goes on"))


def test_a_folder_that_is_no_run_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        status_of(folder)


def test_the_command_prints_json_and_imports_nothing_that_trains(tmp_path: Path) -> None:
    written(str(tmp_path))
    code = "import sys; from softseg_dist.cli.main import app; app(sys.argv[1:], standalone_mode=False); "
    code += "print(sorted({'torch', 'ray', 'mlflow', 'optuna', 'pandas'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "status", str(tmp_path), "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    told, _, loaded = out.rpartition("}\n")
    assert json.loads(told + "}")["planned"] == 9
    assert loaded.strip() == "[]"


def test_a_torn_result_is_not_counted(folder: str) -> None:
    written(folder)
    (Place.at(folder) / "fits/hard/001.json").write(b'{"candid')
    assert status_of(folder).failed == 1


def test_repeats_count_as_fits(tmp_path: Path) -> None:
    ledger = written(str(tmp_path))
    ledger.open_study(STUDY.replace(repeats=2), STUDY.splits.make({f"sub-{i}": "" for i in range(10)}, STUDY.seed))
    ledger.write_result(FitResult(candidate="soft", split=1, repeat=1, state="finished", score=0.25))
    status = status_of(str(tmp_path))
    counts = {c.name: (c.finished, c.failed, c.splits, c.left) for c in status.candidates}
    assert counts == {"hard": (1, 1, 4, 2), "soft": (1, 0, 4, 3), "trial-000": (0, 1, 4, 0)}
    assert status.planned == 4 + 4 + 1 + 2 * 4
