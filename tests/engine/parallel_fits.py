"""Fits on several processes of this machine that find each other through gloo. Imported by the processes themselves."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from softseg_dist import (
    BCE,
    L1,
    AdaptiveWing,
    Affine,
    BatchDice,
    Brier,
    Dice,
    DiceSemimetric,
    Focal,
    FocalTversky,
    GeneralizedDice,
    Huber,
    JaccardMetric,
    MonteCarlo,
    NormReLU,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Sigmoid,
    Softmax,
    Sum,
    Tversky,
    TverskySemimetric,
    UNet,
)
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.fit import Training, fit
from softseg_dist.training.host_step import HostStepper
from softseg_dist.training.task import FitTask, Interrupted, Worker, cases_path, history_path, weights_path

STEPS = 20
# Of 20 items 2 are left for the last batch, for one worker only.
OPTIM = Optim(lr=1e-3, epochs=5, batch_size=18, precision="float32")
BASE = Recipe(network=UNet(filters=(4, 8, 16)), augment=(Affine(degrees=20, scale=0.1, shift=0.03),), optim=OPTIM)
OTHERS = (JaccardMetric(), Tversky(), TverskySemimetric(), FocalTversky(), GeneralizedDice(), Focal(), L1(), Huber())
ALL_OTHERS = Sum(terms=(BatchDice(smooth=0), *OTHERS), weights=(0.3, *[1.0] * len(OTHERS)))
LOSSES = (AdaptiveWing(), BCE(), Brier(), Dice(), DiceSemimetric(), BatchDice(), ALL_OTHERS)
ACTIVATIONS = (Sigmoid(), Softmax(), NormReLU(), NormReLU(over="global"), NormReLU(over="running"))
NETWORKS = {
    "instance": UNet(filters=(4, 8, 16), norm="instance"),
    "dropout": UNet(filters=(4, 8, 16), dropout=0.2),
    "deconv": UNet(filters=(4, 8, 16), upsample="deconv"),
    "wide": UNet(filters=(16, 32), upsample="deconv", norm="instance"),
}
Job = Callable[[FitTask, Worker], Any]


def make_tasks(folder: Path) -> dict[str, FitTask]:
    """A task for every loss, for every activation that promises equal results, and for every kind of network."""
    data, preprocess = Phantom(subjects=8, size=(25, 25), num_slices=5, raters=2), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(folder, cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    recipes = {str(loss): BASE.replace(loss=loss) for loss in LOSSES}
    recipes |= {str(activation): BASE.replace(activation=activation) for activation in ACTIVATIONS}
    recipes |= {name: BASE.replace(network=network) for name, network in NETWORKS.items()}
    lower = OPTIM.replace(precision="bfloat16")
    recipes |= {f"{name}, bfloat16": BASE.replace(network=network, optim=lower) for name, network in NETWORKS.items()}
    recipes["clipped"] = BASE.replace(optim=OPTIM.replace(clip_norm=0.1))
    return {
        name: FitTask(
            study="parallel", seed=0, candidate="c", recipe=recipe, split=split, objective="dice_dml",
            store=str(path), store_fingerprint=fingerprint(cases, data, preprocess), folder=str(folder / f"fit-{index}"),
        )
        for index, (name, recipe) in enumerate(recipes.items())
    }  # fmt: skip


def first_steps(task: FitTask, worker: Worker) -> dict[str, Any]:
    """Losses, gradients and state after `STEPS` steps."""
    Path(task.folder).mkdir(exist_ok=True)
    training = Training(task, worker)
    assert isinstance(training.stepper, HostStepper)
    training.model.train()
    now, per_epoch = training.progress, training.batches.steps_per_epoch
    for step in range(STEPS):
        now.epoch, now.step = divmod(step, per_epoch)
        torch.manual_seed(step)
        members = training.batches.order(now.epoch)[now.step * OPTIM.batch_size : (now.step + 1) * OPTIM.batch_size]
        training.stepper.step(now, members)
    gradients = {name: parameter.grad for name, parameter in training.model.named_parameters()}
    return {"losses": now.losses, "gradients": gradients, "state": training.model.state_dict()}


def whole_fit(task: FitTask, worker: Worker) -> dict[str, Any]:
    """The result of a fit, without what a machine adds."""
    return fit(task, worker).replace(duration_s=0.0, peak_memory_mb=0.0, num_workers=1).model_dump()


def interrupted_fit(task: FitTask, worker: Worker) -> dict[str, Any]:
    """A fit that is asked to stop after five steps."""
    left = iter(range(5))
    try:
        fit(task, Worker(rank=worker.rank, num_workers=worker.num_workers, stop=lambda: next(left, None) is None))
    except Interrupted:
        return {"interrupted": worker.rank}
    return {}


def assert_same_files(one: Path, other: Path) -> None:
    """Two fits have left the same curve, rows and weights."""
    assert history_path(one).read_text() == history_path(other).read_text()
    rows, others = (pq.read_table(cases_path(folder)).to_pandas() for folder in (one, other))
    assert rows.equals(others), "to the last digit; here NaN equals NaN"
    weights = load_file(weights_path(other))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(weights_path(one)).items())


def run_on(num_workers: int, job: Job, tasks: dict[str, FitTask], *, apart: bool = False) -> dict[str, Any]:
    """What rank 0 of so many workers gives for every task; one worker works in this process, unless `apart`."""
    if num_workers == 1 and not apart:
        return {name: job(task, Worker()) for name, task in tasks.items()}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, args=(num_workers, job, tasks, folder), nprocs=num_workers)
        given: dict[str, Any] = torch.load(f"{folder}/given.pt", weights_only=False)
        return given


def _rank(rank: int, num_workers: int, job: Job, tasks: dict[str, FitTask], folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=num_workers)
    given = {name: job(task, Worker(rank=rank, num_workers=num_workers)) for name, task in tasks.items()}
    if rank == 0:
        torch.save(given, f"{folder}/given.pt")
    os._exit(0)  # a thread of gloo's may still let go of a tensor, and kills a process whose Python is on its way out
