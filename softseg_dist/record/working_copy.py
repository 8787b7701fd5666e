"""What the driver of a run needs of the run folder, as files of this machine: the folder itself, or a copy of a remote one."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from softseg_dist.places import Place, working_folder

COPIERS = 8  # files that are copied at a time


class WorkingCopy:
    """`folder` holds what was pulled. Both ways the newer file wins, so a driver that goes on elsewhere finds what it needs.

    Nothing is copied if the run folder is on this machine.
    """

    def __init__(self, run: str | Path) -> None:
        self.place = Place.at(run)
        self.folder = working_folder(self.place) if "://" in str(run) else Path(run)

    def pull(self, *patterns: str) -> None:
        """Fetch all files whose names match, such as "fits/*/*.json", unless what is here is as new.

        A file of a fit that is not there any more is removed here: its fit runs again.
        """
        if self.place.path is not None:
            return
        there = self.place.walk()
        wanted = {
            name: entry.modified_s
            for name, entry in there.items()
            if any(PurePosixPath(name).match(pattern) for pattern in patterns)
            and _modified_s(self.folder / name) < entry.modified_s
        }
        for path in self.folder.glob("fits/**/*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in there:
                path.unlink()
        with ThreadPoolExecutor(COPIERS) as copiers:
            for _ in copiers.map(self._pull, wanted, wanted.values()):
                pass

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

    def _pull(self, name: str, modified_s: float) -> None:
        path = self.folder / name
        (self.place / name).pull(path)
        os.utime(path, (modified_s, modified_s))


def _modified_s(path: Path) -> float:
    """When a file was written, a millisecond later: clocks are not exact. Long ago if there is none."""
    return path.stat().st_mtime + 0.001 if path.exists() else 0.0
