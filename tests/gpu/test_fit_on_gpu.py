"""A whole fit on a GPU: in both precisions, stopped and resumed, beside another one, and with nothing left behind."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Literal

import pytest
import torch

from softseg_dist import AdaptiveWing, Affine, MonteCarlo, NormReLU, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.fit import RunningFit, fit
from softseg_dist.training.task import FitResult, FitTask, Interrupted, Worker, history_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
DEVICE = "cuda"
STEPS_PER_EPOCH = 4
RECIPE = Recipe(
    network=UNet(filters=(8, 16), upsample="deconv"),  # the gradient of an interpolation adds in no fixed order
    activation=NormReLU(),
    loss=AdaptiveWing(),
    augment=(Affine(),),
    optim=Optim(epochs=4, batch_size=8, lr=5e-3, compile="off"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    data, preprocess = Phantom(subjects=12, size=(32, 32), num_slices=4), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    return FitTask(
        study="gpu", seed=0, candidate="c", recipe=RECIPE, split=split, objective="dice_soft",
        store=str(path), store_fingerprint=fingerprint(cases, data, preprocess), folder="",
    )  # fmt: skip


def in_folder(task: FitTask, folder: Path, precision: Literal["float32", "bfloat16"] = "float32") -> FitTask:
    optim = task.recipe.optim.replace(precision=precision)
    folder.mkdir(exist_ok=True)
    return task.replace(folder=str(folder), recipe=task.recipe.replace(optim=optim))


def losses(task: FitTask) -> list[float]:
    return [json.loads(line)["loss"] for line in history_path(task.folder).read_text().splitlines()]


def stop_when_asked(times: int) -> Worker:
    """A worker on the GPU that asks its fit to stop when it is asked so often."""
    counts: Iterator[int] = iter(range(1, 10**6))
    return Worker(device=DEVICE, stop=lambda: next(counts) >= times)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_fit_gives_finite_scores(task: FitTask, tmp_path: Path, precision: Literal["float32", "bfloat16"]) -> None:
    ours = in_folder(task, tmp_path, precision)
    result = fit(ours, Worker(device=DEVICE))
    assert (result.state, result.precision, result.epochs) == ("finished", precision, 4), result
    assert result.score is not None
    assert result.test_score is not None
    assert all(map(math.isfinite, [result.score, result.test_score, *losses(ours)]))
    assert losses(ours)[-1] < losses(ours)[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_fit_that_was_stopped_goes_on_with_the_same_losses(
    task: FitTask, tmp_path: Path, precision: Literal["float32", "bfloat16"], times: int
) -> None:
    whole, parts = (in_folder(task, tmp_path / name, precision) for name in ("whole", "parts"))
    straight = fit(whole, Worker(device=DEVICE))
    with pytest.raises(Interrupted):
        fit(parts, stop_when_asked(times))
    resumed = fit(parts, Worker(device=DEVICE))
    assert resumed.resumed_epoch is not None
    assert losses(parts) == pytest.approx(losses(whole), rel=tolerance(precision))
    assert resumed.score == pytest.approx(straight.score, abs=0.005)


def tolerance(precision: Literal["float32", "bfloat16"]) -> float:
    """Sums on a GPU have no fixed order, so that equal fits drift apart by roundings, over 16 steps."""
    return 1e-4 if precision == "float32" else 1e-2


def test_a_checkpoint_in_the_middle_of_an_epoch_is_gone_on_from(task: FitTask, tmp_path: Path) -> None:
    """The host asks after every step, the GPU less often: a fit that begins on a CPU can be stopped anywhere."""
    whole, parts = in_folder(task, tmp_path / "whole"), in_folder(task, tmp_path / "parts")
    fit(whole, Worker(device=DEVICE))
    counts: Iterator[int] = iter(range(1, 10**6))
    with pytest.raises(Interrupted):
        fit(parts, Worker(stop=lambda: next(counts) >= STEPS_PER_EPOCH + 2))
    training = RunningFit(parts, Worker(device=DEVICE))
    assert (training.progress.epoch, training.progress.step) == (1, 2)
    fit(parts, Worker(device=DEVICE))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)  # convolutions of two devices


def test_fits_in_threads_on_streams_are_the_fits_alone(task: FitTask, tmp_path: Path) -> None:
    """The same folders' tasks one by one, then at once, as they share a GPU."""
    alone = [in_folder(of_seed(task, seed), tmp_path / f"alone-{seed}") for seed in (1, 2)]
    for one in alone:
        fit(one, Worker(device=DEVICE))
    together = [in_folder(of_seed(task, seed), tmp_path / f"together-{seed}") for seed in (1, 2)]
    barrier = Barrier(2)

    def on_a_stream(task: FitTask) -> FitResult:
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            return fit(task, Worker(device=DEVICE))

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(on_a_stream, together))
    assert [result.state for result in results] == ["finished"] * 2, results
    for one, other in zip(alone, together, strict=True):
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    assert losses(together[0]) != pytest.approx(losses(together[1]), rel=1e-3)


def of_seed(task: FitTask, seed: int) -> FitTask:
    return task.replace(seed=seed)


def test_a_fit_leaves_no_memory_behind(task: FitTask, tmp_path: Path) -> None:
    held = []
    for name in ("first", "second", "third"):
        fit(in_folder(task, tmp_path / name), Worker(device=DEVICE))
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[0] == held[1] == held[2] < 128 * 2**20, held  # a process keeps workspaces and a store
