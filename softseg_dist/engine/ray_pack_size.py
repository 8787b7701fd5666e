"""How many fits one GPU should train at once: measured on it before the first fit, as it depends on network, images and GPU."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import ray
import torch
from ray.exceptions import RayError

from softseg_dist.engine.ray_cluster import bundle_of, cause_in, places_for
from softseg_dist.places import Place
from softseg_dist.study import Resources
from softseg_dist.study_file import load_source
from softseg_dist.training.fit import Training
from softseg_dist.training.gpu.compilation import keep_compiled
from softseg_dist.training.task import FitTask, Worker

SIZES = (1, 2, 4)
GAIN = 1.05  # by how much more fits must be faster to be worth their memory, and what a host that dies costs them
MOST_MEMORY = 0.9  # of a GPU's, of which a fit needs more when it validates
WARM_STEPS, WARM_S, MEASURED_S = 20, 2.0, 4.0


class Rate(NamedTuple):
    """`steps_per_s` of so many fits together, and the share of the GPU's memory that is in use then."""

    size: int
    steps_per_s: float
    memory: float


def best_size(rates: Sequence[Rate]) -> int:
    """The fastest size, of which each larger one must gain `GAIN` over the best smaller one, and leave some memory.

    >>> best_size([Rate(1, 100, 0.1), Rate(2, 104, 0.2), Rate(4, 130, 0.4)])
    4
    """
    best = rates[0]
    for rate in rates[1:]:
        if rate.memory <= MOST_MEMORY and rate.steps_per_s >= GAIN * best.steps_per_s:
            best = rate
    return best.size


def with_size(
    resources: Resources, task: FitTask, source: tuple[str, str] | None, say: Callable[[str], None]
) -> Resources:
    """`resources` with a number of fits per GPU that was measured with the fit `task`, and is told to `say`.

    `source` is stem and text of the study file.
    """
    bundle = bundle_of(resources)
    if "GPU" not in bundle:
        say("--fits-per-gpu auto: there is no GPU, so every fit has a process of its own")
        return resources.replace(fits_per_gpu=None)
    sizes = [size for size in SIZES if _has_room(size, resources)]
    measuring = ray.remote(num_cpus=bundle["CPU"], num_gpus=1, max_calls=1)(_measure_in_worker)
    try:
        rates: list[Rate] = ray.get(measuring.remote(task.model_dump(mode="json"), source, sizes))
    except RayError as error:  # the fits themselves will say it better
        say(f"--fits-per-gpu auto: one, as nothing could be measured: {cause_in(str(error)) or type(error).__name__}")
        return resources.replace(fits_per_gpu=1)
    best = best_size(rates)
    told = ", ".join(f"{rate.size}: {rate.steps_per_s:.0f} steps/s, {rate.memory:.0%} of the memory" for rate in rates)
    say(f"--fits-per-gpu auto: {best} (fits at once: {told})")
    return resources.replace(fits_per_gpu=best)


def measure(task: FitTask, sizes: Sequence[int], device: str, measured_s: float = MEASURED_S) -> list[Rate]:
    """The rates of fits like `task`, run in threads of this process; of the sizes that the device has memory for."""
    rates = []
    for size in sizes:
        try:
            rates.append(_rate(task, size, device, measured_s))
        except torch.OutOfMemoryError:
            if not rates:
                raise
            break
        if device != "cpu":
            torch.cuda.empty_cache()
    return rates


def _has_room(size: int, resources: Resources) -> bool:
    return size == 1 or places_for({"CPU": float(resources.cpus_per_fit)}, resources) >= size


def _measure_in_worker(told: object, source: tuple[str, str] | None, sizes: Sequence[int]) -> list[Rate]:
    if source is not None:
        load_source(*source)
    task = FitTask.model_validate(told)
    if Place.at(task.folder).path is not None:
        keep_compiled(task.folder)  # the fits need what is compiled here
    return measure(task, sizes, "cuda")


def _rate(task: FitTask, size: int, device: str, measured_s: float) -> Rate:
    ready = threading.Barrier(size)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(size) as threads:
        tasks = [task.replace(folder=f"{folder}/{number}", checkpoint_every_s=1e9) for number in range(size)]
        fits = [threads.submit(_train, task, device, ready, measured_s) for task in tasks]
    errors = [error for fit in fits if (error := fit.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):  # that of those who have waited for it
            raise error
    found = [fit.result() for fit in fits]
    return Rate(size, sum(rate for rate, _ in found), max(memory for _, memory in found))


def _train(task: FitTask, device: str, ready: threading.Barrier, measured_s: float) -> tuple[float, float]:
    """Steps per second of one fit after its first steps, which make what all others reuse, and the memory in use then."""
    until_s = time.monotonic()
    torch.set_num_threads(task.threads)
    with torch.cuda.stream(torch.cuda.Stream()) if device != "cpu" else nullcontext():
        try:
            training = Training(task, Worker(device=device, stop=lambda: time.monotonic() >= until_s))
            training.model.train()
            warm = 0
            while warm < WARM_STEPS:
                until_s = time.monotonic() + WARM_S
                warm += _advance(training)
            ready.wait()
        except Exception:
            ready.abort()
            raise
        steps, began_s = 0, time.monotonic()
        until_s = began_s + measured_s
        while time.monotonic() < until_s:
            steps += _advance(training)
        return steps / (time.monotonic() - began_s), _memory_in_use(device)


def _advance(training: Training) -> int:
    """Train on for some steps, from epoch to epoch; returns how many they were."""
    now = training.progress
    before = now.step
    training.stepper.advance(now)
    done = now.step - before
    if now.step == training.batches.steps_per_epoch:
        now.epoch, now.step, now.losses, now.dead = (now.epoch + 1) % training.optim.epochs, 0, [], 0
    return done


def _memory_in_use(device: str) -> float:
    if device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return 1 - free / total
