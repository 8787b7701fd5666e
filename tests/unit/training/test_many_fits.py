"""What the test of many fits on a GPU does (tests/gpu/test_many_fits_on_gpu.py), with few fits on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_fits import fit_at_once, largest_difference, losses, make_tasks


@pytest.mark.engine
def test_fits_at_once_have_the_losses_that_they_have_alone_and_a_difference_is_found(tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, (0, 1, 0, 1))
    results = fit_at_once(tasks[:2], 1, "cpu") + fit_at_once(tasks[2:], 2, "cpu")
    assert [result.state for result in results] == ["finished"] * 4
    assert all(len(losses(task)) == 3 for task in tasks)
    assert largest_difference(tasks) < 1e-5
    assert largest_difference([tasks[0], tasks[1].replace(seed=0)]) > 1e-3
