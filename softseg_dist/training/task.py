"""What goes into a fit and what comes out of it: the frozen types that cross between search, workers and training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor, distributed

import softseg_dist
from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.splits import Split
from softseg_dist.frozen import Frozen
from softseg_dist.numerics.metrics import Metric, metric_of
from softseg_dist.numerics.sampling import Uncertainty
from softseg_dist.sealed import AGAIN, Damaged
from softseg_dist.study import Recipe

Slot = tuple[int, int]
"""(split index, repeat): where a fit of a candidate stands."""


def fit_name(split: int, repeat: int = 0) -> str:
    """`003`, `003-r1`: a fit of a candidate in files, ledger and messages."""
    return f"{split:03d}" + (f"-r{repeat}" if repeat else "")


def is_fit_name(name: str) -> bool:
    """Is this such a name?"""
    return re.fullmatch(r"\d+(-r[1-9]\d*)?", name) is not None


class FitTask(Frozen):
    """One fit: one candidate on one split. Everything that its result depends on, and where it may write.

    `seed` is the study's; all randomness of the fit follows from `seeds` (`study`, `seed`, split index, `repeat`), never from the
    candidate, so that all candidates see the same initial weights, batches and augmentation. `store` is the path of the Arrow
    file and `store_fingerprint` the name it must have. `folder` belongs to this fit alone.
    """

    study: str
    seed: int
    candidate: str
    recipe: Recipe
    split: Split
    repeat: int = 0
    objective: str | Metric
    second_objective: str | Metric | None = None
    store: str
    store_fingerprint: str
    folder: str
    uncertainty: tuple[Uncertainty, ...] = ()
    validate_every: int | None = None
    threads: int = 1
    checkpoint_every_s: float = 60.0
    time_limit_s: float | None = None
    attempt: int = 0

    @property
    def key(self) -> str:
        """`hard-sigmoid-dice/003`, `hard-sigmoid-dice/003-r1`: names the fit in the ledger, in MLflow and in messages."""
        return f"{self.candidate}/{fit_name(*self.slot)}"

    @property
    def slot(self) -> Slot:
        """Split index and repeat."""
        return self.split.index, self.repeat

    @property
    def seeds(self) -> tuple[str | int, ...]:
        """What `numerics.seeds.seed_of` takes for this fit."""
        return (self.study, self.seed, self.split.index, *(("repeat", self.repeat) if self.repeat else ()))

    @property
    def objectives(self) -> tuple[Metric, ...]:
        """The metrics that the study looks at: the objective, and the second one if there is one."""
        return tuple(metric_of(value) for value in (self.objective, self.second_objective) if value is not None)

    @property
    def identity(self) -> str:
        """Fingerprint of what the result depends on, the package's numerics included; where and how fast it runs is left out."""
        where = {"store": "", "folder": "", "threads": 1, "checkpoint_every_s": 0.0, "time_limit_s": None, "attempt": 0}
        return f"{self.replace(**where).fingerprint}-{softseg_dist.NUMERICS}"


class FitResult(Frozen):
    """What is known of a fit when it has ended; one JSON file of the ledger.

    `score` is the objective on validation at the best epoch, on the prepared grid; `test_score` the same metric on the test
    subjects, on the grids of their files (both means over subjects, NaN cases left out). `scores` are as `score`, of all objectives
    of the study, by metric; one that is undefined on every case is left out. `validate_every` is the number of epochs from one
    validation to the next. `thresholds` maps rule to the value chosen on validation, `recalibration` class to a and b, {} if the
    maps hold too few values for it. `converged` is False if the best epoch lies in the last 5 % of the budget. `dead_share` is the
    share of training samples, in the last epoch, whose NormReLU output was 0 everywhere; None without NormReLU. A "failed" fit has
    a `reason` and no score. `peak_memory_mb` is that of its process, with whatever else has run in it. `precision` and `engine` say
    how it was trained, and `notes` what was not used for it (see `training.stepper`), or was damaged, and why. `files` has the
    SHA-256 of what it left, by name.
    """

    candidate: str
    split: int
    repeat: int = 0
    state: Literal["finished", "failed"]
    reason: str = ""
    score: float | None = None
    test_score: float | None = None
    scores: dict[str, float] = {}
    best_epoch: int | None = None
    epochs: int = 0
    converged: bool | None = None
    dead_share: float | None = None
    thresholds: dict[str, float] = {}
    recalibration: dict[str, tuple[float, float]] = {}
    parameters: int | None = None
    duration_s: float = 0.0
    peak_memory_mb: float = 0.0
    attempt: int = 0
    resumed_epoch: int | None = None
    num_workers: int = 1
    validate_every: int = 1
    process: str = ""
    versions: dict[str, str] = {}
    precision: str = "float32"
    engine: str = ""
    notes: tuple[str, ...] = ()
    files: dict[str, str] = {}

    @property
    def key(self) -> str:
        """`hard-dice/003`, as `FitTask.key`."""
        return f"{self.candidate}/{fit_name(*self.slot)}"

    @property
    def slot(self) -> Slot:
        """Split index and repeat."""
        return self.split, self.repeat


T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """One process of a fit: its device, its rank among the others, where it reports, and how it is stopped.

    A fit runs on `num_workers` processes at once, which call the same functions in the same order and differ in `rank`; they
    find each other through torch.distributed. Rank 0 alone writes files, reports and calls `stop` and `leaving`. `report` gets
    one flat dict of numbers per epoch ("epoch", "loss", "lr", the objective, ...). `stop` is called in every step: True makes the
    fit write its checkpoint and raise `Interrupted`. `saved` is called when a checkpoint has been written. `leaving` says whether
    a machine of the fit ends soon: checkpoints are then written every few seconds.
    """

    device: str = "cpu"
    report: Callable[[dict[str, float]], None] = field(default=lambda metrics: None)
    stop: Callable[[], bool] = field(default=lambda: False)
    saved: Callable[[], None] = field(default=lambda: None)
    leaving: Callable[[], bool] = field(default=lambda: False)
    rank: int = 0
    num_workers: int = 1

    @property
    def leads(self) -> bool:
        """Does this worker write and report?"""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every worker's `values`, on all of them; overwrites `values`."""
        if self.num_workers > 1:
            distributed.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        """Rank 0's `value`, on all workers."""
        if self.num_workers == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all workers, one after the other by rank, on all of them."""
        if self.num_workers == 1:
            return values
        lists: list[list[T]] = [[] for _ in range(self.num_workers)]
        distributed.all_gather_object(lists, values)
        return [value for of_one in lists for value in of_one]


class Interrupted(Exception):
    """The fit was stopped on request; its checkpoint is written and the next call resumes from there."""


def _in_folder(name: str) -> Callable[[str | Path], Path]:
    return lambda folder: Path(folder) / name


history_path = _in_folder("history.jsonl")  # one JSON line per finished epoch
result_path = _in_folder("result.json")  # of a fit that has ended, beside its identity; makes a fit that is run again free
checkpoint_path = _in_folder("checkpoint.pt")  # the state of a fit that has not ended; removed when it has
weights_path = _in_folder("best.safetensors")  # of the best epoch
cases_path = _in_folder("cases.parquet")  # the fit's rows of the results table
holdout_path = _in_folder("holdout.parquet")  # its rows about held-out subjects; written by the driver when the search is complete


def left_in(folder: str | Path) -> dict[str, str]:
    """The SHA-256 of what a fit has left in its folder, by name, as in `FitResult.files`."""
    found = (history_path(folder), weights_path(folder), cases_path(folder))
    return {path.name: sha256_of(path) for path in found if path.exists()}


def vouched(result: FitResult, path: Path) -> Path:
    """The path of a file that a fit has left. Raises Damaged if that is not the file that its result was recorded with."""
    if not path.is_file() or sha256_of(path) != result.files.get(path.name):
        raise Damaged(path, AGAIN, fit=result.key)
    return path


def history_of(folder: str | Path, result: FitResult | None = None) -> list[dict[str, float]]:
    """The epochs that the fit of a folder has finished, each with its numbers; a torn last line is left out.

    Of a fit that has ended with `result`: none if that names no history. Raises Damaged if it is about another history.
    """
    path = history_path(folder)
    if result is not None and path.name in result.files:
        vouched(result, path)
    elif result is not None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
