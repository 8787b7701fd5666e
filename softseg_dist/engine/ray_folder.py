"""The private folder of a Ray on this machine: nothing of that Ray stays when its driver has ended, in whatever way it ended.

python ray_folder.py FOLDER     # the watcher that each driver starts: waits for the driver's end, then clears the folder

It imports the standard library only, so that the watcher starts in milliseconds and stays small.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
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
CLEAR_S = 30.0  # the longest that a killed process may take to go
UNFINISHED_S = 3600.0  # a folder without a locked file may just be being made, but not for so long

_held: set[Path] = set()


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for this user alone, on a short path. At its end processes of its Ray are ended, and it is deleted.

    Folders of drivers that were killed together with their watchers are cleared first. Raises OSError if no folder can be made.
    """
    base = _base()
    base.mkdir(parents=True, exist_ok=True)
    for folder in (*base.glob(f"{PREFIX}*"), *Path("/tmp").glob(f"{PREFIX}*")):
        if folder not in _held and _is_abandoned(folder):
            clear(folder)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 700
    # Such a lock belongs to the process: a forked child does not share it, and no process identity can be mistaken.
    with (folder / LOCK).open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        _held.add(folder)  # to open this file again and close it would release the lock
        command = [sys.executable, "-I", "-S", __file__, str(folder)]
        nothing = subprocess.DEVNULL
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
    """The processes of this user that were started by the Ray of `folder`, by what their environment says. Linux only."""
    mark, found = f"{VARIABLE}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours
            if process.stat().st_uid == os.getuid() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def _base() -> Path:
    base = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    return base if len(os.fsencode(base / SOCKET)) <= SOCKET_BYTES else Path("/tmp")


def _is_abandoned(folder: Path) -> bool:
    """Is it this user's, and has its driver ended? Another container's driver holds the lock as one of this does."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with (folder / LOCK).open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return bool(lock.read()) or _is_old(folder)
    except FileNotFoundError:
        return _is_old(folder)
    except OSError:
        return False


def _is_old(folder: Path) -> bool:
    return folder.exists() and time.time() - folder.stat().st_mtime > UNFINISHED_S


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they end the driver, which may need time for it
        signal.signal(name, signal.SIG_IGN)
    place = Path(sys.argv[1])
    with suppress(FileNotFoundError), (place / LOCK).open("r+") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)  # waits until the driver has closed its file, or has ended
        clear(place)
