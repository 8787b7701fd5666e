"""Signals that end a run raise KeyboardInterrupt, but not where it would be lost or leave a lock behind.

Python raises what a handler raises between any two instructions of the main thread. In a finalizer it is printed and forgotten.
Between two that take and release a lock, the lock may stay taken, and a thread that wants it waits for ever: so the one that writes
to MLflow, for the lock of `logging`. In both places the signal is sent again a little later.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, the end of a job or machine, a lost terminal
LOCKING = ("acquire", "release", "__enter__", "__exit__")  # functions that take or release a lock for their callers
LOCKED = (logging.__file__, "<frozen importlib")  # files, or how they begin, whose functions do so in their midst
AGAIN_S = 0.05  # a finalizer is over by then, and a lock in good hands
MOST = 20  # times in a row that a signal is sent again: what takes longer only waits
Handler = Callable[[int, FrameType | None], None]


def handler_of(stop: Callable[[int], None]) -> Handler:
    """A handler that calls `stop` with the signal as soon as the main thread is at no place that takes or releases a lock."""
    times = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal times
        code = frame.f_code if frame else None
        if code and times < MOST and (code.co_name in LOCKING or code.co_filename.startswith(LOCKED)):
            times += 1
            send_again(number)
        else:
            times = 0
            stop(number)

    return handle


def interrupt(kind: int) -> None:
    """Raise KeyboardInterrupt, at a signal of whichever kind."""
    raise KeyboardInterrupt


def interrupt_always() -> None:
    """From here on a signal of `ENDING` raises KeyboardInterrupt, in finalizers, too, unless it is ignored, as `nohup` does."""
    for kind in ENDING:
        if signal.getsignal(kind) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(kind, handler_of(interrupt))
    sys.unraisablehook = _unraisable


@contextmanager
def handled(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop`, which may raise, at the signals of `ENDING` that are not ignored. Only a main thread gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: handler for kind in ENDING if (handler := signal.getsignal(kind)) not in (signal.SIG_IGN, None)}
    try:
        for kind in before:
            signal.signal(kind, handler_of(stop))
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def interruptible() -> AbstractContextManager[None]:
    """A signal of `ENDING` raises KeyboardInterrupt in the block, but in a block of `handled` within it."""
    return handled(interrupt)


@contextmanager
def held_back() -> Iterator[None]:
    """The first signal of `ENDING` waits for the end of the block. A second one raises KeyboardInterrupt at once."""
    came: list[int] = []

    def wait(kind: int) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(kind)

    try:
        with handled(wait):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def send_again(kind: int) -> None:
    """Send this process a signal, in a moment."""
    start_new_thread(_send, (kind,))  # not `threading`, whose locks may be what was interrupted


def _send(kind: int) -> None:
    time.sleep(AGAIN_S)
    os.kill(os.getpid(), kind)


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    caught = [kind for kind in ENDING if callable(signal.getsignal(kind))]
    if isinstance(ignored.exc_value, KeyboardInterrupt) and caught:
        send_again(caught[0])
    else:
        sys.__unraisablehook__(ignored)
