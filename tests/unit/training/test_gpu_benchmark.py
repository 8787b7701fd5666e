"""The benchmark of a GPU compares what is equal, and is ready for a machine that has one: its parts on a CPU, at tiny sizes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from softseg_dist import UNet

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu_fits import EagerFit, EngineFit, covered
from gpu_steps import Steps
from gpu_work import TINY, WORKS, MonaiBasicUNet, Work

FLAT, VOLUMES = TINY.works[0], TINY.works[-1]


@pytest.mark.parametrize("work", [FLAT, VOLUMES], ids=["2D", "3D"])
def test_the_usual_loop_learns_the_same_as_the_package(work: Work, tmp_path: Path) -> None:
    task = work.task(tmp_path, precision="float32", compile="off")
    usual, ours = EagerFit(task, "cpu"), EngineFit(task, "cpu")
    for _ in range(3):
        assert usual.train_epoch() == pytest.approx(ours.train_epoch(), rel=1e-3)


def test_the_usual_loop_has_contiguous_weights(tmp_path: Path) -> None:
    usual = EagerFit(FLAT.task(tmp_path), "cpu")
    assert all(parameter.is_contiguous() for parameter in usual.model.parameters())


@pytest.mark.parametrize("work", [*WORKS, *TINY.works], ids=lambda work: f"{work.key} {work.size[0]}")
def test_all_batches_of_an_epoch_are_full(work: Work) -> None:
    assert work.num_images % work.batch_size == 0


def test_the_last_bias_of_monais_network_is_added_to_its_logits() -> None:
    module = MonaiBasicUNet().build(1, 2, 2).eval()
    image = torch.zeros(1, 1, 32, 32)
    with torch.no_grad():
        before = module(image)
        MonaiBasicUNet().last_bias(module, num_logits=2).add_(torch.tensor([1.0, 2.0]))
        assert torch.allclose(module(image) - before, torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), atol=1e-5)


@pytest.mark.engine
def test_a_table_has_every_way_and_only_the_packages_count(tmp_path: Path) -> None:
    lines: list[str] = []
    table = Steps(FLAT, tmp_path, TINY, lines.append)
    table.measure()
    keys = ["eager", "tuned", "float32", "float32_2_fits", "bfloat16", "bfloat16_2_fits"]
    assert list(table.rows) == keys
    assert [row.ours for row in table.rows.values()] == [False, False, True, True, True, True]
    figures = table.figures()
    assert figures["eager_ratio"] == 1
    assert figures["best"] == max(figures[f"{key}_ratio"] for key in keys[2:])
    assert {headline.key for headline in table.headlines()} <= figures.keys()
    assert all(map(math.isfinite, figures.values()))
    assert sum(line.startswith(("eager", "float32", "bfloat16")) for line in lines) == len(keys)


class Scarce(UNet):
    """Can be built so many times, as if memory ran out then."""

    left: ClassVar[list[int]] = [1, 2, 3]

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        if not self.left:
            raise RuntimeError("out of memory\nand how that came about")
        self.left.pop()
        return super().build(in_channels, out_channels, dim)


@pytest.mark.engine
def test_a_way_that_fails_says_so_and_the_others_are_measured(tmp_path: Path) -> None:
    lines: list[str] = []
    table = Steps(replace(FLAT, network=Scarce(filters=(4, 8))), tmp_path, TINY, lines.append)
    table.measure()
    assert list(table.rows) == ["eager", "tuned", "float32"]
    assert table.figures()["failed"] == 2
    assert [line for line in lines if "failed" in line] == [
        "float32, 2 at once: failed, RuntimeError: out of memory",
        "bfloat16, 1 at once: failed, RuntimeError: out of memory",
    ]


def test_time_is_covered_once_and_short_gaps_with_it() -> None:
    intervals = [(5, 7), (0, 2), (1, 3), (1, 2)]
    assert [covered(intervals), covered(intervals, gap=1), covered(intervals, gap=2)] == [3 + 2, 3 + 2, 7]
    assert covered([]) == 0
