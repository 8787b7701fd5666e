"""Remote run folders: a fit works in a scratch folder that is mirrored to its own, a driver in a copy of the run folder.

A fit whose process dies loses everything since the last checkpoint, and the stacks of a fit that took too long. `WorkingCopy`
copies only what is newer, in both directions, so that another machine can continue a run. A local folder is not copied.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from softseg_dist.data.source_files import stamp_of
from softseg_dist.locks import hold, holder
from softseg_dist.places import Place, working_folder
from softseg_dist.training.task import FitTask

LAST = ("checkpoint.pt", "result.json")  # sent last, so that history and weights there are never older
FRESH_S = 60.0  # a scratch folder as young as this may not have its lock yet


@contextmanager
def mirrored(task: FitTask) -> Iterator[tuple[FitTask, Callable[[], None]]]:
    """The task with a folder of this machine, and what to call after each checkpoint; the folder is sent at the end.

    A fit whose folder is on this machine works there, and nothing is copied.
    """
    place = Place.at(task.folder)
    if place.path is not None:
        yield task.replace(folder=str(place.path)), lambda: None
        return
    with scratch_folder("softseg-fit") as scratch:
        mirror = Mirror(place, scratch)
        mirror.pull()
        try:
            yield task.replace(folder=str(scratch)), mirror.push
        finally:
            mirror.push()


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder for the block, in `parent` or where temporary files are. Removes those of `name` whose processes have died."""
    parent, prefix = parent or Path(tempfile.gettempdir()), f"{name}-{os.getuid()}-"
    for folder in parent.glob(f"{prefix}*"):
        lock = folder / ".lock"
        if lock.exists() and lock.stat().st_mtime < time.time() - FRESH_S and holder(lock) is None:
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, hold(Path(made) / ".lock"):
        yield Path(made)


class Mirror:
    """A remote folder and its copy here. Only what has changed since it was last copied is sent."""

    def __init__(self, place: Place, folder: Path) -> None:
        self._place, self._folder = place, folder
        self._copied: dict[str, list[int]] = {}  # the stamp of each file

    def pull(self) -> None:
        """Fetch all files."""
        for name in self._place.names():
            (self._place / name).pull(self._folder / name)
            self._copied[name] = stamp_of((self._folder / name).stat())

    def push(self) -> None:
        """Send new files, and then remove files there that were removed here."""
        here = {p.name: stamp_of(p.stat()) for p in self._folder.iterdir() if p.is_file() and not p.name.startswith(".")}
        new = [name for name, stamp in here.items() if self._copied.get(name) != stamp]
        for name in sorted(new, key=lambda name: (LAST.index(name) + 1 if name in LAST else 0, name)):
            (self._place / name).push(self._folder / name)
            self._copied[name] = here[name]
        for name in self._copied.keys() - here.keys():
            (self._place / name).delete()
            del self._copied[name]


COPIERS = 8  # files that are copied at a time


class WorkingCopy:
    """A run folder and its copy `folder`: the newer file wins, so another driver can go on. A local one is not copied."""

    def __init__(self, run: str | Path) -> None:
        self.place = Place.at(run)
        self.folder = working_folder(self.place) if "://" in str(run) else Path(run)

    def pull(self, *patterns: str) -> None:
        """Fetch files whose names match, such as "fits/*/*.json", if newer; what a fit has not there any more is removed here."""
        if self.place.path is not None:
            return
        there = self.place.walk()
        matching = [name for name in there if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
        here = {name: path.stat().st_mtime for name in matching if (path := self.folder / name).exists()}
        newer = [name for name in matching if here.get(name, 0.0) + 0.001 < there[name]]  # clocks are not exact
        for path in self.folder.glob("fits/**/*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in there:
                path.unlink()

        def fetch(name: str) -> None:
            (self.place / name).pull(self.folder / name)
            os.utime(self.folder / name, (there[name], there[name]))

        with ThreadPoolExecutor(COPIERS) as copiers:
            list(copiers.map(fetch, newer))

    def push(self, *names: str) -> None:
        """Send files, and the files of folders. One that is not here is removed there."""
        if self.place.path is not None:
            return
        for name in names:
            here = self.folder / name
            if not here.exists():
                (self.place / name).delete()
            for path in sorted(here.iterdir()) if here.is_dir() else [here]:
                if path.is_file():
                    (self.place / path.relative_to(self.folder).as_posix()).push(path)
