"""Peers: packages that do the same work, in environments of their own; and two sides that take turns, so that noise hits both.

A peer's environment sees what this one has, so torch and numpy are the same files, and adds what the peer needs beside them.
A side is a process: `Side` at the bench's end, `Turns` at its own. It works only while it is asked to.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TextIO

import psutil
import torch

HERE = Path(__file__).parent
ENVS = HERE / ".envs"
MB = 1e6
SAID = 4000  # characters of what a side that has failed said last
LOOK_S = 0.2  # between two looks at the memory of a command


def add_peer_options(parser: ArgumentParser) -> None:
    """`--peer` and `--envs`."""
    parser.add_argument("--peer", action="store_true", help="install the peer from PyPI and run it beside ours")
    parser.add_argument("--envs", type=Path, default=ENVS, help="where environments of peers are made, and kept")


def may_run_nnunet(peer: bool) -> bool:
    """Was `--peer` given, and is hippocampus_msd at hand? Prints what is missing."""
    at_hand = (Path(os.environ.get("SOFTSEG_TEST_DATA", "")) / "hippocampus_msd").is_dir()
    if not peer:
        print("left out: --peer installs nnU-Net v2 from PyPI and runs it")
    elif not at_hand:
        print("left out: SOFTSEG_TEST_DATA names no folder with hippocampus_msd")
    return peer and at_hand


def environment(envs: Path, package: str) -> Path:
    """The interpreter of an environment that has `package`, made when it is not there yet (one or two minutes)."""
    folder = envs / package
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(f"Installing {package} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        theirs = Path(subprocess.check_output(where, text=True).strip())
        (theirs / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        same = folder / "same.txt"
        same.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", same]
        subprocess.run([*pip, package], check=True)
        ready.touch()
    return python


def version(python: Path, package: str) -> str:
    """Of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


@dataclass(frozen=True)
class Turn:
    """What a side did in one turn: so many items in so many seconds; its memory high-water until then, with its children's."""

    items: int
    seconds: float
    processor_s: float
    memory_mb: float


@dataclass
class Side:
    """A process that takes turns: it calls `work`, a function of a module of this folder, with `job` and its `Turns`."""

    work: Callable[[str, Turns], None]
    job: str
    python: Path = Path(sys.executable)
    threads: int = 1
    settings: Mapping[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        package = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        name = self.work.__name__
        code = f"import sys; from peers import Turns; from {self.work.__module__} import {name}; {name}(sys.argv[1], Turns())"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the side
        self.process = subprocess.Popen(
            [str(self.python), "-c", code, self.job],
            env=os.environ | package | threads | dict(self.settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def turn(self) -> Turn:
        """Let it work once. Raises RuntimeError if it ends instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            self.process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
            raise RuntimeError(f"{self.work.__name__} of {self.job} has ended: {said[-SAID:]}")
        self.turns.append(Turn(**json.loads(line)))
        return self.turns[-1]

    def close(self) -> None:
        """Tell it that there are no more turns, and wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    @property
    def per_s(self) -> float:
        """Items per second in its best turn: other work on the machine only adds."""
        return max(turn.items / turn.seconds for turn in self.turns)

    @property
    def per_processor_s(self) -> float:
        """Items per second of processor time, the median of turns."""
        return median(turn.items / turn.processor_s for turn in self.turns)

    @property
    def memory_mb(self) -> float:
        """High-water."""
        return max(turn.memory_mb for turn in self.turns)


def take_turns(sides: Mapping[str, Side], rounds: int) -> None:
    """One turn each to warm up, which does not count, then `rounds` of one after the other; ends all of them."""
    try:
        for side in sides.values():
            side.turn()
            side.turns.clear()
        for _ in range(rounds):
            for side in sides.values():
                side.turn()
    finally:
        for side in sides.values():
            side.close()


@dataclass(frozen=True)
class Watched:
    """What a command took: seconds, processor time and memory of all its processes; what several share counts once."""

    seconds: float
    processor_s: float
    peak_mb: float


def watch(start: Callable[[], psutil.Popen]) -> Watched:
    """Start a command and wait for its end. Raises CalledProcessError if it fails."""
    used = _children_s()
    started, peak = time.perf_counter(), 0
    run = start()
    while run.poll() is None:
        peak = max(peak, sum(map(_shared_bytes, [run, *run.children(recursive=True)])))
        with suppress(psutil.TimeoutExpired):
            run.wait(LOOK_S)
    seconds = time.perf_counter() - started
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, run.args)
    return Watched(seconds, _children_s() - used, peak / MB)


class Turns:
    """A side's own end: its reports go to the benchmark, and what it prints does not."""

    def __init__(self) -> None:
        self._reports: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0, 0.0

    def wait(self) -> None:
        """Until it is this side's turn. Raises SystemExit if there are no more."""
        if not sys.stdin.readline():
            raise SystemExit
        self._started = time.perf_counter(), _processor_s()

    def report(self, items: int) -> None:
        """What was done since then."""
        seconds, processor_s = time.perf_counter() - self._started[0], _processor_s() - self._started[1]
        turn = {"items": items, "seconds": seconds, "processor_s": processor_s, "memory_mb": _memory_mb()}
        self._reports.write(json.dumps(turn) + "\n")
        self._reports.flush()


def _processor_s() -> float:
    """Of this process and of its children, alive or not."""
    alive = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + _children_s() + sum(times.user + times.system for times in alive)


def _children_s() -> float:
    """Processor time of children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def _shared_bytes(process: psutil.Process) -> int:
    """Its memory, of what it shares with others its part; 0 if it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _memory_mb() -> float:
    """This process's high-water, and what its children have now that they do not share."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (own + sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))) / MB
