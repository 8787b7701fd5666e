"""The searcher, driven by hand: what it emits, in which order, what it tells Optuna, and how it goes on from a ledger."""

from __future__ import annotations

import pytest
from driven_search import failed, finished, optuna_trials, run, score_of, searcher
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from softseg_dist import BCE, Brier, Dice, Metric, MonteCarlo, Optim, Phantom, Recipe, Search, Study, TuneEach
from softseg_dist.errors import UserError
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.search.searcher import MAX_MOVES, StudySearcher

BASE = Recipe(optim=Optim(epochs=1))
NUM_SPLITS = 3


def propose(trial):
    if trial.suggest_categorical("loss", ["dice", "bce"]) == "bce":
        return BASE.replace(loss=BCE(), optim=Optim(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))
    return BASE.replace(loss=Dice())


def make_study(candidates: dict[str, Recipe] | None = None, control: str | None = None, search: Search | None = None) -> Study:
    return Study(
        name="s",
        question="?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=NUM_SPLITS),
        candidates=candidates or {},
        control=control,
        search=search,
    )


FIXED = make_study({"a": BASE, "b": BASE, "c": BASE}, control="b")
SEARCH = make_study({"a": BASE}, search=Search(propose, trials=6, startup_trials=3))


def trials(search: StudySearcher) -> list[tuple[dict[str, object], TrialState, float | None]]:
    return [(trial.params, trial.state, trial.value) for trial in optuna_trials(search)]


def test_every_fit_runs_once_breadth_first_the_control_before_all(tmp_path):
    search = searcher(tmp_path, FIXED)
    keys = [task.key for task in run(search)]
    assert keys == [f"{candidate}/{split:03d}" for split in range(NUM_SPLITS) for candidate in "bac"]
    assert search.ended


def test_every_candidate_runs_every_split_as_often_and_one_split_before_the_next(tmp_path):
    search = searcher(tmp_path, FIXED.replace(repeats=2))
    assert search.num_planned == 3 * NUM_SPLITS * 2
    tasks = run(search)
    names = [f"{split:03d}{repeat}" for split in range(NUM_SPLITS) for repeat in ("", "-r1")]
    assert [task.key for task in tasks] == [f"{candidate}/{name}" for name in names for candidate in "bac"]
    assert search.ended
    assert len({task.seeds for task in tasks}) == NUM_SPLITS * 2, "the same for all candidates"
    assert {task.seeds for task in tasks if not task.repeat} == {("s", 0, split) for split in range(NUM_SPLITS)}


def test_another_repeat_extends_a_study_and_scores_are_means_over_repeats_first(tmp_path):
    first = run(searcher(tmp_path, SEARCH))
    more = searcher(tmp_path, SEARCH.replace(repeats=2))
    assert {task.key for task in run(more)} == {f"{task.key}-r1" for task in first}, "what has ended does not run again"
    a = more.candidates["a"]
    assert a.scores == {split: (pytest.approx(BASE.optim.lr * 10 + split / 100 + 0.0005),) for split in range(NUM_SPLITS)}
    assert trials(more)[0][2] == pytest.approx(more.candidates["trial-000"].means[0])


def test_a_split_counts_when_all_its_repeats_have_a_score(tmp_path):
    search = searcher(tmp_path, make_study({"a": BASE}).replace(repeats=2))
    run(search, 3)
    assert list(search.candidates["a"].scores) == [0]
    run(search, 2, lambda task: failed(task) if task.split.index == 1 else finished(task))
    assert list(search.candidates["a"].scores) == [0], "a repeat of the second split has failed"
    assert search.candidates["a"].means is None


def test_a_learning_rate_is_tried_once_on_each_of_its_splits(tmp_path):
    search = searcher(tmp_path, make_study({"a": BASE}).replace(repeats=3, tune_each=TuneEach(trials=2, splits=1)))
    assert [task.key for task in run(search)][:2] == ["a~0/000", "a~1/000"]
    assert search.num_planned == 2 + 3 * NUM_SPLITS


def test_fixed_candidates_come_before_proposed_ones(tmp_path):
    tasks = run(searcher(tmp_path, SEARCH))
    assert [task.candidate for task in tasks[:NUM_SPLITS]] == ["a"] * NUM_SPLITS
    assert len(tasks) == (1 + 6) * NUM_SPLITS
    assert tasks[-1].candidate == "trial-005"


def test_optuna_is_told_the_mean_over_splits(tmp_path):
    search = searcher(tmp_path, SEARCH)
    tasks = run(search)
    for number, (_, state, value) in enumerate(trials(search)):
        scores = [score_of(task) for task in tasks if task.candidate == f"trial-{number:03d}"]
        assert (state, value) == (TrialState.COMPLETE, pytest.approx(sum(scores) / NUM_SPLITS))


def test_no_worker_waits_while_there_are_trials_left(tmp_path):
    search = searcher(tmp_path, SEARCH)
    tasks = [search.next_fit() for _ in range((1 + 6) * NUM_SPLITS)]
    assert all(tasks)
    assert search.next_fit() is None
    assert not search.ended


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A search that has ended, and its fits."""
    whole = searcher(tmp_path_factory.mktemp("whole"), SEARCH)
    return whole, [(task.key, task.recipe) for task in run(whole)]


@given(stops=st.lists(st.integers(0, 6), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_a_resumed_search_asks_what_an_uninterrupted_one_asks(tmp_path_factory, uninterrupted, stops):
    whole, expected = uninterrupted
    folder = tmp_path_factory.mktemp("parts")
    ran = []
    for num_fits in (*stops, 1000):
        part = searcher(folder, SEARCH)
        ran += [(task.key, task.recipe) for task in run(part, num_fits)]
    assert ran == expected
    assert trials(part) == trials(whole)


def test_running_fits_of_a_killed_driver_run_again_and_ended_ones_do_not(tmp_path):
    first = searcher(tmp_path, SEARCH)
    running = [first.next_fit() for _ in range(NUM_SPLITS + 4)]
    for task in running[::2]:
        first.finish(finished(task))
    again = run(searcher(tmp_path, SEARCH))
    ended = {task.key for task in running[::2]}
    assert ended.isdisjoint(task.key for task in again)
    assert {task.key for task in running[1::2]} <= {task.key for task in again}
    assert len(ended) + len(again) == (1 + 6) * NUM_SPLITS


def test_a_failed_fit_is_final_and_a_fixed_candidate_goes_on(tmp_path):
    search = searcher(tmp_path, FIXED)
    assert len(run(search, end=failed)) == 3 * NUM_SPLITS
    assert run(searcher(tmp_path, FIXED)) == []


def test_a_failed_proposal_emits_no_more_and_stays_failed(tmp_path):
    study = make_study(search=Search(propose, trials=2))
    search = searcher(tmp_path, study)
    first = run(search, 1, end=failed)
    assert trials(search)[0][1:] == (TrialState.FAIL, None)
    assert search.num_planned == 1 + NUM_SPLITS
    rest = run(search)
    assert {task.candidate for task in (*first, *rest)} == {"trial-000", "trial-001"}
    assert len(rest) == NUM_SPLITS
    again = searcher(tmp_path, study)
    assert again.ended
    assert trials(again) == trials(search)


def test_a_lost_fit_is_tried_twice_and_again_next_time(tmp_path):
    search = searcher(tmp_path, FIXED)
    task = search.next_fit()
    assert search.lose(task, "killed") is True
    second = search.next_fit()
    assert (second.key, second.attempt) == (task.key, 1)
    assert search.lose(second, "killed") is False
    assert search.candidates["b"].lost == {(0, 0): "killed"}
    assert task.key not in [t.key for t in run(search)]
    assert [(t.key, t.attempt) for t in run(searcher(tmp_path, FIXED))] == [(task.key, 0)]


def test_a_fit_that_loses_its_machine_goes_on_as_the_same_attempt_but_not_for_ever(tmp_path):
    search = searcher(tmp_path, FIXED)
    for _ in range(MAX_MOVES):
        task = search.next_fit()
        assert (task.key, task.attempt) == ("b/000", 0)
        assert search.lose(task, "its machine was lost", blameless=True) is True
    assert search.lose(search.next_fit(), "its machine was lost", blameless=True) is False
    assert search.candidates["b"].lost == {(0, 0): "its machine was lost"}


def test_a_proposal_that_lost_a_fit_is_completed_next_time(tmp_path):
    study = make_study(search=Search(propose, trials=2))
    search = searcher(tmp_path, study)
    run(search, 1)
    for _ in range(2):
        search.lose(search.next_fit(), "killed")
    assert trials(search)[0][1] == TrialState.FAIL
    run(search)
    again = searcher(tmp_path, study)
    assert [task.key for task in run(again)] == ["trial-000/001", "trial-000/002"]
    assert [state for _, state, _ in trials(again)] == [TrialState.COMPLETE] * 2


def test_an_interrupted_fit_keeps_its_attempt_and_comes_first(tmp_path):
    search = searcher(tmp_path, FIXED)
    task = search.next_fit()
    search.interrupt(task)
    assert search.next_fit() == task
    assert next(iter(run(searcher(tmp_path, FIXED)))) == task


def test_more_splits_reopen_proposed_candidates(tmp_path):
    study = make_study(search=Search(propose, trials=2))
    run(searcher(tmp_path, study))
    more = searcher(tmp_path, study.replace(splits=MonteCarlo(count=NUM_SPLITS + 1)))
    assert [task.key for task in run(more)] == ["trial-000/003", "trial-001/003"]
    assert [state for _, state, _ in trials(more)] == [TrialState.COMPLETE] * 2


def test_more_trials_go_on_where_the_search_was(tmp_path):
    run(searcher(tmp_path, make_study(search=Search(propose, trials=2))))
    more = run(searcher(tmp_path, make_study(search=Search(propose, trials=3))))
    assert {task.candidate for task in more} == {"trial-002"}


def test_a_removed_candidate_folder_is_asked_anew_under_its_number(tmp_path):
    study = make_study(search=Search(propose, trials=3))
    run(searcher(tmp_path, study))
    for file in (tmp_path / "fits/trial-001").iterdir():
        file.unlink()
    assert {task.candidate for task in run(searcher(tmp_path, study))} == {"trial-001"}


def broken(trial):
    trial.suggest_float("lr", 0, 1)
    return 1 / 0


def nothing(trial):
    return None


def objects(trial):
    return BASE.replace(optim=Optim(batch_size=trial.suggest_categorical("sizes", [(1, 2), (3, 4)])[0]))


def wrong_rater(trial):
    return BASE.replace(fusion="rater:Zoe")


def made_for_each(trial):
    class Own(Brier):
        power: float = trial.suggest_float("power", 1, 2)

    return BASE.replace(loss=Own())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (made_for_each, r"trial 0: propose\(\) gave a recipe that cannot be recorded: loss is made_for_each.<locals>.Own, which"),
        (broken, r"trial 0: propose\(\) raised ZeroDivisionError: division by zero; parameters lr=0\.\d+"),
        (nothing, r"trial 0: propose\(\) must return a Recipe, got NoneType"),
        (objects, r"trial 0: parameter 'sizes' has the choice \(1, 2\), which cannot be stored"),
        (wrong_rater, r"trial-000: fusion names rater 'Zoe'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:optuna.*")
def test_a_mistake_in_propose_names_the_trial(tmp_path, function, message):
    with pytest.raises(UserError, match=message):
        searcher(tmp_path, make_study(search=Search(function, trials=1))).next_fit()


def drifting(trial):
    drifting.calls += 1
    return BASE.replace(optim=Optim(epochs=drifting.calls))


def test_a_proposal_that_is_not_repeatable_is_refused(tmp_path):
    drifting.calls = 0
    study = make_study(search=Search(drifting, trials=1))
    run(searcher(tmp_path, study), 1)
    with pytest.raises(UserError, match=r"trial 0: propose\(\) gave another recipe than before"):
        searcher(tmp_path, study)


def test_a_fixed_candidate_may_not_be_called_like_a_trial(tmp_path):
    study = make_study({"trial-7": BASE}, search=Search(propose))
    with pytest.raises(UserError, match="trial-7"):
        searcher(tmp_path, study)


class Own(Metric):
    """A metric of the study."""

    short = "own"
    higher_is_better = False

    def __call__(self, prediction, reference, scale):
        return (prediction - reference).mean(axis=(0, 2, 3))


@pytest.mark.parametrize(("objective", "pick"), [("dice_dml", max), ("brier", min), (Own(), min)])
def test_the_best_trial_is_the_lowest_where_less_is_better(tmp_path, objective, pick):
    search = searcher(tmp_path, SEARCH.replace(objective=objective))
    run(search)
    assert search._optuna._optuna.best_value == pick(value for _, _, value in trials(search))


def test_sampled_proposals_show_the_mistakes_of_propose_before_a_search():
    def broken(trial):
        return trial.suggest_float("lr", 0, 1) / 0

    assert all(isinstance(recipe, Recipe) for recipe in sample_proposals(SEARCH).values())
    assert sample_proposals(FIXED) == {}
    with pytest.raises(UserError, match=r"trial 0: propose\(\) raised ZeroDivisionError"):
        sample_proposals(make_study({"a": BASE}, search=Search(broken, trials=1)))
