"""What does STAPLE cost? Seven raters of 200 x 200 x 200 voxels, one class, on one thread.

Run:    python tests/benchmarks/bench_staple.py
Target: less than 10 s of processor time for a case, and less than 3 GB of the whole process
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from record import Headline, record
from torch import Tensor

from softseg_dist.numerics.labels import staple

RATERS, SIZE, SLIPS = 7, 200, 0.01
HEADLINES = (
    Headline(key="all_s", what="STAPLE of 7 raters, 200 x 200 x 200 voxels, soft everywhere, one thread", unit="s", at_most=10),
    Headline(key="all_peak_gb", what="STAPLE of them: memory of the whole process", unit="GB", at_most=3),
)
UNIT = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss, in GB


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    print(f"{'7 raters, 200 x 200 x 200 voxels':<52}{'s':>8}{'steps':>8}{'peak GB':>9}")
    for name, softness in (("masks", "none"), ("masks, soft at their borders", "border"), ("soft in every voxel", "all")):
        decisions = _raters(softness)
        started = time.process_time()
        found = staple(decisions)
        seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / UNIT
        del decisions
        print(f"{name:<52}{seconds:>8.1f}{found.steps:>8}{peak:>9.2f}")
        figures |= {f"{softness}_s": seconds, f"{softness}_peak_gb": peak}
    record("staple", figures, HEADLINES)


def _raters(softness: str) -> Tensor:
    """Balls [R *S] of radii that differ by a voxel, and slips of every rater all over the field of view."""
    generator = torch.Generator().manual_seed(0)
    along = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = (along[:, None, None] ** 2 + along[:, None] ** 2 + along**2).sqrt()
    decisions = torch.empty(RATERS, SIZE, SIZE, SIZE)
    for rater in range(RATERS):
        ball = (0.4 * SIZE + rater - radius + 0.5).clamp(0, 1)  # the share of a voxel that lies inside, nearly
        slip = (torch.rand(radius.shape, generator=generator) < SLIPS).float()
        soft = torch.rand(radius.shape, generator=generator) * 0.1
        decisions[rater] = (ball if softness != "none" else ball.round()) * (1 - slip) + (1 - ball.round()) * slip
        if softness == "all":
            decisions[rater] = 0.9 * decisions[rater] + soft
    return decisions


if __name__ == "__main__":
    main()
