"""Accidents of a fit of several workers are survived as those of one worker's, and its lane leaves nothing reserved.

`python test_lanes.py FOLDER` is a driver with a Ray of four CPUs of its own: two lanes of two workers.
"""

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
import ray
from ray.util import placement_group_table
from scripted import BASE, NUM_SPLITS, context_of, make_study, run, splits_of, starts

from softseg_dist import Resources
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_private import private_ray
from softseg_dist.engine.session import Outcome, run_beside
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import Ledger
from softseg_dist.training.task import FitResult, FitTask, Worker

pytestmark = pytest.mark.engine
LANE = Resources(workers_per_fit=2, time_limit_s=5)
FREE_WITHIN_S = 15.0


def reserved(num_cpus: int) -> int:
    """CPUs and placement groups of a Ray with `num_cpus` that are still held a while after the last session."""
    until = time.monotonic() + FREE_WITHIN_S
    while True:
        groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
        held = groups + num_cpus - int(ray.available_resources().get("CPU", 0.0))
        if held == 0 or time.monotonic() > until:
            return held
        time.sleep(0.1)


@pytest.mark.long
def test_every_accident_of_a_fit_on_a_lane_is_survived(shared_ray: None, tmp_path: Path) -> None:
    """One session with everything that can go wrong, as each start of a lane costs seconds."""
    lines = io.StringIO()
    faults = {"a/000": "kill", "a/001": "raise", "b/000": "nan", "b/001": "exit", "b/002": "hang"}
    assert run(tmp_path, make_study(), PlainLines(lines), faults=faults, resources=LANE) == Outcome(5, 1, 0, False)
    expected = {f"{name}/{split:03d}": 1 for name in ("a", "b") for split in range(NUM_SPLITS)}
    again = ("a/000", "a/001", "b/001", "b/002")
    assert starts(tmp_path) == expected | dict.fromkeys(again, 2)
    results = Ledger(tmp_path).results()
    assert results["b/000"].reason == "loss is nan in epoch 2"
    assert {key for key, result in results.items() if result.attempt == 1} == set(again)
    told = lines.getvalue()
    assert "a/000: one of its workers died" in told
    assert "a/001: ValueError: the fit broke" in told
    assert "b/001: one of its workers died" in told
    assert "b/002: took longer than its time limit of 5 s" in told
    assert told.count("trying again") == len(again)
    assert reserved(2) == 0


def test_a_mistake_of_the_users_on_a_lane_stops_the_study_with_its_text(shared_ray: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a/000: the store is missing"):
        run(tmp_path, make_study(("a",)), faults={"a/000": "user"}, resources=LANE)
    assert starts(tmp_path) == {"a/000": 1}
    assert reserved(2) == 0


@pytest.mark.long
def test_two_lanes_start_at_once_and_do_not_wait_for_each_other(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("{"))  # among what Ray prints
    told = json.loads(line)
    assert told == {"finished": 6, "failed": 0, "unfinished": 0, "interrupted": False, "reserved": 0}
    assert starts(tmp_path) == {f"{name}/{split:03d}": 1 for name in ("a", "b") for split in range(NUM_SPLITS)}
    assert len({line.split()[0] for file in tmp_path.glob("fits/*/*/starts") for line in file.open()}) == 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_fit_beside_the_search_runs_as_those_of_the_search_and_survives_its_death(
    shared_ray: None, tmp_path: Path, num_workers: int
) -> None:
    def fit(task: FitTask, worker: Worker) -> FitResult:
        if task.attempt == 0 and worker.leads:
            os.kill(os.getpid(), signal.SIGKILL)
        worker.report({"epoch": 3.0, "loss": 0.5})  # by every worker, and told by one
        if worker.leads:
            time.sleep(0.5)  # what others report comes before the answer, which ends the job
        known = {"candidate": task.candidate, "split": task.split.index, "repeat": task.repeat, "attempt": task.attempt}
        return FitResult(**known, state="finished", num_workers=worker.num_workers)

    study, lines, resources = make_study(("a",)), io.StringIO(), Resources(workers_per_fit=num_workers)
    context = context_of(tmp_path, study, resources=resources, progress=PlainLines(lines), fit=fit)
    result = run_beside(context, context.fit_task("a", BASE, splits_of(study)[0]))
    assert (result.num_workers, result.attempt) == (num_workers, 1)
    assert lines.getvalue() == "a/000: epoch 3 of 3, loss 0.5\n"
    assert reserved(2) == 0


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    with private_ray({"num_cpus": 4, "object_store_memory": 128 * 2**20, "log_to_driver": False}):
        outcome = run(Path(sys.argv[1]), make_study(), faults={"sleep_s": 0.2}, resources=Resources(workers_per_fit=2))
        print(json.dumps(vars(outcome) | {"reserved": reserved(4)}), flush=True)
