"""What does it cost to judge one case: 240 x 240 x 155 voxels, 3 classes, 4 raters, each with 16 components per class?

Run:     python tests/benchmarks/bench_judge.py
Targets: under 10 s of one core and 1.5 GB for a map that is above 0 everywhere, as a sigmoid's is; two cases in two processes take
         under 1.2 times as long as one
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt
from record import Headline, record
from scipy.ndimage import gaussian_filter

from softseg_dist.data.cases import CaseData
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.judging.judge import Yardstick, judge

SHAPE, CLASSES, NUM_RATERS = (240, 240, 155), ("a", "b", "c"), 4
RATERS, THRESHOLDS = [f"r{r}" for r in range(NUM_RATERS)], (0.3, 0.42, 0.5)
YARDSTICK = Yardstick(CLASSES, (3e5, 1e5, 5e4), recalibration=dict.fromkeys(CLASSES, (1.2, -0.3)))
HEADLINES = (
    Headline(key="judge_s", what="judging 240 x 240 x 155, 3 classes, 4 raters: processor time", unit="s", at_most=10),
    Headline(key="memory_gb", what="the same: memory of its process", unit="GB", at_most=1.5),
    Headline(key="two_to_one", what="two such cases in two processes, against one", unit="times", at_most=1.2),
)


@cache
def case() -> tuple[npt.NDArray[np.float32], OwnMasks]:
    """Maps [K *SHAPE] above 0 everywhere, and what the raters drew; little memory beside them, and none left behind."""
    raters = np.zeros((NUM_RATERS, len(CLASSES), *SHAPE), dtype=np.float32)
    for r in range(NUM_RATERS):
        for k in range(len(CLASSES)):
            _draw(raters[r, k], (110 + 8 * k + r, 120 - 5 * k, 80 + r), 40 - 9 * k + r)
            for number in range(15):
                _draw(raters[r, k], (60 + 9 * number, 40 + (number * 37) % 160, 30 + (number * 23) % 100), 4)
    maps = np.stack([gaussian_filter(raters[:, k].mean(axis=0), 1.5) for k in range(len(CLASSES))])
    maps += np.random.default_rng(0).uniform(1e-5, 1e-3, maps.shape).astype(np.float32)
    own = OwnMasks.of(CaseData(maps[:1], raters, None, np.eye(4), Geometry(SHAPE, np.eye(4))))
    return maps.clip(0, 1, out=maps), own


def _draw(mask: npt.NDArray[np.float32], center: tuple[int, ...], radius: int) -> None:
    """A ball."""
    around = tuple(slice(c - radius, c + radius + 1) for c in center)
    square = sum(np.square(axis - radius) for axis in np.indices((2 * radius + 1,) * 3))
    mask[around][square < radius**2] = 1


def judge_case(_: int) -> tuple[float, float, float]:
    """When judging began and ended, and its processor time, in s."""
    maps, own = case()
    began, processor_s = time.monotonic(), time.process_time()
    judge(maps, own, RATERS, YARDSTICK, THRESHOLDS)
    return began, time.monotonic(), time.process_time() - processor_s


def wall_s(processes: int) -> tuple[float, float]:
    """From the beginning of the first judging to the end of the last, one case per process; processor time of one."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(judge_case, range(processes)))  # imports, and makes the case
        found = list(pool.map(judge_case, range(processes)))
    return max(end for _, end, _ in found) - min(begin for begin, _, _ in found), found[0][2]


def main() -> None:
    """Measure, and print a table."""
    one_s, processor_s = wall_s(1)
    memory_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    two_s, _ = wall_s(2)
    print(f"one case {one_s:.1f} s ({processor_s:.1f} s of a core, {memory_gb:.2f} GB), two in two processes {two_s:.1f} s")
    record("judge", {"judge_s": processor_s, "memory_gb": memory_gb, "two_to_one": two_s / one_s}, HEADLINES)


if __name__ == "__main__":
    main()
