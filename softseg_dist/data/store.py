"""The store: all samples of a study in one Arrow IPC file, memory-mapped, read without a copy.

One record batch per case, one row per item; each column holds the item's numbers as a list of float32 (`nearest`:
uint8), so any Arrow reader can open it. What belongs to a case (names, shapes, placement) is JSON in the metadata of
its batch, what belongs to the file is JSON in the metadata of the schema. The file is named by its fingerprint: what
it was made from, and how.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from softseg_dist.data.dataset import Case, DataSet
from softseg_dist.data.preprocess import Placement, Preprocess, Sample
from softseg_dist.errors import UserError
from softseg_dist.frozen import canonical_json, digest

FORMAT = 1  # raised when the same sources and preprocessing would give another file
KEY = b"softseg"
COLUMNS = {"image": pa.float32(), "raters": pa.float32(), "nearest": pa.uint8(), "truth": pa.float32()}
SCHEMA = pa.schema(
    [pa.field(name, pa.large_list(pa.field("item", kind, nullable=False))) for name, kind in COLUMNS.items()]
)

Progress = Callable[[int, int, str], None]


def fingerprint(cases: Sequence[Case], data: DataSet, preprocess: Preprocess) -> str:
    """16 hexadecimal digits that name the store of these cases under this preprocessing. Reads the sources."""
    parts = preprocess.mask_parts
    content = {
        "format": FORMAT,
        "classes": data.classes,
        "cases": [[case.name, case.subject, case.site, case.rater_names, case.sources(parts)] for case in cases],
        "preprocess": preprocess.model_dump(mode="json"),
    }
    return digest(canonical_json(content), 16)


def build_store(
    folder: Path, cases: Sequence[Case], data: DataSet, preprocess: Preprocess, progress: Progress | None = None
) -> Path:
    """Prepare `cases` into `folder`/<fingerprint>.arrow, one case in memory at a time; returns at once if it is there.

    `progress` is called with (cases done, cases in all, name) after each. Several processes may build the same store
    at once: each writes a file of its own and the last one to finish puts an equal file in place. Raises UserError if
    there is no case, if a case cannot be read, if sizes differ, or if the disk is full; no partial file stays.
    """
    if not cases:
        raise UserError(f"{data} has no case: there is nothing to prepare")
    name = fingerprint(cases, data, preprocess)
    path = folder / f"{name}.arrow"
    if path.exists():
        return path
    draft = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(draft, _samples(cases, preprocess, progress), data, preprocess, name)
        draft.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the store {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class StoredCase:
    """A case of a store. `num_items` is the number of its slices in 2D, 1 in 3D."""

    index: int
    name: str
    subject: str
    site: str
    rater_names: tuple[str, ...]
    num_items: int


class Store:
    """An open store. Arrays of its samples are read-only views of the memory-mapped file.

    `classes`, `dim`, `channels` and `size` (voxels of an item) hold for all cases; `fingerprint` is the name of the
    file.
    """

    def __init__(self, path: Path, source: pa.MemoryMappedFile, reader: pa.RecordBatchFileReader) -> None:
        about = _unsealed(reader.schema.metadata[KEY])
        if about["format"] != FORMAT:
            raise UserError(
                f"{path} has format {about['format']}, this version reads {FORMAT}; delete it to prepare it again"
            )
        self.path = path
        self.fingerprint: str = about["fingerprint"]
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.dim: int = about["dim"]
        self.channels: int = about["channels"]
        self.size: tuple[int, ...] = tuple(about["size"])
        self.data: dict[str, Any] = about["data"]
        self.preprocess = Preprocess.model_validate(about["preprocess"])
        self._source = source
        self._reader = reader
        self._samples: dict[int, Sample] = {}
        self._about = [
            _unsealed(reader.get_batch_with_custom_metadata(index).custom_metadata[KEY])
            for index in range(reader.num_record_batches)
        ]
        self.cases: tuple[StoredCase, ...] = tuple(
            StoredCase(i, a["name"], a["subject"], a["site"], tuple(a["rater_names"]), a["num_items"])
            for i, a in enumerate(self._about)
        )

    @classmethod
    def open(cls, path: Path | str, fingerprint: str | None = None) -> Store:
        """Map the file; nothing but its metadata is read.

        Raises UserError if it is missing, cut off or not a store, and if `fingerprint` is given and not the store's.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"there is no store {path}; run `softseg prepare` first")
        try:
            source = pa.memory_map(str(path))
            store = cls(path, source, pa.ipc.open_file(source))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise _damaged(path, error) from error
        if fingerprint is not None and store.fingerprint != fingerprint:
            raise UserError(
                f"{path} is a store from another preprocessing or of other images: "
                f"expected fingerprint {fingerprint}, got {store.fingerprint}"
            )
        return store

    def sample(self, index: int) -> Sample:
        """Case `index`, as read-only views of the file: a page is loaded when it is touched.

        Raises UserError if the file is damaged there.
        """
        if index not in self._samples:  # the views are checked once: training asks for a case again and again
            self._samples[index] = self._view(index)
        return self._samples[index]

    def _view(self, index: int) -> Sample:
        about = self._about[index]

        def view(batch: pa.RecordBatch, column: str) -> NDArray[Any] | None:
            shape = about["shapes"][column]
            if shape is None:
                return None
            lists = batch.column(column)
            lists.validate(full=True)  # so that no offset of a damaged file leads out of the map
            return lists.flatten().to_numpy(zero_copy_only=True).reshape(shape)

        try:
            batch = self._reader.get_batch(index)
            image, raters, nearest, truth = (view(batch, column) for column in COLUMNS)
        except (pa.ArrowException, ValueError) as error:
            raise _damaged(self.path, error) from error
        assert image is not None, "every case is written with its image"
        assert raters is not None, "every case is written with its raters"
        return Sample(
            name=about["name"],
            subject=about["subject"],
            site=about["site"],
            rater_names=tuple(about["rater_names"]),
            image=image,
            raters=raters,
            nearest=nearest,
            truth=truth,
            spacing_mm=tuple(about["spacing_mm"]),
            voxel_mm3=about["voxel_mm3"],
            placement=Placement.from_dict(about["placement"]),
        )

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of the content, from the digest that each case got when it was written."""
        return digest(canonical_json([self.fingerprint, [about["digest"] for about in self._about]]))

    def verify(self) -> None:
        """Read everything and compare it with the digests of its cases. Raises UserError, naming the case, if they differ."""
        for case, about in zip(self.cases, self._about, strict=True):
            if _digest(self._view(case.index)) != about["digest"]:
                raise _damaged(self.path, ValueError(f"the numbers of {case.name} are not those that were written"))

    def __len__(self) -> int:
        return len(self.cases)

    def __reduce__(self) -> tuple[Callable[[Path, str], Store], tuple[Path, str]]:
        """A pickled store is opened again from its path."""
        return Store.open, (self.path, self.fingerprint)


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} is cut off, damaged or not a store ({reason}); delete it to prepare it again")


def _samples(cases: Sequence[Case], preprocess: Preprocess, progress: Progress | None) -> Iterator[Sample]:
    first: Sample | None = None
    for done, case in enumerate(cases, start=1):
        sample = preprocess.apply(case)
        first = first or sample
        _check_alike(first, sample)
        yield sample
        if progress is not None:
            progress(done, len(cases), case.name)


def _check_alike(first: Sample, sample: Sample) -> None:
    one, other = first.image.shape[2:], sample.image.shape[2:]
    if one != other:
        raise UserError(
            f"all cases must have one size, got {_by(one)} for {first.name} and {_by(other)} for {sample.name}; "
            "set crop=... of Preprocess"
        )
    if first.image.shape[1] != sample.image.shape[1]:
        raise UserError(
            f"all cases must have the same channels, got {first.image.shape[1]} for {first.name} "
            f"and {sample.image.shape[1]} for {sample.name}"
        )


def _write(path: Path, samples: Iterator[Sample], data: DataSet, preprocess: Preprocess, name: str) -> None:
    first = next(samples)
    about = {
        "format": FORMAT,
        "fingerprint": name,
        "classes": data.classes,
        "dim": preprocess.dim,
        "channels": first.image.shape[1],
        "size": first.image.shape[2:],
        "data": data.model_dump(mode="json"),
        "preprocess": preprocess.model_dump(mode="json"),
    }
    schema = SCHEMA.with_metadata({KEY: _sealed(about)})
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for sample in itertools.chain([first], samples):
            _write_case(writer, sample, schema)
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def _write_case(writer: pa.RecordBatchFileWriter, sample: Sample, schema: pa.Schema) -> None:
    arrays = {"image": sample.image, "raters": sample.raters, "nearest": sample.nearest, "truth": sample.truth}
    num_items = len(sample.image)
    columns = []
    for column, array in arrays.items():
        if array is None:
            columns.append(pa.nulls(num_items, schema.field(column).type))
            continue
        flat = np.ascontiguousarray(array).reshape(-1)
        offsets = np.arange(num_items + 1, dtype=np.int64) * (flat.size // num_items)
        columns.append(pa.LargeListArray.from_arrays(offsets, pa.array(flat), type=schema.field(column).type))
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
        "digest": _digest(sample),
    }
    writer.write_batch(pa.record_batch(columns, schema=schema), custom_metadata={KEY: _sealed(about)})


def _digest(sample: Sample) -> str:
    """Of the numbers of a case."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in (sample.image, sample.raters, sample.nearest, sample.truth):
        if array is not None:
            hashed.update(np.ascontiguousarray(array).reshape(-1).data)
    return hashed.hexdigest()


def _sealed(about: dict[str, Any]) -> str:
    """JSON behind its own digest, so that damage to it is seen."""
    text = canonical_json(about)
    return digest(text) + text


def _unsealed(sealed: bytes) -> dict[str, Any]:
    text = sealed[12:]
    if digest(text) != sealed[:12].decode():
        raise ValueError("its description was changed")
    return cast("dict[str, Any]", json.loads(text))


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
