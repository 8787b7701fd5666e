"""One fit: one candidate on one split, plain torch, on one worker or on several that share every batch.

Everything random follows from (study, seed, split, epoch, item), never from the candidate, the process, the number of workers or
a restart. So every candidate starts from the same weights and sees the same batches, and a fit that resumes from its checkpoint
ends with the weights of one that was not interrupted.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softseg_dist.data.source_files import sha256_of
from softseg_dist.data.store import local_store
from softseg_dist.frozen import digest
from softseg_dist.numerics.activations import NormReLU
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.places import Place
from softseg_dist.sealed import Damaged, sealed_json, unsealed_json
from softseg_dist.training.batches import Batches, cases_of, open_store
from softseg_dist.training.evaluation import evaluate, validation_score
from softseg_dist.training.gpu.device_step import DeviceStepper
from softseg_dist.training.host_step import HostStepper, kept_heap
from softseg_dist.training.model import ANEW, Model, build_model, load_checkpoint, read_weights, save_checkpoint, save_weights
from softseg_dist.training.preflight import check_methods
from softseg_dist.training.stepper import Diverged, FitProgress, Stepper, choose_execution, learning_rate
from softseg_dist.training.task import (
    FitResult,
    FitTask,
    Interrupted,
    Worker,
    cases_path,
    checkpoint_path,
    history_path,
    holdout_path,
    left_in,
    result_path,
    vouched,
    weights_path,
)

NOT_CONVERGED_SHARE = 0.05  # a best epoch in the last 5 % of the budget: docs/training.md, Fairness


def fit(task: FitTask, worker: Worker | None = None) -> FitResult:
    """Train, pick the best epoch on validation, evaluate validation and test; idempotent and resumable.

    Writes only into `task.folder`. A fit that has ended there is returned as it was; one that has not goes on from its
    checkpoint; one that was damaged begins anew, and a note says so. A loss that is not finite gives a result with state "failed".
    Raises UserError if the store is damaged, or was in the meantime. A requested stop raises `Interrupted`.
    """
    worker = worker or Worker()
    ended, notes = worker.share(_ended(task) if worker.leads else (None, []))
    if ended is not None:
        return ended
    torch.set_num_threads(task.threads)
    if worker.leads:
        Path(task.folder).mkdir(parents=True, exist_ok=True)
        for path in (of(task.folder) for of in (history_path, weights_path, cases_path, checkpoint_path, result_path)):
            if path.is_dir():  # each is a file, and is written anew
                Place.at(path).delete()
    with kept_heap():
        torch.set_flush_denormal(True)  # numbers below 1e-38 change nothing here, and cost a CPU a hundred times as much
        try:
            while (result := _train(task, worker, notes)) is None:
                notes.append(str(Damaged(weights_path(task.folder), ANEW)))
                if worker.leads:
                    checkpoint_path(task.folder).unlink(missing_ok=True)
        finally:
            torch.set_flush_denormal(False)
    if worker.leads:
        local_store(task.store)  # what was changed while it trained does not become a result
        record = {"identity": task.identity, "result": result.model_dump(mode="json")}
        Place.at(result_path(task.folder)).write(sealed_json(record))
        checkpoint_path(task.folder).unlink(missing_ok=True)
    return result


def _ended(task: FitTask) -> tuple[FitResult | None, list[str]]:
    """The result of a fit that has ended, if all that it left is as it was; else what is damaged."""
    path = result_path(task.folder)
    try:
        record = unsealed_json(path.read_bytes(), path, to_do=ANEW) if path.is_file() else {"identity": None}
        if record["identity"] != task.identity:
            return None, []
        result = FitResult.model_validate(record["result"])
        for name in result.files:
            vouched(result, path.with_name(name))
    except Damaged as damage:
        return None, [str(Damaged(damage.path, ANEW))]
    return result, []


def _train(task: FitTask, worker: Worker, notes: list[str]) -> FitResult | None:
    """Train from the checkpoint, or anew, to the result; None if the weights of the best epoch are damaged by then."""
    running = RunningFit(task, worker, notes)
    try:
        running.run()
        return running.result()
    except Diverged as reason:
        return running.describe(state="failed", reason=str(reason))


class RunningFit:
    """The state of one running fit: model, batches, progress, and the stepper that trains."""

    def __init__(self, task: FitTask, worker: Worker, notes: list[str] | None = None) -> None:
        self.task, self.worker, self.optim = task, worker, task.recipe.optim
        self.notes = [] if notes is None else notes
        self.store = open_store(task.store, task.store_fingerprint)
        self.batches = Batches.of(task, self.store)
        weights_seed = seed_of(self.batches.seed, "weights")
        shape = self.store.channels, len(self.store.classes), self.store.size
        self.model: Model = build_model(task.recipe, *shape, weights_seed, self.batches.mean_label()).on(worker.device)
        check_methods(task.candidate, self.model, task.uncertainty)
        self.validate_every = task.validate_every or validation_interval(self.batches, task.split.validation)
        self.progress = FitProgress()
        self.resumed_epoch: int | None = None
        self.started = time.monotonic()
        state = worker.share(load_checkpoint(task, self.notes) if worker.leads else None)
        wanted = self.optim if state is None else self.optim.replace(precision=state["precision"])
        execution = choose_execution(wanted, worker.device, worker.num_workers, self.batches.num_steps)
        self.model.precision = execution.precision
        kind = HostStepper if worker.device == "cpu" or worker.num_workers > 1 else DeviceStepper
        self.stepper: Stepper = kind(task, self.batches, self.model, worker, execution)
        self._go_on_from(state)

    def run(self) -> None:
        """Train to the last epoch, or until the objective has not risen for `patience` epochs with a validation in them."""
        now = self.progress
        patience = math.inf if self.optim.patience is None else max(self.optim.patience, self.validate_every)
        while now.epoch < self.optim.epochs and now.epoch - now.best_epoch < patience:
            self._train_epoch()
            self._close_epoch()

    def result(self) -> FitResult | None:
        """Evaluate the best epoch, write its rows, and say what came out; None if its weights are not those that were saved."""
        best = self.progress.best_epoch
        if best == 0:
            return self.describe(state="failed", reason=f"{self.task.objectives[0].row.name} is undefined on every validation case")
        if not self.task.split.validation:
            return self.describe(state="finished", best_epoch=best)
        path = weights_path(self.task.folder)
        intact = self.worker.leads and path.is_file() and sha256_of(path) == self.progress.best_sha256
        if (weights := self.worker.share(read_weights(path) if intact else None)) is None:
            return None
        self.model.load_state_dict(weights)
        self.model.precision = "float32"  # as the model that is taken home predicts
        outcome = evaluate(self.model, self.task, self.store, self.worker)
        converged = best <= (1 - NOT_CONVERGED_SHARE) * self.optim.epochs
        return self.describe(state="finished", best_epoch=best, converged=converged, **outcome)

    def describe(self, **outcome: Any) -> FitResult:
        """A result with everything that is known whether the fit has failed or not."""
        best, history = self.progress.best_sha256, digest(self.progress.history, 64)
        written = {history_path("").name: history} | ({weights_path("").name: best} if best else {})
        return FitResult(
            candidate=self.task.candidate,
            split=self.task.split.index,
            repeat=self.task.repeat,
            epochs=self.progress.epoch,
            dead_share=self.progress.dead_share if isinstance(self.task.recipe.activation, NormReLU) else None,
            parameters=sum(p.numel() for p in self.model.parameters()),
            duration_s=self.progress.elapsed_s + time.monotonic() - self.started,
            peak_memory_mb=_peak_memory_mb(self.worker.device),
            attempt=self.task.attempt,
            resumed_epoch=self.resumed_epoch,
            num_workers=self.worker.num_workers,
            validate_every=self.validate_every,
            process=platform.node(),
            versions={"python": platform.python_version(), "torch": torch.__version__},
            precision=self.stepper.execution.precision,
            engine=self.stepper.execution.name,
            notes=(*self.stepper.execution.notes, *self.notes),
            files=left_in(self.task.folder) | written if self.worker.leads else {},
            **outcome,
        )

    def _train_epoch(self) -> None:
        self.model.train()
        while self.progress.step < self.batches.steps_per_epoch:
            request = self.stepper.advance(self.progress)
            if request.stop or request.save:
                self._checkpoint()
            if request.stop:
                raise Interrupted(self.task.key)

    def _close_epoch(self) -> None:
        now, objective = self.progress, self.task.objectives[0].row
        has_validation, last = bool(self.task.split.validation), now.epoch + 1 == self.optim.epochs
        validates = has_validation and (now.epoch == 0 or last or (now.epoch + 1) % self.validate_every == 0)
        score = validation_score(self.model, self.task, self.store, self.worker) if validates else math.nan
        now.dead_share = now.dead / len(self.batches.items)
        if score > now.best_score or not has_validation:  # without validation the last epoch counts
            now.best_score, now.best_epoch = score, now.epoch + 1
            if self.worker.leads and (has_validation or last):
                save_weights(self.model, weights_path(self.task.folder))
                now.best_sha256 = sha256_of(weights_path(self.task.folder))
        row = {
            "epoch": now.epoch + 1,
            "loss": sum(now.losses) / len(now.losses),
            **({objective.name: objective.sign * score} if validates else {}),
            "lr": learning_rate(self.optim, (now.epoch + 1) * self.batches.steps_per_epoch - 1, self.batches.num_steps),
            "dead_share": now.dead_share,
        }
        now.epoch, now.step, now.losses, now.dead = now.epoch + 1, 0, [], 0
        if self.worker.leads:
            line = json.dumps(row) + "\n"
            now.history += line
            with history_path(self.task.folder).open("a") as history:
                history.write(line)
            self.worker.report({name: float(value) for name, value in row.items()})

    def _checkpoint(self) -> None:
        self.progress.elapsed_s += time.monotonic() - self.started
        self.started = self.stepper.saved_s = time.monotonic()
        if self.worker.leads:
            local_store(self.task.store)  # what it was trained on until now is as it was
            state = {"model": self.model.state_dict(), "optimizer": self.stepper.state()}
            kept = {"progress": vars(self.progress), "precision": self.stepper.execution.precision}
            save_checkpoint(self.task, state | kept)
            self.worker.saved()

    def _go_on_from(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.stepper.load(state["optimizer"])
            self.progress = FitProgress(**state["progress"])
            self.resumed_epoch = self.progress.epoch
        if not self.worker.leads:
            return
        if self.resumed_epoch is None:  # nothing of another fit stays
            for stale in (history_path, weights_path, cases_path, holdout_path):
                stale(self.task.folder).unlink(missing_ok=True)
        else:
            Place.at(history_path(self.task.folder)).write(self.progress.history.encode())  # the epochs that are done


def validation_interval(batches: Batches, validation: Sequence[str]) -> int:
    """Epochs from one validation to the next, so that it takes about a tenth of the time: max(1, ceil(10 n_val / (3 n_train))).

    n are voxels that a validation and an epoch see: candidates with the same patches validate equally often, on any machine.
    """
    store, patch = batches.store, batches.recipe.patch
    validated = [store.cases[case] for case in cases_of(store, validation)]
    num_validation = sum(case.num_items * math.prod(case.size) for case in validated)
    num_train = len(batches.items) * math.prod(store.size if patch is None else patch.size)
    return max(1, math.ceil(10 * num_validation / (3 * num_train)))


def _peak_memory_mb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
