"""What a study with many fits must not do: keep handles, or look through all trials that there ever were."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from driven_search import searcher
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from softseg_dist import MonteCarlo, Optim, Phantom, Race, Recipe, Search, Study
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.ray_tune import _InOrder
from softseg_dist.engine.session import SearchSession, run_search
from softseg_dist.engine.worker import Ending
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import status_of
from softseg_dist.study import Resources
from softseg_dist.training.task import FitResult, FitTask, Worker


def no_fit(task: FitTask, worker: Worker) -> FitResult:
    return FitResult(candidate=task.candidate, split=task.split.index, state="finished", score=0.5)


def session(folder: Path) -> None:
    study = Study(
        name="s", question="?", data=Phantom(subjects=10), splits=MonteCarlo(count=2), candidates={"a": Recipe(), "b": Recipe()}
    )
    ledger, splits = Ledger(folder), study.splits.make({f"sub-{i}": "" for i in range(10)}, study.seed)
    ledger.open_study(study, splits)
    prepared, copy = Prepared("none.arrow", "0" * 16), WorkingCopy(folder)
    context = RunContext(study, splits, prepared, ledger, copy, Resources(), LocalBackend(), Progress(), fit=no_fit)
    assert run_search(context).finished == 4
    assert status_of(str(folder)).finished == 4


def test_sessions_leave_no_handle_and_no_thread_behind(tmp_path: Path) -> None:
    found = []
    for number in range(4):
        session(tmp_path / str(number))
        found.append((len(list(Path("/proc/self/fd").iterdir())), threading.active_count()))
    assert found[1:] == found[:1] * 3


def num_calls(folder: Path, count: int, search: Search | None) -> float:
    """Calls of Python functions per fit, from the first to the last event of a session."""
    names = [f"c{number:02d}" for number in range(count)]
    study = Study(
        name="s", question="?", data=Phantom(subjects=10), splits=MonteCarlo(count=4), search=search,
        candidates=dict.fromkeys(names, Recipe()),
    )  # fmt: skip
    driven = SearchSession(searcher(folder, study), None, Progress(), Place.at(folder / ".stop"))
    driven.start()
    calls, fits = Counter[str](), 0
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        while (task := driven.next_fit("fit")) is not None:
            driven.ended_as("fit", Ending(kind="result", result=no_fit(task, Worker())))
            fits += 1
    finally:
        sys.setprofile(None)
    assert driven.ended
    return calls["call"] / fits


def propose(trial: Any) -> Recipe:
    return Recipe(optim=Optim(lr=trial.suggest_float("lr", 1e-4, 1e-1)))


@pytest.mark.parametrize("search", [None, Search(propose, trials=1, race=Race(fixed=True))], ids=["search", "race"])
def test_an_event_costs_the_same_however_many_candidates_there_are(search: Search | None, tmp_path: Path) -> None:
    few, many = (num_calls(tmp_path / str(count), count, search) for count in (8, 32))
    assert many < 1.2 * few


def test_the_trial_that_starts_next_is_that_of_tunes_own_scheduler() -> None:
    generator, trials, ours = np.random.default_rng(0), [], _InOrder()
    controller = SimpleNamespace(get_trials=lambda: trials)
    for _ in range(200):
        if generator.random() < 0.5 or not trials:
            trials.append(Trial("softseg_fit", stub=True))
            ours.on_trial_add(controller, trials[-1])
        else:
            trial = trials[generator.integers(len(trials))]
            trial.set_status(Trial.TERMINATED if trial.status == Trial.RUNNING else Trial.RUNNING)
        assert ours.choose_trial_to_run(None) is FIFOScheduler().choose_trial_to_run(controller)
