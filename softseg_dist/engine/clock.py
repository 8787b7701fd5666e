"""Time limits of what runs in this process: whoever overruns ends the process, and leaves the stacks of all its threads.

The interpreter itself watches, without its lock, so that a fit that hangs in native code is ended, too. It has one clock for a
process: set to the limit that is the next to run out, of as many fits as run in threads of it.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LEAST_S = 1e-3  # the interpreter wants a time that is still to come

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
            faulthandler.dump_traceback_later(max(LEAST_S, next_s - time.monotonic()), exit=True, file=file)
