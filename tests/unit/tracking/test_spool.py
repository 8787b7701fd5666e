"""The spool and the address of MLflow: records come back in order, a torn line costs nothing else, a full disk costs nothing."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
from model_folders import card_of, model_of, saved
from sqlalchemy import make_url

from softseg_dist import MonteCarlo, Phantom, Preprocess, Recipe, Study
from softseg_dist.cli.main import _places
from softseg_dist.engine.session import Outcome
from softseg_dist.errors import UserError
from softseg_dist.frozen import unsealed
from softseg_dist.pipeline import Finished
from softseg_dist.record.status import SPOOL
from softseg_dist.tracking.delivery import TAKEN, Spool, server_address
from softseg_dist.tracking.tracker import Tracker, default_uri
from softseg_dist.words import next_command

RECORDS = [{"what": "open", "key": str(number)} for number in range(4)]


def taken(spool: Spool) -> list[dict[str, object]]:
    """All that is left, sent."""
    found = spool.collect()
    for _ in found:
        spool.sent()
    return found


def test_records_come_back_in_order_and_what_was_sent_is_gone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / SPOOL)
    spool.append(RECORDS[:2])
    spool.append(RECORDS[2:3])
    assert spool.collect() == RECORDS[:3]
    spool.append(RECORDS[3:])
    assert Spool(spool.path).collect() == RECORDS, "a process that dies now has lost nothing"
    spool.sent()
    assert spool.collect() == RECORDS[1:3], "what is left comes first"
    assert taken(spool) == RECORDS[1:3]
    spool.shorten()
    assert [unsealed(line) for line in spool.path.read_bytes().splitlines()] == RECORDS[3:]
    assert taken(spool) == RECORDS[3:]
    assert spool.close() == 0
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_sent_stays_and_is_known_as_of_an_earlier_session(tmp_path: Path) -> None:
    first = Spool(tmp_path / SPOOL)
    first.append(RECORDS[:2])
    assert first.close() == 2
    second = Spool(first.path)
    second.append(RECORDS[2:])
    assert taken(second) == RECORDS[:2]
    assert second.collect() == RECORDS[2:]
    second.sent()
    assert (second.num_sent, second.num_late) == (3, 2)
    assert second.close() == 1
    assert [unsealed(line) for line in second.path.read_bytes().splitlines()] == RECORDS[3:]
    second.sent()  # of a thread that nobody waits for
    second.shorten()
    assert second.path.is_file(), "the file may be another's"


def test_what_waits_for_a_server_that_is_away_waits_in_the_file(tmp_path: Path) -> None:
    spool, num, at_a_time = Spool(tmp_path / SPOOL), 3 * TAKEN + 1, 1_000
    tracemalloc.start()
    for first in range(0, num, at_a_time):
        spool.append([{"what": "open", "key": f"{key:05d}"} for key in range(first, min(first + at_a_time, num))])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < spool.path.stat().st_size / 10
    keys, sizes = list[str](), list[int]()
    while records := taken(spool):
        keys += [str(record["key"]) for record in records]
        spool.shorten()
        sizes.append(len(records))
    assert keys == sorted(keys)
    assert sizes == [TAKEN, TAKEN, TAKEN, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", [b'{"what": "op', b"[1, 2]\n", b'\xff\x00\n{"what": "log", "key": "a", "metrics": 3}\n\n'])
def test_what_follows_a_damaged_line_is_kept(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / SPOOL).write_bytes(damaged)
    spool = Spool(tmp_path / SPOOL)
    spool.append(RECORDS)
    assert taken(spool) == RECORDS
    assert spool.num_late == 0
    (tmp_path / SPOOL).write_bytes(damaged)
    assert Spool(tmp_path / SPOOL).close() == 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_full_disk_does_not_take_waits_in_memory(tmp_path: Path) -> None:
    (tmp_path / SPOOL).symlink_to("/dev/full")
    spool = Spool(tmp_path / SPOOL)
    spool.append(RECORDS[:2])
    assert "No space left" in spool.problem
    (tmp_path / SPOOL).unlink()
    spool.append(RECORDS[2:])
    assert (spool.problem, Spool(spool.path).collect()) == ("", RECORDS)
    assert taken(spool) == RECORDS


def test_a_disk_that_takes_nothing_does_not_end_the_thread_that_tells_mlflow(tmp_path: Path) -> None:
    study = Study(name="full", question="?", data=Phantom(), splits=MonteCarlo(count=1), candidates={"a": Recipe()}, control="a")
    (tmp_path / SPOOL).mkdir()  # no file can be written there
    tracker = Tracker("http://127.0.0.1:9", tmp_path, study)  # nobody listens on the discard port
    (note,) = tracker.close()
    assert note.startswith("3 records for MLflow could not be kept: [Errno 21] Is a directory")


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "htp://lab:5000", "mlruns", "file:///lab/mlruns", "sqlite:////no/such/folder/m.db"]
)
def test_what_can_be_no_address_of_mlflow_is_refused_at_once(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match=f"the tracking URI {uri}"):
        server_address(uri)


@pytest.mark.parametrize("name", ["50%20", "what?", "a#b"])
def test_the_address_of_a_database_is_that_of_its_file_whatever_its_folder_is_called(tmp_path: Path, name: str) -> None:
    uri = default_uri(tmp_path / name)
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")
    (tmp_path / name).mkdir()
    known = server_address(f"{uri}?timeout=5")
    assert known is not None
    assert known.original == f"{uri}?timeout=5"


def test_a_file_that_is_no_database_is_refused_and_a_relative_one_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("buy milk, and more than sixteen bytes")
    with pytest.raises(UserError, match="is no SQLite database and cannot become one"):
        server_address("sqlite:///notes.txt")
    found = server_address("sqlite:///lab.db?timeout=9")
    assert found is not None
    assert found.original == f"sqlite:///{tmp_path}/lab.db?timeout=9"


def test_a_database_without_its_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)  # Python's way to say that it is not installed
    with pytest.raises(UserError, match=r"postgresql\+psycopg2://lab/db needs the package psycopg2") as refused:
        server_address("postgresql+psycopg2://me:secret@lab/db")
    assert "secret" not in str(refused.value)


def test_the_environment_names_the_server_unless_an_option_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert server_address(None) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@lab:5000")
    for given, shown in ((None, "http://lab:5000"), ("http://other:5000", "http://other:5000")):
        address = server_address(given)
        assert address is not None
        assert address.shown == shown


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
