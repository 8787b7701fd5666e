"""Fits that share a process end as if they were alone, and what goes wrong with one of them costs the others nothing but time.

Without a GPU: hosts of the slot "cpu", and a Ray that is told of a GPU which there is not, for fits that train nothing.
`python test_packs.py FOLDER FAULTS` is a driver with such a Ray of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from parallel_fits import BASE, OPTIM, assert_same_files, make_tasks, run_on, whole_fit
from scripted import make_study, processes, run, starts

from softseg_dist import Dice, MCDropout, NormReLU, Resources, UNet
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_packs import ENDED, packs, run_in_pack, wait_until_released
from softseg_dist.engine.ray_private import private_ray
from softseg_dist.engine.worker import LostJob, Report, run_fit, time_limit
from softseg_dist.record.ledger import Ledger
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitTask, Worker

pytestmark = pytest.mark.engine
SIZE = 3
LIMIT_S = 4.0
at_once = threading.Barrier(SIZE)


def train(config: dict[str, Any], worker: Worker, report: Report) -> dict[str, str]:
    """A job: a fit that begins when as many as a host takes are there; it leaves the host's process id beside its folder."""
    Path(f"{json.loads(config['task'])['folder']}.pid").write_text(str(os.getpid()))
    at_once.wait(timeout=60)
    return run_fit(fit, None, config, worker, report)


def linger(config: dict[str, Any], worker: Worker, report: Report) -> str:
    """A job that says when half of its time is over, and then goes on until it is asked to stop."""
    with time_limit(LIMIT_S, Path(config["folder"]) / "stack.txt"):
        time.sleep(LIMIT_S / 2)
        report({})
        while not worker.stop():
            time.sleep(0.01)
    (Path(config["folder"]) / "stopped").touch()
    return "stopped"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitTask]:
    """As many as a host takes: one that drops, also when it predicts, one that fuses whole cases, and a plain one."""
    torch.set_num_threads(1)
    few = OPTIM.replace(epochs=3)
    recipes = {
        "dropping": BASE.replace(network=UNet(filters=(4, 8, 16), dropout=0.2), optim=few),
        "fused": BASE.replace(loss=Dice(), fusion="staple", label="hard", optim=few),
        "plain": BASE.replace(activation=NormReLU(), optim=few),
    }
    short = make_tasks(tmp_path_factory.mktemp("packs"), recipes)
    return short | {"dropping": short["dropping"].replace(uncertainty=(MCDropout(samples=3),))}


@pytest.fixture(scope="module")
def alone(tasks: dict[str, FitTask], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    ran = {name: task.replace(folder=str(folder / name)) for name, task in tasks.items()}
    return {name: (ran[name].folder, result) for name, result in run_on(1, whole_fit, ran).items()}


def in_pack(manager: Any, task: FitTask, report: Report) -> dict[str, Any]:
    """The result of a fit, without what a machine adds; the trial is a thread of this process."""
    config = {"task": json.dumps(task.model_dump(mode="json")), "stop": f"{task.folder}.stop"}
    ending = json.loads(run_in_pack(manager, task.folder, config, report)["ending"])
    assert ending["kind"] == "result", ending
    same = {"duration_s": 0.0, "peak_memory_mb": 0.0, "num_workers": 1}
    return ending["result"] | same


def lost(job: Callable[[], Any]) -> LostJob:
    with pytest.raises(LostJob) as raised:
        job()
    return raised.value


def hosts_in(folder: Path) -> set[int]:
    return {int(file.read_text()) for file in folder.glob("*.pid")}


def assert_ends(pids: set[int]) -> None:
    until = time.monotonic() + 15
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < until, "hosts outlive their search"
        time.sleep(0.02)


def test_fits_in_one_host_end_as_if_they_were_alone_and_the_host_ends_with_the_search(
    shared_ray: None, tasks: dict[str, FitTask], alone: dict[str, Any], tmp_path: Path
) -> None:
    epochs: list[dict[str, str]] = []
    ran = [task.replace(folder=str(tmp_path / name)) for name, task in tasks.items()]
    with packs(train, SIZE) as manager, ThreadPoolExecutor(SIZE) as trials:
        together = list(trials.map(lambda task: in_pack(manager, task, epochs.append), ran))
    assert len(hosts_in(tmp_path)) == 1
    assert len(epochs) == sum(result["epochs"] for result in together)
    for name, result in zip(tasks, together, strict=True):
        folder, expected = alone[name]
        assert result == json.loads(json.dumps(expected)), name
        assert_same_files(Path(folder), tmp_path / name)
    assert_ends(hosts_in(tmp_path))


@pytest.mark.long
def test_fits_of_a_host_that_is_killed_go_on_alone_from_their_checkpoints(
    shared_ray: None, tasks: dict[str, FitTask], alone: dict[str, Any], tmp_path: Path
) -> None:
    def ask(task: FitTask) -> LostJob:
        return lost(lambda: in_pack(manager, task, lambda report: both_train.wait(timeout=60) and None))

    ran = {name: tasks[name].replace(folder=str(tmp_path / name), checkpoint_every_s=0) for name in tasks}
    both_train = threading.Barrier(SIZE, action=lambda: os.kill(*hosts_in(tmp_path), 9))
    with packs(train, SIZE) as manager, ThreadPoolExecutor(SIZE) as trials:
        ends = list(trials.map(ask, ran.values()))
        for name, task in ran.items():
            wait_until_released(manager, task.folder)
            folder, expected = alone[name]
            resumed = whole_fit(task.replace(attempt=1), Worker())
            assert resumed.pop("resumed_epoch") is not None
            assert resumed.items() <= (expected | {"attempt": 1}).items()
            assert_same_files(Path(folder), tmp_path / name)
    assert [end.blameless for end in ends] == [False] * SIZE


def test_a_job_that_takes_too_long_ends_its_host_with_the_other_jobs_and_leaves_its_stacks(
    shared_ray: None, tmp_path: Path
) -> None:
    with packs(linger, SIZE) as manager, ThreadPoolExecutor(SIZE) as trials:
        late: list[Any] = []

        def start_late(report: dict[str, str]) -> None:
            config = {"folder": str(tmp_path / "late")}
            late.append(trials.submit(lost, lambda: run_in_pack(manager, "late", config, lambda report: None)))

        for name in ("first", "late"):
            (tmp_path / name).mkdir()
        first = lost(lambda: run_in_pack(manager, "first", {"folder": str(tmp_path / "first")}, start_late))
        assert (str(first), str(late[0].result())) == (ENDED, ENDED)
        assert "linger" in (tmp_path / "first" / "stack.txt").read_text()
        assert (tmp_path / "late" / "stack.txt").read_text() == ""


def test_a_job_whose_client_dies_is_asked_to_stop_and_runs_nowhere_else_before(shared_ray: None, tmp_path: Path) -> None:
    config = {"folder": str(tmp_path)}
    with packs(linger, SIZE) as manager:

        def die(report: dict[str, str]) -> None:
            os.kill(os.getpid(), 9)

        client = ray.remote(num_cpus=0, max_retries=0)(run_in_pack)
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(client.remote(manager, "job", config, die))
        wait_until_released(manager, "job")
        assert (tmp_path / "stopped").exists()


def driver(folder: Path, **faults: object) -> subprocess.Popen[str]:
    """A driver in a process group of its own, as a shell would start it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, __file__, str(folder), json.dumps(faults)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def test_accidents_of_fits_in_a_pack_are_survived_and_those_that_had_one_are_tried_again_alone(tmp_path: Path) -> None:
    faults = {"a/001": "raise", "b/000": "nan", "b/002": "hang", "sleep_s": 0.1}
    told = driver(tmp_path, **faults).communicate(timeout=300)[0]
    assert json.loads(told.splitlines()[-1]) == {"finished": 5, "failed": 1, "unfinished": 0, "interrupted": False}
    results = Ledger(tmp_path).results()
    assert results["b/000"].reason == "loss is nan in epoch 2"
    assert "a/001: ValueError: the fit broke" in told
    assert "b/002: took longer than its time limit of 5 s" in told
    assert {key for key, result in results.items() if result.attempt} >= {"a/001", "b/002"}  # and who shared b/002's process
    hosts = {result.process for result in results.values() if not result.attempt}
    assert len(hosts) <= 2  # one, and another after the fit that hung
    assert hosts.isdisjoint(result.process for result in results.values() if result.attempt)
    assert_ends(set(map(int, processes(tmp_path))))


@pytest.mark.long
def test_no_host_outlives_a_driver_that_is_killed(tmp_path: Path) -> None:
    ours = driver(tmp_path, sleep_s=0.5)
    until = time.monotonic() + 240
    while len(starts(tmp_path)) < SIZE:
        assert ours.poll() is None
        assert time.monotonic() < until, ours.communicate()
        time.sleep(0.02)
    ours.kill()
    ours.communicate(timeout=240)
    hosts = processes(tmp_path)
    assert len(hosts) == 1
    assert_ends(set(map(int, hosts)))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    resources = Resources(fits_per_gpu=SIZE, time_limit_s=5)
    with private_ray({"num_cpus": 4, "num_gpus": 1, "object_store_memory": 128 * 2**20, "log_to_driver": False}):
        outcome = run(Path(sys.argv[1]), make_study(), PlainLines(sys.stdout), faults=json.loads(sys.argv[2]), resources=resources)
        print(json.dumps(vars(outcome)), flush=True)
