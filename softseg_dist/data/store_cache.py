"""Stores on other file systems: each machine fetches a store once into its cache and checks the copy."""

from __future__ import annotations

import logging
from pathlib import Path

from softseg_dist.data.cases import Case, DataSet
from softseg_dist.data.file_digests import remembered_sha256
from softseg_dist.data.preprocess import Preprocess
from softseg_dist.data.store import ProgressCallback, build_store, check_store, fingerprint
from softseg_dist.errors import UserError
from softseg_dist.locks import hold
from softseg_dist.places import Place, cache_folder, sweep_partials
from softseg_dist.sealed import AGAIN, Damaged

log = logging.getLogger(__name__)


def local_store(where: str | Path) -> Path:
    """The file of a store on this machine, checked: `where` itself, or its copy in the cache, fetched by one process.

    A copy that is damaged is fetched again, once. Raises Damaged if it is damaged still, UserError if there is no remote one.
    """
    place = Place.at(where)
    if place.path is not None:
        return check_store(place.path) if place.path.is_file() else place.path
    path = cached_path(place)
    with hold(path.with_suffix(".lock"), wait=True):
        if path.exists():
            try:
                return check_store(path)
            except UserError:
                path.unlink()
        return _fetch(place, path)


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


def _fetch(place: Place, path: Path) -> Path:
    sweep_partials(path.parent)
    for _ in range(2):
        try:
            place.pull(path)
        except FileNotFoundError:
            raise UserError(f"there is no store {place}; run `softseg prepare` first") from None
        try:
            return check_store(path)
        except UserError as error:
            path.unlink()
            damage = error
    raise Damaged(place, AGAIN) from damage
