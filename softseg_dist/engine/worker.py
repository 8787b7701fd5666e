"""What the process of a fit does: it loads the study file, runs the fit under its time limit, and says how it ended.

A fit that overruns its limit ends the process and leaves the stacks of all threads. The interpreter watches without its lock, so
that a fit that hangs in native code ends, too. Its only timer is set to the next limit of all fits that run in its threads.
"""

from __future__ import annotations

import faulthandler
import json
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from softseg_dist.data.store import local_store
from softseg_dist.engine.ray_folder import VARIABLE
from softseg_dist.errors import UserError, no_room
from softseg_dist.frozen import Frozen
from softseg_dist.places import Place
from softseg_dist.record.remote import mirrored
from softseg_dist.sources import Sources
from softseg_dist.study_file import describe, load_sources
from softseg_dist.training.data_parallel import partner_died
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker

STOP_CHECK_S = 0.5  # how often a fit looks for the stop file, at most after every step
REMOTE_STOP_CHECK_S = 5.0  # every request to an object store costs money
ENDS_SOON = "its machine ends soon"
ERROR, STACK = "error.txt", "stack.txt"  # what a fit that died leaves in its folder

Fit = Callable[[FitTask, Worker], FitResult]
Report = Callable[[dict[str, str]], None]
_limits: dict[TextIO, float] = {}  # the file that takes the stacks, and when
_changing = threading.Lock()


@contextmanager
def time_limit(limit_s: float | None, stacks: Path) -> Iterator[None]:
    """End the process if the block takes longer than `limit_s`, and leave all stacks in the file `stacks`."""
    stacks.unlink(missing_ok=True)
    if limit_s is None:
        yield
        return
    with stacks.open("w") as file:
        _set(file, time.monotonic() + limit_s)
        try:
            yield
        finally:
            _set(file, None)
    stacks.unlink()


def _set(file: TextIO, deadline_s: float | None) -> None:
    with _changing:
        _limits.pop(file, None)
        if deadline_s is not None:
            _limits[file] = deadline_s
        faulthandler.cancel_dump_traceback_later()
        if _limits:
            file, next_s = min(_limits.items(), key=lambda limit: limit[1])
            left_s = max(1e-3, next_s - time.monotonic())  # the timer takes no time that has passed
            faulthandler.dump_traceback_later(left_s, exit=True, file=file)


class LostJob(Exception):
    """A job without an answer, as a worker died or raised, and why if known; `blameless` if the loss of a machine is the cause."""

    def __init__(self, reason: str, blameless: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless


class Ending(Frozen):
    """How a fit ended: with a result, interrupted, on a mistake of the user's, or lost with the process that ran it.

    `text` is the mistake, or the cause of the loss if it is known. `blameless`: that cause is not the fit.
    """

    kind: Literal["result", "interrupted", "user_error", "lost"]
    result: FitResult | None = None
    text: str = ""
    blameless: bool = False

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Self:
        """What an `answer` says."""
        return cls.model_validate(json.loads(answer["ending"]))

    @property
    def answer(self) -> dict[str, str]:
        """As text, for Tune."""
        return {"ending": json.dumps(self.model_dump(mode="json"))}


class StopFile:
    """True once the file is there, which is looked for at intervals: the driver writes it to make all fits stop."""

    def __init__(self, uri: str) -> None:
        self._place = Place.at(uri)
        self._every_s = STOP_CHECK_S if self._place.path is not None else REMOTE_STOP_CHECK_S
        self._seen = False
        self._next_s = 0.0

    def __call__(self) -> bool:
        """Shall the fit stop?"""
        if not self._seen and time.monotonic() >= self._next_s:
            self._seen = self._place.is_file()
            self._next_s = time.monotonic() + self._every_s
        return self._seen


def message_of(task: FitTask, stop_file: Place) -> dict[str, str]:
    """What a worker gets of a fit, as `run_fit` takes it."""
    return {"task": json.dumps(task.model_dump(mode="json")), "stop": str(stop_file)}


def run_fit(fit: Fit, sources: Sources | None, message: Mapping[str, Any], worker: Worker, report: Report) -> dict[str, str]:
    """Run the fit of a `message_of`, with classes of `sources`; returns the answer of its `Ending`. Each worker calls this."""
    if sources is not None:
        load_sources(sources)
    task = FitTask.model_validate(json.loads(message["task"]))
    stop_file = StopFile(message["stop"])

    def stop() -> bool:
        return stop_file() or worker.stop()

    if worker.share(stop() if worker.leads else False):
        return Ending(kind="interrupted").answer
    reporting = replace(worker, report=lambda metrics: report({"epoch": json.dumps(metrics)}), stop=stop)
    return _guarded(task, fit, reporting).answer


def _guarded(task: FitTask, fit: Fit, worker: Worker) -> Ending:
    try:
        local_store(task.store)  # a node fetches it once, outside of any fit's time limit
        if not worker.leads:
            with tempfile.TemporaryDirectory(dir=os.environ.get(VARIABLE)) as scratch:  # the fit's own folder belongs to rank 0
                return Ending(kind="result", result=_watched(task.replace(folder=scratch), fit, worker))
        with mirrored(task) as (here, saved):
            return Ending(kind="result", result=_watched(here, fit, replace(worker, saved=saved)))
    except Interrupted:
        return Ending(kind="interrupted")
    except UserError as error:
        return Ending(kind="user_error", text=str(error))
    except OSError as error:
        if (text := no_room(error)) is None:
            raise
        return Ending(kind="user_error", text=text)  # every other fit would fail in the same way


def _watched(task: FitTask, fit: Fit, worker: Worker) -> FitResult:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        with time_limit(task.time_limit_s, folder / STACK):
            return fit(task, worker)
    except (Interrupted, UserError):
        raise
    except Exception as error:
        if no_room(error) is None and not (worker.num_workers > 1 and partner_died(error)):
            (folder / ERROR).write_text(f"{describe(error)}\n\n{traceback.format_exc()}", encoding="utf-8")
        raise


def reason_of(task: FitTask, cause: str = "") -> str:
    """Why a fit's process ended without an `Ending`: from the files in its folder, else `cause`, else that it died."""
    folder = Place.at(task.folder)
    if (error := (folder / ERROR).read()) is not None:
        lines = error.decode(errors="replace").splitlines()
        return f"{lines[0] if lines else 'error'} (see {folder / ERROR})"
    if (folder / STACK).read():
        return f"took longer than its time limit of {task.time_limit_s:g} s (see {folder / STACK})"
    return cause or "its process died (killed, out of memory, or crashed)"
