"""Real Ray: fits run once, deaths and hangs are survived, a run that was stopped goes on, and nothing of Ray's is printed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import tune
from scripted import NUM_SPLITS, make_study, run, starts

from softseg_dist import Recipe, Resources, Search, TuneEach
from softseg_dist.engine.progress import JsonLines, PlainLines
from softseg_dist.engine.session import Outcome
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import Ledger
from softseg_dist.sources import Sources
from softseg_dist.study_file import load_sources
from softseg_dist.training.task import FitResult

pytestmark = pytest.mark.engine
DRIVER = Path(__file__).parent / "scripted.py"


def driver(folder: Path, **options: object) -> subprocess.Popen[str]:
    """A driver in a process group of its own, as a shell would start it."""
    command = [sys.executable, str(DRIVER), str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_results(folder: Path, num_results: int, process: subprocess.Popen[str]) -> None:
    """Return when the ledger has that many results."""
    deadline = time.monotonic() + 240
    while len(results := list(folder.glob("fits/*/[0-9]*.json"))) < num_results:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, results
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_a_trial_and_its_log_bear_the_name_of_the_fit(shared_ray, tmp_path):
    def fit(task, worker):
        log = Path("/proc/self/fd/1").readlink().read_text().splitlines()
        known = {"candidate": task.candidate, "split": task.split.index, "process": tune.get_context().get_trial_name()}
        return FitResult(**known, state="finished", versions={"log": log[-1]})

    run(tmp_path, make_study(("a",)), fit=fit)
    results = Ledger(tmp_path).results()
    assert {key: result.process for key, result in results.items()} == {key: key for key in ("a/000", "a/001", "a/002")}
    assert {key: result.versions["log"] for key, result in results.items()} == {key: f":actor_name:{key}" for key in results}


def test_every_accident_of_a_fit_is_survived(shared_ray, tmp_path, capfd):
    """One session with everything that can go wrong at once, as each Ray session costs seconds."""
    lines = io.StringIO()
    faults = {"a/000": "kill", "a/001": "raise", "b/000": "nan", "b/001": "exit", "b/002": "hang"}
    study = make_study(trials=1)
    resources = Resources(max_concurrent=2, time_limit_s=3)
    assert run(tmp_path, study, PlainLines(lines), faults=faults, resources=resources) == Outcome(8, 1, 0, False)

    expected = {f"{name}/{split:03d}": 1 for name in ("a", "b", "trial-000") for split in range(NUM_SPLITS)}
    assert starts(tmp_path) == expected | {"a/000": 2, "a/001": 2, "b/001": 2, "b/002": 2}
    results = Ledger(tmp_path).results()
    assert results["b/000"].state == "failed"
    assert results["b/000"].reason == "loss is nan in epoch 2"
    assert {key: result.attempt for key, result in results.items() if result.attempt} == {
        "a/000": 1,
        "a/001": 1,
        "b/001": 1,
        "b/002": 1,
    }
    told = lines.getvalue()
    assert "a/001: ValueError: the fit broke" in told
    assert "b/002: took longer than its time limit of 3 s" in told
    assert "a/000: its process died" in told
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / ".tune").exists()
    assert not (tmp_path / ".stop").exists()


def test_a_fit_that_dies_twice_is_given_up_and_tried_again_next_time(shared_ray, tmp_path):
    study = make_study(("a",))
    faults = {"a/001": "raise", "always": True}
    assert run(tmp_path, study, PlainLines(io.StringIO()), faults=faults) == Outcome(2, 1, 0, False)
    assert starts(tmp_path)["a/001"] == 2
    assert "a/001" not in Ledger(tmp_path).results()
    events = io.StringIO()
    assert run(tmp_path, study, JsonLines(events)) == Outcome(3, 0, 0, False)
    assert starts(tmp_path) == {"a/000": 1, "a/001": 3, "a/002": 1}
    lines = [json.loads(line) for line in events.getvalue().splitlines()]
    assert lines[0] == {"event": "start", "total": 3, "done": 2}
    assert [line["fit"] for line in lines if line["event"] == "fit"] == ["a/001"]
    assert sum(line["event"] == "epoch" for line in lines) == 3


def test_a_study_is_tuned_and_raced_and_goes_on_the_same_way(shared_ray, tmp_path):
    """`score_of` rises with the learning rate: the highest one is chosen, and whoever has less is out of the race."""
    study = make_study(("a",), trials=3, num_splits=5, tune_each=TuneEach(lr=(1e-3, 0.5), trials=2, splits=1))
    lines = io.StringIO()
    outcome = run(tmp_path, study, PlainLines(lines))
    ledger, results = Ledger(tmp_path), Ledger(tmp_path).results()
    assert ledger.candidates()["a"].recipe["optim"]["lr"] == 0.5
    assert sorted(ledger.races()) == ["trial-000", "trial-001", "trial-002"]
    assert {key for key in results if key.startswith("a")} == {"a~0/000", "a~1/000", *(f"a/00{j}" for j in range(5))}
    assert outcome == Outcome(len(results), 0, 0, False)
    assert len(results) < 2 + 5 + 3 * 5
    assert lines.getvalue().count("is out of the race") == 3
    before = starts(tmp_path)
    assert run(tmp_path, study) == outcome
    assert starts(tmp_path) == before


def test_a_finished_study_starts_nothing(shared_ray, tmp_path):
    study = make_study(("a",), num_splits=1)
    assert run(tmp_path, study) == Outcome(1, 0, 0, False)
    started = time.monotonic()
    assert run(tmp_path, study) == Outcome(1, 0, 0, False)
    assert time.monotonic() - started < 1
    assert starts(tmp_path) == {"a/000": 1}


def test_a_user_error_in_a_fit_stops_the_study_with_its_text(shared_ray, tmp_path):
    with pytest.raises(UserError, match="a/000: the store is missing"):
        run(tmp_path, make_study(("a",)), faults={"a/000": "user"}, resources=Resources(max_concurrent=1))
    assert starts(tmp_path) == {"a/000": 1}


def broken(trial):
    raise RuntimeError("not today")


def test_a_mistake_in_propose_stops_the_study_and_keeps_what_ended(shared_ray, tmp_path):
    study = make_study(("a",), num_splits=1).replace(search=Search(broken, trials=1))
    with pytest.raises(UserError, match="not today"):
        run(tmp_path, study, resources=Resources(max_concurrent=1))
    assert list(Ledger(tmp_path).results()) == ["a/000"]


def test_a_fit_that_no_machine_can_hold_is_refused_before_anything_starts(shared_ray, tmp_path):
    with pytest.raises(UserError, match=r"one fit needs 99 CPUs on one machine, but the most that one has is 2 CPUs"):
        run(tmp_path, make_study(), resources=Resources(cpus_per_fit=99))
    with pytest.raises(UserError, match=r"needs 1 CPUs and 1 GPUs"):
        run(tmp_path, make_study(), resources=Resources(gpus_per_fit=1))
    assert starts(tmp_path) == {}


OWN_LOSS = """
from softseg_dist import Brier, Recipe
class Halved(Brier):
    def per_sample(self, prediction, target):
        return 0.5 * super().per_sample(prediction, target)
RECIPE = Recipe(loss=Halved())
"""


def test_a_loss_of_the_study_file_is_known_in_the_workers(shared_ray, tmp_path):
    sources = Sources("s999_own.py", {"s999_own.py": OWN_LOSS})
    recipe: Recipe = load_sources(sources).RECIPE
    study = make_study(("a",), num_splits=1).replace(candidates={"a": recipe})
    assert run(tmp_path, study, sources=sources).finished == 1


def test_a_killed_driver_goes_on_where_it_was(tmp_path):
    first = driver(tmp_path, sleep_s=0.1, trials=2)
    wait_for_results(tmp_path, 4, first)
    with pytest.raises(UserError, match=f"in use by process {first.pid} on "), Ledger(tmp_path).lock():
        pass
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    ended = set(Ledger(tmp_path).results())
    assert len(ended) < 12
    second = driver(tmp_path, trials=2)
    out, err = second.communicate(timeout=240)
    assert (json.loads(out.splitlines()[-1]), err) == ({"finished": 12, "failed": 0, "unfinished": 0, "interrupted": False}, "")
    assert {key: count for key, count in starts(tmp_path).items() if key in ended} == dict.fromkeys(ended, 1)

    for result in Ledger(tmp_path).results().values():
        lr = Ledger(tmp_path).candidates()[result.candidate].recipe["optim"]["lr"]
        assert result.score == lr + result.split / 100  # what `score_of` gives: no result went to another fit


def test_ctrl_c_lets_fits_end_and_a_second_one_does_not(tmp_path):
    first = driver(tmp_path, sleep_s=0.1, trials=2)
    wait_for_results(tmp_path, 2, first)
    os.killpg(first.pid, signal.SIGINT)  # the whole group, as a terminal does: workers must not die of it
    out, err = first.communicate(timeout=180)
    outcome = json.loads(out.splitlines()[-1])
    assert (outcome["interrupted"], outcome["failed"], err) == (True, 0, "")
    assert outcome["finished"] + outcome["unfinished"] == 12
    assert "stopping: running fits write their checkpoints" in out
    assert "died" not in out

    names, before = ("a", "b", "trial-000", "trial-001"), sum(starts(tmp_path).values())
    everything = [f"{name}/{split:03d}" for name in names for split in range(NUM_SPLITS)]
    second = driver(tmp_path, trials=2, **dict.fromkeys(everything, "hang"))
    deadline = time.monotonic() + 180
    while sum(starts(tmp_path).values()) < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(second.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=2)  # the fits hang
    os.killpg(second.pid, signal.SIGINT)
    out, err = second.communicate(timeout=240)
    assert (json.loads(out.splitlines()[-1])["interrupted"], err) == (True, "")


def test_a_study_whose_fits_all_die_is_stopped_and_says_why(shared_ray, tmp_path):
    faults = dict.fromkeys((f"{name}/{split:03d}" for name in ("a", "b") for split in range(NUM_SPLITS)), "raise")
    with pytest.raises(UserError, match=r"the first 3 fits all died, .*ValueError: the fit broke"):
        run(tmp_path, make_study(), PlainLines(io.StringIO()), faults=faults | {"always": True})
    assert sum(starts(tmp_path).values()) <= 2 * 3 + 2  # what ran beside the last of them
