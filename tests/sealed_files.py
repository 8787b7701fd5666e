"""Files of a run folder as the package seals them, for tests that make or change one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger
from softseg_dist.sealed import BLANK, FIELD, KEEPER, key_of, read_json, seal, sealed_json
from softseg_dist.training.task import left_in


def run_of(path: Path) -> Path:
    """The run folder that a file is in."""
    return path.parents[len(path.parts) - path.parts.index("fits") - 1] if "fits" in path.parts else path.parent


def seal_of(path: Path) -> str:
    """What a file is sealed with."""
    run = run_of(path)
    key = key_of(Place.at(run)) or Ledger(run).seal_of("").rstrip("/")
    return KEEPER if path.name == KEEPER else f"{key}/{path.relative_to(run).as_posix()}"


def put(path: Path, value: object) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sealed_json(value, seal_of(path)))


def value_of(path: Path) -> Any:
    """The value in such a file."""
    run = Place.at(run_of(path))
    return read_json(run, path.relative_to(run_of(path)).as_posix(), key_of(run))


def put_table(frame: pd.DataFrame, path: Path, seal_with: str | None = None) -> None:
    """Write a table."""
    table, content = pa.Table.from_pandas(frame, preserve_index=False), io.BytesIO()
    with pq.ParquetWriter(content, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({FIELD: BLANK.decode()})
    path.write_bytes(seal(content.getvalue(), seal_of(path) if seal_with is None else seal_with))


def vouch(fit: Path) -> None:
    """Let the recorded result of a fit name the files that are in its folder now."""
    record = fit.with_name(f"{fit.name}.json")
    put(record, value_of(record) | {"files": left_in(fit)})
