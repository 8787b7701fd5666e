"""Fits as the GPU benchmark times them: the package's own, the usual loop of plain PyTorch, and several at once."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from softseg_dist.numerics.augmentation import apply, draw_all
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.transforms import Frame
from softseg_dist.training.batches import Batches, open_store
from softseg_dist.training.evaluation import validation_score
from softseg_dist.training.fit import RunningFit
from softseg_dist.training.model import Model, build_model
from softseg_dist.training.stepper import learning_rate
from softseg_dist.training.task import FitTask, Worker

T = TypeVar("T")
WARM_EPOCHS = 2  # the first compiles, captures and chooses algorithms, the second is as all others
GAP_US = 10.0  # a device needs some microseconds from one kernel to the next; longer ones it has waited


class Fit(Protocol):
    """Trains epoch after epoch."""

    model: Model

    def train_epoch(self) -> list[float]:
        """The losses of all steps of the next epoch, which are read from the device."""


class EngineFit:
    """A fit as the package trains it, without validation."""

    def __init__(self, task: FitTask, device: str) -> None:
        self.training = RunningFit(task, Worker(device=device))
        self.model = self.training.model

    @property
    def way(self) -> tuple[str, tuple[str, ...]]:
        """How it is really trained: `bfloat16, compiled, graph`, and what was not used and why."""
        result = self.training.describe(state="finished")
        return result.engine, result.notes

    def train_epoch(self) -> list[float]:
        """See `Fit`."""
        now = self.training.progress
        self.model.train()
        while now.step < self.training.batches.steps_per_epoch:
            self.training.stepper.advance(now)
        losses, now.epoch, now.step, now.losses, now.dead = now.losses, now.epoch + 1, 0, [], 0
        return losses


class EagerFit:
    """The same fit as usual code trains it: contiguous tensors, Adam as it comes, and the loss read in every step.

    Better than usual in one thing: all images lie on the device.
    """

    def __init__(self, task: FitTask, device: str) -> None:
        self.recipe, self.epoch = task.recipe, 0
        self.store = open_store(task.store, task.store_fingerprint)
        self.batches = Batches.of(task, self.store)
        self.spacing_mm = self.store.sample(0).spacing_mm
        plain = replace(self.batches, recipe=self.recipe.replace(augment=()))
        self.images, self.targets = plain.batch(0, range(len(self.batches.items)), device)
        shape = self.store.channels, len(self.store.classes), self.store.size
        weights_seed = seed_of(self.batches.seed, "weights")
        self.model = build_model(self.recipe, *shape, weights_seed, self.batches.mean_label()).to(device)
        self.model.network.to(memory_format=torch.contiguous_format)
        self.adam = torch.optim.Adam(self.model.parameters())

    def train_epoch(self) -> list[float]:
        """See `Fit`."""
        self.model.train()
        losses, size, seed = [], self.recipe.optim.batch_size, self.batches.seed
        order = self.batches.order(self.epoch)
        for step in range(self.batches.steps_per_epoch):
            done = self.epoch * self.batches.steps_per_epoch + step
            self.adam.param_groups[0]["lr"] = learning_rate(self.recipe.optim, done, self.batches.num_steps)
            members = order[step * size : (step + 1) * size]
            seeds = [seed_of(seed, "augment", self.epoch, member) for member in members]  # what the fit draws, too
            frame = Frame.of(self.images, self.spacing_mm)
            drawn = draw_all(self.recipe.augment, seeds, frame)
            image, target = apply(self.images[members], self.targets[members], drawn, "soft", frame)
            prediction = self.model.activation(self.model.network(image))
            loss = self.recipe.loss(prediction, target)
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            losses.append(loss.item())
        self.epoch += 1
        return losses


class Lane:
    """A fit in a thread of its own and, on a GPU, on a stream of its own."""

    def __init__(self, make: Callable[[], Fit], device: str) -> None:
        self.device, self.thread = device, ThreadPoolExecutor(1)
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.fit = self.do(make).result()

    def do(self, work: Callable[[], T]) -> Future[T]:
        """Start `work` there."""
        return self.thread.submit(self._on_stream, work)

    def train(self, epochs: int) -> Future[None]:
        """Start to train."""
        return self.do(lambda: [self.fit.train_epoch() for _ in range(epochs)] and None)

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown()

    def _on_stream(self, work: Callable[[], T]) -> T:
        here: AbstractContextManager[object] = nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        with here:
            return work()


def images_per_s(lanes: Sequence[Lane], num_images: int, least_s: float, repeats: int) -> float:
    """Of all `lanes` at once, with `num_images` in each one's epoch: the median of `repeats`, each `least_s` long or more."""
    for lane in lanes:
        lane.train(WARM_EPOCHS).result()  # one after the other: no fit captures while another one allocates
    epochs = math.ceil(max(1.0, least_s / _seconds(lanes, 1)))
    return statistics.median(len(lanes) * epochs * num_images / _seconds(lanes, epochs) for _ in range(repeats))


def _seconds(lanes: Sequence[Lane], epochs: int) -> float:
    synchronize(lanes[0].device)
    started = time.perf_counter()
    for done in [lane.train(epochs) for lane in lanes]:
        done.result()
    synchronize(lanes[0].device)
    return time.perf_counter() - started


def busy_shares(lane: Lane, epochs: int) -> tuple[float, float]:
    """Shares of the time of some epochs in which the GPU computes, and in which it does not wait for the host; 0 on a CPU.

    Epochs with all that is between them: losses are read, and the next order is drawn. The profiler slows the host, so both are
    rather too small.
    """
    on_gpu = lane.device == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes about itself on stderr
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        synchronize(lane.device)
        started = time.perf_counter()
        lane.train(epochs).result()
        synchronize(lane.device)
        wall_us = (time.perf_counter() - started) * 1e6
    events = [e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    return covered(intervals) / wall_us, covered(intervals, GAP_US) / wall_us


def covered(intervals: Sequence[tuple[float, float]], gap: float = 0.0) -> float:
    """Length of the union of `intervals` (begin, end), and of the gaps in it that are not longer than `gap`."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until)) + (begin - until if 0 < begin - until <= gap else 0.0)
        until = max(until, end)
    return total


def score(fit: Fit, task: FitTask, device: str) -> float:
    """The objective on validation, predicted in float32."""
    fit.model.precision = "float32"
    return validation_score(fit.model, task, open_store(task.store, task.store_fingerprint), Worker(device=device))


def seconds_to_first_step(task: FitTask, device: str) -> float:
    """What the first epoch of a fit takes beyond its second one, with all that has to be made before."""
    started = time.perf_counter()
    fit = EngineFit(task, device)
    fit.train_epoch()
    synchronize(device)
    first = time.perf_counter()
    fit.train_epoch()
    synchronize(device)
    return first - started - (time.perf_counter() - first)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
