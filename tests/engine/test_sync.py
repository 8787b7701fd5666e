"""softseg sync with a real MLflow: what waited arrives, a server that knows nothing is told the ledger, a server that is away loses
nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from commands import softseg, softseg_here
from s3_server import BUCKET
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


def test_a_relative_path_and_a_run_whose_server_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(tmp_path / "run", f"sqlite:///{tmp_path}/lab.db", num_splits=1)
    done = softseg_here("sync", "run", "--json", cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["waiting"]) == (0, 0), done.stdout
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")  # the run has another
    code, told = sync(tmp_path / "run")
    assert (code, told["tracking_uri"]) == (0, f"sqlite:///{tmp_path}/lab.db")
    assert not (tmp_path / "other.db").exists()


TINY = """from softseg_dist import *
BASE = Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=1, batch_size=8))
STUDY = Study(name="tiny", question="Does it run?", data=Phantom(subjects=6, size=(24, 24), num_slices=2),
              preprocess=Preprocess(dim=2), splits=MonteCarlo(count=1), candidates={"a": BASE})
"""


def test_planted_secrets_are_found_in_nothing_that_a_run_leaves_or_prints(tmp_path: Path, s3: dict[str, str]) -> None:
    """The server of MLflow is down, so that its client complains; then other commands look at the run."""
    (tmp_path / "tiny.py").write_text(TINY)
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    own = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "SOFTSEG_CACHE": str(tmp_path / "cache")}
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in keys} | own
    server = "http://pl4nted-user:pl4nted%2F%40%3Fword@127.0.0.1:9/?token=pl4nted/t0k@n?"
    stores = f"--stores=s3://PL4NTEDKEY:pl4nted/secret+x@{BUCKET}/stores?region=us-east-1"
    refused = softseg("run", "tiny.py", "--local", f"--tracking-uri={server}", cwd=tmp_path, env=environment)
    server = server.replace("k@n?", "k%40n%3F")
    done = softseg("run", "tiny.py", "--local", "--json", stores, "--tracking-uri", server, cwd=tmp_path, env=environment)
    assert (refused.returncode, done.returncode) == (2, 0), refused.stderr + done.stderr
    assert "it is not clear where the password of this address ends" in refused.stderr
    assert "MLflow at http://127.0.0.1:9/ was out of reach" in done.stdout
    run = tmp_path / "runs/tiny"
    record = json.loads((run / "run.json").read_text())
    assert record["tracking_uri"] == "http://127.0.0.1:9/"
    assert f"--stores=s3://{BUCKET}/stores?region=us-east-1" in record["command"]
    assert record["store"].startswith(f"s3://{BUCKET}/stores/")
    printed = [
        refused,
        done,
        softseg_here("status", run, "--json", cwd=tmp_path),
        softseg_here("report", run, "--json", cwd=tmp_path),
    ]
    printed += [softseg_here("sync", run, *words, cwd=tmp_path) for words in ((), ("--tracking-uri", server))]
    assert [ended.returncode for ended in printed[2:]] == [0, 0, 1, 1]
    texts = [text for ended in printed for text in (ended.stdout, ended.stderr)]
    assert not [text for text in texts if "pl4nted" in text.lower()]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "mlflow_spool.jsonl", "index.html"} <= {path.name for path in files}
    assert not [path for path in files if b"pl4nted" in path.read_bytes().lower() or "pl4nted" in path.name.lower()]
