"""Processes of a test that work together through gloo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from torch import distributed


@contextmanager
def gloo_group(folder: str | Path, rank: int, num_workers: int) -> Iterator[None]:
    """Make this process one of `num_workers` that meet in `folder`; after the block it is over, if nothing was raised.

    It does not go through the end of Python: a thread of gloo's may still have to let go of a tensor then, and dies of it.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    meeting, patience = f"file://{folder}/meeting", timedelta(minutes=10)
    distributed.init_process_group("gloo", meeting, patience, world_size=num_workers, rank=rank)
    yield
    os._exit(0)
