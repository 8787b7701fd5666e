"""What the tests of training on a device share: stores of phantoms, recipes that use everything, and steppers of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from softseg_dist import (
    SVLS,
    AdaptiveWing,
    Affine,
    BiasField,
    Blur,
    Contrast,
    Elastic,
    Flip,
    Gamma,
    LowResolution,
    Mixup,
    MonteCarlo,
    Noise,
    NormReLU,
    Optim,
    Patch,
    Phantom,
    Preprocess,
    Recipe,
    UNet,
)
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.batches import Batches, open_store
from softseg_dist.training.gpu.device_batches import DeviceBatches, Resident, Streamed, device_batches
from softseg_dist.training.gpu.device_step import DeviceStepper, Feed
from softseg_dist.training.host_step import HostStepper
from softseg_dist.training.model import Model, build_model
from softseg_dist.training.stepper import Execution, FitProgress, Stepper
from softseg_dist.training.task import FitTask, Worker

EVERYTHING = (
    Affine(), Flip(), Elastic(), Noise(), Gamma(), Contrast(), BiasField(), Blur(), LowResolution(), Mixup(alpha=0.4),
)  # fmt: skip
PLAIN = Recipe(
    network=UNet(filters=(4, 8)),
    activation=NormReLU(),
    loss=AdaptiveWing(),
    augment=(Affine(degrees=20, scale=0.1, shift=0.03),),
    optim=Optim(lr=5e-3, epochs=4, batch_size=5),
)
RECIPES = {
    "plain": PLAIN,
    "nothing": PLAIN.replace(augment=()),
    "everything": PLAIN.replace(augment=EVERYTHING, smoothing=SVLS()),
    "random_rater": PLAIN.replace(augment=(Flip(),), fusion="random_rater"),
    "hard_each": PLAIN.replace(label="hard_each", fusion="staple"),
    "nearest": PLAIN.replace(label="nearest", fusion="random_rater"),
    "hard": PLAIN.replace(label="hard", augment=EVERYTHING),
}
PATCHES = {2: Patch(size=(16, 12), per_item=2), 3: Patch(size=(12, 12, 8))}


def task_of(folder: Path, dim: int) -> FitTask:
    """A fit on a small phantom."""
    size = {2: (24, 20), 3: (16, 16)}[dim]
    data, preprocess = Phantom(subjects=6, size=size, num_slices={2: 3, 3: 8}[dim], raters=2), Preprocess(dim=dim)
    cases = data.cases(None)
    path = build_store(folder / "stores", cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    return FitTask(
        study="device", seed=0, candidate="c", recipe=PLAIN, split=split, objective="dice_dml", store=str(path),
        store_fingerprint=fingerprint(cases, data, preprocess), folder=str(folder / "fit"),
    )  # fmt: skip


def batches_of(task: FitTask) -> Batches:
    return Batches.of(task, open_store(task.store, task.store_fingerprint))


def model_of(batches: Batches, device: str = "cpu") -> Model:
    store = batches.store
    shape = store.channels, len(store.classes), store.size
    model = build_model(batches.recipe, *shape, seed_of(batches.seed, "weights"), batches.mean_label())
    return model.train().to(device)


def host_stepper(task: FitTask) -> HostStepper:
    batches = batches_of(task)
    return HostStepper(task, batches, model_of(batches), Worker(), Execution())


def device_stepper(task: FitTask, device: str = "cpu", worker: Worker | None = None, **engine: Any) -> DeviceStepper:
    batches = batches_of(task)
    model = model_of(batches, device)
    made = Execution(**engine)
    model.precision = made.precision
    return DeviceStepper(task, batches, model, worker or Worker(device=device), made)


def train(stepper: Stepper, batches: Batches, epochs: int, progress: FitProgress | None = None) -> list[float]:
    """The losses of all steps until so many epochs are done."""
    now, losses = progress or FitProgress(), []
    while now.epoch < epochs:
        while now.step < batches.steps_per_epoch:
            stepper.advance(now)
        losses += now.losses
        now.epoch, now.step, now.losses = now.epoch + 1, 0, []
    return losses


def assert_equal_to_the_host(batches: Batches, sent: bool, drawn: Sequence[tuple[int, list[int]]]) -> None:
    """The batches that a device makes of these (epoch, three members), from its own memory or `sent`, are those of the host."""
    device = torch.device("cpu")
    made, notes = device_batches(batches, device)
    assert isinstance(made, DeviceBatches)
    assert notes == ()
    assert isinstance(made.source, Resident)
    if sent:
        made = DeviceBatches(batches, Streamed(batches), device)
    for epoch, members in drawn:
        feed = Feed(made.fields(3), device)
        feed.send(lambda into, made=made, epoch=epoch, members=members: made.write(into, epoch, members))
        for ours, theirs in zip(made.batch(feed.inputs), batches.batch(epoch, members, "cpu"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
