"""Does anything cost more than its share when a study grows? Processor time against candidates, splits, cases and voxels.

Each stage is measured at three sizes, with fits that do nothing; its slope is that of log(seconds) over log(size) between the two
larger ones, where what does not grow weighs least. 1 is linear. Each is the lesser of two measurements. Time of the kernel is left
out: for the same fsync it takes .1 to .8 ms, as the disk's other users will have it.

Run:    python tests/benchmarks/bench_growth.py [--tune]    # --tune: Ray Tune's share too, over 1,250 fits; some minutes more
Target: no slope above 1.2 where the stage takes more than a second at the largest size
"""

from __future__ import annotations

import argparse
import io
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from bench_overhead import no_fit
from record import Headline, record
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from driven_search import searcher
from synthetic_run import CELLS, write_run

from softseg_dist import MonteCarlo, Phantom, Preprocess, Recipe, Resources, Study
from softseg_dist.data.cases import CaseData
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.plan import plan_study
from softseg_dist.engine.progress import PlainLines, Progress
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_private import private_ray
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import SearchSession, run_search
from softseg_dist.engine.worker import Ending
from softseg_dist.judging.judge import Yardstick, case_rows
from softseg_dist.judging.results import merge_tables, write_frame
from softseg_dist.numerics.metrics import Scale
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import status_of
from softseg_dist.report.page import write_page
from softseg_dist.report.run_folder import load_run
from softseg_dist.report.tables import summarise
from softseg_dist.tracking.tracker import connect, default_uri, parameters
from softseg_dist.training.task import FitResult, FitTask

CANDIDATES, SPLITS, CASES, SIDES = (20, 80, 320), (10, 40, 160), (24, 96, 384), (32, 64, 128)
FITS = (50, 200, 800)
FEW = 8  # of what does not grow
TUNED = (10, 40, 200)
REPEATS = 2
LIMIT, FROM_S = 1.2, 1.0
HEADLINES = (
    Headline(
        key="steepest slope",
        what="growth with candidates, splits, cases, voxels: steepest slope of a stage of over a second (1: linear)",
        at_most=LIMIT,
    ),
)
Stages = dict[str, float]
"""Processor seconds by stage."""


def main(tune: bool) -> None:
    """Measure, and print a table for everything that grows."""
    figures: dict[str, float] = {}
    figures |= grow("candidates", CANDIDATES, lambda count, place: engine(count, FEW, place) | ended(count, FEW, 6, place))
    figures |= grow("splits", SPLITS, lambda count, place: engine(FEW, count, place) | ended(FEW, count, 6, place))
    figures |= grow("fits", FITS, tracked)
    figures |= grow("cases", CASES, lambda count, place: stored(count, place) | ended(FEW, FEW, count // 4, place))
    figures |= grow("voxels", [side**3 for side in SIDES], measured)
    if tune:
        os.environ.update(ENVIRONMENT)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        with private_ray({"num_cpus": 2, "log_to_driver": False, "logging_level": "ERROR"}):
            figures |= grow("candidates", TUNED, lambda count, place: tuned(count, place))
    steep = [value for key, value in figures.items() if key.endswith("slope") and figures[f"{key[:-7]}, s"] > FROM_S]
    record("growth", figures | {"steepest slope": max(steep, default=0.0)}, HEADLINES)


def grow(what: str, sizes: Sequence[int], measure: Callable[[int, Path], Stages]) -> dict[str, float]:
    """Print the stages at each size with their slopes; returns the figures."""
    stages: list[Stages] = [{} for _ in sizes]
    for size, least in REPEATS * list(zip(sizes, stages, strict=True)):
        with tempfile.TemporaryDirectory() as folder:
            for name, spent_s in measure(size, Path(folder)).items():
                least[name] = min(spent_s, least.get(name, math.inf))
    print(f"\n{'processor time [s], ' + what:<36}" + "".join(f"{size:>12,}" for size in sizes) + f"{'slope':>8}")
    figures: dict[str, float] = {}
    for name in stages[0]:
        seconds = [of_size[name] for of_size in stages]
        slope = math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])
        over = "  over" if slope > LIMIT and seconds[-1] > FROM_S else ""
        print(f"{name:<36}" + "".join(f"{value:>12.3f}" for value in seconds) + f"{slope:>8.2f}{over}", flush=True)
        figures |= {f"{what}: {name}, slope": slope, f"{what}: {name}, s": seconds[-1]}
    return figures


def engine(candidates: int, splits: int, place: Path) -> Stages:
    """What the driver does beside Tune, searcher and ledger; and what reads the folder of a run that has not ended."""
    study, folder, stages = study_of(candidates, splits), place / "run", Stages()
    with Clock(stages, "searcher, ledger"):
        session = SearchSession(searcher(folder, study), None, Progress(), Place.at(folder / ".stop"))
        session.start()
        while (task := session.next_fit("fit")) is not None:
            session.ended_as("fit", Ending(kind="result", result=result_of(task)))
    assert len(Ledger(folder).results()) == candidates * splits
    with Clock(stages, "going on with it"):
        searcher(folder, study)
    with Clock(stages, "softseg status"):
        status_of(str(folder))
    with Clock(stages, "softseg plan --run"):
        plan_study(study, None, run=str(folder))
    return stages


def study_of(candidates: int, splits: int) -> Study:
    """A study of candidates that are all alike."""
    return Study(
        name="growth",
        question="What does it cost?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=splits),
        candidates={f"c{number:04d}": Recipe() for number in range(candidates)},
    )


def result_of(task: FitTask) -> FitResult:
    """What a fit would say that has done nothing."""
    known = {"candidate": task.candidate, "split": task.split.index, "state": "finished", "duration_s": 1.0}
    return FitResult(**known, score=0.5, test_score=0.5, epochs=1)


def tracked(fits: int, place: Path) -> Stages:
    """The time that MLflow takes to record so many fits, in the order in which a study logs them."""
    stages, server = Stages(), connect(default_uri(place), place, "growth")
    of_recipe, numbers = parameters(json_of(Recipe())), [["score", 0.5, 0, 0], ["test_score", 0.5, 0, 0]]
    with Clock(stages, "MLflow, SQLite"):
        for number in range(fits):
            key = {"key": f"c/{number:03d}", "ms": 0}
            server.apply(key | {"what": "open", "name": key["key"], "parent": None, "tags": {"softseg.split": str(number)}})
            server.apply(key | {"what": "log", "metrics": numbers, "params": of_recipe, "tags": {}})
            server.apply(key | {"what": "close", "status": "FINISHED"})
    return stages


def ended(candidates: int, splits: int, tested: int, place: Path) -> Stages:
    """What is done when all fits have ended: their rows are collected, and reported."""
    stages, proposed = Stages(), [f"trial-{number:04d}" for number in range(candidates - len(CELLS))]
    folder = write_run(
        place / "ended", proposed=proposed, num_splits=splits, num_tested=tested, num_subjects=4 * tested, collected=False
    )
    parts = sorted(folder.glob("fits/*/*/cases.parquet"))
    for part in parts:
        write_frame(pd.read_parquet(part), part)
    with Clock(stages, "collect the fits' rows"):
        merge_tables(parts, folder / "results.parquet")
    with Clock(stages, "report: load"):
        run = load_run(folder)
    with Clock(stages, "report: numbers"):
        summary = summarise(run)
    with Clock(stages, "report: page"):
        write_page(run, summary, [])
    return stages


def stored(cases: int, place: Path) -> Stages:
    """What is done with cases before a fit sees them."""
    stages, data, preprocess = Stages(), Phantom(subjects=cases, num_slices=1, size=(32, 32)), Preprocess(dim=2)
    found = data.cases(None)
    with Clock(stages, "prepare"):
        path = build_store(place, found, data, preprocess)
    with Clock(stages, "prepare, nothing changed"):
        build_store(place, found, data, preprocess)
    with Clock(stages, "open the store, read one case"):
        Store.open(path).sample(cases - 1)
    with Clock(stages, "splits"):
        MonteCarlo(count=FEW).make({case.subject: case.site for case in found}, 0)
    return stages


def measured(voxels: int, place: Path) -> Stages:
    """What is done with the voxels of one case: one structure in a cube, drawn by two raters."""
    stages, side = Stages(), round(voxels ** (1 / 3))
    case = Phantom(subjects=1, dim=3, size=(32, 32, 32)).cases(None)[0]
    small = case.load()
    zoom = (1,) * (small.raters.ndim - 3) + (side / 32,) * 3
    raters = ndimage.zoom(small.raters, zoom, order=0)
    data = CaseData(np.zeros((1, side, side, side), np.float32) + raters[0], raters, None, small.affine, small.geometry)
    with Clock(stages, "preprocess, resampled"):
        Preprocess(dim=3, spacing_mm=(2, 2, 2)).transform(case, data)
    references = {"mean": raters.mean(axis=0)[None]} | {str(r): mask[None] for r, mask in enumerate(raters)}
    prediction = ndimage.gaussian_filter(references["mean"], (0, 0, 1, 1, 1))
    with Clock(stages, "all rows of the results table"):
        yardstick, scale = Yardstick(("cord",), (1e3,)), Scale(1.0, (1e3,), (1.0, 1.0, 1.0))
        case_rows(prediction, references, yardstick, (0.5, 0.45, 0.392), scale)
    return stages


def tuned(candidates: int, place: Path) -> Stages:
    """The main thread of a search on Ray: Tune, searcher and ledger. Its wall time is `bench_overhead.py`'s."""
    study = study_of(candidates, 5)
    ledger = Ledger(place)
    splits = study.splits.make({f"sub-{number}": "" for number in range(10)}, study.seed)
    ledger.open_study(study, splits)
    lines, started = PlainLines(io.StringIO()), time.thread_time()
    run_search(
        RunContext(
            study,
            splits,
            Prepared("none", "0" * 16),
            ledger,
            WorkingCopy(ledger.folder),
            Resources(max_concurrent=2),
            RayBackend(),
            lines,
            fit=no_fit,
        )
    )
    return {"Tune, 5 splits each": time.thread_time() - started}


class Clock:
    """Adds the processor time of its block, by all threads, to `stages`; that of the kernel is not in it."""

    def __init__(self, stages: Stages, name: str) -> None:
        self._stages, self._name = stages, name

    def __enter__(self) -> None:
        self._started = resource.getrusage(resource.RUSAGE_SELF).ru_utime

    def __exit__(self, *raised: object) -> None:
        self._stages[self._name] = resource.getrusage(resource.RUSAGE_SELF).ru_utime - self._started


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    main(parser.parse_args().tune)
