"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

FULL_BYTES = 2**16  # a disk with less than this left is full


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(partial)` and rename `partial` to `path`; nothing is left behind if `write` raises.

    Raises OSError with the errno ENOSPC or EDQUOT and the name of the file if the disk is full, whatever `write` makes of that.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        partial.replace(path)
    except Exception as error:
        if (full := _full(error, path)) is not None:
            raise OSError(full, os.strerror(full), str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _full(error: Exception, path: Path) -> int | None:
    """The errno of a full disk if that is what `error` is about: safetensors hides it in its text, torch does not tell it."""
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(hidden[1]) if hidden else None
    if number is None and shutil.disk_usage(path.parent).free < FULL_BYTES:
        return errno.ENOSPC
    return number if number in (errno.ENOSPC, errno.EDQUOT) else None
