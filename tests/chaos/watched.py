"""A real `softseg run` in a folder of its own, watched while it runs: its lines, the fits that it finishes, what it leaves.

Processes are found by a mark in their environment, which all that a run starts inherit.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

MARK = "SOFTSEG_CHAOS"
NAME = "struck"
STUDY = '''
"""The study that faults are injected into: real fits of some seconds, each step a checkpoint, and in a bucket one a second."""

import os
import time

from torch import nn

from softseg_dist import Brier, MonteCarlo, Network, Optim, Phantom, Preprocess, Recipe, Resources, Study


class Small(Network):
    """Two convolutions: MONAI's import would take most of the time."""

    short = "small"

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        first = nn.Conv2d(in_channels, 4, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, out_channels, 1))


class Slow(Brier):
    """Leaves time for faults, and the processor to others."""

    def per_sample(self, prediction, target):
        time.sleep(0.05)
        return super().per_sample(prediction, target)


OPTIM = Optim(epochs=6, batch_size=8)
BASE = Recipe(network=Small(), loss=Slow(), optim=OPTIM)
STUDY = Study(
    name="struck",
    question="Does a study survive each fault?",
    data=Phantom(subjects=6, size=(16, 16), num_slices=4),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2),
    resources=Resources(checkpoint_every_s=float(os.environ.get("CHECKPOINT_EVERY_S", "0"))),
    candidates={"a": BASE, "b": BASE.replace(optim=OPTIM.replace(lr=1e-2))},
)
'''
POLL_S = 0.03
LEFT_S = 60.0  # nothing of a run may be left after so long
KEYS = ["candidate", "split", "repeat", "subset", "grid", "case", "class", "reference", "threshold", "metric"]
MADE_ANEW = ("mlartifacts/", "report/")  # named by ids or times


@dataclass
class Command:
    """One `softseg run`, and what it has printed: each line with the time at which it came."""

    process: subprocess.Popen[str]
    started: float
    lines: list[tuple[float, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """What it printed that is JSON."""
        for at, line in list(self.lines):
            with suppress(json.JSONDecodeError):
                yield at, json.loads(line)

    @property
    def done(self) -> bool:
        """Did it end with the study done?"""
        return self.process.returncode == 0 and any(event.get("end") == "done" for _, event in self.events)


class Watched:
    """The study in `folder`, whose runs lie in `disk`, with `options` of `softseg run` and `environment` beside this one's."""

    def __init__(self, folder: Path, disk: Path, options: tuple[str, ...], environment: dict[str, str]) -> None:
        self.folder, self.disk, self.options = folder, disk, options
        self.run = disk / "runs" / NAME
        self.scratch = folder / "t"
        self.scratch.mkdir()
        self.study = folder / f"{NAME}.py"
        self.study.write_text(STUDY.lstrip())
        places = {"TMPDIR": self.scratch, "RAY_TMPDIR": self.scratch, "SOFTSEG_CACHE": folder / "cache"}
        own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"), "RAY_worker_niceness": "0"}
        own |= {name: str(place) for name, place in (places | {"XDG_CONFIG_HOME": folder / "configuration"}).items()}
        self.environment = os.environ | own | {MARK: str(folder), "PYTHONPATH": str(Path(__file__).parents[2])} | environment
        self.commands: list[Command] = []
        self.finished: dict[str, tuple[int, bytes]] = {}  # as the record of each fit was first seen
        self.epochs: dict[str, int] = {}  # the most that the history of each fit has had
        self.changed: set[str] = set()
        self.repeated: set[str] = set()
        self._ended = threading.Event()
        self._shared = set(Path("/dev/shm").iterdir())
        self._watching = _in_background(self._watch)

    def start(self, *more: str) -> Command:
        """The command, in a session of its own."""
        places = [] if "--out" in self.options else ["--out", str(self.disk / "runs"), "--stores", str(self.disk / "stores")]
        program = [sys.executable, "-P", "-m", "softseg_dist.cli.main", "run", str(self.study), "--json"]
        command = [*program, *places, *self.options, *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started = Command(subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes), time.time())
        self.commands.append(started)
        process = started.process
        started.readers += [
            _in_background(lambda: started.lines.extend((time.time(), line) for line in process.stdout or ())),
            _in_background(lambda: started.errors.extend(process.stderr or ())),
        ]
        return started

    def stop_looking(self) -> None:
        """Look at fits no more in the background."""
        self._ended.set()
        self._watching.join()

    def close(self) -> None:
        """End all that is left."""
        self._ended.set()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """All that the commands have started and that has not ended, also those whose parents have."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def titled(self, start: str) -> list[psutil.Process]:
        """Those whose title or program begins so."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                words = process.cmdline() or [""]
                if words[0].startswith(start) or Path(words[0]).name.startswith(start):
                    found.append(process)
        return found

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.look()

    def look(self) -> None:
        """Note the fits that have finished, and the epochs that each fit has trained."""
        for path in self.run.glob("fits/*/*.json"):
            if path.stem.isdigit():
                with suppress(OSError):
                    self.note(str(path.relative_to(self.run)), (path.stat().st_mtime_ns, path.read_bytes()))
        for path in self.run.glob("fits/*/*"):
            with suppress(OSError):
                if path.is_dir():
                    key, history = str(path.relative_to(self.run / "fits")), path / "history.jsonl"
                    now = history.read_text().count("\n") if history.exists() else 0
                    if now < self.epochs.get(key, 0) - 1:  # the last epoch may be trained again from its last step
                        self.repeated.add(f"{key} from epoch {self.epochs[key]} to {now}")
                    self.epochs[key] = max(now, self.epochs.get(key, 0))

    def note(self, name: str, now: tuple[int, bytes]) -> None:
        """The record of a fit that has finished: it stays as it is."""
        if self.finished.setdefault(name, now) != now:
            self.changed.add(name)

    def left(self, expected: set[str]) -> list[str]:
        """What a run that has ended leaves that it should not; looks for a minute at most."""
        until = time.monotonic() + LEFT_S
        while (found := self._left_now(expected)) and time.monotonic() < until:
            time.sleep(0.2)
        return found

    def _left_now(self, expected: set[str]) -> list[str]:
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                ports = [c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                found.append(f"process {' '.join(process.cmdline())[:60]} {ports or ''}")
        found += [f"{path}" for path in self.scratch.iterdir()]
        mine = [path for path in set(Path("/dev/shm").iterdir()) - self._shared if _is_ours(path, self.commands[0].started)]
        return [*found, *map(str, mine), *sorted(self.files() - expected)]

    def files(self) -> set[str]:
        """All files of runs and stores, by their path, but those that ids or times name."""
        names = (str(path.relative_to(self.disk)) for path in self.disk.rglob("*") if path.is_file())
        return {name for name in names if not name.startswith(tuple(f"runs/{NAME}/{part}" for part in MADE_ANEW))}


def _in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _is_ours(path: Path, since: float) -> bool:
    with suppress(OSError):
        return path.stat().st_uid == os.getuid() and path.stat().st_ctime > since
    return False


def hung(command: Command, limit_s: float) -> bool:
    """Wait for the end of a command; True, and it is killed, if it does not come."""
    try:
        command.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(command.process.pid, signal.SIGKILL)
        command.process.wait()
        return True
    return False


def table(run: Path) -> pd.DataFrame:
    """All rows, in one order."""
    rows = pd.read_parquet(run / "results.parquet")
    rows = rows.astype({name: str for name in KEYS if name not in ("split", "repeat", "threshold")})
    return rows.sort_values(KEYS, ignore_index=True)


def mlflow_runs(database: Path) -> Counter[str]:
    """Each run of MLflow by key and state, with its metrics: names and steps."""
    asked = """select t.value, r.status, (select group_concat(m) from (select distinct key || ' ' || step as m from metrics
               where run_uuid = r.run_uuid order by m)) from runs r join tags t on t.run_uuid = r.run_uuid
               where t.key = 'softseg.key' and r.lifecycle_stage = 'active'"""
    with closing(sqlite3.connect(database)) as connection:
        return Counter(" | ".join(map(str, row)) for row in connection.execute(asked))
