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
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TextIO

import psutil
import torch

HERE = Path(__file__).parent
ENVS = HERE / ".envs"
MB = 1e6


def add_peer_options(parser: ArgumentParser) -> None:
    """`--peer` and `--envs`."""
    parser.add_argument("--peer", action="store_true", help="install the peer from PyPI and run it beside ours")
    parser.add_argument("--envs", type=Path, default=ENVS, help="where environments of peers are made, and kept")


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
        self.process = subprocess.Popen(
            [str(self.python), "-c", code, self.job],
            env=os.environ | package | threads | dict(self.settings),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> Turn:
        """Let it work once. Raises RuntimeError if it ends instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.work.__name__} of {self.job} has ended with {self.process.wait()}")
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


class Turns:
    """A side's own end: what it prints goes to standard error, what it tells to the bench."""

    def __init__(self) -> None:
        self._told: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._started = 0.0, 0.0

    def wait(self) -> None:
        """Until it is this side's turn. Raises SystemExit if there are no more."""
        if not sys.stdin.readline():
            raise SystemExit
        self._started = time.perf_counter(), _processor_s()

    def tell(self, items: int) -> None:
        """What was done since then."""
        seconds, processor_s = time.perf_counter() - self._started[0], _processor_s() - self._started[1]
        turn = {"items": items, "seconds": seconds, "processor_s": processor_s, "memory_mb": _memory_mb()}
        self._told.write(json.dumps(turn) + "\n")
        self._told.flush()


def _processor_s() -> float:
    """Of this process and of its children, alive or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(times.user + times.system for times in alive)


def _memory_mb() -> float:
    """This process's high-water, and what its children have now that they do not share."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (own + sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))) / MB
