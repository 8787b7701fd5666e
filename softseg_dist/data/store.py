"""The store of a study: all prepared cases in one Arrow file that is named by its fingerprint and mapped into memory.

The file has one record batch per case and one row per item. Each column holds the item's numbers as a list of float32
(`nearest`: uint8), so any Arrow reader can open it. Column `own` has the raters' own masks, packed, in the first row of a case.
What belongs to a case (names, shapes, placement) is JSON in the metadata of its batch; what belongs to the file is JSON in the
metadata of the schema. Arrow writes batches one after the other, so a file that was cut off is read up to the cut.

Of a store on another file system each machine fetches a copy into its cache, once, and checks it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import math
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from softseg_dist.data.cases import Case, DataSet, check_apart
from softseg_dist.data.drafts import Draft, leftovers, new_draft, parts_of, remove_draft
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.data.preprocess import Placement, Preprocess, Sample
from softseg_dist.data.processes import num_processors, over_processes
from softseg_dist.data.source_files import Digest, remembered_sha256, sha256_of, stamp_of
from softseg_dist.errors import UserError
from softseg_dist.frozen import canonical_json, digest, sealed, unsealed
from softseg_dist.locks import hold
from softseg_dist.places import Place, cache_folder, sweep_partials
from softseg_dist.sealed import AGAIN, BLANK, FIELD, Damaged, is_intact

log = logging.getLogger(__name__)
FORMAT = 5  # raised when the same sources and preprocessing would give other numbers, or could not be read
KEY = b"softseg"
PLAIN = ("name", "subject", "site", "rater_names", "spacing_mm", "voxel_mm3")  # fields of a sample that JSON holds as they are
COLUMNS = {"image": pa.float32(), "raters": pa.float32(), "nearest": pa.uint8(), "truth": pa.float32(), "own": pa.uint8()}
SCHEMA = pa.schema([pa.field(name, pa.large_list(pa.field("item", kind, nullable=False))) for name, kind in COLUMNS.items()])
Arrays = dict[str, NDArray[Any] | None]  # of a case, by column
ProgressCallback = Callable[[int, int, str], None]
PREPARATION = ("format", "classes", "preprocess")  # stores that agree in these have equal records of equal sources
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAGIC = b"ARROW1\0\0"  # of a file; what follows it is a stream of messages (Arrow columnar format, IPC file format)


@dataclass(frozen=True, eq=False)
class CaseRecord:
    """A prepared case as it lies in a file. `about["identity"]` says what it was made from."""

    batch: pa.RecordBatch
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image: [N C *S]."""
        return tuple(self.about["shapes"]["image"])

    def sample(self) -> Sample:
        """As read-only views of the file. Raises ValueError or ArrowException if the file is damaged there."""
        fields = {name: self.about[name] for name in PLAIN} | self._arrays()
        fields |= {name: tuple(self.about[name]) for name in ("rater_names", "spacing_mm")}  # lists in JSON
        placement = Placement.from_dict(self.about["placement"])
        fields["own"] = OwnMasks.from_dict(self.about["own"], placement.geometry, fields["own"])
        return Sample(**fields, placement=placement)

    def is_intact(self) -> bool:
        """Whether its numbers are those that were written; reads them all."""
        try:
            return digest_of(self._arrays()) == self.about["digest"]
        except (pa.ArrowException, ValueError):
            return False

    def _arrays(self) -> Arrays:
        found: Arrays = dict.fromkeys(COLUMNS)
        for column, shape in self.about["shapes"].items():
            if shape is not None:
                lists = self.batch.column(column)
                lists.validate(full=True)  # so that no offset of a damaged file leads out of the map
                found[column] = lists.flatten().to_numpy(zero_copy_only=True).reshape(shape)
        return found


def record_of(sample: Sample, identity: str) -> CaseRecord:
    """The record of a sample, which shares its memory; `identity` says what the sample was made from."""
    arrays: Arrays = {column: getattr(sample, column) for column in COLUMNS} | {"own": sample.own.packed}
    num_items = len(sample.image)
    rows = np.arange(num_items + 1, dtype=np.int64)
    columns = []
    for column, array in arrays.items():
        kind = SCHEMA.field(column).type
        if array is None:
            columns.append(pa.nulls(num_items, kind))
            continue
        flat = np.ascontiguousarray(array).reshape(-1)
        offsets = np.minimum(rows, 1) * flat.size if column == "own" else rows * (flat.size // num_items)
        columns.append(pa.LargeListArray.from_arrays(offsets, pa.array(flat), type=kind))
    about = {name: getattr(sample, name) for name in PLAIN} | {
        "num_items": num_items,
        "shapes": {column: None if array is None else array.shape for column, array in arrays.items()},
        "placement": sample.placement.to_dict(),
        "own": sample.own.to_dict(),
        "ignored": bool(np.isnan(sample.raters).any()),
        "mean_volumes_mm3": sample.own.mean_volumes_mm3,
        "identity": identity,
        "digest": digest_of(arrays),
    }
    return CaseRecord(pa.record_batch(columns, schema=SCHEMA), about)


def digest_of(arrays: Arrays) -> str:
    """Of the numbers of a case."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in arrays.values():
        if array is not None:
            hashed.update(np.ascontiguousarray(array).reshape(-1).data)
    return hashed.hexdigest()


def write_records(file: BinaryIO, about: dict[str, Any], records: Iterable[CaseRecord]) -> None:
    """Write a file of at least one record, each when it comes; the first says how many channels all have."""
    left = iter(records)
    first = next(left)
    schema = SCHEMA.with_metadata({KEY: sealed(about | {"channels": first.shape[1]}), FIELD: BLANK})
    with pa.ipc.new_file(file, schema) as writer:
        for record in itertools.chain([first], left):
            batch = record.batch.replace_schema_metadata(schema.metadata)
            writer.write_batch(batch, custom_metadata={KEY: sealed(record.about)})
            file.flush()  # what is written survives the process


def read_records(path: Path) -> tuple[dict[str, Any], Iterator[CaseRecord]]:
    """What a file says about itself, and its records, in the order in which they were written, as far as they reach.

    Raises ValueError, OSError or ArrowException if not even its head can be read.
    """
    source = pa.memory_map(str(path))
    if source.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is not an Arrow file")
    stream = pa.ipc.open_stream(source)
    return unsealed((stream.schema.metadata or {})[KEY]), _intact_records(stream)


def _intact_records(stream: pa.RecordBatchReader) -> Iterator[CaseRecord]:
    while True:
        try:
            batch, metadata = stream.read_next_batch_with_custom_metadata()
            record = CaseRecord(batch, unsealed(metadata[KEY]))
        except (StopIteration, pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # its end, or a damaged place
            return
        yield record


@dataclass(frozen=True)
class Part:
    """A case to prepare, what it is made from, and the file that takes it."""

    case: Case
    identity: str
    preprocess: Preprocess
    about: dict[str, Any]
    path: Path


PartMap = Callable[[Callable[[Part], Path], Sequence[Part]], Generator[Path, None, None]]


def fingerprint(cases: Sequence[Case], data: DataSet, preprocess: Preprocess, sha256: Digest = sha256_of) -> str:
    """16 hexadecimal digits that name the store of these cases under this preprocessing, whenever and wherever it is built."""
    return str(_about(data, preprocess, _origins(cases, preprocess, sha256))["fingerprint"])


def build_store(
    folder: Path,
    cases: Sequence[Case],
    data: DataSet,
    preprocess: Preprocess,
    progress: ProgressCallback | None = None,
    spread: PartMap = over_processes,
) -> Path:
    """Prepare `cases` into `folder`/<fingerprint>.arrow; returns at once if it is there and not damaged.

    Cases that a store in `folder` has already, prepared in the same way from equal sources, are copied from it; so are those of an
    unfinished one, so that an interrupted preparation goes on. `spread` prepares the rest: it calls a function on parts as `map`
    does, in any processes that see `folder`, and is closed when no more is wanted. The file does not depend on it. Each process has
    one case in memory at a time. `progress` is called with (cases done, cases in all, name) after each. Several processes may build
    the same store at once: each writes a file of its own and the last one to finish puts an equal file in place.

    Raises UserError if there is no case, if a case cannot be read (the first one that cannot is named), if one has more channels
    than another, or if the disk is full. No partial store stays; what has been prepared does, hidden, except if it is of no use.
    """
    if not cases:
        raise UserError(f"{data} has no case: there is nothing to prepare")
    with remembered_sha256(folder) as sha256:
        origins = _origins(cases, preprocess, sha256)
    about = _about(data, preprocess, origins)
    path = folder / f"{about['fingerprint']}.arrow"
    if path.exists():
        try:
            Store.open(check_store(path), about["fingerprint"])
            return path
        except UserError as error:
            log.warning("%s; it is prepared again now", error)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(folder)
        with new_draft(path) as draft, leftovers(folder) as left:
            identities = (digest(canonical_json(origin), 32) for origin in origins)
            made_of = enumerate(zip(cases, identities, strict=True))
            parts = [Part(case, identity, preprocess, about, draft.part(number)) for number, (case, identity) in made_of]
            usable = [each for each in left if not each.stat().st_size or _is_compatible(each, about)]  # an empty one is litter
            _build(draft, path, parts, usable, spread, progress)
    except BrokenPipeError:  # who listened to `progress` has gone
        raise
    except OSError as error:
        raise UserError(f"cannot write the store {path}: {error.strerror or error}; free space or give another folder") from error
    return path


def prepare_part(part: Part) -> Path:
    """Prepare one case into a file of its own; returns where that is. Raises UserError if it has changed since then."""
    record = record_of(part.preprocess.apply(part.case), part.identity)
    with remembered_sha256(part.path.parent) as sha256:  # a file that has not changed is not read for that
        origin = _origin(part.case, part.preprocess, sha256)
    if digest(canonical_json(origin), 32) != part.identity:
        raise UserError(f"{part.case.name}: a file of it has changed since this began; run again when its files stay as they are")
    with part.path.open("wb") as file:
        write_records(file, part.about, [record])
    return part.path


@dataclass(frozen=True)
class StoredCase:
    """A case of a store. `num_items` is the number of its slices in 2D, 1 in 3D, `size` the voxels of each along *S."""

    index: int
    name: str
    subject: str
    site: str
    rater_names: tuple[str, ...]
    num_items: int
    size: tuple[int, ...]


class Store:
    """An open store. Arrays of its samples are read-only views of the memory-mapped file.

    `classes`, `dim` and `channels` hold for all cases; `fingerprint` is the name of the file.
    """

    def __init__(self, path: Path, reader: pa.RecordBatchFileReader) -> None:
        about = unsealed(reader.schema.metadata[KEY])
        if about["format"] != FORMAT:
            other = f"another version of softseg_dist (format {about['format']}, this version reads {FORMAT})"
            raise UserError(f"{path} was made by {other}: run or prepare the study again, then this file can be deleted")
        self.path = path
        self.fingerprint: str = about["fingerprint"]
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.dim: int = about["dim"]
        self.channels: int = about["channels"]
        self.preprocess = Preprocess.model_validate(about["preprocess"])
        self._samples: dict[int, Sample] = {}
        read = map(reader.get_batch_with_custom_metadata, range(reader.num_record_batches))
        self._records = [CaseRecord(batch, unsealed(metadata[KEY])) for batch, metadata in read]
        self.cases: tuple[StoredCase, ...] = tuple(
            StoredCase(i, a["name"], a["subject"], a["site"], tuple(a["rater_names"]), a["num_items"], record.shape[2:])
            for i, (record, a) in enumerate((record, record.about) for record in self._records)
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
            store = cls(path, pa.ipc.open_file(pa.memory_map(str(path))))
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise _damaged(path, error) from error
        if fingerprint is not None and store.fingerprint != fingerprint:
            got = f"expected fingerprint {fingerprint}, got {store.fingerprint}"
            raise UserError(f"{path} is a store from another preprocessing or of other images: {got}")
        return store

    def sample(self, index: int) -> Sample:
        """Case `index`, as read-only views of the file, loaded when touched. Raises UserError if the file is damaged there."""
        if index not in self._samples:  # the views are checked once: training asks for a case again and again
            try:
                self._samples[index] = self._records[index].sample()
            except (pa.ArrowException, ValueError) as error:
                raise _damaged(self.path, error) from error
        return self._samples[index]

    @cached_property
    def size(self) -> tuple[int, ...]:
        """Voxels of an item; where cases differ, the largest number along each axis."""
        return tuple(map(max, zip(*(case.size for case in self.cases), strict=True)))

    @cached_property
    def sizes_differ(self) -> bool:
        """Whether items of one case are larger than those of another."""
        return any(case.size != self.size for case in self.cases)

    @cached_property
    def has_ignored(self) -> bool:
        """Whether some case has voxels to ignore: NaN in its masks and targets."""
        return any(record.about["ignored"] for record in self._records)

    @cached_property
    def spacings_mm(self) -> tuple[tuple[float, float], ...]:
        """The smallest and the largest voxel size of the images' files along X, Y and Z."""
        grids = (Placement.from_dict(record.about["placement"]).geometry for record in self._records)
        return tuple((min(sizes), max(sizes)) for sizes in zip(*(grid.spacing_mm for grid in grids), strict=True))

    @cached_property
    def mean_volumes_mm3(self) -> tuple[float, ...]:
        """The mean over all cases of the raters' mean volume of each class [K], on the grid of the files.

        Raises UserError if a class has no volume in any case: scores are relative to it.
        """
        volumes = zip(*(record.about["mean_volumes_mm3"] for record in self._records), strict=True)
        means = tuple(math.fsum(of_class) / len(self.cases) for of_class in volumes)
        if absent := [name for name, mean in zip(self.classes, means, strict=True) if not mean > 0]:
            raise UserError(f"no case has a voxel of {', '.join(absent)}, so that nothing can be scored; leave the class out")
        return means

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits of the content, from the digest that each case got when it was written."""
        return digest(canonical_json([self.fingerprint, [record.about["digest"] for record in self._records]]))

    def verify(self) -> None:
        """Read everything. Raises Damaged, naming the case where it is one, if the file is not as it was written."""
        if not is_intact(self.path):
            changed = ", ".join(record.about["name"] for record in self._records if not record.is_intact())
            raise _damaged(self.path, ValueError(f"the numbers of {changed or 'no case'} are not those that were written"))

    def __reduce__(self) -> tuple[Callable[[Path, str], Store], tuple[Path, str]]:
        """A pickled store is opened again from its path."""
        return Store.open, (self.path, self.fingerprint)


def check_store(path: Path) -> Path:
    """The path of a store as it was written: read once per start of the machine, and when changed. Raises Damaged if it is not."""
    started = Path("/proc/sys/kernel/random/boot_id")
    seen = f"{stamp_of(path.stat())} {started.read_text() if started.exists() else ''}"
    note = cache_folder() / "checked" / digest(f"{path.resolve()} {platform.node()}", 24)
    with suppress(OSError):
        if note.read_text() == seen:
            return path
    if not is_intact(path):
        Store.open(path).verify()
    with suppress(OSError):  # a cache that cannot be written costs time
        Place.at(note).write(seen.encode())
    return path


def _damaged(path: Path, error: Exception) -> Damaged:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return Damaged(path, f"{reason}: the same `softseg run` or `softseg prepare` makes it again")


class _IncompatibleError(UserError):
    """Cases that cannot be in one store."""


def _origins(cases: Sequence[Case], preprocess: Preprocess, sha256: Digest) -> list[list[Any]]:
    """What determines each case, apart from the preprocessing."""
    with ThreadPoolExecutor(num_processors()) as threads:  # reading and hashing hold no interpreter lock
        origins = list(threads.map(lambda case: _origin(case, preprocess, sha256), cases))
    check_apart(cases, [origin[-1] for origin in origins])
    return origins


def _origin(case: Case, preprocess: Preprocess, sha256: Digest) -> list[Any]:
    return [case.name, case.subject, case.site, case.rater_names, case.sources(preprocess.mask_parts, sha256)]


def _about(data: DataSet, preprocess: Preprocess, origins: list[list[Any]]) -> dict[str, Any]:
    """What the store says about itself."""
    preparation = {"format": FORMAT, "classes": data.classes, "preprocess": preprocess.model_dump(mode="json")}
    name = digest(canonical_json(preparation | {"cases": origins}), 16)
    return preparation | {"fingerprint": name, "dim": preprocess.dim, "data": data.model_dump(mode="json")}


def _build(
    draft: Draft, path: Path, parts: Sequence[Part], left: Sequence[Path], spread: PartMap, progress: ProgressCallback | None
) -> None:
    """Write the store `path` by way of `draft`. The leftovers `left` are used, and removed if they will not be needed again."""
    about, found = parts[0].about, {part.identity for part in parts}
    files = [*path.parent.glob("*.arrow"), *left, *(file for each in left for file in parts_of(each))]
    records = (record for file in files if _is_compatible(file, about) for record in read_records(file)[1])
    known = {record.about["identity"]: record for record in records if record.about["identity"] in found}
    try:
        with closing(spread(prepare_part, [part for part in parts if part.identity not in known])) as prepared:
            write_records(draft.file, about, _records(parts, known, prepared, progress))
        draft.finish(path)
    except (OSError, _IncompatibleError) as error:
        if isinstance(error, _IncompatibleError) or error.errno in NO_ROOM:
            for each in (draft.path, *left):
                remove_draft(each)
        raise
    for each in left:
        remove_draft(each)


def _is_compatible(path: Path, about: dict[str, Any]) -> bool:
    """Whether the file has cases prepared as `about` says."""
    try:
        other, _ = read_records(path)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):  # empty yet, damaged, or no store
        return False
    return canonical_json([other.get(key) for key in PREPARATION]) == canonical_json([about[key] for key in PREPARATION])


def _records(
    parts: Sequence[Part], known: dict[str, CaseRecord], prepared: Iterator[Path], progress: ProgressCallback | None
) -> Iterator[CaseRecord]:
    """The records of all parts, in their order: what is known and intact, else what is prepared."""
    first: CaseRecord | None = None
    for done, part in enumerate(parts, start=1):
        record = known.get(part.identity)
        if record is None or not record.is_intact():
            path = next(prepared) if record is None else prepare_part(part)
            if (record := next(read_records(path)[1], None)) is None or not record.is_intact():
                raise Damaged(path, "the disk may be failing; run again")
        first = first or record
        if record.shape[1] != first.shape[1]:
            got = " and ".join(f"{each.shape[1]} for {each.about['name']}" for each in (first, record))
            raise _IncompatibleError(f"all cases must have as many channels, got {got}")
        yield record
        part.path.unlink(missing_ok=True)
        if progress is not None:
            progress(done, len(parts), part.case.name)


def local_store(where: str | Path) -> Path:
    """The file of a store on this machine, checked: `where` itself, or its copy in the cache, fetched by one process.

    A copy that is damaged is fetched again, once. Raises Damaged if it is damaged still, UserError if there is no remote one.
    """
    place = Place.at(where)
    if place.path is not None:
        return check_store(place.path) if place.path.is_file() else place.path
    path = cached_path(place)
    with hold(path.with_suffix(".lock"), wait=True):
        for _ in range(2):
            try:
                if not path.exists():
                    sweep_partials(path.parent)
                    place.pull(path)
                return check_store(path)
            except FileNotFoundError:
                raise UserError(f"there is no store {place}; run `softseg prepare` first") from None
            except UserError as error:
                path.unlink()
                damage = error
        raise Damaged(place, AGAIN) from damage


def shared_store(
    folder: str | Path, cases: tuple[Case, ...], data: DataSet, preprocess: Preprocess, progress: ProgressCallback | None = None
) -> str:
    """Where the store of these cases is in `folder`, a path or URI; it is built on this machine if it is not there yet."""
    place = Place.at(folder)
    if place.path is not None:  # absolute: workers have their own working directories
        return str(build_store(place.path, cases, data, preprocess, progress))
    here = cached_path(place).parent
    with remembered_sha256(here) as sha256:
        place /= f"{fingerprint(cases, data, preprocess, sha256)}.arrow"
    if place.is_file():
        try:
            local_store(place.uri)
            return str(place)
        except Damaged as damage:
            log.warning("%s; it is prepared again now", damage)
    place.push(build_store(here, cases, data, preprocess, progress))
    return str(place)


def cached_path(place: Place) -> Path:
    """Where the cache keeps a remote store. Its name says what it was made from, so it is the same from every folder."""
    return cache_folder() / "stores" / place.uri.partition("?")[0].rpartition("/")[2]
