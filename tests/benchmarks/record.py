"""What a benchmark leaves behind: its figures, of which the headlines have words and targets, the command, the machine, the date.

`out/` holds what was measured here last, `results/` (committed) what docs/benchmarks.md shows; `summary.py` reads both.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel, model_validator

HERE = Path(__file__).parent
OUT, RESULTS = HERE / "out", HERE / "results"


class Headline(BaseModel, frozen=True):
    """A figure of the tables: its key, what it is, its unit, and its target, if it has one."""

    key: str
    what: str
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool | None:
        """Does `value` meet the target? None without one."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def formatted(self, value: float) -> str:
        """The value with three digits and its unit.

        >>> Headline(key="x", what="", unit="s").formatted(20.5004)
        '20.5 s'
        """
        number = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return f"{number} {self.unit}".strip()

    @property
    def target(self) -> str:
        """In words; empty without one."""
        ends = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{words} {self.formatted(end)}" for words, end in ends if end is not None)


class Machine(BaseModel, frozen=True):
    """Where figures come from, as far as it explains them; what is not known is empty or 0."""

    processor: str
    cores: int
    memory_gb: int = 0
    gpu: str = ""
    torch: str = ""
    python: str = ""

    @property
    def hardware(self) -> str:
        """One line.

        >>> Machine(processor="AMD EPYC", cores=2, memory_gb=24).hardware
        'AMD EPYC, 2 cores, 24 GB, no GPU'
        """
        memory = [f"{self.memory_gb} GB"] if self.memory_gb else []
        return ", ".join([self.processor, f"{self.cores} cores", *memory, self.gpu or "no GPU"])


class Result(BaseModel, frozen=True):
    """One run of one benchmark. `short`: it did less than what its targets are about."""

    name: str
    command: str
    date: str
    machine: Machine
    load: float | None = None
    short: bool = False
    figures: dict[str, float]
    headlines: tuple[Headline, ...] = ()

    @model_validator(mode="after")
    def _has_its_headlines(self) -> Result:
        if missing := {headline.key for headline in self.headlines} - self.figures.keys():
            raise ValueError(f"{self.name} has no figure {', '.join(sorted(missing))}")
        return self

    @property
    def file_name(self) -> str:
        """A short run does not overwrite a long one."""
        return f"{self.name}{'-short' * self.short}.json"


def record(name: str, figures: Mapping[str, float], headlines: Sequence[Headline] = (), short: bool = False) -> None:
    """Write out/<name>.json, and say so; headlines of figures that this run does not have are left out."""
    result = Result(
        name=name,
        command=shlex.join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=this_machine(),
        load=round(os.getloadavg()[0], 1),
        short=short,
        figures={key: float(f"{value:.6g}") for key, value in figures.items()},
        headlines=tuple(headline for headline in headlines if headline.key in figures),
    )
    OUT.mkdir(exist_ok=True)
    (OUT / result.file_name).write_text(result.model_dump_json(indent=1, exclude_defaults=True) + "\n")


def read(folder: Path) -> list[Result]:
    """All results of a folder, by name."""
    return [Result.model_validate_json(path.read_text()) for path in sorted(folder.glob("*.json"))]


def this_machine() -> Machine:
    """The machine that this runs on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return Machine(
        processor=_processor(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 0,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        torch=torch.__version__,
        python=platform.python_version(),
    )


def _processor() -> str:
    """The model of the processor, where the system has it."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", about.read_text(), re.MULTILINE) if about.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
