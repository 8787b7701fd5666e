"""A study of small real fits that keep a diary, to be killed at any moment. Imported by workers; as a program it is a driver.

`python besieged.py FOLDER ADDRESS WORKERS_PER_FIT` runs a session of the study on the Ray at ADDRESS and prints its outcome. Every
step of a fit is a checkpoint. The diary, `diary.jsonl`, has a line for every start, epoch and end of a fit on each of its workers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from softseg_dist import Affine, Brier, Dice, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Study, UNet
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.context import Prepared, RunContext
from softseg_dist.engine.progress import PlainLines
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import run_search
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitResult, FitTask, Worker

NUM_EPOCHS, NUM_SPLITS = 30, 2
BASE = Recipe(
    network=UNet(filters=(4, 8)), augment=(Affine(degrees=20),), optim=Optim(epochs=NUM_EPOCHS, batch_size=8), loss=Dice()
)
STUDY = Study(
    name="besieged",
    question="Does a study survive the death of each of its processes?",
    data=Phantom(subjects=8, size=(24, 24), num_slices=4),
    preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=NUM_SPLITS),
    candidates={"dice": BASE, "brier": BASE.replace(loss=Brier())},
)
NUM_FITS = len(STUDY.candidates) * NUM_SPLITS


def prepare(folder: Path) -> tuple[Store, tuple[Split, ...]]:
    """The study's store, built if it is not there, and its splits."""
    cases = STUDY.data.cases(None)
    store = Store.open(build_store(folder / "stores", cases, STUDY.data, STUDY.preprocess))
    return store, STUDY.splits.make({case.subject: case.site for case in cases}, STUDY.seed)


def diary(folder: Path) -> list[dict[str, Any]]:
    """All that has been written; a line that is being written is left for the next time."""
    path = folder / "diary.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def diarised_fit(task: FitTask, worker: Worker) -> FitResult:
    """A fit that writes down, on each of its workers, when it starts and ends, and every epoch."""
    path = Path(task.store).parents[1] / "diary.jsonl"

    def write(event: str, **more: Any) -> None:
        line = {"event": event, "fit": task.key, "rank": worker.rank, "pid": os.getpid(), "time": time.time(), **more}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def report(metrics: dict[str, float]) -> None:
        write("epoch", epoch=int(metrics["epoch"]))
        worker.report(metrics)

    write("start")
    try:
        return fit(task, replace(worker, report=report))
    finally:
        write("end")


if __name__ == "__main__":
    folder, address, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    store, splits = prepare(folder)
    ledger = Ledger(folder / "run")
    resources = Resources(workers_per_fit=workers, checkpoint_every_s=0)
    with ledger.lock():
        ledger.open_study(STUDY, splits)
        outcome = run_search(
            RunContext(
                STUDY, splits, Prepared(str(store.path), store.fingerprint), ledger, WorkingCopy(ledger.folder),
                resources, RayBackend(address), PlainLines(sys.stdout), fit=diarised_fit,
            )
        )  # fmt: skip
    print(json.dumps(vars(outcome)), flush=True)
