"""What does the engine cost per fit? 200 fits that do nothing, through Tune, ledger and MLflow on SQLite, two at a time.

Run:    python tests/benchmarks/bench_overhead.py [number of fits]
Target: 200 fits in less than 20 s, Ray's start and MLflow's end included.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise

from record import Headline, record

from softseg_dist import MonteCarlo, Phantom, Recipe, Resources, Study
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_private import private_ray
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import run_search
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.tracking.tracker import Tracker
from softseg_dist.training.task import FitResult, FitTask, Worker

TARGET_S = 20.0
NUM_FITS, NUM_SPLITS = 200, 10
HEADLINES = (
    Headline(
        key="total_s", what="200 fits that do nothing, with the start of Ray and the end of MLflow", unit="s", at_most=TARGET_S
    ),
    Headline(key="per_fit_s", what="of that, each fit", unit="s"),
)


def no_fit(task: FitTask, worker: Worker) -> FitResult:
    """End at once, after one report."""
    worker.report({"epoch": 1.0, "loss": 0.5})
    return FitResult(candidate=task.candidate, split=task.split.index, state="finished", score=0.5, test_score=0.5, epochs=1)


def main(num_fits: int) -> None:
    """Measure, and print a table."""
    num_candidates = num_fits // NUM_SPLITS
    study = Study(
        name="overhead",
        question="What does the engine cost per fit?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=NUM_SPLITS),
        candidates={f"c{number:03d}": Recipe() for number in range(num_candidates)},
    )
    splits = study.splits.make({f"sub-{number}": "" for number in range(10)}, study.seed)
    marks = {"start": time.perf_counter()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ENVIRONMENT)
        tracker = Tracker(None, folder, study)
        private = ExitStack()
        private.enter_context(private_ray({"num_cpus": 2, "log_to_driver": False, "logging_level": "ERROR"}))
        marks["Ray starts"] = time.perf_counter()
        ledger = Ledger(folder)
        ledger.open_study(study, splits)
        lines = io.StringIO()
        outcome = run_search(
            RunContext(
                study,
                splits,
                Prepared("none", "0" * 16),
                ledger,
                WorkingCopy(ledger.folder),
                Resources(max_concurrent=2),
                RayBackend(),
                PlainLines(lines),
                tracker,
                fit=no_fit,
            )
        )
        marks["fits run"] = time.perf_counter()
        notes = tracker.close()
        marks["MLflow ends"] = time.perf_counter()
        private.close()
        marks["Ray stops"] = time.perf_counter()
    assert (outcome.finished, notes) == (num_candidates * NUM_SPLITS, ()), (outcome, notes)
    names = list(marks)
    parts = {name: marks[name] - marks[before] for before, name in pairwise(names)}
    total = sum(parts.values())
    for name, seconds in parts.items():
        print(f"{name:12} {seconds:7.2f} s")
    print(f"{'total':12} {total:7.2f} s   {total / outcome.finished:.3f} s per fit   target {TARGET_S:.0f} s for 200 fits")
    named = {name.replace(" ", "_").lower() + "_s": seconds for name, seconds in parts.items()}
    figures = {"fits": outcome.finished, "total_s": total, "per_fit_s": parts["fits run"] / outcome.finished, **named}
    record("overhead", figures, HEADLINES, short=num_fits < NUM_FITS)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_FITS)
