"""Records for a server that cannot be reached now, in a file beside the run, in the order in which they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Spool:
    """JSON lines. A last line torn by a crash is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """All records, oldest first."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def append(self, records: Sequence[Record]) -> None:
        """Add records at the end."""
        if records:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def replace(self, records: Sequence[Record]) -> None:
        """Make `records` the whole content; none removes the file."""
        if not records:
            self.path.unlink(missing_ok=True)
            return
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        partial.replace(self.path)
