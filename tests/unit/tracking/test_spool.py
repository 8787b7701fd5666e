"""The spool: records come back in order, a torn line costs nothing else, a full disk costs nothing that was there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from model_folders import card_of, model_of, saved

from softseg_dist import MonteCarlo, Phantom, Preprocess, Recipe, Study
from softseg_dist.cli.main import _places
from softseg_dist.engine.session import Outcome
from softseg_dist.pipeline import Finished, provenance
from softseg_dist.places import partial_of
from softseg_dist.tracking.tracker import SPOOL, Spool, Tracker, without_password
from softseg_dist.words import next_command

RECORDS = [{"what": "open", "key": str(number)} for number in range(4)]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / SPOOL)
    spool.append(RECORDS[:2])
    spool.append(RECORDS[2:])
    assert spool.read() == RECORDS
    spool.replace(RECORDS[1:])
    assert spool.read() == RECORDS[1:]
    spool.replace([])
    assert spool.read() == []
    assert list(tmp_path.iterdir()) == []


def test_what_follows_a_torn_line_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path / SPOOL)
    spool.append(RECORDS[:2])
    spool.path.write_bytes(spool.path.read_bytes()[:-9])
    spool.append(RECORDS[2:])
    assert spool.read() == [RECORDS[0], *RECORDS[2:]]


def test_a_full_disk_is_told_by_the_spool(tmp_path: Path) -> None:
    (tmp_path / SPOOL).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        Spool(tmp_path / SPOOL).append(RECORDS)
    assert full.value.errno == errno.ENOSPC


def test_a_full_disk_does_not_end_the_thread_that_tells_mlflow(tmp_path: Path) -> None:
    study = Study(name="full", question="?", data=Phantom(), splits=MonteCarlo(count=1), candidates={"a": Recipe()}, control="a")
    partial_of(tmp_path / SPOOL).symlink_to("/dev/full")  # where the spool is written first
    tracker = Tracker("http://127.0.0.1:9", tmp_path, study)  # nobody listens on the discard port
    notes = tracker.close()
    assert any("could not be kept" in note and "No space left" in note for note in notes), notes


def test_a_tracking_uri_is_recorded_without_its_password() -> None:
    assert without_password("https://me:secret@mlflow.lab:5000/a@b") == "https://mlflow.lab:5000/a@b"
    assert without_password("sqlite:////tmp/a@b.db") == "sqlite:////tmp/a@b.db"
    assert without_password(None) is None
    assert (
        provenance("softseg run s.py --tracking-uri http://me:secret@lab")["command"]
        == "softseg run s.py --tracking-uri http://lab"
    )

    told = "softseg run s.py --tracking-uri http://lab --out me@lab"
    assert provenance(told)["command"] == told


def test_commands_that_a_run_prints_can_be_typed(tmp_path: Path) -> None:
    card = card_of(Preprocess(dim=3, crop=(8, 8, 8), center="label-cord_dseg:1|image"), channels=2)
    model = saved(tmp_path / "my model", card, model_of(card))
    ended = Finished("my runs/one", Outcome(1, 0, 0, False), Path("my runs/one/report/index.html"), model, "http://lab:5000")
    printed = "\n".join(_places(ended))
    assert f"{next_command('report', 'my runs/one', json=True)}\n" in printed
    images = ["predict", model, "IMAGE1.nii.gz,IMAGE2.nii.gz"]
    assert f"use it:  {next_command(*images, out='maps', center_mask='MASK.nii.gz')}\n" in printed
    assert "MASK is 'label-cord_dseg:1' of the image" in printed
    assert "open it: http://lab:5000" in printed, "a server has its own page"
