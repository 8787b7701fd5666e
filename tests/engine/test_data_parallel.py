"""The number of workers changes nothing: losses, gradients, weights and results are equal to the last digit on 1, 2 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_fits import assert_same_files, first_steps, interrupted_fit, make_tasks, run_on, whole_fit

from softseg_dist import TTA, Flip, MCDropout, Noise
from softseg_dist.training.task import FitTask, checkpoint_path

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitTask]:
    torch.set_num_threads(1)
    return make_tasks(tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module")
def alone(tasks: dict[str, FitTask]) -> dict[str, Any]:
    return run_on(1, first_steps, tasks)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_twenty_steps_are_equal_to_the_last_digit(tasks, alone, num_workers):
    together = run_on(num_workers, first_steps, tasks)
    for name in tasks:
        assert together[name]["losses"] == alone[name]["losses"], name
        for kind in ("gradients", "state"):
            different = [k for k, v in alone[name][kind].items() if not torch.equal(v, together[name][kind][k])]
            assert different == [], (name, kind)


def of(task: FitTask, folder: Path) -> dict[str, FitTask]:
    return {"fit": task.replace(folder=str(folder))}


def test_a_fit_on_two_workers_leaves_what_one_leaves_even_if_it_changes_over_in_the_middle(tasks, tmp_path):
    task = tasks["dropout"].replace(uncertainty=(MCDropout(samples=2), TTA(transforms=(Flip(), Noise()), samples=2)))
    alone = run_on(1, whole_fit, of(task, tmp_path / "alone"))
    assert run_on(2, whole_fit, of(task, tmp_path / "two")) == alone
    assert_same_files(tmp_path / "alone", tmp_path / "two")

    assert run_on(2, interrupted_fit, of(task, tmp_path / "moved")) == {"fit": {"interrupted": 0}}
    assert checkpoint_path(tmp_path / "moved").exists()
    moved = run_on(1, whole_fit, of(task, tmp_path / "moved"))["fit"]
    assert moved.pop("resumed_epoch") is not None
    assert moved.items() <= alone["fit"].items()
    assert_same_files(tmp_path / "alone", tmp_path / "moved")


def test_a_loss_that_is_not_finite_ends_the_fit_on_all_workers_with_one_cause(tasks, tmp_path):
    task = tasks["dropout"]
    wild = task.replace(recipe=task.recipe.replace(optim=task.recipe.optim.replace(lr=1e30, schedule="constant")))
    alone, together = (run_on(n, whole_fit, of(wild, tmp_path / str(n)))["fit"] for n in (1, 2))
    assert alone["state"] == "failed"
    assert "weights diverged" in alone["reason"]
    assert together == alone
