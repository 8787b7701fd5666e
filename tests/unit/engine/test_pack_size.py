"""How many fits share a GPU follows from what was measured: more of them must pay, and fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, UNet
from softseg_dist.data.store import Store, build_store
from softseg_dist.engine.ray_packs import Rate, best_size, measure
from softseg_dist.training.task import FitTask


def rates(*steps_per_s: float, memory: float = 0.1) -> list[Rate]:
    return [Rate(2**power, rate, memory * 2**power) for power, rate in enumerate(steps_per_s)]


@pytest.mark.parametrize(
    ("measured", "size"),
    [
        (rates(100), 1),
        (rates(100, 90, 80), 1),
        (rates(100, 104, 104), 1),  # 4 % do not pay
        (rates(100, 110, 114), 2),  # nor do 3 % more
        (rates(100, 110, 116), 4),
        (rates(100, 104, 106), 4),  # against the best before, which is one
        (rates(100, 150, 200, memory=0.3), 2),  # four have no memory left
        (rates(100, 150, 200, memory=0.5), 1),
        (rates(100, memory=1.0), 1),
    ],
)
def test_the_largest_size_that_pays_and_fits_is_taken(measured: list[Rate], size: int) -> None:
    assert best_size(measured) == size


def test_sizes_are_measured_by_training(tmp_path: Path) -> None:
    data, preprocess = Phantom(subjects=4, size=(16, 16), num_slices=3), Preprocess(dim=2)
    cases = data.cases(None)
    path = build_store(tmp_path, cases, data, preprocess)
    task = FitTask(
        study="s", seed=0, candidate="c", split=MonteCarlo(count=1).make({case.subject: "" for case in cases}, 0)[0],
        recipe=Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=2, batch_size=4)), objective="dice_dml",
        store=str(path), store_fingerprint=Store.open(path).fingerprint, folder=str(tmp_path / "fit"),
    )  # fmt: skip
    one, two = measure(task, (1, 2), "cpu", measured_s=0.05)
    assert (one.size, two.size) == (1, 2)
    assert min(one.steps_per_s, two.steps_per_s) > 0
    assert not (tmp_path / "fit").exists()
    with pytest.raises(ValueError, match="no store"):
        measure(task.replace(store=str(tmp_path / "none.arrow")), (2,), "cpu")
