"""What a run of `softseg` costs: wall time and processor time, of all of its processes, stage by stage. Used by `bench_study.py`.

The lines of `--json` delimit the stages, so a checkout of any commit can be measured. Processor time is that of every process
whose environment carries the run's mark (Ray's and the fits' are no children of ours for long), looked at every `SAMPLE_S`: what a
process uses between its last sample and its end is missed, at most that long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MARK = "SOFTSEG_BENCH_RUN"
SAMPLE_S = 0.25
STAGES = (
    "the command starts",  # until it says the first thing: imports
    "prepare, check",
    "Ray and its workers start",  # until the first fit has trained an epoch
    "fits",
    "collect, report",
    "final model, ends",  # the winner on everybody; Ray and MLflow end
)


@dataclass(frozen=True)
class Cost:
    """`stages` are (wall, processor) seconds by the names of `STAGES`; `ends` those at which each fit ended."""

    folder: Path
    wall_s: float
    cpu_s: float
    stages: Mapping[str, tuple[float, float]]
    ends: tuple[tuple[float, float], ...]


def cost_of(study: Path, folder: Path, *options: str, package: Path | None = None, **environment: str) -> Cost:
    """Run a study from nothing to its report and model; `package` is a checkout to run instead of the one on the path."""
    mark = uuid.uuid4().hex
    where = {"PYTHONPATH": str(package)} if package else {}
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", str(study), "--json", *options]
    folder.mkdir(parents=True)
    started = time.time()
    run = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ | where | environment | {MARK: mark}
    )
    samples: list[tuple[float, float]] = [(0.0, 0.0)]
    sampler = threading.Thread(target=_sample, args=(run, mark, started, samples))
    sampler.start()
    assert run.stdout is not None
    lines = [(time.time() - started, json.loads(line)) for line in run.stdout]
    sampler.join()
    assert run.wait() == 0, lines[-3:]
    ran = Path(lines[-1][1]["run"])
    return _cost(folder / ran, lines, np.array(samples).T)


def _cost(folder: Path, lines: list[tuple[float, dict[str, Any]]], samples: Any) -> Cost:
    def first(**wanted: str) -> float:
        return next(at for at, line in lines if all(str(line.get(k, "")).startswith(v) for k, v in wanted.items()))

    ends = [at for at, line in lines if line.get("event") == "fit"]
    marks = [
        0.0, lines[0][0], first(event="start"), first(event="epoch"), ends[-1],
        first(event="note", text="training "), float(samples[0][-1]),
    ]  # fmt: skip
    cpu = np.interp([*marks, *ends], *samples)
    parts = [(later - sooner, used) for (sooner, later), used in zip(pairwise(marks), np.diff(cpu), strict=False)]
    stages = dict(zip(STAGES, parts, strict=True))
    of_ends = tuple(zip(ends, map(float, cpu[len(marks) :]), strict=True))
    return Cost(folder, marks[-1], float(samples[1][-1]), stages, of_ends)


def _sample(run: subprocess.Popen[str], mark: str, started: float, samples: list[tuple[float, float]]) -> None:
    ours: dict[tuple[int, float], bool] = {}
    used: dict[tuple[int, float], float] = {}
    while True:
        ended = run.poll() is not None
        for process in psutil.process_iter():
            try:
                key = process.pid, process.create_time()
                if key not in ours or not used.get(key):  # between fork and exec a process has its parent's environment
                    ours[key] = process.environ().get(MARK) == mark
                if ours[key]:
                    times = process.cpu_times()
                    used[key] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        samples.append((time.time() - started, sum(used.values())))
        if ended:
            return
        time.sleep(SAMPLE_S)
