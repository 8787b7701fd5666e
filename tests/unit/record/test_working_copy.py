"""The driver's copy of a remote run folder: the newer file wins both ways, and what is gone there is gone here."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from s3_server import BUCKET

from softseg_dist.places import Place
from softseg_dist.record.remote import WorkingCopy


@pytest.fixture
def copy(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkingCopy:
    monkeypatch.setenv("SOFTSEG_CACHE", str(tmp_path / "cache"))
    return WorkingCopy(f"s3://{BUCKET}/{uuid.uuid4().hex}/tiny")


def put(copy: WorkingCopy, *names: str) -> None:
    for name in names:
        (copy.place / name).write(name.encode())


def here(copy: WorkingCopy) -> set[str]:
    return {path.relative_to(copy.folder).as_posix() for path in copy.folder.rglob("*") if path.is_file()}


def test_what_is_asked_for_is_fetched_and_nothing_else(copy: WorkingCopy) -> None:
    put(copy, "run.json", "fits/a_0.5/000.json", "fits/a_0.5/000/result.json", "fits/a_0.5/000/checkpoint.pt")
    copy.pull("run.json", "fits/*/*.json")
    copy.pull("run.json", "fits/*/*.json")
    assert here(copy) == {"run.json", "fits/a_0.5/000.json"}
    assert (copy.folder / "run.json").read_bytes() == b"run.json"


def test_the_newer_file_wins(copy: WorkingCopy) -> None:
    put(copy, "mlflow.db")
    copy.pull("mlflow.db")
    (copy.folder / "mlflow.db").write_bytes(b"what this driver knows")
    os.utime(copy.folder / "mlflow.db", (time.time() + 60, time.time() + 60))
    copy.pull("mlflow.db")
    assert (copy.folder / "mlflow.db").read_bytes() == b"what this driver knows"
    os.utime(copy.folder / "mlflow.db", (1, 1))
    copy.pull("mlflow.db")
    assert (copy.folder / "mlflow.db").read_bytes() == b"mlflow.db"


def test_a_fit_that_was_removed_there_is_removed_here(copy: WorkingCopy) -> None:
    put(copy, "fits/a/000.json", "fits/a/001.json")
    copy.pull("fits/*/*.json")
    (copy.place / "fits/a/000.json").delete()
    copy.pull("fits/*/*.json")
    assert here(copy) == {"fits/a/001.json"}


def test_files_and_folders_are_sent_and_what_is_gone_is_removed(copy: WorkingCopy) -> None:
    (copy.folder / "report").mkdir(parents=True)
    (copy.folder / "report/index.html").write_bytes(b"page")
    (copy.folder / "mlflow_spool.jsonl").write_bytes(b"{}\n")
    copy.push("report", "mlflow_spool.jsonl", "never there")
    assert set(copy.place.walk()) == {"report/index.html", "mlflow_spool.jsonl"}
    (copy.folder / "mlflow_spool.jsonl").unlink()
    copy.push("mlflow_spool.jsonl")
    assert set(copy.place.walk()) == {"report/index.html"}


def test_a_local_run_folder_is_its_own_copy(tmp_path: Path) -> None:
    (tmp_path / "fits").mkdir()
    (tmp_path / "fits/000.json").write_text("{}")
    copy = WorkingCopy(tmp_path)
    assert copy.folder == tmp_path
    copy.pull("*.json")
    copy.push("nothing")
    assert WorkingCopy(f"file://{tmp_path}").folder == tmp_path
    assert Place.at(tmp_path).walk().keys() == {"fits/000.json"}
