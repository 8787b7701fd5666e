"""Stores on other file systems: each machine fetches a store once into its cache and checks the copy."""

from __future__ import annotations

from pathlib import Path

from softseg_dist.data.cases import Case, DataSet
from softseg_dist.data.file_digests import remembered_sha256, stamp_of
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.store import ProgressCallback, Store, build_store, fingerprint
from softseg_dist.errors import UserError
from softseg_dist.locks import hold
from softseg_dist.places import Place, cache_folder


def local_store(where: str | Path) -> Path:
    """The file of a store on this machine: `where` itself, or its copy in the cache, fetched by one process of the machine.

    A copy that is damaged is fetched again, once. Raises UserError if it is damaged still, or if there is no such store.
    """
    place = Place.at(where)
    if place.path is not None:
        return place.path
    path = cached_path(place)
    with hold(path.with_suffix(".lock"), wait=True):
        note = path.with_suffix(".checked")
        is_checked = path.exists() and note.exists() and note.read_text() == f"{stamp_of(path.stat())}"
        return path if is_checked else _fetch(place, path)


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
    if not place.is_file():
        place.push(build_store(here, cases, data, preprocess, progress))
    return str(place)


def cached_path(place: Place) -> Path:
    """Where the cache keeps a remote store. Its name says what it was made from, so it is the same from every folder."""
    return cache_folder() / "stores" / place.uri.partition("?")[0].rpartition("/")[2]


def _fetch(place: Place, path: Path) -> Path:
    damage: UserError | None = None
    for _ in range(2):
        if not path.exists():
            try:
                place.pull(path)
            except FileNotFoundError:
                raise UserError(f"there is no store {place}; run `softseg prepare` first") from None
        try:
            Store.open(path).verify()
        except UserError as error:
            path.unlink()
            damage = error
        else:
            path.with_suffix(".checked").write_text(f"{stamp_of(path.stat())}")
            return path
    raise UserError(f"the store {place} is damaged; delete it to prepare it again") from damage
