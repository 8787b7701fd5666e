"""Where does a study become too large for its driver? Processor time per fit, of fits that do nothing.

Without Ray: four shapes of a study, each with 10,000 and 20,000 fits, through searcher, session and ledger; then `softseg status`
of such a folder. What Optuna takes to propose is measured apart, as it looks at all trials each time. Through Ray: 8 fits at a
time, the driver's time per fit early in a search and late. Time of the kernel counts, so the run folders lie in memory where the
machine has such a folder: on a disk each fit waits for an fsync besides.

Run:    python tests/benchmarks/bench_large.py [--fits 10000] [--through-ray 2000]
Target: 10,000 fits in 10 s, twice as many in 2.2 times that, their status in 2 s; through Ray, 1.3 times the time per fit
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import ray
from bench_overhead import no_fit
from record import Headline, record

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from driven_search import searcher

from softseg_dist import MonteCarlo, Optim, Phantom, Race, Recipe, Resources, Search, Study
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import SearchSession, run_search
from softseg_dist.engine.worker import Ending
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.places import Place
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import status_of
from softseg_dist.training.task import FitResult, FitTask

FITS, THROUGH_RAY = 10_000, 2_000
SPLITS, FEW = 10, 4
EARLY = 200  # fits through Ray: the first 20 of them pay for its start
PLACES = 8
FOLDERS = "/dev/shm" if Path("/dev/shm").is_dir() else None
SHAPES = ("few candidates", "many candidates", "many trials", "many trials, raced")
HEADLINES = (
    Headline(key="slowest, s", what="10,000 fits that do nothing, without Ray and Optuna, processor time", unit="s", at_most=10.0),
    Headline(key="growth", what="of that, twice as many fits to as many", unit="times", at_most=2.2),
    Headline(key="status, s", what="`softseg status` of 10,000 fits", unit="s", at_most=2.0),
    Headline(key="through Ray, growth", what="driver's time per fit, the 2,000th to the 200th", unit="times", at_most=1.3),
    Headline(key="through Ray, ms", what="driver's time per fit through Ray, 8 at a time", unit="ms"),
)


def main(fits: int, through_ray: int) -> None:
    """Measure, and print a table."""
    figures: dict[str, float] = {}
    print(f"{'processor time [s]':<24}{fits:>10,}{2 * fits:>10,}{'times':>8}{'Optuna':>9}{2 * fits:>10,}{'peak MB':>9}")
    for shape in SHAPES:
        spent, optunas = [], []
        for count in (fits, 2 * fits):
            with tempfile.TemporaryDirectory(dir=FOLDERS) as folder:
                number, seconds, of_optuna = drive(study_of(shape, count), Path(folder) / "run")
                spent.append((seconds - of_optuna) * count / number)  # a race saves fits
                optunas.append(of_optuna)
                if shape == "many candidates" and count == fits:
                    with clock(figures, "status, s"):
                        status_of(f"{folder}/run")
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{shape:<24}{spent[0]:>10.2f}{spent[1]:>10.2f}{spent[1] / spent[0]:>8.2f}", end="")
        print(f"{optunas[0]:>9.2f}{optunas[1]:>10.2f}{peak_mb:>9.0f}", flush=True)
        figures |= {f"{shape}, s": spent[0], f"{shape}, growth": spent[1] / spent[0], f"{shape}, Optuna, s": optunas[0]}
    print(f"{'softseg status':<24}{figures['status, s']:>10.2f}")
    figures["slowest, s"] = max(figures[f"{shape}, s"] for shape in SHAPES)
    figures["growth"] = max(figures[f"{shape}, growth"] for shape in SHAPES)
    if through_ray:
        figures |= tuned(through_ray)
    record("large", figures, HEADLINES, short=(fits, through_ray) != (FITS, THROUGH_RAY))


def propose(trial: Any) -> Recipe:
    """A search of one number."""
    return Recipe(optim=Optim(lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


def study_of(shape: str, fits: int) -> Study:
    """A study of so many fits. All its trials are random: the model of a search looks at all trials for each proposal."""
    count = fits // SPLITS
    fields: dict[str, Any] = {"name": "large", "question": "What does it cost?", "data": Phantom(subjects=10)}
    if shape == "few candidates":
        names = [f"c{number}" for number in range(FEW)]
        return Study(**fields, splits=MonteCarlo(count=count // FEW), repeats=SPLITS, candidates=dict.fromkeys(names, Recipe()))
    fields["splits"] = MonteCarlo(count=SPLITS)
    if shape == "many candidates":
        return Study(**fields, candidates={f"c{number:05d}": Recipe() for number in range(count)})
    search = Search(propose, trials=count - 1, startup_trials=count, race=Race() if "raced" in shape else None)
    return Study(**fields, candidates={"control": Recipe()}, control="control", search=search)


def drive(study: Study, folder: Path) -> tuple[int, float, float]:
    """Run a study of made-up results: how many fits it had, the processor time of the whole, and Optuna's share of that."""
    known: dict[str, float] = {}
    optunas = [0.0]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                optunas[0] += time.process_time() - started

        return call

    with clock(known, "s"), ExitStack() as patches:
        for owner, name in ((optuna.Study, "ask"), (optuna.Study, "tell"), (optuna.Trial, "suggest_float")):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        session = SearchSession(searcher(folder, study), None, Progress(), Place.at(folder / ".stop"))
        session.start()
        while (task := session.next_fit("fit")) is not None:
            session.ended_as("fit", Ending(kind="result", result=result_of(task)))
        outcome = session.outcome()
    assert session.ended
    assert (outcome.failed, outcome.unfinished) == (0, 0)
    return outcome.finished, known["s"], optunas[0]


def result_of(task: FitTask) -> FitResult:
    """A score that differs between candidates and between fits."""
    score = seed_of(task.candidate) % 1000 / 1e4 + seed_of(task.key) % 1000 / 1e4
    known = {"candidate": task.candidate, "split": task.split.index, "repeat": task.repeat, "scores": {task.objective: score}}
    return FitResult(**known, state="finished", score=score, test_score=score, duration_s=1.0, epochs=1)


class Marks(Progress):
    """Notes the processor time of this process when each fit ends."""

    def __init__(self) -> None:
        super().__init__()
        self.spent_s: list[float] = []

    def show(self, event: str, **fields: Any) -> None:
        """As `Progress.show`."""
        if event == "fit":
            self.spent_s.append(time.process_time())


def tuned(fits: int) -> dict[str, float]:
    """The driver's time per fit through Ray Tune: over `EARLY` fits at the beginning, and over as many at the end."""
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    ray.init(address="local", num_cpus=PLACES, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    study, marks = study_of("many candidates", fits), Marks()
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        splits = study.splits.make({f"sub-{number}": "" for number in range(10)}, study.seed)
        ledger.open_study(study, splits)
        prepared, resources = Prepared("none", "0" * 16), Resources(max_concurrent=PLACES)
        context = RunContext(study, splits, prepared, ledger, WorkingCopy(folder), resources, RayBackend(), marks, fit=no_fit)
        outcome = run_search(context)
    ray.shutdown()
    assert outcome.finished == fits
    each_ms = 1e3 * np.diff(marks.spent_s)
    early, late = each_ms[EARLY // 10 : EARLY].mean(), each_ms[-EARLY:].mean()
    print(f"through Ray: {early:.2f} ms per fit up to fit {EARLY}, {late:.2f} ms up to fit {fits}, {late / early:.2f} times")
    print("             " + "  ".join(f"{start}: {each_ms[start : start + EARLY].mean():.2f}" for start in range(0, fits, EARLY)))
    return {"through Ray, ms": each_ms.mean(), "through Ray, growth": late / early}


@contextmanager
def clock(figures: dict[str, float], name: str) -> Iterator[None]:
    """The processor time of the block, by all threads and in the kernel."""
    started = time.process_time()
    yield
    figures[name] = time.process_time() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fits", type=int, default=FITS)
    parser.add_argument("--through-ray", type=int, default=THROUGH_RAY, help="0 leaves Ray out")
    options = parser.parse_args()
    main(options.fits, options.through_ray)
