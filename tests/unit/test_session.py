"""A session whose run folder cannot be written: it ends with one message, what ran may run again, and the ledger stays valid."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from softseg_dist import MonteCarlo, Phantom, Recipe, Study
from softseg_dist.data.splits import Split
from softseg_dist.search.ledger import Ledger
from softseg_dist.search.live import Progress
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.search.session import Outcome, Session
from softseg_dist.search.worker import Ending, StopFile
from softseg_dist.training.task import FitResult, FitTask

STUDY = Study(
    name="full",
    question="What if the disk is full?",
    data=Phantom(subjects=10),
    splits=MonteCarlo(count=3),
    candidates={"a": Recipe()},
)
SPLITS = STUDY.splits.make({f"sub-{i}": "" for i in range(10)}, 0)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    ledger = Ledger(tmp_path)
    ledger.open_study(STUDY, SPLITS)

    def make_task(candidate: str, recipe: Recipe, split: Split, attempt: int) -> FitTask:
        return FitTask(
            study="full",
            seed=0,
            candidate=candidate,
            recipe=recipe,
            split=split,
            objective="dice_dml",
            store="",
            store_fingerprint="",
            folder=ledger.fit_folder(candidate, split),
            attempt=attempt,
        )

    found = Session(StudySearcher(STUDY, SPLITS, ledger, make_task), None, Progress(), StopFile(f"{tmp_path}/.stop"))
    found.start()
    return found


def result(split: int) -> Ending:
    return Ending(kind="result", result=FitResult(candidate="a", split=split, state="finished", score=0.5))


def full(path: Path) -> None:
    """Make writing `path` meet a full disk."""
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")


def test_a_result_that_cannot_be_recorded_stops_the_session_and_runs_again_next_time(
    session: Session, tmp_path: Path
) -> None:
    for fit_id in ("one", "two", "three"):
        assert session.next_fit(fit_id) is not None
    session.ended_as("one", result(0))
    full(tmp_path / "fits/a/001.json")
    session.ended_as("two", result(1))
    assert session.next_fit("four") is None
    assert (tmp_path / ".stop").exists()
    session.ended_as("three", result(2))
    assert session.ended
    assert f"cannot write {tmp_path}/fits/a/001.json: No space left on device" in str(session.error)
    assert "the same command goes on" in str(session.error)
    assert session.outcome() == Outcome(finished=2, failed=0, unfinished=1, interrupted=False)
    assert [split for _, split in Ledger(tmp_path).results()] == [0, 2]


def test_fits_that_cannot_be_asked_to_stop_do_not_hide_why(session: Session, tmp_path: Path) -> None:
    session.next_fit("one")
    full(tmp_path / "fits/a/000.json")
    full(tmp_path / ".stop")
    session.ended_as("one", result(0))
    assert "fits/a/000.json" in str(session.error)
    assert session.ended


def test_ctrl_c_on_a_full_disk_stops_all_the_same(session: Session, tmp_path: Path) -> None:
    session.next_fit("one")
    full(tmp_path / ".stop")
    session.stop()
    session.ended_as("one", Ending(kind="interrupted"))
    assert session.ended
    assert session.outcome().interrupted
