"""The private folder of a Ray on this machine: nothing of that Ray stays when its driver has ended, in whatever way.

python ray_folder.py FOLDER     # the watcher that each driver starts: it waits for the driver's end, then clears the folder

It imports the standard library only, so that the watcher starts in milliseconds and stays small.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "SOFTSEG_RAY_FOLDER"  # in the environment of all processes of that Ray, and of no other process
PREFIX = "softseg-ray-"
RAY = "r"  # Ray's temporary folder in ours: Ray makes its own folders open to all
LOCK = "driver"
SOCKET = "softseg-ray-12345678/r/session_2026-11-29_13-02-26_936634_4194304/sockets/plasma_store"  # Ray's longest
SOCKET_BYTES = 103  # that the path of a socket may have; Linux allows 107
END_S = 1.0  # that processes have to end when they are asked to
CLEAR_S = 30.0  # the longest that killed processes may take
UNFINISHED_S = 3600.0  # a folder that nobody has locked may be just being made, but not for so long

_held: set[Path] = set()  # a process that opens and closes its own lock file again has lost its lock


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for this user alone, on a short path. At its end the processes of its Ray are ended and it is deleted.

    Clears first what drivers left that were killed together with their watchers. Raises OSError if no folder can be made.
    """
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    if len(os.fsencode(base / SOCKET)) > SOCKET_BYTES:
        base = Path("/tmp")
    base.mkdir(parents=True, exist_ok=True)
    for folder in {*base.glob(f"{PREFIX}*"), *Path("/tmp").glob(f"{PREFIX}*")} - _held:
        if _is_abandoned(folder):
            clear(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 700
    with (folder / LOCK).open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # belongs to this process: no forked child shares it, as it would that of filelock
        lock.write(str(os.getpid()))
        lock.flush()
        _held.add(folder)
        command, nothing = [sys.executable, "-I", "-S", __file__, str(folder)], subprocess.DEVNULL
        watcher = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True)
        try:
            yield folder
        finally:
            lock.close()
            with suppress(subprocess.TimeoutExpired):
                watcher.wait(CLEAR_S)
            watcher.kill()
            clear(folder)
            _held.remove(folder)


def clear(folder: Path) -> None:
    """End the processes of the Ray of `folder`, whose driver has ended, and delete the folder."""
    start = time.monotonic()
    while (left := processes_of(folder)) and time.monotonic() < start + CLEAR_S:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < start + END_S else signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """The processes of this user that the Ray of `folder` has started, by what their environment says. Linux only."""
    mark, found = f"{VARIABLE}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            if process.stat().st_uid == os.getuid() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _is_abandoned(folder: Path) -> bool:
    """Is it this user's, and has its driver ended? The driver may be in another container, where its number means nothing."""
    try:
        facts = folder.lstat()
        if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode):
            return False
        with (folder / LOCK).open("a+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            return lock.read() != "" or facts.st_mtime < time.time() - UNFINISHED_S
    except OSError:  # the lock is held, or another start has deleted the folder
        return False


if __name__ == "__main__":
    for of_driver in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(of_driver, signal.SIG_IGN)
    watched = Path(sys.argv[1])
    with suppress(FileNotFoundError), (watched / LOCK).open("r+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)  # waits for the driver
        clear(watched)
