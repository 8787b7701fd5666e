"""The results table: one row per study, candidate, split, repeat, case, class, reference, threshold and metric, as Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from softseg_dist.judging.judge import Measurement
from softseg_dist.sealed import BLANK, FIELD, write_sealed

if TYPE_CHECKING:  # a fit writes no data frame, so that machines that only train need no pandas
    import pandas as pd

_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("study", _NAME),
        ("candidate", _NAME),
        ("split", pa.int32()),  # -1 for an ensemble of several fits
        ("repeat", pa.int32()),
        ("subset", _NAME),  # validation or test; holdout, in a table of its own
        ("grid", _NAME),  # "own": that of the file, against what the raters drew; "prepared": that of training, objectives only
        ("subject", _NAME),
        ("case", _NAME),
        ("class", _NAME),
        ("reference", _NAME),  # "mean" of the raters, each by name, all as "raters", "truth" where it is known
        ("threshold", pa.float64()),  # null for metrics of the soft map
        ("metric", _NAME),
        ("value", pa.float64()),
    ]
)
Row = dict[str, Any]


class Head(NamedTuple):
    """What the rows of one case have in common: the first columns of the table."""

    study: str
    candidate: str
    split: int
    repeat: int
    subset: str
    grid: Literal["own", "prepared"]
    subject: str
    case: str

    def rows(self, measured: Iterable[Measurement]) -> list[Row]:
        """Rows of the results table from measurements."""
        return [dict(zip(SCHEMA.names, (*self, *line), strict=True)) for line in measured]


def write_rows(rows: Sequence[Row], path: str | Path, key: str = "") -> None:
    """Write rows of the results table, sealed with `key`; the file appears whole or not at all."""
    _write([pa.Table.from_pylist(rows, schema=SCHEMA)], path, key)


def write_frame(frame: pd.DataFrame, path: str | Path, key: str = "") -> None:
    """Write a data frame with the columns of the results table, sealed with `key`; the file appears whole or not at all."""
    plain = frame.astype({field.name: str for field in SCHEMA if field.type == _NAME})
    _write([pa.Table.from_pandas(plain, schema=SCHEMA, preserve_index=False)], path, key)


def merge_tables(parts: Iterable[Path], path: str | Path, key: str = "") -> None:
    """Write the rows of all `parts` to one table, sealed with `key`, part by part."""
    _write((pq.read_table(part).cast(SCHEMA) for part in parts), path, key)


def _write(tables: Iterable[pa.Table], path: str | Path, key: str) -> None:
    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
            writer.add_key_value_metadata({FIELD: BLANK.decode()})

    write_sealed(path, write, key)
