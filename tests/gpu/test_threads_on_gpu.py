"""Fits in threads of one process, each on a stream of its own, while they capture, draw and are measured: as they are alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow.parquet as pq
import pytest
import torch

from softseg_dist import Affine, MCDropout, MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import build_store, fingerprint
from softseg_dist.training.fit import fit
from softseg_dist.training.task import FitResult, FitTask, Worker, cases_path

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
NUM_FITS = 4
OPTIM = Optim(batch_size=8, lr=1e-3, precision="float32", compile="off")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[FitTask]:
    """Fits of different lengths, with dropout in training and after it: some draw while others are still captured."""
    data, preprocess = Phantom(subjects=8, size=(32, 32), num_slices=4), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(tmp_path_factory.mktemp("stores"), cases, data, preprocess)
    split = MonteCarlo(count=1).make({case.subject: case.site for case in cases}, 0)[0]
    recipe = Recipe(network=UNet(filters=(8, 16), dropout=0.2), augment=(Affine(),))
    return [
        FitTask(
            study="gpu", seed=number, candidate="c", split=split, objective="dice_soft",
            recipe=recipe.replace(optim=OPTIM.replace(epochs=1 + number)), uncertainty=(MCDropout(samples=8),),
            store=str(path), store_fingerprint=fingerprint(cases, data, preprocess), folder="",
        )
        for number in range(NUM_FITS)
    ]  # fmt: skip


def test_fits_that_drop_and_sample_side_by_side_measure_what_they_measure_alone(tasks: list[FitTask], tmp_path: Path) -> None:
    def run(task: FitTask, folder: Path) -> FitResult:
        with torch.cuda.stream(torch.cuda.Stream()):
            return fit(task.replace(folder=str(folder)), Worker(device="cuda"))

    def run_beside_others(number: int) -> FitResult:
        begin.wait()
        return run(tasks[number], tmp_path / f"together-{number}")

    begin = Barrier(NUM_FITS)
    with ThreadPoolExecutor(NUM_FITS) as threads:
        together = list(threads.map(run_beside_others, range(NUM_FITS)))
    for number, result in enumerate(together):
        alone = run(tasks[number], tmp_path / f"alone-{number}")
        assert (result.state, result.engine, result.notes) == ("finished", alone.engine, alone.notes)
        sampled = [
            [row["value"] for row in pq.read_table(cases_path(tmp_path / f"{how}-{number}")).to_pylist()
             if row["metric"].startswith("mc_dropout")]
            for how in ("alone", "together")
        ]  # fmt: skip
        assert len(sampled[0]) > 0
        assert sampled[1] == pytest.approx(sampled[0], rel=1e-2, abs=1e-3, nan_ok=True)
