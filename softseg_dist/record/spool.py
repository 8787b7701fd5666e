"""Records for a server that cannot be reached now, in a file beside the run, in the order in which they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from softseg_dist.places import replace_file

SPOOL = "mlflow_spool.jsonl"  # its name in a run folder
TrackingRecord = dict[str, Any]


class Spool:
    """JSON lines. A line torn by a crash is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[TrackingRecord]:
        """All records, oldest first."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                records.append(json.loads(line))
        return records

    def append(self, records: Sequence[TrackingRecord]) -> None:
        """Add records at the end. Raises OSError if not all could be written; adding them again does no harm."""
        if not records:
            return
        with self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # ends a line that a crash or a full disk has torn
            file.write(_lines(records))

    def replace(self, records: Sequence[TrackingRecord]) -> None:
        """Make `records` the whole content; none removes the file. Raises OSError, with nothing changed, if that cannot be."""
        if records:
            replace_file(self.path, lambda partial: partial.write_bytes(_lines(records)))
        else:
            self.path.unlink(missing_ok=True)


def _lines(records: Sequence[TrackingRecord]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()
