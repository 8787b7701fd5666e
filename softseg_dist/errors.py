"""The one exception that is shown to people as a line of text instead of a traceback, and what disks and servers refuse."""

from __future__ import annotations

import errno
import re

NO_ROOM_OR_RIGHTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR)


class UserError(ValueError):
    """What a user can mend: rule, value, place, and what to do.

    The command line prints its text on one line and exits with code 2. Every other exception is a defect of ours.
    """

    def __init__(self, text: str) -> None:
        super().__init__(re.sub(r"\S{400,}", lambda word: f"{word[0][:120]}...{word[0][-40:]}", text))  # as damaged files have them


def in_words(error: BaseException) -> str:
    """Type and text of an exception, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def no_room(error: BaseException) -> str | None:
    """What to tell people if `error` means that a disk is full or may not be written; None if it means something else."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM_OR_RIGHTS:
        return None
    where = error.filename or "a file of the run"
    do = "use" if error.errno in (errno.EACCES, errno.EPERM) else "write"  # a program that may not be run, too
    return f"cannot {do} {where}: {error.strerror}; what has finished is kept, the same command goes on"


def out_of_reach(error: BaseException) -> str | None:
    """The same for a remote filesystem that does not answer or refuses (see `places`)."""
    if not isinstance(error, OSError) or error.errno != errno.EIO:
        return None
    return f"{error.filename}: {error.strerror}; what has finished is kept, the same command goes on"
