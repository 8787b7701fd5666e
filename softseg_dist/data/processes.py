"""Independent tasks over the processors of this machine, in processes that are started only where they pay.

Work begins in this process. If after a second the rest would need more than `POOL_PAYS_S` of processor time at that pace, it goes
on in one process per processor: a small data set never waits for processes to start (about 1 s). Processor time, because on a
busy machine everything seems long, and nothing gets shorter by being shared.

Nothing is forked from this process, whose threads and locks may be in any state: a server process imports the package once, and
workers are forked from that (Python's "forkserver").
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from softseg_dist.frozen import TEXT_MODULES

GROUPS = Path("/sys/fs/cgroup")
PACE_KNOWN_S = 1.0
POOL_PAYS_S = 4.0
PRELOADED = [f"softseg_dist.data.{name}" for name in ("layouts", "phantom", "store")]  # once, not by each worker
LOOK_AHEAD = 2  # tasks per worker that may be done or under way before their turn: results wait on disk

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_processors() -> int:
    """How many processors this process may use, by its affinity and the limits of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [int(quota) / int(period) for quota, period in map(str.split, _group_limits("cpu.max")) if quota != "max"]
    return max(1, math.floor(min([allowed, *shares])))


def free_bytes() -> float:
    """The memory that is available, as Linux says it and a limit of the control group allows; infinite elsewhere."""
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", facts.read_text()) if facts.exists() else None
    limits = [int(limit) for limit in _group_limits("memory.max") if limit != "max"]
    return min([1024 * int(found[1]) if found else math.inf, *limits])


def _group_limits(name: str, root: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> list[str]:
    """What a file of this process's control group (version 2) and of those above it says; in a container its own is the root."""
    path = next((line[3:] for line in own.read_text().splitlines() if line.startswith("0::")), "") if own.exists() else ""
    group = root / path.strip("/")
    files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [file.read_text().strip() for file in files if file.is_file()]


def over_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int | None = None, pays_s: float = POOL_PAYS_S
) -> Generator[Result, None, None]:
    """As `map(function, tasks)`: results in the order of the tasks; an error is raised where its result would come.

    `function` and `tasks` are pickled; tasks that cannot be sent stay in this process. So do those that are left when a worker
    is killed: that is mostly for want of memory, and one process needs the least. Close the generator to stop early.
    """
    workers = min(workers or num_processors(), len(tasks))
    started = time.process_time()
    for done, task in enumerate(tasks):
        spent_s = time.process_time() - started
        rest_s = spent_s / max(done, 1) * (len(tasks) - done)
        if workers > 1 and rest_s > pays_s and spent_s >= min(PACE_KNOWN_S, pays_s):
            if all(_can_be_sent((function, task)) for task in tasks[done:]):
                yield from _pooled(function, tasks[done:], workers)
                return
            workers = 1
        yield function(task)


def _pooled(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Generator[Result, None, None]:
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    left, done = iter(tasks), 0
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        with _without_main():
            waiting = deque(pool.submit(function, task) for task in islice(left, LOOK_AHEAD * workers))
        while waiting:
            yield waiting.popleft().result()
            done += 1
            with _without_main():
                waiting.extend(pool.submit(function, task) for task in islice(left, 1))
    except BrokenProcessPool:
        yield from map(function, tasks[done:])
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Workers that start in the block do not import the main module: a script that runs a study would run it again."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """In a worker: end at once on Ctrl-C, which the parent tells about, and when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None, "workers are started by a parent"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _can_be_sent(task: object) -> bool:
    """Whether a process that knows only the package can be sent the task: not if it needs a class of a study or a script."""
    try:
        _WithoutStudies(BytesIO()).dump(task)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


class _WithoutStudies(pickle.Pickler):
    """Refuses classes and functions of the main module, and of modules that were loaded from the text of a study."""

    def reducer_override(self, thing: object) -> Any:
        """Called for each object; leaves it to pickle if it is none of those."""
        if isinstance(thing, type | FunctionType) and (thing.__module__ == "__main__" or thing.__module__ in TEXT_MODULES):
            raise pickle.PicklingError(thing.__qualname__)
        return NotImplemented
