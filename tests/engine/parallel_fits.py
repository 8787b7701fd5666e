"""Fits on several processes of this machine that find each other through gloo. Imported by the processes themselves."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import torch
from pandas.testing import assert_frame_equal
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing, nn

import softseg_dist
from softseg_dist import (
    BCE,
    Activation,
    AdaptiveWing,
    Affine,
    BatchDice,
    Dice,
    Loss,
    MonteCarlo,
    Network,
    NormReLU,
    Optim,
    Phantom,
    Preprocess,
    Recipe,
    Sum,
    UNet,
)
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.batches import Batches
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.host_step import HostStepper
from softseg_dist.training.task import FitTask, Interrupted, Worker, cases_path, history_path, weights_path

STEPS = 20
# Of 13 items one is left for the last batch: some workers have none of it.
OPTIM = Optim(lr=1e-3, epochs=5, batch_size=6, precision="float32")
# Instance norm exchanges nothing between workers, which makes a test of many losses cheap.
BASE = Recipe(network=UNet(filters=(4, 8), norm="instance"), augment=(Affine(degrees=20, scale=0.1, shift=0.03),), optim=OPTIM)
Job = Callable[[FitTask, Worker], Any]


class Unused(UNet):
    """A U-Net with a layer that it does not use."""

    short: ClassVar[str] = "unused"

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """The U-Net's module with one more child."""
        module = super().build(in_channels, out_channels, dim)
        module.add_module("unused", nn.Linear(2, 3))
        return module


# How to make a component that has no defaults, or variants that are computed in another way.
VARIANTS: dict[str, tuple[Any, ...]] = {
    "AdaptiveWing": (AdaptiveWing(), AdaptiveWing(reduction="sum")),
    "BatchDice": (BatchDice(), BatchDice(over="batch and classes")),
    "Sum": (Sum(terms=(BatchDice(), Dice()), weights=(0.3, 1.0)), Sum(terms=(BCE(), Dice()), weights=(1, 2))),
    "NormReLU": (
        *(NormReLU(over=over) for over in ("sample", "global", "running")),  # over "batch" depends on workers
        NormReLU(over="global", share=True),
    ),
    "UNet": (
        UNet(filters=(4, 8)),
        UNet(filters=(4, 8), dropout=0.2),
        UNet(filters=(4, 8), upsample="deconv"),
        UNet(filters=(4, 8), dropout=0.2, order="relu-norm-dropout", last_kernel=3),
        UNet(filters=(4, 8, 16), upsample="deconv", norm="instance"),
    ),
}


def public(kind: type) -> list[Any]:
    """An object, or several, of every class of `kind` that the package makes public."""
    classes = [getattr(softseg_dist, name) for name in softseg_dist.__all__]
    concrete = [c for c in classes if isinstance(c, type) and issubclass(c, kind) and not inspect.isabstract(c)]
    return [made for c in concrete for made in (VARIANTS[c.__name__] if c.__name__ in VARIANTS else (c(),))]


def recipes() -> dict[str, Recipe]:
    """Every public loss and activation with one network, every public network with one loss, and what else a step may do."""
    made = {str(loss): BASE.replace(loss=loss) for loss in public(Loss)}
    made |= {str(activation): BASE.replace(activation=activation) for activation in public(Activation)}
    made |= {str(network): BASE.replace(network=network) for network in public(Network)}
    made["unused"] = BASE.replace(network=Unused(filters=(4, 8)))
    made["clipped"] = BASE.replace(optim=OPTIM.replace(clip_norm=0.1))
    return made


def make_tasks(folder: Path, recipes: Mapping[str, Recipe]) -> dict[str, FitTask]:
    """A task for every recipe, all on one small phantom."""
    data, preprocess = Phantom(subjects=15, size=(16, 16), num_slices=1, raters=2), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(folder, cases, data, preprocess)
    splits = MonteCarlo(count=1, fractions=(0.86, 0.07, 0.07))
    split = splits.make({case.subject: case.site for case in cases}, 0)[0]
    return {
        name: FitTask(
            study="parallel", seed=0, candidate="c", recipe=recipe, split=split, objective="dice_dml",
            store=str(path), store_fingerprint=fingerprint(cases, data, preprocess), folder=str(folder / f"fit-{index}"),
        )
        for index, (name, recipe) in enumerate(recipes.items())
    }  # fmt: skip


class DoubleBatches(Batches):
    """The batches in float64."""

    def batch(self, epoch: int, members: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
        """See `Batches.batch`."""
        image, target = super().batch(epoch, members, device)
        return image.double(), target.double()


def steps_in_float64(task: FitTask, worker: Worker) -> dict[str, Any]:
    """Losses, the last gradients and the state after `STEPS` steps."""
    torch.set_default_dtype(torch.float64)
    try:
        running = begun(task, worker)
    finally:
        torch.set_default_dtype(torch.float32)
    running.stepper.batches = DoubleBatches(**vars(running.batches))
    return after(running, STEPS)


def sgd_step_in_float32(task: FitTask, worker: Worker) -> dict[str, Any]:
    """The same after one step of plain gradient descent."""
    recipe = task.recipe
    # With a rate of 1 an error of the gradients is as large in the weights.
    running = begun(task.replace(recipe=recipe.replace(optim=recipe.optim.replace(lr=1.0))), worker)
    running.stepper.adam = torch.optim.SGD(running.model.parameters())
    return after(running, 1)


def begun(task: FitTask, worker: Worker) -> RunningFit:
    Path(task.folder).mkdir(exist_ok=True)
    running = RunningFit(task, worker)
    running.model.train()
    return running


def after(running: RunningFit, steps: int) -> dict[str, Any]:
    """Train so many steps, without what comes between epochs."""
    now, losses = running.progress, []
    assert isinstance(running.stepper, HostStepper)
    for _ in range(steps):
        running.stepper.advance(now)
        losses += now.losses
        done = now.step == running.batches.steps_per_epoch
        now.epoch, now.step, now.losses = now.epoch + done, 0 if done else now.step, []
    gradients = {name: p.grad for name, p in running.model.named_parameters() if p.grad is not None}
    return {"losses": losses, "gradients": gradients, "state": running.model.state_dict()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The L2 norm of the difference of all tensors together, relative to that of `one`; counters must be equal."""
    assert one.keys() == other.keys()
    floating = [name for name, tensor in one.items() if tensor.is_floating_point()]
    assert all(torch.equal(one[name], other[name]) for name in one.keys() - set(floating))
    a, b = (torch.cat([tensors[name].double().flatten() for name in floating]) for tensors in (one, other))
    return float((a - b).norm() / a.norm())


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


def assert_same_files(one: Path, other: Path, *, exact: bool = True) -> None:
    """Two fits have left the same curve, rows and weights: bit for bit, or up to rounding."""
    rtol = 0.0 if exact else 1e-4
    curves = [[json.loads(line) for line in history_path(folder).read_text().splitlines()] for folder in (one, other)]
    for row, same in zip(*curves, strict=True):
        assert row == pytest.approx(same, rel=rtol, abs=rtol)
    rows, others = (pq.read_table(cases_path(folder)).to_pandas() for folder in (one, other))
    assert_frame_equal(rows, others, check_exact=exact, rtol=rtol, atol=rtol)
    weights = load_file(weights_path(other))
    for name, tensor in load_file(weights_path(one)).items():
        torch.testing.assert_close(tensor, weights[name], rtol=rtol, atol=rtol)


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
