"""Many fits in one process, a few at a time, each in a thread of its own: how fits share a GPU with `--fits-per-gpu`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch

from softseg_dist import Affine, MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitResult, FitTask, Worker, history_path

RECIPE = Recipe(
    network=UNet(filters=(8, 16), upsample="deconv"),  # the gradient of an interpolation adds in no fixed order
    augment=(Affine(),),
    optim=Optim(batch_size=5, epochs=3, precision="float32", compile="off"),
)


def make_tasks(folder: Path, seeds: Sequence[int]) -> list[FitTask]:
    """One fit per seed on the same small phantom, each in a folder of its own under `folder`."""
    data, preprocess = Phantom(subjects=8, size=(32, 32), num_slices=4), Preprocess(dim=2)
    cases = data.cases(None)
    store, split = build_store(folder, cases, data, preprocess), MonteCarlo(count=1)
    folders = [folder / f"{number:03d}-seed{seed}" for number, seed in enumerate(seeds)]
    for path in folders:
        path.mkdir()
    return [
        FitTask(
            study="many", seed=seed, candidate="c", recipe=RECIPE, objective="dice_soft", folder=str(path),
            split=split.make({case.subject: case.site for case in cases}, 0)[0],
            store=str(store), store_fingerprint=fingerprint(cases, data, preprocess),
        )
        for seed, path in zip(seeds, folders, strict=True)
    ]  # fmt: skip


def fit_at_once(tasks: Sequence[FitTask], num_at_once: int, device: str) -> list[FitResult]:
    """Train all tasks, `num_at_once` at a time. On a GPU fits take turns on as many streams, which are made once."""
    streams: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
    for _ in range(num_at_once):
        streams.put(torch.cuda.Stream() if device == "cuda" else None)

    @contextmanager
    def free_stream() -> Iterator[None]:
        stream = streams.get()  # waits until a fit ends
        try:
            with torch.cuda.stream(stream):  # does nothing for None
                yield
        finally:
            streams.put(stream)

    def train(task: FitTask) -> FitResult:
        with free_stream():
            return fit(task, Worker(device=device))

    with ThreadPoolExecutor(len(tasks)) as threads:
        return list(threads.map(train, tasks))


def losses(task: FitTask) -> list[float]:
    """The mean loss of every epoch of a fit that has ended."""
    return [json.loads(line)["loss"] for line in history_path(task.folder).read_text().splitlines()]


def largest_difference(tasks: Sequence[FitTask]) -> float:
    """The largest relative difference of a loss from that of the first fit with the same seed and epoch."""
    first: dict[int, list[float]] = {}
    differences = [0.0]
    for task in tasks:
        ours = losses(task)
        reference = first.setdefault(task.seed, ours)
        differences += [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return max(differences)
