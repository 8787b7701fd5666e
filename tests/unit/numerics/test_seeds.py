"""Random numbers follow from their seed, whatever other threads of the process draw."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from softseg_dist.numerics.seeds import seeded


def test_threads_draw_what_they_would_draw_alone() -> None:
    together = threading.Barrier(4)

    def draw(seed: int) -> Tensor:
        together.wait()
        drawn = []
        for again in range(20):
            with seeded(seed + again):
                drawn += [torch.rand(3) for _ in range(20)]
        return torch.cat(drawn)

    with ThreadPoolExecutor(4) as threads:
        side_by_side = list(threads.map(draw, range(4)))
    together = threading.Barrier(1)
    assert all(torch.equal(drawn, draw(seed)) for seed, drawn in enumerate(side_by_side))
