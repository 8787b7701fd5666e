"""A search with a race, driven by hand: in which order it emits, who is put out and stays out, and what Optuna is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from driven_search import failed, finished, interrupted, optuna_trials, run, searcher
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from softseg_dist import MonteCarlo, Optim, Phantom, Race, Recipe, Search, Study
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.optuna_study import OPTUNA_LOG
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.training.task import FitResult, FitTask

BASE = Recipe(optim=Optim(epochs=1))
NUM_SPLITS, TRIALS, STARTUP = 8, 7, 4


def propose(trial):
    return BASE.replace(optim=Optim(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


RACE = Race()


def make_study(race: Race | None = RACE, **changes: object) -> Study:
    search = Search(propose, trials=TRIALS, startup_trials=STARTUP, race=race)
    fields = {"name": "s", "question": "?", "data": Phantom(subjects=10), "splits": MonteCarlo(count=NUM_SPLITS)}
    return Study(**fields | {"candidates": {"control": BASE}, "control": "control", "search": search} | changes)


STUDY = make_study()


def noisy(task: FitTask) -> float:
    """Better the nearer the learning rate is to 1e-2, with a noise that depends on the fit alone."""
    generator = np.random.default_rng(seed_of("noise", task.candidate, task.split.index))
    return -abs(np.log10(task.recipe.optim.lr) + 2) + task.split.index / 10 + generator.normal(0, 0.2)


def end(task: FitTask) -> FitResult:
    return finished(task, noisy(task))


def raced(search: StudySearcher) -> dict[str, int]:
    return {name: c.raced.after for name, c in search.candidates.items() if c.raced}


def told(search: StudySearcher) -> list[tuple[object, ...]]:
    return [(t.params, t.state, t.values, t.user_attrs) for t in optuna_trials(search)]


def test_the_startup_trials_run_breadth_first_up_to_the_start_of_the_race(tmp_path):
    tasks = run(searcher(tmp_path, make_study(candidates={}, control=None)))
    first = [task.key for task in tasks[: 3 * STARTUP]]
    assert first == [f"trial-{number:03d}/{split:03d}" for split in range(3) for number in range(STARTUP)]


def test_without_anybody_who_has_run_fully_the_best_looking_one_goes_first(tmp_path):
    search = searcher(tmp_path, make_study(candidates={}, control=None))
    tasks = run(search, 3 * STARTUP + NUM_SPLITS - 3, end)
    names = [f"trial-{number:03d}" for number in range(STARTUP)]
    means = {name: np.mean([noisy(t) for t in tasks[: 3 * STARTUP] if t.candidate == name]) for name in names}
    assert {task.candidate for task in tasks[3 * STARTUP :]} == {max(means, key=lambda name: means[name])}


def test_who_is_put_out_gets_no_more_and_the_rest_runs_fully(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = run(search, end=end)
    out = raced(search)
    assert out
    assert search.ended
    for name in search.candidates:
        assert sum(task.candidate == name for task in tasks) == out.get(name, NUM_SPLITS)
    assert search.num_planned == len(tasks)
    assert {name: record.after for name, record in Ledger(tmp_path).races().items()} == out


def test_optuna_is_told_the_mean_of_the_incumbent_and_the_difference(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = {(task.candidate, task.split.index): noisy(task) for task in run(search, end=end)}

    def mean(name: str, splits: range) -> float:
        return float(np.mean([tasks[name, split] for split in splits]))

    everything = range(NUM_SPLITS)
    for trial in optuna_trials(search):
        name = trial.user_attrs["candidate"]
        record = search.candidates[name].raced
        assert trial.state == TrialState.COMPLETE
        if record is None:
            assert trial.value == pytest.approx(mean(name, everything))
            continue
        shared = range(record.after)
        expected = mean(record.incumbent, everything) + mean(name, shared) - mean(record.incumbent, shared)
        assert trial.value == pytest.approx(expected)
        assert trial.value < mean(record.incumbent, everything)
        assert trial.user_attrs["raced out by"] == record.incumbent


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A search that has ended, and its fits."""
    whole = searcher(tmp_path_factory.mktemp("whole"), STUDY)
    return whole, [(task.key, task.recipe) for task in run(whole, end=end)]


@given(stops=st.lists(st.integers(0, 25), min_size=1, max_size=4))
@settings(max_examples=4, deadline=None)
def test_a_race_that_is_resumed_decides_what_an_uninterrupted_one_decides(tmp_path_factory, uninterrupted, stops):
    whole, expected = uninterrupted
    ran, part = interrupted(tmp_path_factory.mktemp("parts"), STUDY, stops, end)
    assert ran == expected
    assert raced(part) == raced(whole)
    assert told(part) == told(whole)


def test_a_decision_that_a_killed_driver_did_not_record_is_made_again(tmp_path):
    whole = searcher(tmp_path, STUDY)
    run(whole, end=end)
    for path in tmp_path.glob("fits/*/race.json"):
        path.unlink()
    assert raced(searcher(tmp_path, STUDY)) == raced(whole)


def test_more_trials_and_more_splits_keep_out_who_is_out(tmp_path):
    first = searcher(tmp_path, STUDY)
    run(first, end=end)
    more = STUDY.replace(splits=MonteCarlo(count=NUM_SPLITS + 2), search=STUDY.search.replace(trials=TRIALS + 2))
    again = searcher(tmp_path, more)
    tasks = run(again, end=end)
    assert raced(first).items() <= raced(again).items()
    assert not {task.candidate for task in tasks} & raced(first).keys()
    assert {name for name, c in again.candidates.items() if not c.raced and len(c.results) < NUM_SPLITS + 2} == set()


def test_a_race_counts_splits_and_not_repeats(tmp_path):
    once, twice = (searcher(tmp_path / str(r), make_study(repeats=r)) for r in (1, 2))
    tasks = {search: run(search, end=end) for search in (once, twice)}
    assert raced(twice) == raced(once), "repeats of equal scores decide nothing"
    assert {name: c.values for name, c in once.candidates.items()} == {name: c.values for name, c in twice.candidates.items()}
    assert len(tasks[twice]) == 2 * len(tasks[once])


def test_the_control_and_fixed_candidates_run_all_splits_unless_the_race_is_for_all(tmp_path):
    candidates = {"control": BASE, "bad": BASE.replace(optim=Optim(lr=1.0)), "good": BASE.replace(optim=Optim(lr=1e-2))}
    search = searcher(tmp_path / "some", make_study(candidates=candidates))
    run(search, end=end)
    assert not {"control", "bad", "good"} & raced(search).keys()
    assert raced(search)
    search = searcher(tmp_path / "all", make_study(Race(fixed=True), candidates=candidates, control="bad"))
    run(search, end=end)
    assert "control" in raced(search)
    assert "bad" not in raced(search)


def test_no_race_runs_everything(tmp_path):
    search = searcher(tmp_path, make_study(race=None))
    assert len(run(search, end=end)) == (1 + TRIALS) * NUM_SPLITS
    assert raced(search) == {}


def test_no_worker_waits_and_those_whose_results_are_awaited_emit_last(tmp_path):
    search = searcher(tmp_path, make_study(candidates={}, control=None))
    tasks = [search.next_fit() for _ in range(TRIALS * NUM_SPLITS)]
    assert all(tasks)
    assert search.next_fit() is None
    started = [task.candidate for task in tasks if task.split.index == 0]
    before = [task.split.index for task in tasks[: 3 * TRIALS]]
    assert len(started) == TRIALS
    assert max(before) < 3  # all trials are opened before any emits beyond the start of the race


def test_what_still_runs_of_a_candidate_that_is_out_is_recorded_and_its_death_is_no_failure(tmp_path):
    study = make_study(candidates={"control": BASE}, search=Search(propose, trials=1))
    search = searcher(tmp_path, study)
    run(search, NUM_SPLITS, lambda task: finished(task, 1.0 + task.split.index))
    tasks = [search.next_fit() for _ in range(NUM_SPLITS)]
    for task in tasks[:3]:
        search.finish(finished(task, float(task.split.index)))
    assert raced(search) == {}  # all its splits were emitted: nothing is saved by putting it out
    folder = tmp_path / "second"
    search = searcher(folder, study)
    run(search, NUM_SPLITS, lambda task: finished(task, 1.0 + task.split.index))
    tasks = [search.next_fit() for _ in range(5)]
    for task in tasks[:3]:
        search.finish(finished(task, float(task.split.index)))
    assert raced(search) == {"trial-000": 3}
    assert not search.ended
    search.finish(finished(tasks[3], 3.0))
    assert search.lose(tasks[4], "killed") is False
    assert search.ended
    (trial,) = optuna_trials(search)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, pytest.approx(3.5 + 1 - 1))
    assert told(searcher(folder, study)) == told(search)


def test_a_failed_proposal_stays_failed_in_a_race(tmp_path):
    search = searcher(tmp_path, STUDY)
    run(search, NUM_SPLITS, end)
    run(search, 1, failed)
    run(search, end=end)
    assert optuna_trials(search)[0].state == TrialState.FAIL
    assert "trial-000" not in raced(search)
    assert told(searcher(tmp_path, STUDY)) == told(search)


def two_objectives(task: FitTask) -> FitResult:
    """The accurate ones are not the calibrated ones; those in between are worse in both than either is in one."""
    x = np.log10(task.recipe.optim.lr)
    generator = np.random.default_rng(seed_of("noise", task.candidate, task.split.index))
    noise = generator.normal(0, 0.05, 2)
    return finished(task, x + noise[0], second=abs(x + 3) + noise[1])


def test_with_two_objectives_optuna_knows_both_and_who_is_worse_in_both_is_out(tmp_path):
    study = make_study(second_objective="brier")
    search = searcher(tmp_path, study)
    tasks = run(search, end=two_objectives)
    assert all(len(trial.values) == 2 for trial in optuna_trials(search))
    assert [d.name for d in search._optuna._optuna.directions] == ["MAXIMIZE", "MINIMIZE"]
    means = {name: candidate.means for name, candidate in search.candidates.items() if not candidate.raced}
    assert raced(search)
    for name in raced(search):
        record = search.candidates[name].raced
        assert record.values[0] < means[record.incumbent][0]
        assert record.values[1] > means[record.incumbent][1]
    assert told(searcher(tmp_path, study)) == told(search)
    assert len(tasks) < (1 + TRIALS) * NUM_SPLITS


def test_a_trial_whose_second_objective_is_undefined_has_failed_for_optuna(tmp_path):
    study = make_study(second_objective="volume_error_abs")
    search = searcher(tmp_path, study)
    run(search, end=lambda task: finished(task, noisy(task), second=None if task.candidate == "trial-001" else 0.1))
    assert [trial.state for trial in optuna_trials(search)].count(TrialState.FAIL) == 1
    assert optuna_trials(search)[1].state == TrialState.FAIL
    assert told(searcher(tmp_path, study)) == told(search)


def journal(folder: Path) -> list[tuple[object, ...]]:
    study = load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(folder / OPTUNA_LOG))))
    return [(t.params, t.state, t.values, t.user_attrs) for t in study.trials]


def test_the_journal_is_what_optuna_knows_whatever_was_left_in_the_file(tmp_path):
    search = searcher(tmp_path, STUDY)
    run(search, 30, end)
    assert journal(tmp_path) == told(search)
    (tmp_path / OPTUNA_LOG).write_bytes(b'{"op_code": 0, "tor')
    again = searcher(tmp_path, STUDY)
    assert journal(tmp_path) == told(again)
    run(again, end=end)
    assert journal(tmp_path) == told(again)
    assert len(journal(tmp_path)) == TRIALS


def test_a_study_without_a_search_has_no_journal(tmp_path):
    run(searcher(tmp_path, STUDY.replace(search=None)), end=end)
    assert not (tmp_path / OPTUNA_LOG).exists()
