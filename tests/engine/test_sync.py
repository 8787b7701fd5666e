"""softseg sync with a real MLflow: what waited arrives, a server that knows nothing is told the ledger, a server that is away loses
nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import softseg_here
from scripted import make_study, score_of, splits_of
from test_tracking import free_port, losses, runs_of, server, task

from softseg_dist.record.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.sources import Sources
from softseg_dist.tracking.tracker import Tracker, default_uri
from softseg_dist.training.task import FitResult, history_path, left_in

pytestmark = pytest.mark.engine
STUDY = make_study(("a",))


def ran(folder: Path, uri: str, num_splits: int = 3) -> None:
    """The run folder of a study that ran while its MLflow server was away."""
    ledger = Ledger(folder)
    code = Sources("s.py", {"s.py": "raise RuntimeError('sync runs the code of a study')"})
    ledger.open_study(STUDY, splits_of(STUDY), sources=code)
    ledger.write_candidate(CandidateRecord(name="a", origin="fixed", number=0, recipe=json_of(STUDY.candidates["a"])))
    ledger.write("run.json", {"tracking_uri": uri})
    (folder / "report").mkdir()
    (folder / "report/index.html").write_text("<p>report</p>")
    tracker = Tracker(uri, folder, STUDY)
    for split in range(num_splits):
        tracker.fit_started(task(split))
        tracker.epoch(f"a/{split:03d}", {"epoch": 1.0, "loss": 0.5})
        (folder / f"fits/a/{split:03d}").mkdir()
        history_path(folder / f"fits/a/{split:03d}").write_text('{"epoch": 1, "loss": 0.5}\n')
        result = FitResult(
            candidate="a", split=split, state="finished", score=score_of(task(split)), files=left_in(folder / f"fits/a/{split:03d}")
        )
        ledger.write_result(result)
        tracker.fit_ended(result)
    tracker.candidate_ended("a", list(ledger.results().values()))
    tracker.artifact(folder / "report/index.html", "report")
    tracker.close()


def sync(folder: Path, *args: str) -> tuple[int, dict[str, object]]:
    done = softseg_here("sync", folder, "--json", *args, cwd=folder.parent)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_what_waited_for_a_server_arrives_when_it_is_there(tmp_path: Path) -> None:
    port = free_port()
    ran(tmp_path / "first", f"http://127.0.0.1:{port}")
    spool = tmp_path / "first/mlflow_spool.jsonl"
    waited = spool.read_bytes()
    code, told = sync(tmp_path / "first")
    assert (code, told["sent"], told["waiting"]) == (1, 0, waited.count(b"\n"))
    assert spool.read_bytes() == waited
    moved = (tmp_path / "first").rename(tmp_path / "elsewhere")  # the report is found all the same
    with server(port, tmp_path / "server") as uri:
        assert sync(moved) == (0, {"tracking_uri": uri, "sent": waited.count(b"\n"), "waiting": 0, "notes": []})
        runs = runs_of(uri)
        assert {key: run.info.status for key, run in runs.items()} == dict.fromkeys(
            ("study", "a", "a/000", "a/001", "a/002"), "FINISHED"
        )
        assert losses(uri, runs["a/001"].info.run_id) == [(1, 0.5)]
        assert not (moved / "mlflow_spool.jsonl").exists()
    assert list((tmp_path / "server/artifacts").rglob("index.html"))


def test_a_server_that_knows_nothing_is_told_what_the_ledger_knows(tmp_path: Path) -> None:
    ran(tmp_path / "run", default_uri(tmp_path / "run"), num_splits=2)
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):  # the second time changes nothing
        code, told = sync(tmp_path / "run", "--tracking-uri", other)
        assert (code, told["sent"], told["waiting"], told["notes"]) == (0, 0, 0, [])
    runs = runs_of(other)
    statuses = {"study": "KILLED", "a": "KILLED", "a/000": "FINISHED", "a/001": "FINISHED"}  # a third split is left
    assert {key: run.info.status for key, run in runs.items()} == statuses
    assert runs["a/001"].data.metrics["score"] == score_of(task(1))
    assert losses(other, runs["a/001"].info.run_id) == [(1, 0.5)]


def test_a_run_that_is_in_use_is_refused(tmp_path: Path) -> None:
    ran(tmp_path, default_uri(tmp_path), num_splits=1)
    with Ledger(tmp_path).lock():
        refused = softseg_here("sync", tmp_path, cwd=tmp_path)
    assert refused.returncode == 2
    assert "in use by process" in refused.stderr
