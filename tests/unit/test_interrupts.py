"""Signals end what runs, wherever it is: not in a finalizer, where they are lost, nor where a lock was just taken."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time

import pytest

from softseg_dist.interrupts import AGAIN_S, MOST, held_back, interruptible


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_a_run_and_handlers_are_put_back(kind: signal.Signals) -> None:
    before = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(kind)
    assert signal.getsignal(kind) == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


TAKES = """
def NAME(lock):
    lock.acquire()
    raise_signal(SIGTERM)
"""


@pytest.mark.parametrize(
    ("name", "file", "stays_taken"),
    [
        ("acquire", "semaphore.py", False),
        ("__enter__", "condition.py", False),
        ("clear_cache", logging.__file__, False),
        ("get_module_lock", "<frozen importlib._bootstrap>", False),
        ("other", "other.py", True),  # what a signal does without care
    ],
)
def test_a_lock_that_was_just_taken_is_released(name: str, file: str, stays_taken: bool) -> None:
    names = {"raise_signal": signal.raise_signal, "SIGTERM": signal.SIGTERM}
    exec(compile(TAKES.replace("NAME", name), file, "exec"), names)
    lock = threading.Lock()

    def take_and_release() -> None:
        names[name](lock)
        try:
            time.sleep(30)
        finally:
            lock.release()

    with pytest.raises(KeyboardInterrupt), interruptible():
        take_and_release()
    assert lock.locked() == stays_taken


def test_what_takes_long_to_take_a_lock_is_interrupted_all_the_same() -> None:
    def acquire() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(30)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interruptible():
        acquire()
    assert MOST * AGAIN_S <= time.monotonic() - started < 10


def test_a_signal_waits_for_the_end_of_a_block_that_holds_it_back_and_a_second_one_does_not() -> None:
    reached: list[str] = []

    def block(*kinds: signal.Signals) -> None:
        with held_back():
            for kind in kinds:
                signal.raise_signal(kind)
            reached.append("the end")

    for kinds in ((signal.SIGTERM,), (signal.SIGTERM, signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt), interruptible():
            block(*kinds)
    assert reached == ["the end"]
    block()
    assert reached == ["the end", "the end"]


FINALIZER = """
import time
from softseg_dist.interrupts import interrupt_always

class Object:
    def __del__(self):
        raise ERROR

interrupt_always()
one = Object()
try:
    del one  # where Python prints what is raised, and goes on
    time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_a_signal_that_comes_in_a_finalizer_comes_again_and_other_errors_there_are_printed() -> None:
    ended = []
    for raised in ("KeyboardInterrupt", "ValueError('of others')"):
        text = FINALIZER.replace("ERROR", raised).replace("30", "30" if raised == "KeyboardInterrupt" else "0.2")
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
        ended.append((done.stdout, done.stderr.splitlines()[-1:]))
    assert ended == [("interrupted\n", []), ("", ["ValueError: of others"])]
