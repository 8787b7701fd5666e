"""Kill the processes of a study at random moments, and count what that cost. Used by `test_faults.py` and `bench_faults.py`.

`python faults.py FOLDER SEED WORKERS_PER_FIT KIND...` starts a Ray that outlives the drivers, kills one process of each KIND
while studies of `besieged.py` run, and prints the figures as JSON. Processes are killed by ids that the fits themselves wrote into
their diary, or that Ray gives for the actor that holds a lane.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import pyarrow.parquet as pq
import ray
from besieged import NUM_FITS, STUDY, diary, prepare
from ray._private import state as ray_state
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.record.ledger import Ledger
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitResult, FitTask, cases_path, history_path, result_path

HERE = Path(__file__).parent
PATIENCE_S = 240.0  # a study that has not gone on by then never will
FREE_WITHIN_S = 15.0
NUM_CPUS = 2
Kind = Literal["worker", "holder", "driver"]
"""What is killed: a process that trains, the Tune actor that holds its lane, the driver."""
Line = dict[str, Any]
T = TypeVar("T")


@dataclass
class Figures:
    """What a siege has cost. `resume_s`: (kind, seconds from the kill until the study trains again)."""

    kills: int = 0
    resume_s: list[tuple[Kind, float]] = field(default_factory=list)
    lost: int = 0
    repeated: int = 0
    continued: int = 0
    different: int = 0
    reserved: int = 0
    studies: int = 0
    sessions: int = 0


@contextmanager
def lasting_ray() -> Iterator[str]:
    """A Ray of two CPUs that drivers connect to; gives its address."""
    os.environ.update(ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"})
    os.environ["PYTHONPATH"] = str(HERE)  # of drivers and of Ray's workers
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": NUM_CPUS, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def undisturbed(folder: Path, address: str, workers: int) -> dict[str, dict[str, Any]]:
    """What every fit leaves that nobody disturbs, by its key: of one worker without Ray, in this process."""
    if workers > 1:  # their sums have other last digits than one worker's
        folder.mkdir(parents=True)
        subprocess.run(_session(folder, address, workers), check=True, stdout=subprocess.DEVNULL)
        return _left_in(folder)
    store, splits = prepare(folder)
    left = {}
    for name, recipe in STUDY.candidates.items():
        for split in splits:
            task = FitTask(
                study=STUDY.name, seed=STUDY.seed, candidate=name, recipe=recipe, split=split, objective=STUDY.objective,
                store=str(store.path), store_fingerprint=store.fingerprint, folder=str(folder / name / split.name),
            )  # fmt: skip
            left[task.key] = _left_by(task.folder, fit(task))
    return left


def _session(folder: Path, address: str, workers: int) -> list[str]:
    return [sys.executable, str(HERE / "besieged.py"), str(folder), address, str(workers)]


def _left_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What every fit of the study in `folder` has left, by its key."""
    results = Ledger(folder / "run").results()
    return {key: _left_by(folder / "run" / "fits" / key, result) for key, result in results.items()}


def _left_by(folder: str | Path, result: FitResult) -> dict[str, Any]:
    """What a fit leaves, without what its machine and its interruptions add."""
    same = result.replace(duration_s=0.0, peak_memory_mb=0.0, attempt=0, resumed_epoch=None, num_workers=1)
    cases = pq.read_table(cases_path(folder)).to_pylist()
    return same.model_dump() | {"history": history_path(folder).read_text(), "cases": str(cases)}


def besiege(folder: Path, address: str, workers: int, kinds: Sequence[Kind], seed: int) -> Figures:
    """Kill one process of every kind in `kinds`, in that order, over as many studies as that takes; none is left half done."""
    expected = undisturbed(folder / f"undisturbed-{workers}", address, workers)
    left, chance, figures = list(kinds), random.Random(seed), Figures()
    while left:
        _Siege(folder / f"study-{workers}-{figures.studies:02d}", address, workers, chance, figures).run(left, expected)
        figures.studies += 1
    return figures


class _Siege:
    """One study, from its first session to its last result."""

    def __init__(self, folder: Path, address: str, workers: int, chance: random.Random, figures: Figures) -> None:
        self.folder, self.address, self.workers = folder, address, workers
        self.chance, self.figures = chance, figures
        self.recorded: dict[Path, tuple[int, str]] = {}
        folder.mkdir(parents=True)

    def run(self, left: list[Kind], expected: dict[str, dict[str, Any]]) -> None:
        self._start()
        while True:
            pause_until = time.monotonic() + self.chance.uniform(0.0, 1.0)
            hit = self._wait_for(self._training_since(pause_until)) if left else None
            if hit is not None:
                self._strike(left.pop(0), hit)
                continue
            assert self.driver.wait(PATIENCE_S) == 0, self._said()
            if json.loads(self._said().splitlines()[-1])["finished"] == NUM_FITS:
                break
            self._start()  # a fit that was hit twice in one session was given up until the next one
        self._count(expected)

    def _start(self) -> None:
        self.figures.sessions += 1
        self.session_began = time.time()
        command = _session(self.folder, self.address, self.workers)
        with (self.folder / "driver.txt").open("w") as out:
            self.driver = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def _strike(self, kind: Kind, hit: Line) -> None:
        self.recorded |= {path: (path.stat().st_mtime_ns, path.read_text()) for path in self._ledger_files()}
        victim = self._victim(kind, hit)
        struck = time.time()
        os.kill(victim, signal.SIGKILL)
        if kind == "driver":
            self.driver.wait()
            self._start()
        self.figures.kills += 1
        goes_on = self._wait_for(lambda: self._trained_again(struck, None if kind == "driver" else hit["fit"]))
        if goes_on is not None:
            self.figures.resume_s.append((kind, goes_on - struck))

    def _victim(self, kind: Kind, hit: Line) -> int:
        if kind == "driver":
            return self.driver.pid
        if kind == "worker":
            return int(hit["pid"])
        alive = [actor for actor in ray_state.actors().values() if actor["State"] == "ALIVE"]
        return int(self.chance.choice([a["Pid"] for a in alive if a["ActorClassName"] == "ImplicitFunc"]))

    def _training_since(self, moment: float) -> Callable[[], Line | None]:
        """Looks, from `moment` on, for a worker that trains: at random, of the fits that have a checkpoint."""

        def look() -> Line | None:
            if time.monotonic() < moment:
                return None
            latest: dict[tuple[str, int], Line] = {}
            begun = set()
            for line in diary(self.folder):
                if line["event"] == "epoch":
                    begun.add(line["fit"])
                elif line["time"] > self.session_began:
                    latest[line["fit"], line["rank"]] = line
            running = [line for line in latest.values() if line["event"] == "start" and psutil.pid_exists(line["pid"])]
            training = [line for line in running if line["fit"] in begun]
            return self.chance.choice(training) if training else None

        return look

    def _trained_again(self, struck: float, fit: str | None) -> float | None:
        """When a fit started after `struck` finished an epoch: the fit that was hit, if the blow did not come too late for it."""
        if fit is not None and result_path(self.folder / "run" / "fits" / fit).exists():
            fit = None
        since = [line for line in diary(self.folder) if line["time"] > struck and fit in (None, line["fit"])]
        started = {(line["fit"], line["pid"]) for line in since if line["event"] == "start"}
        return next((x["time"] for x in since if x["event"] == "epoch" and (x["fit"], x["pid"]) in started), None)

    def _wait_for(self, look: Callable[[], T | None]) -> T | None:
        """What `look` gives once it is not None; None if the session ends before."""
        until = time.monotonic() + PATIENCE_S
        while (seen := look()) is None and self.driver.poll() is None:
            assert time.monotonic() < until, f"the study hangs: {self._said()}"
            time.sleep(0.02)
        return seen

    def _said(self) -> str:
        return (self.folder / "driver.txt").read_text()

    def _ledger_files(self) -> list[Path]:
        return list((self.folder / "run" / "fits").glob("*/[0-9]*.json"))

    def _count(self, expected: dict[str, dict[str, Any]]) -> None:
        now = {path: (path.stat().st_mtime_ns, path.read_text()) for path in self._ledger_files()}
        self.figures.lost += sum(now.get(path) != before for path, before in self.recorded.items())
        left = _left_in(self.folder)
        self.figures.different += sum(left[key] != expected[key] for key in left)
        self._count_restarts()
        self.figures.reserved += reserved(NUM_CPUS)

    def _count_restarts(self) -> None:
        """A fit starts again: the first epoch that it then finishes was not finished before, or is the last one that was."""
        reached: dict[str, int] = {}
        restarted = set()
        for line in diary(self.folder):
            key = line["fit"]
            if line["event"] == "start" and line["rank"] == 0 and key in reached:
                restarted.add(key)
            elif line["event"] == "epoch":
                if key in restarted:
                    self.figures.continued += line["epoch"] >= reached[key]
                    self.figures.repeated += line["epoch"] < reached[key]
                    restarted.remove(key)
                reached[key] = line["epoch"]


def reserved(num_cpus: int) -> int:
    """CPUs and placement groups of a Ray with `num_cpus` that are still held a while after the last session."""
    until = time.monotonic() + FREE_WITHIN_S
    while True:
        groups = sum(group["state"] != "REMOVED" for group in placement_group_table().values())
        held = groups + num_cpus - int(ray.available_resources().get("CPU", 0.0))
        if held == 0 or time.monotonic() > until:
            return held
        time.sleep(0.1)


if __name__ == "__main__":
    folder, seed, workers, *kinds = sys.argv[1:]
    with lasting_ray() as address:
        print(json.dumps(vars(besiege(Path(folder), address, int(workers), kinds, int(seed)))))
