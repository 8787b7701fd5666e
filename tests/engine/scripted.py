"""Fits that train nothing and do what a script says, and the study they belong to. Imported by workers and by subprocesses.

The script is `faults.json` in the run folder: fit key -> what goes wrong with it ("raise", "kill", "hang", "nan", ...).
Run as a program it is a driver: `python scripted.py FOLDER '{"sleep_s": 0.1, ...}'`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from softseg_dist import MonteCarlo, Optim, Phantom, Recipe, Resources, Search, Study, TuneEach
from softseg_dist.data.splits import Split
from softseg_dist.engine.context import Backend, Prepared, RunContext
from softseg_dist.engine.local import LocalBackend
from softseg_dist.engine.progress import PlainLines, Progress
from softseg_dist.engine.ray_tune import RayBackend
from softseg_dist.engine.session import Outcome, run_search
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker

NUM_SPLITS = 3
NUM_EPOCHS = 3
BASE = Recipe(optim=Optim(epochs=NUM_EPOCHS))


def propose(trial: Any) -> Recipe:
    return BASE.replace(optim=Optim(epochs=NUM_EPOCHS, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


def make_study(
    candidates: tuple[str, ...] = ("a", "b"), trials: int = 0, num_splits: int = NUM_SPLITS, tune_each: TuneEach | None = None
) -> Study:
    return Study(
        name="scripted",
        question="Does the engine do what it is told?",
        data=Phantom(subjects=10),
        splits=MonteCarlo(count=num_splits),
        candidates=dict.fromkeys(candidates, BASE),
        control=candidates[0] if candidates else None,
        search=Search(propose, trials=trials) if trials else None,
        tune_each=tune_each,
    )


def splits_of(study: Study) -> tuple[Split, ...]:
    return study.splits.make({f"sub-{i}": "" for i in range(10)}, study.seed)


def score_of(task: FitTask) -> float:
    return task.recipe.optim.lr + task.split.index / 100


def scripted_fit(task: FitTask, worker: Worker) -> FitResult:
    """What rank 0 does with the script, on all workers."""
    result = worker.share(_scripted(task, worker) if worker.leads else None)
    assert result is not None
    return result


def _scripted(task: FitTask, worker: Worker) -> FitResult:
    """Count the start, report some epochs, and do what the script says in the middle of it."""
    folder, run = Path(task.folder), Path(task.folder).parents[2]
    script = json.loads((run / "faults.json").read_text()) if (run / "faults.json").exists() else {}
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()} {task.attempt}\n")
    while len(processes(run)) < script.get("together", 1):  # a fit alone waits for others to run beside it
        _pause(worker, 0.1)
    for epoch in range(1, NUM_EPOCHS + 1):
        worker.report({"epoch": float(epoch), "loss": 1 / epoch})
        _pause(worker, script.get("sleep_s", 0.0))
        if epoch == 2 and (task.attempt == 0 or script.get("always")):
            _go_wrong(script.get(task.key, ""))
    known = {
        "candidate": task.candidate,
        "split": task.split.index,
        "repeat": task.repeat,
        "attempt": task.attempt,
        "process": str(os.getpid()),
    }
    if script.get(task.key) == "nan":
        return FitResult(**known, state="failed", reason="loss is nan in epoch 2")
    return FitResult(**known, state="finished", score=score_of(task), test_score=0.5, epochs=NUM_EPOCHS, thresholds={"fixed": 0.5})


def _pause(worker: Worker, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        if worker.stop():
            raise Interrupted
        if time.monotonic() >= until:
            return
        time.sleep(0.01)


def _go_wrong(how: str) -> None:
    if how == "raise":
        raise ValueError("the fit broke")
    if how == "user":
        raise UserError("the store is missing")
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(600)


def context_of(folder: Path, study: Study, **changes: Any) -> RunContext:
    """A run of the study on Ray, two fits at a time; `changes` are fields of the context."""
    common = {
        "study": study,
        "splits": splits_of(study),
        "prepared": Prepared(str(folder / "none.arrow"), "0" * 16),
        "ledger": Ledger(folder),
        "copy": WorkingCopy(folder),
        "resources": Resources(max_concurrent=2),
        "backend": RayBackend(),
        "progress": PlainLines(sys.stderr),
        "fit": scripted_fit,
    }
    return RunContext(**common | changes)


def run(
    folder: Path,
    study: Study,
    progress: Progress | None = None,
    faults: dict[str, Any] | None = None,
    backend: Backend | None = None,
    **changes: Any,
) -> Outcome:
    """A session of the study in `folder`, with `faults` as its script."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(faults or {}))
    changes |= {"progress": progress or PlainLines(sys.stderr), "backend": backend or RayBackend()}
    context = context_of(folder, study, **changes)
    with context.ledger.lock():
        context.ledger.open_study(study, context.splits)
        return run_search(context)


def starts(folder: Path) -> dict[str, int]:
    """How often each fit was started, over all sessions."""
    files = folder.glob("fits/*/*/starts")
    return {f"{file.parent.parent.name}/{file.parent.name}": len(file.read_text().splitlines()) for file in files}


def processes(folder: Path) -> set[str]:
    """The processes in which fits were started, over all sessions."""
    return {line.split()[0] for file in folder.glob("fits/*/*/starts") for line in file.read_text().splitlines()}


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    study = make_study(trials=options.pop("trials", 0))
    defaults = {"cpus_per_fit": 1, "workers_per_fit": 1, "gpus_per_fit": None, "max_concurrent": 2}
    resources = Resources(**{name: options.pop(name, default) for name, default in defaults.items()})
    backend: Backend = RayBackend(options.pop("address", None), options.pop("max_wait_s", None))
    if options.pop("local", False):
        backend = LocalBackend()
    lines = PlainLines(sys.stdout)
    outcome = run(Path(sys.argv[1]), study, lines, faults=options, backend=backend, resources=resources)
    print(json.dumps(vars(outcome)), flush=True)
