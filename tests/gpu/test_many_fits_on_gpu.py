"""Many fits in four threads of one process: every one keeps its CUDA graph, and equal fits have equal losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_fits import fit_at_once, largest_difference, make_tasks
from torch.backends import cudnn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
NUM_FITS, NUM_SEEDS, AT_ONCE = 24, 6, 4


def test_many_fits_keep_their_graphs_and_have_the_losses_that_they_have_alone(tmp_path: Path) -> None:
    alone, together = range(NUM_SEEDS), [number % NUM_SEEDS for number in range(NUM_FITS)]
    tasks = make_tasks(tmp_path, [*alone, *together])
    with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        results = fit_at_once(tasks[:NUM_SEEDS], 1, "cuda") + fit_at_once(tasks[NUM_SEEDS:], AT_ONCE, "cuda")
    lost = [(result.engine, result.notes) for result in results if result.engine != "float32, graph" or result.notes]
    difference = largest_difference(tasks)
    print(f"{len(results)} fits: {len(results) - len(lost)} graphs, losses differ by {difference:.1e} at most")
    assert [result.state for result in results] == ["finished"] * len(results), results
    assert not lost
    assert difference < 1e-5
