"""Volumes of several sizes: what do they cost beside equal ones, does a map from patches cost more than MONAI's, do scores suffer?

Run:     python tests/benchmarks/bench_sizes.py [--steps 40]
         SOFTSEG_TEST_DATA=DATA python tests/benchmarks/bench_sizes.py --study    (20 fits of a minute, two at a time)
Targets: patches of 24 volumes of 160 x 192 x 160 to 256 x 256 x 180 are trained on at 90 % of the steps/s of as many equal volumes,
         in less than 3 GB; a volume of 240 x 240 x 155 is predicted from patches of 96 x 96 x 96 in at most 1.5 times the time and
         the memory of MONAI's SlidingWindowInferer with the same network (medians of five);
         --study: hippocampus_msd at 2 mm without a crop has the Brier skill of the crop of s003 within .02, at as many steps
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from monai.inferers import SlidingWindowInferer
from record import Headline, record

from softseg_dist import Affine, Case, CaseData, Optim, Patch, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store, build_store, fingerprint
from softseg_dist.numerics.crossed_test import crossed_test
from softseg_dist.report.scores import soft_scores
from softseg_dist.study_file import load_study
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.inference import predict_sample
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitTask, Worker, cases_path

SMALLEST, LARGEST, VOLUMES = (160, 192, 160), (256, 256, 180), 24
TO_PREDICT = (240, 240, 155)
NETWORK = UNet(filters=(8, 16, 32))
DATA = Phantom(subjects=VOLUMES, dim=3)  # names the classes; the cases are those below
STUDY = Path(__file__).parents[2] / "studies" / "s003_hippocampus.py"
STEPS = (
    Headline(key="steps_ratio", what="steps/s on patches of volumes of several sizes / of equal ones", at_least=0.9),
    Headline(key="train_memory_gb", what="largest process that trained on them", unit="GB", at_most=3),
    Headline(key="predict_time_ratio", what="a map from patches of 96 x 96 x 96, time / MONAI's inferer", at_most=1.5),
    Headline(key="predict_memory_ratio", what="the same, memory", at_most=1),
)
SCORES = (
    Headline(
        key="whole_minus_crop", what="hippocampus_msd at 2 mm, Brier skill without a crop - with that of s003", at_least=-0.02
    ),
    Headline(key="low", what="its 95 % interval, from"),
    Headline(key="high", what="to"),
)


class Noise(Case):
    """A volume of noise with a bright box, which one rater labelled."""

    site, rater_names = "", ("anna",)

    def __init__(self, number: int, size: tuple[int, ...]) -> None:
        self.name = self.subject = f"case-{number:02d}"
        self.number, self.size = number, size

    def sources(self, parts: Sequence[str] = (), sha256: Any = None) -> tuple[str, ...]:
        """See `Case.sources`."""
        return (f"noise {self.number} {self.size}",)

    def load(self) -> CaseData:
        """See `Case.load`."""
        generator = np.random.default_rng(self.number)
        label = np.zeros((1, 1, *self.size), np.float32)
        start = [int(generator.integers(0, n - 40)) for n in self.size]
        label[0, 0, start[0] : start[0] + 40, start[1] : start[1] + 40, start[2] : start[2] + 40] = 1
        image = generator.standard_normal((1, *self.size), dtype=np.float32) + label[0]
        return CaseData(image, label, None, np.eye(4), Geometry(self.size, np.eye(4)))

    def mask(self, part: str) -> np.ndarray:
        """See `Case.mask`: none is used."""
        raise NotImplementedError(part)


def main(steps: int) -> None:
    """Build two stores, train and predict in processes of their own, and print."""
    generator = np.random.default_rng(0)
    several = [
        tuple(int(generator.integers(low, high + 1)) for low, high in zip(SMALLEST, LARGEST, strict=True)) for _ in range(VOLUMES)
    ]
    equal = [tuple(int(n) for n in np.mean(several, axis=0))] * VOLUMES
    with tempfile.TemporaryDirectory() as folder:
        tasks = {name: task_of(Path(folder) / name, sizes) for name, sizes in (("several", several), ("equal", equal))}
        found = {name: alone(partial(steps_per_s, task, steps)) for name, task in tasks.items()}
        again = {name: alone(partial(steps_per_s, task, steps)) for name, task in reversed(tasks.items())}
    rates = {name: statistics.mean((found[name][0], again[name][0])) for name in tasks}
    memory_gb = max(found["several"][1], again["several"][1])
    print(f"steps/s: {rates['several']:.2f} of several sizes, {rates['equal']:.2f} of equal ones; {memory_gb:.2f} GB")
    tried = [(name, alone(partial(predicted, name))) for name in ("ours", "monai") * 5]  # peaks differ from run to run by a tenth
    maps = {name: np.median([found for way, found in tried if way == name], axis=0) for name in ("ours", "monai")}
    for name, (seconds, gb) in maps.items():
        print(f"map of {TO_PREDICT} by {name}: {seconds:.1f} s, {gb:.2f} GB")
    figures = {
        "steps_ratio": rates["several"] / rates["equal"],
        "train_memory_gb": memory_gb,
        "predict_time_ratio": maps["ours"][0] / maps["monai"][0],
        "predict_memory_ratio": maps["ours"][1] / maps["monai"][1],
    }
    record("sizes", figures, STEPS)


def alone(function: Callable[[], float]) -> tuple[float, float]:
    """What a function returns, and the memory in GB that a process of its own takes for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_memory, function).result()


def _with_memory(function: Callable[[], float]) -> tuple[float, float]:
    torch.set_num_threads(1)
    value = function()
    return value, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def here(function: Callable[[Any], Path], parts: Sequence[Any]) -> Generator[Path, None, None]:
    """Prepare cases one after the other in this process, which has their class."""
    for part in parts:
        yield function(part)


def task_of(folder: Path, sizes: Sequence[tuple[int, ...]]) -> FitTask:
    """A fit on patches of volumes of these sizes."""
    cases, preprocess = [Noise(number, size) for number, size in enumerate(sizes)], Preprocess(dim=3)
    path = build_store(folder, cases, DATA, preprocess, spread=here)
    names = [case.subject for case in cases]
    (folder / "fit").mkdir()
    return FitTask(
        study="sizes", seed=0, candidate="c", objective="brier_skill", folder=str(folder / "fit"),
        recipe=Recipe(
            network=NETWORK, patch=Patch(size=(64, 64, 64), per_item=4), augment=(Affine(degrees=10),),
            optim=Optim(epochs=5, batch_size=2),
        ),
        split=Split(index=0, train=tuple(names[2:]), validation=(names[0],), test=(names[1],)),
        store=str(path), store_fingerprint=fingerprint(cases, DATA, preprocess),
    )  # fmt: skip


def steps_per_s(task: FitTask, steps: int) -> float:
    """Steps per second of a fit, whose store has been read once."""
    Store.open(task.store).verify()  # a warm cache
    running = RunningFit(task, Worker())
    for _ in range(3):
        running.stepper.advance(running.progress)
    started = time.perf_counter()
    for _ in range(steps):
        running.stepper.advance(running.progress)
    return steps / (time.perf_counter() - started)


def predicted(way: str) -> float:
    """Seconds to predict one large volume, by `predict_sample` or by MONAI's class."""
    patch = Patch(size=(96, 96, 96))
    model = Model(Recipe(network=NETWORK, patch=patch), 1, 1, TO_PREDICT).eval()
    sample = Preprocess(dim=3).apply(Noise(0, TO_PREDICT))
    started = time.perf_counter()
    if way == "ours":
        predict_sample(model, sample)
    else:
        inferer = SlidingWindowInferer(patch.size, 1, patch.overlap, mode="gaussian", padding_mode="replicate")
        with torch.inference_mode():
            model.activation(inferer(torch.from_numpy(np.array(sample.image)), model.logits)).numpy()
    return time.perf_counter() - started


def of_study(root: Path) -> None:
    """The soft candidate of s003 on its crop and without one, in the same splits, and the difference in Brier skill."""
    study = load_study(STUDY).study
    cases = study.data.cases(root)
    splits = study.make_splits({case.subject: case.site for case in cases})
    ways = {"crop": study.preprocess, "whole": study.preprocess.replace(crop=None)}
    with tempfile.TemporaryDirectory() as folder:
        stores = {way: build_store(Path(folder), cases, study.data, preprocess) for way, preprocess in ways.items()}
        tasks = [
            FitTask(
                study=study.name, seed=study.seed, candidate=way, split=split, objective=study.objective,
                recipe=study.candidates["soft"], folder=str(Path(folder) / f"{way}-{split.index}"), store=str(stores[way]),
                store_fingerprint=fingerprint(cases, study.data, ways[way]),
            )
            for split, way in product(splits, ways)
        ]  # fmt: skip
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            assert {result.state for result in pool.map(fit, tasks)} == {"finished"}
        rows = pd.concat([pd.read_parquet(cases_path(task.folder)) for task in tasks])
    scores = soft_scores(rows[(rows["subset"] == "test") & (rows["grid"] == "own")], "brier_skill")
    found = crossed_test(scores.difference("whole", "crop"))
    for way in ways:
        print(f"{way}: Brier skill {np.nanmean(scores.of(way)):.4f}")
    print(f"whole - crop: {found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f}), n = {found.num_subjects} subjects")
    record("sizes_study", {"whole_minus_crop": found.mean, "low": found.low, "high": found.high}, SCORES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40, help="training steps that are timed, twice for each store")
    parser.add_argument("--study", action="store_true", help="the scores of s003 with and without its crop")
    chosen = parser.parse_args()
    if chosen.study:
        of_study(Path(os.environ["SOFTSEG_TEST_DATA"]))
    else:
        main(chosen.steps)
