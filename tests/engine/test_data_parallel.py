"""The number of workers changes no more than rounding: losses, gradients, weights and results on 1, 2 and 4 workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parallel_fits import (
    BASE,
    OPTIM,
    assert_same_files,
    distance,
    interrupted_fit,
    make_tasks,
    recipes,
    run_on,
    sgd_step_in_float32,
    steps_in_float64,
    whole_fit,
)

from softseg_dist import TTA, Flip, MCDropout, Noise, UNet
from softseg_dist.training.task import FitTask, checkpoint_path

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FitTask]:
    torch.set_num_threads(1)
    return make_tasks(tmp_path_factory.mktemp("parallel"), recipes())


@pytest.fixture(scope="module")
def alone(tasks: dict[str, FitTask]) -> dict[str, Any]:
    return {job.__name__: run_on(1, job, tasks) for job in (steps_in_float64, sgd_step_in_float32)}


@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_twenty_steps_in_float64_agree_where_rounding_cannot_hide_a_mistake(tasks, alone, num_workers):
    """AdamW divides by the size of a gradient, and so makes a step of every rounding error: in float32 it would hide much."""
    together = run_on(num_workers, steps_in_float64, tasks)
    for name, one in alone["steps_in_float64"].items():
        assert together[name]["losses"] == pytest.approx(one["losses"], rel=1e-9), name
        assert distance(one["gradients"], together[name]["gradients"]) < 1e-9, name
        assert distance(one["state"], together[name]["state"]) < 1e-9, name


@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_step_of_gradient_descent_in_float32_agrees(tasks, alone, num_workers):
    together = run_on(num_workers, sgd_step_in_float32, tasks)
    for name, one in alone["sgd_step_in_float32"].items():
        assert together[name]["losses"] == pytest.approx(one["losses"], rel=1e-6), name
        assert distance(all_of(one), all_of(together[name])) < 1e-6, name


def all_of(trained: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients and state."""
    return trained["state"] | {f"gradient of {name}": tensor for name, tensor in trained["gradients"].items()}


DROPPING = BASE.replace(network=UNet(filters=(4, 8), dropout=0.2))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> FitTask:
    return make_tasks(tmp_path_factory.mktemp("fits"), {"dropping": DROPPING})["dropping"]


def of(task: FitTask, folder: Path) -> dict[str, FitTask]:
    return {"fit": task.replace(folder=str(folder))}


def test_a_fit_on_two_workers_leaves_what_one_leaves_even_if_it_changes_over_in_the_middle(task, tmp_path):
    task = task.replace(uncertainty=(MCDropout(samples=2), TTA(transforms=(Flip(), Noise()), samples=2)))
    alone = run_on(1, whole_fit, of(task, tmp_path / "alone"))["fit"]
    assert_same_result(alone, run_on(2, whole_fit, of(task, tmp_path / "two"))["fit"])
    assert_same_files(tmp_path / "alone", tmp_path / "two", exact=False)

    assert run_on(2, interrupted_fit, of(task, tmp_path / "moved")) == {"fit": {"interrupted": 0}}
    assert checkpoint_path(tmp_path / "moved").exists()
    moved = run_on(1, whole_fit, of(task, tmp_path / "moved"))["fit"]
    assert moved.pop("resumed_epoch") is not None
    assert_same_result(alone, moved)
    assert_same_files(tmp_path / "alone", tmp_path / "moved", exact=False)


def assert_same_result(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Numbers may differ by rounding."""
    for name, value in other.items():
        if name == "files":
            continue  # `assert_same_files` looks into them
        if name == "recalibration":
            assert value.keys() == one[name].keys()
            np.testing.assert_allclose(list(value.values()), list(one[name].values()), rtol=0.01)
            continue
        rounded = name in ("score", "test_score", "scores", "thresholds")
        assert value == (pytest.approx(one[name], rel=1e-3) if rounded else one[name]), name


def test_a_loss_that_is_not_finite_ends_the_fit_on_all_workers_with_one_cause(task, tmp_path):
    wild = task.replace(recipe=DROPPING.replace(optim=OPTIM.replace(lr=1e30, schedule="constant")))
    alone, together = (run_on(n, whole_fit, of(wild, tmp_path / str(n)))["fit"] for n in (1, 2))
    assert alone["state"] == "failed"
    assert "weights diverged" in alone["reason"]
    assert together == alone
