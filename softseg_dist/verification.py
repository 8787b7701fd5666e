"""Verify: finished fits of a run are run anew and compared with what was recorded, row by row."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

import softseg_dist
from softseg_dist.engine.context import RunContext
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.session import run_beside
from softseg_dist.errors import UserError
from softseg_dist.frozen import leaves
from softseg_dist.interrupts import interruptible
from softseg_dist.judging.results import SCHEMA
from softseg_dist.pipeline import RunOptions, provenance, reopened
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy, scratch_folder
from softseg_dist.sealed import KEEPER
from softseg_dist.training.task import FitResult, cases_path, vouched

ROUNDING = 1e-3  # of a value of 1 or less, else of the value: docs/running.md, Verify
OF_MACHINE = {"candidate", "duration_s", "peak_memory_mb", "attempt", "resumed_epoch", "num_workers", "process", "versions"}
OF_MACHINE |= {"precision", "engine", "notes", "files"}  # fields of a result that a fit that is run anew may change
Verdict = Literal["equal", "within rounding", "differs"]


@dataclass(frozen=True)
class FitCheck:
    """A finished fit, run anew and compared: `differing` of its `rows`, among which are the numbers of its result.

    `largest` is the largest difference, None where a value is in one of both alone, and `where` its place; `why` is what is known
    of the cause. `verdict` is "within rounding" up to `ROUNDING`, on a GPU or with several workers only.
    """

    fit: str
    verdict: Verdict
    rows: int
    differing: int = 0
    largest: float | None = 0.0
    where: str = ""
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = "" if self.largest is None else f" {self.largest:.2g}"
        found = f"{self.differing} of {self.rows} rows, the largest difference{size} at {self.where}"
        return f"{self.fit}: " + "; ".join([f"{self.verdict}, {found if self.differing else f'{self.rows} rows'}", *self.why])


def verify_run(
    run: str | Path, num_fits: int | None, options: RunOptions, progress: Progress, seed: int = 0, trust: bool = False
) -> tuple[FitCheck, ...]:
    """Run a sample of the finished fits (None: all) anew, each by one worker and from its beginning, and compare every row.

    The sample follows from the study and `seed`. The fits run in a temporary folder: nothing in the run changes.
    Raises UserError as `refit_run` does, and if the store or a recorded file is not as it was.
    """
    context, loaded = reopened(run, replace(options, workers_per_fit=1), progress, trust, "verifying a run")
    recorded, place = {key: fit for key, fit in context.ledger.results().items() if fit.state == "finished"}, context.copy.place
    if options.address and place.path is None:
        raise UserError(f"--address: {run} is verified on this machine, as nothing is written into it; leave out --address")
    was, now = ({**facts.get("versions", {}), **facts.get("machine", {})} for facts in (loaded.run, provenance("")))
    was, now = was | {"numerics": context.ledger.read(KEEPER)["numerics"]}, now | {"numerics": softseg_dist.NUMERICS}
    for name in (name for name in was if was[name] != now.get(name)):
        progress.note(f"not as recorded: {name} {now.get(name)}, it was {was[name]}")
    size = len(recorded) if num_fits is None else min(num_fits, len(recorded))
    chosen = sorted(random.Random(f"{context.study.fingerprint} {seed}").sample(sorted(recorded), size))
    splits, checks = {split.index: split for split in context.splits}, list[FitCheck]()
    scratch = scratch_folder(".softseg-verify", place.path if options.address else None)  # a cluster sees the run
    with interruptible(), scratch as folder, context.backend.held():
        apart = replace(context, ledger=Ledger(folder / "run"), copy=WorkingCopy(folder / "run"))
        for fit in map(recorded.__getitem__, chosen):
            recipe, before = context.recipe_of(fit.candidate), _rows_of(fit, context)
            again = run_beside(apart, apart.fit_task(fit.candidate, recipe, splits[fit.split], fit.repeat))
            checks.append(_compared(fit, again, before, _rows_of(again, apart)))
            progress.note(str(checks[-1]))
    return tuple(checks)


def _rows_of(fit: FitResult, context: RunContext) -> pd.DataFrame:
    """The rows of a fit, and after them the numbers of its result that do not speak of time, memory or machine."""
    fields = {name: value for name, value in fit if name not in OF_MACHINE}
    case = "the result: " + " ".join(filter(None, (fields.pop("state"), fields.pop("reason"))))
    values = ((name, one) for name, value in sorted(leaves(fields)) for one in (value if isinstance(value, tuple) else (value,)))
    numbers = [{"case": case, "metric": name, "value": np.nan if one is None else float(one)} for name, one in values]
    tables = [pd.read_parquet(vouched(fit, cases_path(context.fit_folder(fit))))] if fit.state == "finished" else []
    return pd.concat([*tables, pd.DataFrame(numbers)], ignore_index=True).reindex(columns=SCHEMA.names)


def _compared(fit: FitResult, again: FitResult, before: pd.DataFrame, now: pd.DataFrame) -> FitCheck:
    """Row by row, in their order; numbers are equal if all their bits are, or if both are undefined."""
    num, numbers = max(len(before), len(now)), ["threshold", "value"]
    tables = [table.reindex(range(num)) for table in (before, now)]
    old, new = (table[numbers].to_numpy(np.float64) for table in tables)
    names = [table.drop(columns=numbers).astype(object).fillna("") for table in tables]
    same = (names[0] == names[1]).all(axis=1).to_numpy()
    equal = (old == new) & (np.signbit(old) == np.signbit(new)) | (np.isnan(old) & np.isnan(new))
    gaps = np.abs(np.subtract(old, new, out=np.zeros_like(old), where=~equal)).max(axis=1)
    gaps = np.where(same & np.isfinite(gaps), gaps, np.inf)
    if not (differing := ~(same & equal.all(axis=1))).any():
        return FitCheck(fit.key, "equal", num)
    worst = int(np.where(differing, gaps, -1).argmax())
    largest = float(gaps[worst]) if np.isfinite(gaps[worst]) else None
    graphs = [one for one in (fit, again) if "graph" in one.engine or any(note.startswith("graph: ") for note in one.notes)]
    rounded = bool(graphs) or max(fit.num_workers, again.num_workers) > 1
    small = largest is not None and bool((gaps <= ROUNDING * np.fmax(1, np.abs(old[:, 1]))).all())
    verdict: Verdict = "within rounding" if rounded and small else "differs"
    row = tables[worst >= len(before)].iloc[worst]
    where = ", ".join(str(row[name]) for name in ("subset", "case", "class", "metric") if isinstance(row[name], str))
    engines = (f"{one.num_workers} workers" if one.num_workers > 1 else one.engine for one in (fit, again))
    made = ((engine, *map(" ".join, one.versions.items()), one.process) for engine, one in zip(engines, (fit, again), strict=True))
    why = tuple(f"recorded with {old}, now {new}" for old, new in zip(*made, strict=False) if old != new)
    return FitCheck(fit.key, verdict, num, int(differing.sum()), largest, where, why)
