"""A session: who is told what, and how it ends with one message, and a valid ledger, when its run folder cannot be written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from softseg_dist import MonteCarlo, Optim, Phantom, Recipe, Search, Study, TuneEach
from softseg_dist.data.splits import Split
from softseg_dist.engine.progress import JsonLines, LiveTable, PlainLines, Progress
from softseg_dist.engine.session import Outcome, SearchSession
from softseg_dist.engine.worker import Ending
from softseg_dist.places import Place, partial_of
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.training.task import FitResult, FitTask

STUDY = Study(
    name="full",
    question="What if the disk is full?",
    data=Phantom(subjects=10),
    splits=MonteCarlo(count=3),
    candidates={"a": Recipe()},
)


def session_of(study: Study, folder: Path, progress: Progress) -> SearchSession:
    splits = study.splits.make({f"sub-{i}": "" for i in range(10)}, 0)
    ledger = Ledger(folder)
    ledger.open_study(study, splits)

    def make_task(candidate: str, recipe: Recipe, split: Split, repeat: int, attempt: int) -> FitTask:
        return FitTask(
            study=study.name,
            seed=0,
            candidate=candidate,
            recipe=recipe,
            split=split,
            objective="dice_dml",
            store="",
            store_fingerprint="",
            repeat=repeat,
            folder=ledger.fit_folder(candidate, split, repeat),
            attempt=attempt,
        )

    found = SearchSession(StudySearcher(study, splits, ledger, make_task), None, progress, Place.at(folder / ".stop"))
    found.start()
    return found


@pytest.fixture
def session(tmp_path: Path) -> SearchSession:
    return session_of(STUDY, tmp_path, Progress())


def result(split: int) -> Ending:
    return Ending(kind="result", result=FitResult(candidate="a", split=split, state="finished", score=0.5))


def full(path: Path) -> None:
    """Make writing `path` meet a full disk."""
    partial_of(path).symlink_to("/dev/full")


def test_a_result_that_cannot_be_recorded_stops_the_session_and_runs_again_next_time(
    session: SearchSession, tmp_path: Path
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
    assert list(Ledger(tmp_path).results()) == ["a/000", "a/002"]


def test_fits_that_cannot_be_asked_to_stop_do_not_hide_why(session: SearchSession, tmp_path: Path) -> None:
    session.next_fit("one")
    full(tmp_path / "fits/a/000.json")
    full(tmp_path / ".stop")
    session.ended_as("one", result(0))
    assert "fits/a/000.json" in str(session.error)
    assert session.ended


def test_ctrl_c_on_a_full_disk_stops_all_the_same(session: SearchSession, tmp_path: Path) -> None:
    session.next_fit("one")
    full(tmp_path / ".stop")
    session.stop()
    session.ended_as("one", Ending(kind="interrupted"))
    assert session.ended
    assert session.outcome().interrupted


def run_all(session: SearchSession, score: Callable[[FitTask], float | None]) -> None:
    number = 0
    while (task := session.next_fit(str(number))) is not None:
        value = score(task)
        known = {"candidate": task.candidate, "split": task.split.index, "score": value}
        state = {"state": "finished"} if value is not None else {"state": "failed", "reason": "loss is nan"}
        session.ended_as(str(number), Ending(kind="result", result=FitResult(**known, **state)))
        number += 1


def propose(trial: Any) -> Recipe:
    return Recipe(optim=Optim(lr=trial.suggest_float("lr", 1e-3, 1e-2)))


def test_who_is_out_of_the_race_is_told_once_and_nothing_of_it_is_counted_as_missing(tmp_path: Path) -> None:
    study = STUDY.replace(splits=MonteCarlo(count=5), search=Search(propose, trials=1), candidates={"a": Recipe()})
    told = io.StringIO()
    raced = session_of(study, tmp_path, PlainLines(told))
    run_all(raced, lambda task: task.split.index / 10 + (task.candidate == "a"))
    assert raced.outcome() == Outcome(finished=5 + 3, failed=0, unfinished=0, interrupted=False)
    assert told.getvalue().count("trial-000 is out of the race: brier_skill -1.0000 (p = ") == 1
    assert told.getvalue().count(") against a over 3 splits") == 1
    assert (raced.progress.total, raced.progress.planned_fits["trial-000"]) == (8, 3)
    loser = raced.searcher.candidates["trial-000"]
    assert loser.raced is not None
    assert (loser.raced.incumbent, loser.values) == ("a", loser.raced.values)
    again = session_of(study, tmp_path, PlainLines(told))
    assert again.ended
    assert again.outcome() == raced.outcome()
    assert told.getvalue().count("out of the race") == 1


def test_a_candidate_without_a_rate_that_works_is_told_once(tmp_path: Path) -> None:
    study = STUDY.replace(tune_each=TuneEach(trials=2, splits=1))
    told = io.StringIO()
    tuned = session_of(study, tmp_path, PlainLines(told))
    run_all(tuned, lambda task: None if "~" in task.candidate else 0.5)
    assert told.getvalue().count("a: every learning rate that was tried has failed: it keeps its own, 0.001") == 1
    assert tuned.outcome() == Outcome(finished=3, failed=2, unfinished=0, interrupted=False)


def test_what_a_machine_could_not_do_is_told_once_however_many_fits_say_it(tmp_path: Path) -> None:
    told = io.StringIO()
    session = session_of(STUDY, tmp_path, PlainLines(told))
    note = "graph: not used, because"
    for split, fit_id in enumerate(("one", "two", "three")):
        assert session.next_fit(fit_id) is not None
        ended = FitResult(candidate="a", split=split, state="finished", score=0.5, notes=(note,))
        session.ended_as(fit_id, Ending(kind="result", result=ended))
    assert [line for line in told.getvalue().splitlines() if note in line] == [f"a/000: {note}"]


def test_the_live_table_shows_what_has_ended_and_what_runs() -> None:
    table, text = LiveTable(io.StringIO()), io.StringIO()
    table.planned("a", 4, 4)
    for split, score in enumerate((0.5, 0.75, None)):
        known = {"candidate": "a", "split": split, "score": score}
        table.finished(FitResult(**known, **({"state": "finished"} if score else {"state": "failed", "reason": "nan"})))
    table.epoch("a/003", {"epoch": 2.0, "loss": 0.25})
    Console(file=text, width=80).print(table.render())
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[0].startswith("3/4 fits, ")
    assert lines[1:] == ["a/003 epoch 2 loss 0.25", "candidate fits mean score", "a 3/4, 1 failed 0.6250"]


def test_the_live_table_lays_out_what_fits_the_terminal_and_at_the_end_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINES", "12")
    table, text = LiveTable(io.StringIO()), io.StringIO()
    for number in range(50):
        table.planned(f"c{number:02d}", 4, 200)
    Console(file=text).print(table.render())
    assert "c11" in text.getvalue()
    assert "c12" not in text.getvalue()
    table.close()
    Console(file=text).print(table.render())
    assert "c49" in text.getvalue()


def test_lines_say_what_was_done_before_and_what_ends() -> None:
    plain, lines = io.StringIO(), io.StringIO()
    for shown in (PlainLines(plain), JsonLines(lines)):
        shown.start(3, [FitResult(candidate="a", split=0, state="finished", score=0.5)])
        shown.epoch("a/001", {"epoch": 1.0, "loss": 0.25})
        shown.finished(FitResult(candidate="a", split=1, state="finished", score=0.75, duration_s=9))
        shown.finished(FitResult(candidate="a", split=2, state="failed", reason="loss is nan"))
        shown.close()
        shown.note("done")
    first, scored, failed, note = plain.getvalue().splitlines()
    assert (first, note) == ("3 fits, 1 of them done before", "done")
    assert scored.startswith("2/3  a/001  score 0.7500  (9.0 s)  ")
    assert failed == "3/3  a/002  failed: loss is nan"
    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["start", "epoch", "fit", "fit", "end", "note"]
    assert events[1] == {"event": "epoch", "fit": "a/001", "metrics": {"epoch": 1.0, "loss": 0.25}}
    assert (events[3]["fit"], events[3]["state"], events[3]["done"], events[3]["total"]) == ("a/002", "failed", 3, 3)
