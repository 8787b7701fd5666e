"""A learning rate for every fixed candidate: the same rates for all, the best on validation wins, and the choice stands."""

from __future__ import annotations

import math

import pytest
from driven_search import failed, finished, interrupted, run, searcher
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from softseg_dist import Dice, DiceSemimetric, MonteCarlo, Optim, Phantom, Race, Recipe, Search, Study, TuneEach
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.training.task import FitResult, FitTask

BASE = Recipe(optim=Optim(epochs=1, lr=3e-3))
TUNE = TuneEach(lr=(1e-4, 1e-1), trials=4, splits=2)
NUM_SPLITS = 5
BEST = {Dice: 1e-3, DiceSemimetric: 1e-1}  # the rate that suits each loss


def make_study(**changes: object) -> Study:
    candidates = {"dice": BASE, "dml": BASE.replace(loss=DiceSemimetric())}
    fields = {"name": "s", "question": "?", "data": Phantom(subjects=10), "splits": MonteCarlo(count=NUM_SPLITS)}
    return Study(**fields | {"candidates": candidates, "control": "dml", "tune_each": TUNE} | changes)


STUDY = make_study()


def end(task: FitTask) -> FitResult:
    away = abs(math.log10(task.recipe.optim.lr / BEST[type(task.recipe.loss)]))
    return finished(task, -away + task.split.index / 10)


def rates(search: StudySearcher) -> dict[str, float]:
    recorded = search.ledger.candidates()
    assert all(search.candidates[name].recipe.optim.lr == recorded[name].recipe["optim"]["lr"] for name in recorded)
    return {name: record.recipe["optim"]["lr"] for name, record in recorded.items() if record.origin == "fixed"}


def test_rates_are_spaced_evenly_by_ratio():
    assert TUNE.rates == pytest.approx((1e-4, 1e-3, 1e-2, 1e-1))
    with pytest.raises(ValidationError, match=r"lr must be \(lowest, highest\), got \(0\.1, 0\.01\)"):
        TuneEach(lr=(0.1, 0.01))


def test_every_candidate_tries_the_same_rates_on_the_same_splits_and_runs_with_the_best(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = run(search, end=end)
    tried = [task for task in tasks if "~" in task.candidate]
    for name in ("dice", "dml"):
        of_one = sorted((t.candidate, t.split.index, t.recipe.optim.lr) for t in tried if t.candidate.startswith(name))
        assert of_one == [(f"{name}~{i}", j, TUNE.rates[i]) for i in range(4) for j in range(2)]
        ran = [task for task in tasks if task.candidate == name]
        assert [task.split.index for task in ran] == list(range(NUM_SPLITS))
        assert {task.recipe.optim.lr for task in ran} == {rates(search)[name]}
    assert rates(search) == {"dice": pytest.approx(1e-3), "dml": pytest.approx(1e-1)}
    assert len(tasks) == 2 * (4 * 2 + NUM_SPLITS) == search.num_planned
    assert search.ended


def test_all_else_of_a_recipe_stays(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = run(search, end=end)
    for task in tasks:
        own = STUDY.candidates[task.candidate.partition("~")[0]]
        assert task.recipe.replace(optim=own.optim) == own
        assert task.recipe.optim.replace(lr=own.optim.lr) == own.optim


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A search that has ended, and its fits."""
    whole = searcher(tmp_path_factory.mktemp("whole"), STUDY)
    return whole, [(task.key, task.recipe) for task in run(whole, end=end)]


@given(stops=st.lists(st.integers(0, 20), min_size=1, max_size=4))
@settings(max_examples=5, deadline=None)
def test_a_resumed_tuning_chooses_what_an_uninterrupted_one_chooses(tmp_path_factory, uninterrupted, stops):
    whole, expected = uninterrupted
    ran, part = interrupted(tmp_path_factory.mktemp("parts"), STUDY, stops, end)
    assert ran == expected
    assert rates(part) == rates(whole)


@pytest.mark.parametrize(("own", "nearest"), [(2e-4, 1e-4), (4e-3, 1e-2), (1.0, 1e-1)])
def test_of_equal_rates_the_one_nearest_to_the_candidates_own_wins(tmp_path, own, nearest):
    candidates = {"dice": BASE.replace(optim=Optim(lr=own))}
    search = searcher(tmp_path, make_study(candidates=candidates, control=None))
    run(search, end=lambda task: finished(task, 0.5))
    assert rates(search)["dice"] == pytest.approx(nearest)


def test_less_is_better_for_an_error(tmp_path):
    search = searcher(tmp_path, make_study(objective="brier", second_objective="volume_error_abs"))
    run(search, end=lambda task: finished(task, task.recipe.optim.lr))
    assert rates(search) == {"dice": pytest.approx(1e-4), "dml": pytest.approx(1e-4)}  # the second has no say


def test_a_rate_with_a_failed_fit_has_lost_and_runs_no_more(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = run(search, end=lambda task: failed(task) if task.candidate == "dice~1" else end(task))
    assert [task.split.index for task in tasks if task.candidate == "dice~1"] == [0]
    assert rates(search)["dice"] in (pytest.approx(1e-4), pytest.approx(1e-2))
    assert search.candidates["dice"].note == ""
    assert run(searcher(tmp_path, STUDY), end=end) == []


def test_a_candidate_whose_rates_have_all_failed_keeps_its_own_and_says_so(tmp_path):
    search = searcher(tmp_path, STUDY)
    tasks = run(search, end=lambda task: failed(task) if task.candidate.startswith("dice~") else end(task))
    assert rates(search)["dice"] == BASE.optim.lr
    assert {task.recipe.optim.lr for task in tasks if task.candidate == "dice"} == {BASE.optim.lr}
    note = Ledger(tmp_path).candidates()["dice"].note
    assert note == search.candidates["dice"].note == "every learning rate that was tried has failed: it keeps its own, 0.003"


def test_a_trial_that_was_given_up_has_lost_and_is_not_tried_again_once_the_choice_is_made(tmp_path):
    search = searcher(tmp_path, STUDY)
    while (task := search.next_fit()) is not None:
        if task.candidate == "dice~1":
            search.lose(task, "killed")
        else:
            search.finish(end(task))
    assert rates(search)["dice"] != pytest.approx(1e-3)
    again = searcher(tmp_path, STUDY)
    assert again.ended
    assert rates(again) == rates(search)


def test_more_candidates_are_tuned_and_more_splits_keep_the_rates(tmp_path):
    first = searcher(tmp_path, STUDY)
    run(first, end=end)
    before = rates(first)
    candidates = {**STUDY.candidates, "third": BASE}
    more = searcher(tmp_path, STUDY.replace(candidates=candidates, splits=MonteCarlo(count=NUM_SPLITS + 1)))
    tasks = run(more, end=end)
    assert before.items() <= rates(more).items()
    assert sum(task.candidate == "third" for task in tasks) == NUM_SPLITS + 1
    assert {task.key for task in tasks if not task.candidate.startswith("third")} == {"dml/005", "dice/005"}


def test_tuning_goes_first_and_is_never_raced_nor_the_one_to_race_against(tmp_path):
    def propose(trial):
        return BASE.replace(optim=Optim(epochs=1, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))

    study = make_study(search=Search(propose, trials=4, race=Race()), tune_each=TUNE.replace(splits=NUM_SPLITS))
    search = searcher(tmp_path, study)
    tasks = run(search, end=end)
    origins = [search.candidates[task.candidate].origin for task in tasks]
    assert origins.index("proposed") == len(origins) - 1 - origins[::-1].index("fixed") + 1
    raced = [candidate for candidate in search.candidates.values() if candidate.raced]
    assert {candidate.origin for candidate in raced} == {"proposed"}
    assert not any("~" in candidate.raced.incumbent for candidate in raced)


def test_debug_tunes_a_little():
    assert STUDY.debug().tune_each == TuneEach(lr=TUNE.lr, trials=2, splits=1)
