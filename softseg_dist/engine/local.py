"""Fits in this process, one at a time, without Ray: breakpoints, profilers and tracebacks work as in any Python program.

Searcher, session, ledger, tracker and report are those of a run on Ray with one fit at a time, and so are the results. What ends
a worker's process there, such as `os._exit` in a loss, ends this one. Time limits of fits do not hold here: a debugger needs time.
"""

from __future__ import annotations

import json
import traceback
from bdb import BdbQuit
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.session import Session, signals
from softseg_dist.engine.worker import Ending, Report, message_of, run_fit
from softseg_dist.study_file import describe
from softseg_dist.training.task import Worker


@dataclass(frozen=True)
class LocalBackend:
    """Fits in this process. `debug`: the traceback of a fit that raises is shown."""

    debug: bool = False

    def held(self) -> AbstractContextManager[None]:
        """Nothing is started."""
        return nullcontext()

    def run_fits(self, session: Session, context: RunContext) -> None:
        """As `Backend.run_fits`."""
        worker = Worker(device=context.device, stop=session.announce_stop)
        with signals(session):
            for number in map(str, count()):
                if (task := session.next_fit(number)) is None:
                    assert session.ended, "with no fit running there is one to start"
                    return
                if task.time_limit_s and number == "0":
                    context.progress.note("the time limit of fits does not hold in this process; Ctrl-C stops one that hangs")
                message = message_of(task.replace(time_limit_s=None), context.stop_file)

                def report(news: Mapping[str, str], number: str = number) -> None:
                    session.epoch(number, json.loads(news["epoch"]))

                session.ended_as(number, self._ending(context, worker, message, report))

    def _ending(self, context: RunContext, worker: Worker, message: dict[str, str], report: Report) -> Ending:
        """Lost where a worker's process would have died. Raises KeyboardInterrupt if the fit's debugger was quit."""
        try:
            return Ending.of(run_fit(context.fit, context.sources, message, worker, report))
        except BdbQuit:
            raise KeyboardInterrupt from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a fit may raise anything
            if self.debug:
                context.progress.note(traceback.format_exc())
            return Ending(kind="lost", text=describe(error) if isinstance(error, Exception) else f"it ended with {error!r}")
