"""Where does the time of a training step on a CPU go? Stage by stage, in float32 and bfloat16, beside plain torch.

Four U-Nets, 2D and 3D, learn from phantoms. "Step" is what a fit on one worker does. "Plain" is the same network, loss and
optimizer in torch alone, channels last, and "NCHW" the same with channels first. All ways take turns, so that other work on the
machine slows all of them. The ratio is that of processor times without reading and augmentation.

Run:    python tests/benchmarks/bench_step.py [--threads 1 2] [--seconds 20] [--only small]
Target: a step takes at most 1.05 times as long as plain float32, and at most .8 of that in bfloat16 where the processor has it;
        a fit with one thread takes at most 1.05 processors
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from record import Headline, record
from torch import Tensor

from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.batches import Batches, open_store
from softseg_dist.training.evaluation import evaluate, validation_score
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.host_step import HostStepper, kept_heap
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitTask, Worker

WORKS = {
    "small": ((8, 16, 32), (48, 48), 16),
    "medium": ((16, 32, 64, 128), (96, 96), 16),
    "large": ((32, 64, 128, 256), (128, 128), 16),
    "volumes": ((8, 16, 32), (48, 48, 48), 4),
}
STAGES = ("read and augment", "network", "loss", "backward", "optimizer", "step")  # the step: all but the first
Times = dict[str, list[float]]
HEADLINES = (
    *(Headline(key=f"{work}_1_step_ratio", what=f"step / plain torch, channels last: {work}", at_most=1.05) for work in WORKS),
    *(
        Headline(key=f"{work}_1_bfloat16_ratio", what=f"step in bfloat16 / plain float32 torch: {work}", at_most=0.8)
        for work in WORKS
    ),
    Headline(key="processors", what="processors that a fit with one thread takes", at_most=1.05),
)


def main(threads: list[int], seconds: float, only: list[str]) -> None:
    """Measure, and print a table for every network and number of threads."""
    figures: dict[str, float] = {}
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as folder, kept_heap():
        for work in only:
            of_work = task_of(work, Path(folder) / work)
            for number in threads:
                torch.set_num_threads(number)
                figures |= measured(work, number, of_work, seconds)
        figures["processors"] = processors(task_of("small", Path(folder) / "fit"))
        print(f"processors that a fit with one thread takes: {figures['processors']:.2f}")
    record("step", figures, HEADLINES, short=set(only) != set(WORKS))


def task_of(work: str, folder: Path) -> FitTask:
    """A fit of the network of `work` on phantoms."""
    filters, size, batch = WORKS[work]
    data = Phantom(subjects=10, dim=3, size=size) if len(size) == 3 else Phantom(subjects=10, size=size, num_slices=4)
    preprocess, cases = Preprocess(dim=len(size)), data.cases(None)
    path = build_store(folder, cases, data, preprocess)
    return FitTask(
        study="step", seed=0, candidate="c", objective="dice_dml", folder=str(folder / "fit"),
        recipe=Recipe(network=UNet(filters=filters), optim=Optim(epochs=5, batch_size=batch)),
        split=MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0],
        store=str(path), store_fingerprint=fingerprint(cases, data, preprocess),
    )  # fmt: skip


def measured(work: str, threads: int, task: FitTask, seconds: float) -> dict[str, float]:
    """Seconds of every stage of every way, as medians; their table."""
    ways = {
        "step": step_of_a_fit(task, "float32"),
        "bfloat16": step_of_a_fit(task, "bfloat16"),
        "plain": plain(task, channels_last=True),
        "nchw": plain(task, channels_last=False),
    }
    found: dict[str, Times] = {way: {} for way in ways}
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(found["plain"]["step"]) < 4:
        for way, step in ways.items():
            step(found[way])
    medians = {way: {stage: statistics.median(times[1:] or times) for stage, times in of.items()} for way, of in found.items()}
    batch = WORKS[work][2]
    print(f"\n{work}: filters {WORKS[work][0]}, {batch} of {WORKS[work][1]}, {threads} thread(s); ms per step")
    print(f"{'':<24}{'step':>10}{'bfloat16':>10}{'plain':>10}{'NCHW':>10}")
    for stage in (*STAGES, "processor", "wall", "an epoch's validation", "evaluation"):
        cells = [1e3 * of[stage] if stage in of else float("nan") for of in medians.values()]
        print(f"{stage:<24}" + "".join(f"{cell:>10.1f}" for cell in cells))
    print(f"{'images per second':<24}" + "".join(f"{batch / of['wall']:>10.0f}" for of in medians.values()), flush=True)
    figures = {
        f"{work}_{threads}_{way}_{stage.replace(' ', '_')}_ms": 1e3 * value
        for way, of in medians.items()
        for stage, value in of.items()
    }
    for way in ("step", "bfloat16"):
        figures[f"{work}_{threads}_{way}_ratio"] = medians[way]["step"] / medians["plain"]["step"]
    return figures


def step_of_a_fit(task: FitTask, precision: Literal["float32", "bfloat16"]) -> Callable[[Times], None]:
    """A step as a fit makes it, and what comes after an epoch and at the end."""
    task = task.replace(folder=f"{task.folder}-{precision}-{torch.get_num_threads()}")
    task = task.replace(recipe=task.recipe.replace(optim=task.recipe.optim.replace(precision=precision)))
    Path(task.folder).mkdir()
    running = RunningFit(task, Worker())
    stepper, model = running.stepper, running.model
    assert isinstance(stepper, HostStepper)
    members = stepper.batches.order(0)[: task.recipe.optim.batch_size]
    stepper.batches = timed = TimedBatches(**vars(running.batches))

    def step(times: Times) -> None:
        model.train()
        with whole_step(times):
            stepper.step(running.progress, members)
        times.setdefault("read and augment", []).append(timed.last_s[0])
        times.setdefault("step", []).append(times["processor"][-1] - timed.last_s[0])
        with stage(times, "an epoch's validation"):
            validation_score(model, task, running.store, running.worker)
        if len(times["step"]) % 10 == 1:
            with stage(times, "evaluation"):
                evaluate(model, task, running.store, running.worker)

    return step


@dataclass(frozen=True)
class TimedBatches(Batches):
    """Batches that know how much processor time the last one took."""

    last_s: list[float] = field(default_factory=lambda: [0.0])

    def batch(self, epoch: int, members: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
        """See `Batches.batch`."""
        started = time.process_time()
        made = super().batch(epoch, members, device)
        self.last_s[0] = time.process_time() - started
        return made


def plain(task: FitTask, *, channels_last: bool) -> Callable[[Times], None]:
    """A step of the same network in torch alone, from a batch that is there already."""
    store = open_store(task.store, task.store_fingerprint)
    batches, recipe = Batches.of(task, store), task.recipe
    image, target = batches.batch(0, batches.order(0)[: recipe.optim.batch_size], "cpu")
    model = Model(recipe, store.channels, len(store.classes), store.size)
    if not channels_last:
        model.layout = torch.contiguous_format
        model.to(memory_format=model.layout)  # type: ignore[call-overload]  # torch does not declare this form
    adam = torch.optim.AdamW(model.parameters(), lr=recipe.optim.lr)

    def step(times: Times) -> None:
        with whole_step(times):
            with stage(times, "network"):
                prediction = model(image)
            with stage(times, "loss"):
                value = recipe.loss(prediction, target)
            with stage(times, "backward"):
                adam.zero_grad()
                value.backward()
            with stage(times, "optimizer"):
                adam.step()
        times.setdefault("step", []).append(times["processor"][-1])

    return step


@contextmanager
def stage(times: Times, name: str) -> Iterator[None]:
    """Adds the processor time of the block."""
    started = time.process_time()
    yield
    times.setdefault(name, []).append(time.process_time() - started)


@contextmanager
def whole_step(times: Times) -> Iterator[None]:
    """Adds the wall and processor time of the block."""
    started = time.perf_counter()
    with stage(times, "processor"):
        yield
    times.setdefault("wall", []).append(time.perf_counter() - started)


def processors(task: FitTask) -> float:
    """Processor time of a fit by wall time, at most 1 if nothing but its thread computes."""
    fit(task.replace(folder=f"{task.folder}-first"))  # imports
    wall, processor = time.perf_counter(), time.process_time()
    fit(task)
    return (time.process_time() - processor) / (time.perf_counter() - wall)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", nargs="+", default=list(WORKS), choices=list(WORKS))
    given = parser.parse_args()
    main(given.threads, given.seconds, given.only)
