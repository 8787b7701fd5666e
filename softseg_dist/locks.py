"""Locks between processes: one driver per run folder, one process per store that is fetched, one writer per draft.

A lock belongs to an open file. It ends when the file is closed, so also when its process is killed; a forked child shares it.
The lock file stays behind; its text names the last holder and means nothing by itself. filelock makes the call of the
operating system (`flock`). Its `FileLock` is not used: it falls back to files whose existence outlives a killed process.
"""

from __future__ import annotations

import errno
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from softseg_dist.errors import UserError

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
GLANCE_S = 0.2  # `holder` has a lock for some microseconds: others must not take it for a driver
POLL_S = 0.02


def is_locked_here(file: IO[Any], wait_s: float = 0.0) -> bool:
    """Lock an open file until it is closed. False if another open file holds the lock after `wait_s` seconds.

    Raises UserError if the file system does not support locks.
    """
    end = time.monotonic() + wait_s
    try:
        while not lock_descriptor(file.fileno(), blocking=False):
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_S)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        to_do = "give a folder on a local disk or a bucket URI by --out (runs), --stores (stores) or SOFTSEG_CACHE (the cache)"
        raise UserError(f"{Path(file.name).parent}: its file system does not support locks ({error.strerror}); {to_do}") from error
    return True


@contextmanager
def hold(path: Path, of: str = "", wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; `of` names what it locks, if that is not its folder.

    Raises UserError that names process and host if another holds it, unless `wait` is set, and if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not is_locked_here(file, math.inf if wait else GLANCE_S):
            raise UserError(f"{of or path.parent}: in use by {_owner(file)}; wait for it to end, or give another --out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """The process and host that hold the lock file `path` now, None if it is free. Looks for an instant, writes nothing.

    A lock that cannot be looked at (on NFS that needs the right to write) may be held: the answer says so.
    """
    if not path.exists():
        return None
    with path.open("r+" if os.access(path, os.W_OK) else "r") as file:
        try:
            return None if is_locked_here(file, GLANCE_S) else _owner(file)
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else "its file system does not support locks"
            return f"{_owner(file)}, if it still runs: the lock {path} cannot be checked ({reason})"


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"
