"""Where the figures of a benchmark go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

OUT = Path(__file__).parent / "out"


def record(name: str, figures: Mapping[str, float]) -> None:
    """Write out/<name>.json."""
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.json").write_text(
        json.dumps({key: round(value, 4) for key, value in figures.items()}, indent=1) + "\n"
    )
