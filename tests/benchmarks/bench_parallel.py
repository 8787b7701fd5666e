"""What do several workers, lanes and nodes give and cost? One thread per worker, gloo, no GPU.

Run:     python tests/benchmarks/bench_parallel.py
Targets: 2 workers learn from at least 88 % of 2 times the volumes per second of 1 worker (one global batch, 3D phantom, U-Net
         of 16 to 64 filters; with half as many filters what does not shrink with the batch weighs more; two fits that share
         nothing but the machine show what it has for two);
         a lane costs less than 0.5 s for each further fit; more nodes cost a study little
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch
from bench_overhead import NUM_SPLITS, no_fit
from ray.cluster_utils import Cluster
from record import Headline, record

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from parallel_fits import Job, run_on

from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Study, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import run_search
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.training.fit import RunningFit
from softseg_dist.training.host_step import HostStepper, kept_heap
from softseg_dist.training.task import FitTask, Worker

HERE = Path(__file__).parent
BATCH, STEPS, WARM_STEPS, REPEATS = 4, 8, 2, 4
DATA, PREPROCESS = Phantom(subjects=8, dim=3, size=(48, 48, 48)), Preprocess(dim=3)
FILTERS = {"": (16, 32, 64), "_small": (8, 16, 32)}
RECIPE = Recipe(optim=Optim(epochs=100, batch_size=BATCH))
NODES = (1, 2, 4)
NUM_FITS = 60
HEADLINES = (
    Headline(
        key="speedup",
        what="two workers against one, U-Net of 16 to 64 filters on 48 x 48 x 48 volumes, one thread each",
        unit="times the volumes per second",
        at_least=1.76,
    ),
    Headline(
        key="of_two_fits",
        what="the same two workers, against two fits of one worker each at the same time",
        unit="of their volumes per second",
    ),
    Headline(key="lane_further_fit_s", what="a further fit of two workers on a lane that is up (median)", unit="s", at_most=0.5),
)


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, float] = {}
        for name, filters in FILTERS.items():
            rates = volumes_per_s(Path(folder) / f"filters{name}", RECIPE.replace(network=UNet(filters=filters)))
            one, two, apart = rates.values()
            figures |= {f"one_worker_per_s{name}": one, f"two_workers_per_s{name}": two, f"two_fits_per_s{name}": apart}
            figures |= {f"speedup{name}": two / one, f"of_two_fits{name}": two / apart}
            said = "-".join(map(str, filters))
            print(f"{f'48 x 48 x 48 volumes per second, {said}: 1, 2 workers':<56}{one:>8.2f}{two:>8.2f}")
            print(f"{'two fits of one worker, which share nothing, together':<56}{apart:>8.2f}")
            print(f"{'efficiency' + (' (target 0.88)' if not name else ''):<56}{two / one / 2:>8.2f}")
            print(f"{'the same, against those two fits':<56}{two / apart:>8.2f}", flush=True)
        for nodes in NODES:
            with ray_of(nodes, cpus=2 if nodes == 1 else 1):
                total, first, further = study_s(Path(folder) / f"nodes-{nodes}", Resources(max_concurrent=max(2, nodes)))
                figures |= {f"nodes_{nodes}_total_s": total, f"nodes_{nodes}_per_fit_s": further}
                name = f"{NUM_FITS} fits that do nothing on {nodes} node{'s' * (nodes > 1)}: in all, each [s]"
                print(f"{name:<56}{total:>8.1f}{further:>8.3f}")
                if nodes == 1:
                    _, first, further = study_s(Path(folder) / "lane", Resources(workers_per_fit=2))
                    figures |= {"lane_first_fit_s": first, "lane_further_fit_s": further}
                    print(f"{'a lane: first fit, each further one [s]':<56}{first:>8.1f}{further:>8.3f}")
    record("parallel", figures, HEADLINES)


def volumes_per_s(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Volumes per second of one worker, two workers, and two fits at once; each the best of some alternating repetitions."""
    torch.set_num_threads(1)
    cases = DATA.cases(None)
    path = build_store(folder, cases, DATA, PREPROCESS)
    task = FitTask(
        study="parallel", seed=0, candidate="c", recipe=recipe, objective="dice_dml", folder=str(folder / "fit"),
        split=MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0],
        store=str(path), store_fingerprint=fingerprint(cases, DATA, PREPROCESS),
    )  # fmt: skip
    Path(task.folder).mkdir()
    ways: dict[str, tuple[int, Job, int]] = {
        "one worker": (1, seconds_per_step, 1),
        "two workers": (2, seconds_per_step, 1),
        "two fits": (2, seconds_apart, 2),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(REPEATS):
        for way, (processes, job, fits) in ways.items():
            best_s = run_on(processes, job, {"fit": task}, apart=True)["fit"]["best"]
            rates[way].append(fits * BATCH / best_s)
    return {way: max(of) for way, of in rates.items()}


def seconds_per_step(task: FitTask, worker: Worker) -> dict[str, Any]:
    """The shortest of some training steps, in memory as a fit has it; the machine may have other work."""
    torch.set_flush_denormal(True)
    times = []
    with kept_heap():
        running = RunningFit(task, worker)
        assert isinstance(running.stepper, HostStepper)
        running.model.train()
        for step in range(WARM_STEPS + STEPS):
            started = time.perf_counter()
            running.stepper.step(running.progress, running.batches.order(step)[:BATCH])
            times.append(time.perf_counter() - started)
    return {"best": min(times[WARM_STEPS:])}


def seconds_apart(task: FitTask, worker: Worker) -> dict[str, Any]:
    """The same of a fit of this process alone, while the other process trains one, too: what the machine has for two."""
    folder = Path(f"{task.folder}-{worker.rank}")
    folder.mkdir(exist_ok=True)
    worker.gather([""])  # both begin at once
    return seconds_per_step(task.replace(folder=str(folder)), Worker())


@contextmanager
def ray_of(nodes: int, cpus: int) -> Iterator[None]:
    """A Ray of so many raylets on this machine."""
    os.environ.update(ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"})
    os.environ["PYTHONPATH"] = str(HERE)
    cluster = Cluster()
    for _ in range(nodes):
        cluster.add_node(num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def study_s(folder: Path, resources: Resources) -> tuple[float, float, float]:
    """Seconds of a study whose fits do nothing, until its first fit has ended, and from one to the next (median)."""
    study = Study(
        name="nothing",
        question="What does the engine cost per fit?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=NUM_SPLITS),
        candidates={f"c{number:03d}": Recipe() for number in range(NUM_FITS // NUM_SPLITS)},
    )
    splits = study.splits.make({f"sub-{number}": "" for number in range(10)}, study.seed)
    ledger = Ledger(folder)
    started = time.time()
    ledger.open_study(study, splits)
    lines = PlainLines(io.StringIO())
    outcome = run_search(
        RunContext(
            study,
            splits,
            Prepared("none", "0" * 16),
            ledger,
            WorkingCopy(ledger.folder),
            resources,
            RayBackend(),
            lines,
            fit=no_fit,
        )
    )
    total = time.time() - started
    assert outcome.finished == NUM_FITS, outcome
    ends = sorted(path.stat().st_mtime for path in folder.glob("fits/*/[0-9]*.json"))
    return total, ends[0] - started, statistics.median(later - sooner for sooner, later in pairwise(ends))


if __name__ == "__main__":
    main()
