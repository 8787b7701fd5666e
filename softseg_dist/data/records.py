"""What a store file holds of each case, written and read again: one record batch per case, one row per item.

Each column holds the item's numbers as a list of float32 (`nearest`: uint8), so any Arrow reader can open the file. What
belongs to a case (names, shapes, placement) is JSON in the metadata of its batch, what belongs to the file is JSON in the
metadata of the schema. Arrow writes batches one after the other, so a file that was cut off is read up to the cut.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from softseg_dist.data.preprocess import Placement, Sample
from softseg_dist.frozen import sealed, unsealed

KEY = b"softseg"
COLUMNS = {"image": pa.float32(), "raters": pa.float32(), "nearest": pa.uint8(), "truth": pa.float32()}
SCHEMA = pa.schema(
    [pa.field(name, pa.large_list(pa.field("item", kind, nullable=False))) for name, kind in COLUMNS.items()]
)
MAGIC = b"ARROW1\0\0"  # of a file; what follows it is a stream of messages (Arrow columnar format, IPC file format)


@dataclass(frozen=True, eq=False)
class Record:
    """A prepared case as it lies in a file. `about["identity"]` says what it was made from (absent in older stores)."""

    batch: pa.RecordBatch
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image: [N C *S]."""
        return tuple(self.about["shapes"]["image"])

    def sample(self) -> Sample:
        """As read-only views of the file. Raises ValueError or ArrowException if the file is damaged there."""
        image, raters, nearest, truth = (self._view(column) for column in COLUMNS)
        assert image is not None, "every case is written with its image"
        assert raters is not None, "every case is written with its raters"
        return Sample(
            name=self.about["name"],
            subject=self.about["subject"],
            site=self.about["site"],
            rater_names=tuple(self.about["rater_names"]),
            image=image,
            raters=raters,
            nearest=nearest,
            truth=truth,
            spacing_mm=tuple(self.about["spacing_mm"]),
            voxel_mm3=self.about["voxel_mm3"],
            placement=Placement.from_dict(self.about["placement"]),
        )

    def is_intact(self) -> bool:
        """Whether its numbers are those that were written; reads them all."""
        try:
            return digest_of(self.sample()) == self.about["digest"]
        except (pa.ArrowException, ValueError):
            return False

    def _view(self, column: str) -> NDArray[Any] | None:
        shape = self.about["shapes"][column]
        if shape is None:
            return None
        lists = self.batch.column(column)
        lists.validate(full=True)  # so that no offset of a damaged file leads out of the map
        return lists.flatten().to_numpy(zero_copy_only=True).reshape(shape)


def record_of(sample: Sample, identity: str) -> Record:
    """The record of a sample, which shares its memory; `identity` says what the sample was made from."""
    arrays = {"image": sample.image, "raters": sample.raters, "nearest": sample.nearest, "truth": sample.truth}
    num_items = len(sample.image)
    columns = []
    for column, array in arrays.items():
        kind = SCHEMA.field(column).type
        if array is None:
            columns.append(pa.nulls(num_items, kind))
            continue
        flat = np.ascontiguousarray(array).reshape(-1)
        offsets = np.arange(num_items + 1, dtype=np.int64) * (flat.size // num_items)
        columns.append(pa.LargeListArray.from_arrays(offsets, pa.array(flat), type=kind))
    about = {
        "name": sample.name,
        "subject": sample.subject,
        "site": sample.site,
        "rater_names": sample.rater_names,
        "num_items": num_items,
        "shapes": {column: None if array is None else array.shape for column, array in arrays.items()},
        "spacing_mm": sample.spacing_mm,
        "voxel_mm3": sample.voxel_mm3,
        "placement": sample.placement.to_dict(),
        "identity": identity,
        "digest": digest_of(sample),
    }
    return Record(pa.record_batch(columns, schema=SCHEMA), about)


def digest_of(sample: Sample) -> str:
    """Of the numbers of a case."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in (sample.image, sample.raters, sample.nearest, sample.truth):
        if array is not None:
            hashed.update(np.ascontiguousarray(array).reshape(-1).data)
    return hashed.hexdigest()


def write_records(file: BinaryIO, about: dict[str, Any], records: Iterable[Record]) -> None:
    """Write a file of at least one record, each when it comes; the first says what `about` lacks: channels and size."""
    left = iter(records)
    first = next(left)
    schema = SCHEMA.with_metadata({KEY: sealed(about | {"channels": first.shape[1], "size": first.shape[2:]})})
    with pa.ipc.new_file(file, schema) as writer:
        for record in itertools.chain([first], left):
            batch = record.batch.replace_schema_metadata(schema.metadata)
            writer.write_batch(batch, custom_metadata={KEY: sealed(record.about)})
            file.flush()  # what is written survives the process


def read_records(path: Path) -> tuple[dict[str, Any], Iterator[Record]]:
    """What a file says about itself, and its records, in the order in which they were written, as far as they reach.

    Raises ValueError, OSError or ArrowException if not even its head can be read.
    """
    source = pa.memory_map(str(path))
    if source.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is not an Arrow file")
    stream = pa.ipc.open_stream(source)
    return unsealed((stream.schema.metadata or {})[KEY]), _records(stream)


def _records(stream: pa.RecordBatchReader) -> Iterator[Record]:
    while True:
        try:
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            record = Record(batch, unsealed(metadata[KEY]))
        except (
            StopIteration,
            pa.ArrowException,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        ):  # its end, or where it broke
            return
        yield record
