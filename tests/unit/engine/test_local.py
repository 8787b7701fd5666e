"""Fits in this process end as they do through Ray: accidents, Ctrl-C, races and tuning; and Ray is not imported."""

from __future__ import annotations

import bdb
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softseg_dist import MonteCarlo, Optim, Phantom, Recipe, Resources, Search, Study, TuneEach, pipeline
from softseg_dist.cli.main import _places
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.session import Outcome, run_beside, run_search
from softseg_dist.errors import UserError
from softseg_dist.pipeline import RunOptions, backend_of
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.sources import Sources
from softseg_dist.study_file import load_sources
from softseg_dist.tracking.tracker import Tracker
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker

BASE = Recipe(optim=Optim(epochs=3))
Faults = dict[str, Callable[[Worker], None]]


def propose(trial: Any) -> Recipe:
    return BASE.replace(optim=Optim(epochs=3, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


def study_of(*candidates: str, splits: int = 3, **more: Any) -> Study:
    names = dict.fromkeys(candidates, BASE)
    return Study(name="s", question="?", data=Phantom(subjects=10), splits=MonteCarlo(count=splits), candidates=names, **more)


class Run:
    """Sessions of a study whose fits train nothing; `faults` happen in the first attempt of a fit, by its key."""

    def __init__(self, folder: Path, study: Study, resources: Resources | None = None, debug: bool = False) -> None:
        self.lines, self.starts, self.faults = io.StringIO(), [""], Faults()
        ledger, splits = Ledger(folder), study.splits.make({f"sub-{i}": "" for i in range(10)}, study.seed)
        ledger.open_study(study, splits)
        self.context = RunContext(
            study, splits, Prepared("none.arrow", "0" * 16), ledger, WorkingCopy(folder), resources or Resources(),
            LocalBackend(debug), PlainLines(self.lines), fit=self.fit,
        )  # fmt: skip
        self.starts.clear()

    def search(self) -> Outcome:
        return run_search(self.context)

    def fit(self, task: FitTask, worker: Worker) -> FitResult:
        self.starts.append(task.key)
        worker.report({"epoch": 1.0, "loss": 0.5})
        if task.attempt == 0 and task.key in self.faults:
            self.faults[task.key](worker)
        if worker.stop():
            raise Interrupted
        known = {"candidate": task.candidate, "split": task.split.index, "repeat": task.repeat, "attempt": task.attempt}
        score = task.recipe.optim.lr + task.split.index / 100
        return FitResult(**known, state="finished", score=score, epochs=3, thresholds={"fixed": 0.5})


def breaks(worker: Worker) -> None:
    raise ValueError("the fit broke")


def test_accidents_are_recorded_as_through_ray_and_the_fits_run_again(tmp_path: Path) -> None:
    run = Run(tmp_path, study_of("a"))
    run.faults |= {"a/000": breaks, "a/002": lambda worker: sys.exit(3)}
    assert run.search() == Outcome(3, 0, 0, False)
    assert run.starts == ["a/000", "a/000", "a/001", "a/002", "a/002"]
    assert [result.attempt for _, result in sorted(Ledger(tmp_path).results().items())] == [1, 0, 1]
    text = run.lines.getvalue()
    assert "a/000: ValueError: the fit broke (see " in text
    assert "a/002: it ended with SystemExit(3)" in text
    assert "Traceback" not in text


def test_a_fit_that_breaks_twice_is_given_up_with_its_traceback_and_tried_again_next_time(tmp_path: Path) -> None:
    run = Run(tmp_path, study_of("a"))
    broken = replace(run.context, fit=lambda task, worker: breaks(worker) if task.split.index else run.fit(task, worker))
    assert run_search(broken) == Outcome(1, 2, 0, False)
    assert "in breaks\n" in (tmp_path / "fits/a/001/error.txt").read_text()
    assert "a/001" not in Ledger(tmp_path).results()
    run.starts.clear()
    assert run.search() == Outcome(3, 0, 0, False)
    assert run.starts == ["a/001", "a/002"]
    assert not (tmp_path / "fits/a/001/error.txt").exists()


def test_debug_shows_the_traceback_of_a_fit_that_breaks(tmp_path: Path) -> None:
    run = Run(tmp_path, study_of("a", splits=1), debug=True)
    run.faults["a/000"] = breaks
    assert run.search() == Outcome(1, 0, 0, False)
    assert "in breaks\n" in run.lines.getvalue()


def beside(run: Run) -> FitTask:
    """A fit that is not one of the search, as that of the final model."""
    split = run.context.splits[0].replace(validation=(), test=())
    return run.context.fit_task("a", BASE.replace(optim=Optim(epochs=4)), split)


def test_a_fit_beside_the_search_runs_again_if_it_is_lost_once_and_not_twice(tmp_path: Path) -> None:
    run = Run(tmp_path, study_of("a"))
    run.faults["a/000"] = breaks
    assert run_beside(run.context, beside(run)).attempt == 1
    assert run.starts == ["a/000", "a/000"]
    assert run.lines.getvalue() == "a on all subjects: epoch 1 of 4, loss 0.5\n" * 2
    run_beside(run.context, beside(run).replace(split=run.context.splits[1]))
    assert run.lines.getvalue().endswith("\na/001: epoch 1 of 4, loss 0.5\n"), "one of the search, run anew"
    broken = replace(run.context, fit=lambda task, worker: breaks(worker))
    with pytest.raises(UserError, match=r"^a/000: lost 2 times, the last time: ValueError: the fit broke"):
        run_beside(broken, beside(run))


def test_a_fit_beside_the_search_ends_with_a_mistake_of_the_users_or_with_ctrl_c_after_its_checkpoint(tmp_path: Path) -> None:
    def mistaken(worker: Worker) -> None:
        raise UserError("the store is missing")

    def interrupts(worker: Worker) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert worker.stop()  # a fit writes its checkpoint now

    run = Run(tmp_path, study_of("a"))
    run.faults["a/000"] = mistaken
    with pytest.raises(UserError, match=r"^a/000: the store is missing$"):
        run_beside(run.context, beside(run))
    run.faults["a/000"] = interrupts
    with pytest.raises(KeyboardInterrupt):
        run_beside(run.context, beside(run))
    assert run.lines.getvalue().count("stopping: running fits write their checkpoints") == 1
    run.faults.clear()
    assert run_beside(run.context, beside(run)).state == "finished"
    assert len(run.starts) == 3


def test_a_mistake_of_the_users_stops_the_study_with_its_text(tmp_path: Path) -> None:
    def mistaken(worker: Worker) -> None:
        raise UserError("the store is missing")

    run = Run(tmp_path, study_of("a"))
    run.faults["a/001"] = mistaken
    with pytest.raises(UserError, match=r"^a/001: the store is missing$"):
        run.search()
    assert list(Ledger(tmp_path).results()) == ["a/000"]


def test_the_first_ctrl_c_lets_the_fit_end_and_the_second_does_not(tmp_path: Path) -> None:
    def interrupts(worker: Worker) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert worker.stop()  # a fit writes its checkpoint now

    run, before = Run(tmp_path, study_of("a")), signal.getsignal(signal.SIGINT)
    run.faults["a/001"] = interrupts
    assert run.search() == Outcome(1, 0, 2, True)
    assert run.lines.getvalue().count("stopping: running fits write their checkpoints") == 1

    def insists(worker: Worker) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    run.faults["a/001"] = insists
    assert run.search() == Outcome(1, 0, 2, True)
    assert run.starts == ["a/000", "a/001", "a/001"]
    assert signal.getsignal(signal.SIGINT) is before
    run.faults.clear()
    assert run.search() == Outcome(3, 0, 0, False)


@pytest.mark.engine  # MLflow
def test_ctrl_c_before_the_search_is_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def held(backend: LocalBackend) -> AbstractContextManager[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalBackend, "held", held)
    context = Run(tmp_path / "s", study_of("a")).context
    ended = pipeline._run(context, Tracker(None, tmp_path / "s", context.study), final_model=False)
    assert ended.outcome.interrupted
    assert ended.report is None
    assert list(_places(ended)) == [], "there is nothing yet to look at, or to take numbers of"


def test_quitting_the_debugger_stops_the_study_and_loses_nothing(tmp_path: Path) -> None:
    def quits(worker: Worker) -> None:
        raise bdb.BdbQuit

    run = Run(tmp_path, study_of("a"))
    run.faults["a/001"] = quits
    assert run.search() == Outcome(1, 0, 2, True)


def test_a_debugger_may_hold_a_fit_longer_than_its_time_limit(tmp_path: Path) -> None:
    run = Run(tmp_path, study_of("a", splits=1), Resources(time_limit_s=0.1))
    run.faults["a/000"] = lambda worker: time.sleep(0.3)
    run.search()
    assert run.starts == ["a/000"]
    assert "the time limit of fits does not hold in this process" in run.lines.getvalue()


def test_a_study_is_tuned_and_raced_and_goes_on_the_same_way(tmp_path: Path) -> None:
    tune, search = TuneEach(lr=(1e-3, 0.5), trials=2, splits=1), Search(propose, trials=3)
    run = Run(tmp_path, study_of("a", splits=5, control="a", search=search, tune_each=tune))
    outcome, ledger = run.search(), Ledger(tmp_path)
    assert ledger.candidates()["a"].recipe["optim"]["lr"] == 0.5
    assert sorted(ledger.races()) == ["trial-000", "trial-001", "trial-002"]
    assert outcome == Outcome(len(ledger.results()), 0, 0, False)
    run.starts.clear()
    assert run.search() == outcome
    assert run.starts == []


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"address": "auto"}, "--address"),
        ({"workers_per_fit": 2}, "--workers-per-fit"),
        ({"fits_per_gpu": 4, "max_concurrent": 3}, "--fits-per-gpu and --max-concurrent"),
    ],
)
def test_local_refuses_what_needs_ray(option: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"--local runs one fit at a time in this process: leave out {named}$"):
        backend_of(RunOptions(local=True, **option))
    assert isinstance(backend_of(RunOptions(local=True, workers_per_fit=1, max_concurrent=1)), LocalBackend)


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, True), ({"max_concurrent": 2, "workers_per_fit": 1}, True), ({"address": "auto"}, False),
        ({"workers_per_fit": 2}, False), ({"fits_per_gpu": 1}, False),
    ],
)  # fmt: skip
def test_debug_runs_here_unless_an_option_asks_for_ray(options: dict[str, Any], here: bool) -> None:
    chosen = RunOptions(debug=True, **options)
    assert chosen.in_process == here
    if here:
        assert backend_of(chosen) == LocalBackend(debug=True)


@pytest.mark.engine
def test_what_a_local_run_imports_is_without_ray() -> None:
    code = "import sys, softseg_dist.nested, softseg_dist.tracking.server, softseg_dist.engine.local; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


SEARCHED = """
from softseg_dist import Brier, MonteCarlo, Optim, Phantom, Recipe, Search, Study
class Own(Brier):
    power: float = 1.0
def propose(trial):
    return Recipe(loss=Own(power=trial.suggest_float("power", 1, 2)), optim=Optim(epochs=3))
STUDY = Study(name="s", question="?", data=Phantom(subjects=10), splits=MonteCarlo(count=2), search=Search(propose, trials=2))
"""


def test_a_search_goes_on_with_its_own_classes_when_debug_has_run_the_code_anew(tmp_path: Path) -> None:
    sources = Sources("searched.py", {"searched.py": SEARCHED})
    run = Run(tmp_path, load_sources(sources).STUDY, debug=True)  # type: ignore[union-attr]
    assert run_search(replace(run.context, sources=sources)) == Outcome(4, 0, 0, False)
