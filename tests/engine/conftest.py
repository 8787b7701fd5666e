"""One Ray for all engine tests of this process: starting one takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from softseg_dist.engine.ray_cluster import ENVIRONMENT
from softseg_dist.engine.ray_private import private_ray


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A private Ray with two places for fits, as a run starts it."""
    os.environ.update(ENVIRONMENT)
    here = str(Path(__file__).parent)
    with private_ray(
        {
            "num_cpus": 2,
            "object_store_memory": 128 * 2**20,
            "log_to_driver": False,
            "logging_level": "ERROR",
            "runtime_env": {"env_vars": {"PYTHONPATH": here}},
        }
    ):
        yield
