"""Drafts: stores that are being written, and what is left of them when their process is stopped or killed.

A draft is `.<fingerprint>.<token>.draft`, beside the store that it becomes; the single cases that are prepared for it are
`.<fingerprint>.<token>.<number>.part`. Its process holds a lock on it, which ends with the process, however that ends: a draft
without a holder is a leftover, from which the next preparation takes the intact cases.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from softseg_dist.locks import is_locked_here
from softseg_dist.sealed import seal_file


@dataclass(frozen=True)
class Draft:
    """A file that is being written, and the names of its parts."""

    path: Path
    file: BinaryIO

    def part(self, number: int) -> Path:
        """Where case `number` goes until it is in the draft."""
        return self.path.with_name(f"{self.path.stem}.{number}.part")

    def finish(self, path: Path) -> None:
        """Seal the draft and rename it to the finished file `path`: whole or not at all, even after a crash."""
        self.file.flush()
        seal_file(self.path)
        os.fsync(self.file.fileno())
        self.path.replace(path)


@contextmanager
def new_draft(path: Path) -> Iterator[Draft]:
    """A draft of the store `path`. If it is left unfinished it stays as a leftover, unless nothing was written yet."""
    unheld = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.new")  # not yet to be found as a leftover
    try:
        with unheld.open("w+b") as file:
            is_locked_here(file)
            draft = Draft(unheld.rename(unheld.with_suffix(".draft")), file)
            try:
                yield draft
            finally:
                with suppress(FileNotFoundError):
                    if not draft.path.stat().st_size:
                        remove_draft(draft.path)
    finally:
        unheld.unlink(missing_ok=True)


@contextmanager
def leftovers(folder: Path) -> Iterator[list[Path]]:
    """The drafts in `folder` whose processes have ended; until this ends, no other process takes them for leftovers."""
    with ExitStack() as held:
        found = []
        for path in sorted(folder.glob(".*.draft")):
            try:
                file = held.enter_context(path.open("r+b"))
            except OSError:  # it has just become a store, or belongs to another user
                continue
            if is_locked_here(file):
                found.append(path)
        yield found


def parts_of(path: Path) -> list[Path]:
    """The single cases that were prepared for a draft and are not in it yet."""
    return sorted(path.parent.glob(f"{path.stem}.*.part"))


def remove_draft(path: Path) -> None:
    """Remove a draft and its parts."""
    for file in (*parts_of(path), path):
        file.unlink(missing_ok=True)
