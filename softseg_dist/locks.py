"""One driver per run folder: two would run the same fits twice and overwrite each other's results."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softseg_dist.errors import UserError


@contextmanager
def hold(path: Path, of: str = "") -> Iterator[None]:
    """Hold the lock file `path` while the block runs; `of` names what it locks, if that is not its folder.

    Raises UserError, naming process and host, if another driver holds it.
    The operating system frees it when the process ends, however it ends; the file stays behind and means nothing by itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"{of or path.parent}: in use by {owner}; wait for it to end, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """Who holds the lock file `path` now: process and host; None if nobody does. Looks at it for an instant, writes nothing."""
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None
