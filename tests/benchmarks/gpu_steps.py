"""One training step each way: images per second, memory, and how busy the device is; a table per network."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gpu_fits import EagerFit, EngineFit, Lane, busy_shares, images_per_s
from gpu_work import Scale, Work
from record import Headline
from torch.backends import cudnn

LEAST_NOT_IDLE = 0.95
COLUMNS = f"{'way':<46}{'images/s':>10}{'ratio':>8}{'GiB':>8}{'computes':>10}{'not idle':>10}"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What was measured of so many fits at once. `gib` is what the process holds of the device's memory, used or not.

    `computes` and `not_idle` are shares of the time of a fit alone (see `busy_shares`), NaN of several.
    """

    name: str
    ours: bool
    fits: int
    images_per_s: float
    gib: float
    computes: float
    not_idle: float


class Steps:
    """The table of one network: its rows by key, and how many of the package's ways have failed."""

    def __init__(self, work: Work, folder: Path, scale: Scale, say: Say) -> None:
        self.work, self.folder, self.scale, self.say = work, folder, scale, say
        self.title = f"{work.title}, {' x '.join(map(str, work.size))}, batch {work.batch_size}"
        self.rows: dict[str, Row] = {}
        self.failed = 0

    def measure(self) -> None:
        """All rows, each printed when it is measured."""
        self.say(f"\n{self.title}\n{COLUMNS}")
        self._eager("eager", "eager float32", tuned=False)
        self._eager("tuned", "eager, TF32, cudnn.benchmark", tuned=True)
        for way, speed in self.scale.ways.items():
            self._engine(way, speed)

    def figures(self) -> dict[str, float]:
        """All that was measured; `best` is the ratio of the package's fastest way, `not_idle` of its fastest fit alone."""
        figures: dict[str, float] = {"failed": self.failed}
        for key, row in self.rows.items():
            figures |= {f"{key}_per_s": row.images_per_s, f"{key}_ratio": self._ratio(row), f"{key}_gib": row.gib}
            figures |= {f"{key}_computes": row.computes, f"{key}_not_idle": row.not_idle} if row.fits == 1 else {}
        if any(row.ours for row in self.rows.values()):
            figures |= {"best": self._ratio(self._fastest()), "not_idle": self._fastest(most_fits=1).not_idle}
        return figures

    def headlines(self) -> list[Headline]:
        """What is aimed at; nothing if no way of the package's has run."""
        if not any(row.ours for row in self.rows.values()):
            return []
        idle = "share of a fit's time in which the GPU does not wait for the host"
        return [
            Headline(
                key="best",
                what=f"{self.title}: images per second against eager float32, as {self._fastest().name}",
                unit="times",
                at_least=self.work.target,
            ),
            Headline(key="not_idle", what=f"{self.title}: {idle}", at_least=LEAST_NOT_IDLE),
        ]

    def _fastest(self, most_fits: int = 10**6) -> Row:
        ours = [row for row in self.rows.values() if row.ours and row.fits <= most_fits]
        return max(ours, key=lambda row: row.images_per_s)

    def _ratio(self, row: Row) -> float:
        return row.images_per_s / self.rows["eager"].images_per_s

    def _eager(self, key: str, name: str, tuned: bool) -> None:
        task, device = self.work.task(self.folder), self.scale.device
        with cudnn.flags(enabled=True, benchmark=tuned, allow_tf32=tuned), _lanes(device) as lanes:
            lanes.append(Lane(partial(EagerFit, task, device), device))
            self._row(key, name, lanes)

    def _engine(self, way: str, speed: Mapping[str, str]) -> None:
        """A row for every number of fits at once; a way that fails says why."""
        device = self.scale.device
        with cudnn.flags(enabled=True, allow_tf32=speed["precision"] != "float32"), _lanes(device) as lanes:
            try:
                for fits in self.scale.at_once:
                    tasks = [self.work.task(self.folder, index, **speed) for index in range(len(lanes), fits)]
                    lanes += [Lane(partial(EngineFit, task, device), device) for task in tasks]
                    self._row(way if fits == 1 else f"{way}_{fits}_fits", "", lanes)
            except RuntimeError as error:
                self.failed += 1
                first_line = next(iter(str(error).splitlines()), "")
                self.say(f"{way}, {fits} at once: failed, {type(error).__name__}: {first_line}")

    def _row(self, key: str, name: str, lanes: list[Lane]) -> None:
        scale, fits, fit = self.scale, len(lanes), lanes[0].fit
        rate = images_per_s(lanes, self.work.num_images, scale.least_s, scale.repeats)
        gib = torch.cuda.max_memory_reserved() / 2**30 if scale.device == "cuda" else 0.0
        shares = busy_shares(lanes[0], scale.busy_epochs) if fits == 1 else (math.nan, math.nan)
        used, notes = fit.way if isinstance(fit, EngineFit) else (name, ())
        row = Row(used + f", {fits} at once" * (fits > 1), bool(not name), fits, rate, gib, *shares)
        self.rows[key] = row
        alone = "{:>10.3f}{:>10.3f}".format(*shares) if fits == 1 else ""
        self.say(f"{row.name:<46}{rate:>10.0f}{self._ratio(row):>8.2f}{gib:>8.2f}{alone}")
        for note in notes:
            self.say(f"    {note}")


@contextmanager
def _lanes(device: str) -> Iterator[list[Lane]]:
    """A list for fits, with which they go. What former ones held of the device's memory is given back before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    lanes: list[Lane] = []
    try:
        yield lanes
    finally:
        for lane in lanes:
            lane.close()
        lanes.clear()
