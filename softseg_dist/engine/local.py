"""Fits in this process, one at a time, without Ray: breakpoints, profilers and tracebacks work as in any Python program.

softseg run STUDY --local        # --debug runs so too, unless --address, --workers-per-fit or --fits-per-gpu is given

Searcher, session, ledger, tracker and report are those of a run on Ray with one fit at a time, and so are the results. What ends
a worker's process there, such as `os._exit` in a loss, ends this one. A time limit interrupts Python code, not native code, and
acts in the main thread only, where signals arrive.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import threading
import traceback
from bdb import BdbQuit
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import Session, signals
from softseg_dist.engine.worker import LostJob, Report, ending_of, message_of, run_fit, run_until_done
from softseg_dist.study_file import describe
from softseg_dist.training.task import FitResult, FitTask, Worker


class TimeLimitExceeded(BaseException):
    """Ends a fit; not an Exception, so that the code of a fit does not catch it."""


@dataclass(frozen=True)
class LocalBackend:
    """Fits in this process. `debug`: the traceback of a fit that raises is shown, as it is in any case under a debugger."""

    debug: bool = False

    def held(self) -> AbstractContextManager[None]:
        """Nothing is started."""
        return nullcontext()

    def run_fits(self, session: Session, context: RunContext) -> None:
        """As `Backend.run_fits`."""
        with signals(session):
            for number in map(str, count()):
                if (task := session.next_fit(number)) is None:
                    assert session.ended, "with no fit running there is one to start"
                    return

                def report(news: Mapping[str, str], number: str = number) -> None:
                    session.epoch(number, json.loads(news["epoch"]))

                worker = Worker(device=context.device, stop=session.announce_stop)
                job = partial(self._run, context, worker)
                session.ended_as(number, ending_of(job, message_of(task, context.stop_file), report))

    def train(self, context: RunContext, task: FitTask, alone_s: float) -> FitResult:
        """As `Backend.train`."""
        return run_until_done(partial(self._run, context, Worker(device=context.device)), task, context.progress.note)

    def _run(self, context: RunContext, worker: Worker, message: dict[str, str], report: Report) -> dict[str, str]:
        """Raises LostJob where a worker's process would have died, and KeyboardInterrupt if the fit's debugger was quit."""
        try:
            return run_fit(message, context.fit, context.sources, worker, report, time_limit)
        except BdbQuit:
            raise KeyboardInterrupt from None
        except TimeLimitExceeded:
            raise LostJob("") from None  # the file with the stacks says the rest
        except (Exception, SystemExit) as error:
            if self.debug or _in_debugger():
                context.progress.note(traceback.format_exc())
            raise LostJob(describe(error) if isinstance(error, Exception) else f"it ended with {error!r}") from error


@contextmanager
def time_limit(limit_s: float | None, stacks: Path) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in the block after `limit_s`, with all stacks in the file `stacks`; never in a debugger."""
    stacks.unlink(missing_ok=True)
    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def overrun(number: int, frame: FrameType | None) -> None:
        if not _in_debugger():
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file)
            raise TimeLimitExceeded

    before = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _in_debugger() -> bool:
    """Does a debugger trace this process?"""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return sys.gettrace() is not None or (monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None)
