"""Digests of source files, remembered beside the stores: a file that has not changed is not read again to know that.

A file is taken as unchanged if size, inode, time of modification and time of change (which no tool can set back) are those
that it had when it was read. One that was changed less than `SETTLED_NS` before it was read is not remembered: it could
change again without a later time, as clocks of filesystems tick up to every 2 s (FAT).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from softseg_dist.data.source_files import check_regular
from softseg_dist.errors import UserError
from softseg_dist.frozen import sealed, unsealed
from softseg_dist.places import Place

NAME = ".digests"  # in the folder of the stores; may be removed at any time
SETTLED_NS = 4 * 10**9

Digest = Callable[[Path], str]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits. Raises UserError if it cannot be read."""
    return _read(path)[1]


@contextmanager
def remembered_sha256(folder: Path, now_ns: Callable[[], int] = time.time_ns) -> Iterator[Digest]:
    """`sha256_of`, for files that were read before without reading them; several threads may ask at once.

    At the end, what is new is written down; a folder that cannot be written only costs time. `now_ns` is the clock, for tests.
    """
    memory = folder / NAME
    known: dict[str, Any] = {}
    new: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # none yet, or damaged
        known = unsealed(memory.read_bytes())

    def sha256(path: Path) -> str:
        key = str(path.absolute())
        with suppress(OSError):  # reading the file reports the error with its name
            if key in known and known[key][:-1] == stamp_of(path.stat()):
                return str(known[key][-1])
        read_ns = now_ns()
        stamp, digest = _read(path)
        if stamp is not None and max(stamp[1:3]) < read_ns - SETTLED_NS:
            new[key] = [*stamp, digest]
        return digest

    try:
        yield sha256
    finally:
        if new:
            with suppress(OSError):
                Place.at(memory).write(sealed(known | new).encode())


def _read(path: Path) -> tuple[list[int] | None, str]:
    """Stamp and digest of a file; no stamp if it changed while it was read."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            before = stamp_of(os.fstat(file.fileno()))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return before if stamp_of(os.fstat(file.fileno())) == before else None, digest
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def stamp_of(stat: os.stat_result) -> list[int]:
    """Size, times and inode: a file is taken as unchanged while they are."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
