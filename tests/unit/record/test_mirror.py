"""A fit with a remote folder: it finds what it left there and leaves what it makes; no checkpoint is ahead of its history."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from s3_server import BUCKET

from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store
from softseg_dist.engine.worker import StopFile, reason_of, run_fit
from softseg_dist.places import Place
from softseg_dist.record.remote import FRESH_S, Mirror, mirrored
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker

SPLIT = MonteCarlo(count=1).make({f"sub-{i}": "" for i in range(10)}, 0)[0]
RESULT = FitResult(candidate="a", split=0, state="finished", score=0.5)


GIVEN = ("recipe", "split", "store", "store_fingerprint", "checkpoint_every_s")


def task(folder: str, **changes: object) -> FitTask:
    given = {"recipe": Recipe(), "split": SPLIT, "store": "none.arrow", "store_fingerprint": "0"} | changes
    return FitTask(study="s", seed=0, candidate="a", objective="dice_dml", folder=folder, **given)


@pytest.fixture
def remote(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a fit's folder; scratch folders are made in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/fits/a/000"


def run(folder: str, fit, **changes: object) -> dict[str, str]:
    """The fit as a worker runs it."""
    config = {"task": task(folder, **changes).model_dump_json(), "stop": str(Place.at(folder) / ".stop")}
    return run_fit(fit, None, config, Worker(), lambda metrics: None)


def names(folder: str) -> list[str]:
    return Place.at(folder).names()


def test_a_fit_works_in_a_folder_of_its_node_that_is_gone_when_it_has_ended(remote: str, tmp_path: Path) -> None:
    seen: list[Path] = []

    def fit(task: FitTask, worker: Worker) -> FitResult:
        folder = Path(task.folder)
        seen.append(folder)
        (folder / "checkpoint.pt").write_bytes(b"1")
        worker.saved()
        assert names(remote) == ["checkpoint.pt"]
        (folder / "result.json").write_text("{}")
        (folder / "checkpoint.pt").unlink()
        return RESULT

    assert "finished" in run(remote, fit)["ending"]
    assert names(remote) == ["result.json"]
    assert seen[0].parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    for where in (str(tmp_path), f"file://{tmp_path}"):
        with mirrored(task(where)) as (here, saved):
            assert here.folder == str(tmp_path)
            saved()


def test_an_interrupted_fit_goes_on_elsewhere_from_its_checkpoint(remote: str) -> None:
    def first(task: FitTask, worker: Worker) -> FitResult:
        (Path(task.folder) / "history.jsonl").write_text('{"epoch": 1}\n')
        (Path(task.folder) / "checkpoint.pt").write_bytes(b"epoch 1")
        worker.saved()
        raise Interrupted

    def second(task: FitTask, worker: Worker) -> FitResult:
        assert (Path(task.folder) / "checkpoint.pt").read_bytes() == b"epoch 1"
        assert (Path(task.folder) / "history.jsonl").read_text() == '{"epoch": 1}\n'
        return RESULT

    assert "interrupted" in run(remote, first)["ending"]
    assert "finished" in run(remote, second)["ending"]


def test_checkpoint_and_result_are_sent_after_what_they_rely_on(tmp_path: Path) -> None:
    """As a push that breaks off anywhere shows: a folder in the place of one file makes it fail there."""
    order = ["best.safetensors", "history.jsonl", "checkpoint.pt", "result.json"]
    for broken in range(len(order)):
        folder = tmp_path / str(broken)
        place = Place.at(tmp_path / f"there-{broken}")
        (place / order[broken] / "in the way").write(b"")
        folder.mkdir()
        for name in order:
            (folder / name).write_bytes(b"new")
        with pytest.raises(OSError, match=r"in the way|directory"):
            Mirror(place, folder).push()
        assert place.names() == sorted(order[:broken])


def test_only_what_has_changed_is_sent_and_what_is_gone_is_removed(remote: str, tmp_path: Path) -> None:
    place, folder = Place.at(remote), tmp_path / "scratch"
    (place / "history.jsonl").write(b"1\n")
    (place / "old.bin").write(b"x")
    folder.mkdir()
    mirror = Mirror(place, folder)
    mirror.pull()
    (place / "history.jsonl").write(b"made by somebody else, so that sending it again would be seen\n")
    (folder / "old.bin").unlink()
    (folder / "new.bin").write_bytes(b"y")
    mirror.push()
    assert names(remote) == ["history.jsonl", "new.bin"]
    assert b"somebody else" in ((place / "history.jsonl").read() or b"")


def test_why_a_fit_broke_reaches_the_driver_and_is_gone_when_it_runs_again(remote: str) -> None:
    def broken(task: FitTask, worker: Worker) -> FitResult:
        raise ValueError("the fit broke")

    with pytest.raises(ValueError, match="the fit broke"):
        run(remote, broken)
    assert reason_of(task(remote)) == f"ValueError: the fit broke (see {remote}/error.txt)"
    run(remote, lambda task, worker: RESULT)
    assert names(remote) == []
    assert reason_of(task(remote)) == "its process died (killed, out of memory, or crashed)"


@pytest.mark.engine
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_real_fit_that_moves_to_another_node_ends_as_one_that_stayed(remote: str, tmp_path: Path, steps: int) -> None:
    """Its process is gone after `steps` steps: nothing is sent but what was sent with its checkpoints."""
    data, preprocess = Phantom(subjects=6, size=(24, 24), num_slices=4), Preprocess(dim=2)
    store = build_store(tmp_path / "stores", data.cases(None), data, preprocess)
    recipe = Recipe(network=UNet(filters=(4, 8)), optim=Optim(lr=5e-3, epochs=3, batch_size=8))
    split = MonteCarlo(count=1).make({case.subject: case.site for case in data.cases(None)}, 0)[0]
    real = task(remote, recipe=recipe, split=split, store=str(store), store_fingerprint=store.stem, checkpoint_every_s=0.0)
    stayed = fit(real.replace(folder=str(tmp_path / "stayed")), Worker())

    counts, sent = itertools.count(1), []
    place = Place.at(remote)
    lost = tmp_path / "lost node"
    lost.mkdir()
    mirror = Mirror(place, lost)

    def saved() -> None:
        mirror.push()
        sent.append(place.names())

    with pytest.raises(Interrupted):
        fit(real.replace(folder=str(lost)), Worker(stop=lambda: next(counts) >= steps, saved=saved))
    assert all("checkpoint.pt" in names for names in sent)
    assert len(sent) >= 1

    moved = json.loads(run(remote, fit, **{name: getattr(real, name) for name in GIVEN})["ending"])["result"]
    assert moved["resumed_epoch"] is not None
    assert (moved["score"], moved["test_score"]) == (stayed.score, stayed.test_score)
    assert names(remote) == ["best.safetensors", "cases.parquet", "history.jsonl", "result.json"]
    for name in ("best.safetensors", "history.jsonl"):
        assert (place / name).read() == (tmp_path / "stayed" / name).read_bytes()
    again = json.loads(run(remote, fit, **{name: getattr(real, name) for name in GIVEN})["ending"])["result"]
    assert again == moved, "a fit that has ended is not run again"


def test_a_full_disk_of_the_node_is_a_users_error_and_not_a_death(tmp_path: Path) -> None:
    def fit(task: FitTask, worker: Worker) -> FitResult:
        with Path("/dev/full").open("w") as file:
            file.write("history")
        return RESULT

    ending = run(str(tmp_path / "fit"), fit)["ending"]
    assert "user_error" in ending
    assert "No space left on device" in ending
    assert not (tmp_path / "fit/error.txt").exists()


def test_the_scratch_folder_of_a_process_that_was_killed_is_removed_by_the_next_fit(remote: str, tmp_path: Path) -> None:
    dead = tmp_path / f"softseg-fit-{os.getuid()}-dead"
    dead.mkdir()
    code = f"import os; from pathlib import Path; from softseg_dist.locks import hold; path = Path({str(dead / '.lock')!r})\n"
    code += "with hold(path): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (dead / ".lock").exists()
    with mirrored(task(remote)):
        assert dead.exists(), "as young as that it may be somebody's who has not locked it yet"
    long_ago = time.time() - FRESH_S - 1
    os.utime(dead / ".lock", (long_ago, long_ago))
    with mirrored(task(remote)) as (mine, _):
        os.utime(Path(mine.folder) / ".lock", (long_ago, long_ago))
        with mirrored(task(remote)):
            assert Path(mine.folder).exists(), "a fit that runs keeps its folder"
        assert not dead.exists()


def test_the_stop_file_is_seen_through_s3(remote: str) -> None:
    place = Place.at(remote) / ".stop"
    assert not StopFile(place.uri)()
    place.write(b"stop\n")
    assert StopFile(place.uri)()
    place.delete()
    assert not StopFile(place.uri)()
