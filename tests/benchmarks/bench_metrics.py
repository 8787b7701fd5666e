"""What does measuring a case cost? All rows of one 160 x 192 x 160 case, 3 classes, 4 raters, and of a quickstart case.

On one thread. Two classes are single structures, the third is 400 lesions of up to 6 voxels in radius, all over the image.

Run:    python tests/benchmarks/bench_metrics.py
Target: less than 5 s for the large case, less than 20 ms for the small one
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
from record import Headline, record
from scipy import ndimage
from scipy.special import expit

from softseg_dist import Phantom, Preprocess
from softseg_dist.judging.rows import Grid, Wanted, case_rows
from softseg_dist.judging.thresholds import CURVE
from softseg_dist.numerics.metrics import Pair, Scale, soft_metrics

SHAPE, LESIONS, RATERS = (160, 192, 160), 400, 4
CLASSES = ("large", "small", "lesions")
THRESHOLDS = (0.5, 0.45, 0.392)
MIB = 2**20
WORDS = {
    "large_s": "160 x 192 x 160, 3 classes, 4 raters: all rows",
    "large_soft_s": "of that, soft metrics against mean and raters",
    "quickstart_s": "quickstart case, 8 x 48 x 48, 4 raters and truth",
}
HEADLINES = (
    Headline(
        key="large_s", what="all metrics of one case of 160 x 192 x 160, 3 classes, 4 raters, one thread", unit="s", at_most=5
    ),
    Headline(key="large_mib", what="memory to measure it, beside 338 MiB of maps", unit="MiB"),
    Headline(key="quickstart_s", what="all metrics of a quickstart case", unit="s", at_most=0.02),
)


def main() -> None:
    prediction, references = large_case(np.random.default_rng(0))
    scale = Scale(1.0, (1e5,) * len(CLASSES), (1.0, 1.0, 1.0))

    def large() -> None:
        case_rows(prediction, references, Wanted(CLASSES, THRESHOLDS, CURVE), scale)

    def soft_only() -> None:
        for name, reference in references.items():
            soft_metrics(Pair(prediction, reference, scale), against_mean=name == "mean")

    figures = {
        "large_s": _seconds(large, 3),
        "large_soft_s": _seconds(soft_only, 3),
        "quickstart_s": _seconds(quickstart_case(), 30),
    }
    tracemalloc.start()
    large()
    allocated = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    print(f"{'one thread, processor time':<52}{'s':>8}")
    for key, words in WORDS.items():
        print(f"{words:<52}{figures[key]:>8.3f}")
    case = sum(maps.nbytes for maps in (prediction, *references.values())) / MIB
    print(f"allocated at most for the large case: {allocated:.0f} MiB, beside the {case:.0f} MiB of its maps")
    record("metrics", figures | {"large_mib": allocated, "large_maps_mib": case}, HEADLINES)


def large_case(generator: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A prediction [1 3 *S], and the mean and the masks of raters who draw every edge within about a voxel of each other."""
    depth = np.stack([_ellipsoid((70, 96, 80), (40, 55, 40)), _ellipsoid((100, 70, 60), (14, 25, 12)), _many(generator)])

    def shifted(by: float) -> np.ndarray:
        wave = generator.standard_normal((3, *(n // 16 for n in SHAPE)))
        return (depth + by * ndimage.zoom(wave, (1, 16, 16, 16), order=1))[None]

    raters = [(shifted(0.8) > 0).astype(np.float32) for _ in range(RATERS)]
    mean = np.mean(raters, axis=0)
    return expit(shifted(0.5)).astype(np.float32), {"mean": mean} | {str(r): mask for r, mask in enumerate(raters)}


def _ellipsoid(center: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Depth below the surface, roughly in voxels; negative outside."""
    axes = np.meshgrid(*map(np.arange, SHAPE), indexing="ij", sparse=True)
    return min(radii) * (1 - np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, center, radii, strict=True))))


def _many(generator: np.random.Generator) -> np.ndarray:
    depth, reach = np.full(SHAPE, -50.0), 10
    distance = np.sqrt(sum(a**2 for a in np.ogrid[(slice(-reach, reach + 1),) * 3]))
    for _ in range(LESIONS):
        at = tuple(slice(c - reach, c + reach + 1) for c in (generator.integers(reach, n - reach) for n in SHAPE))
        depth[at] = np.maximum(depth[at], generator.uniform(1, 6) - distance)
    return depth


def quickstart_case() -> Callable[[], None]:
    """Measures one case of studies/s001_quickstart.py against its raters and its truth."""
    sample = Preprocess(dim=2).apply(Phantom(subjects=1).scan(None)[0])
    assert sample.truth is not None
    raters = {name: sample.raters[:, r] for r, name in enumerate(sample.rater_names)}
    references = {"mean": sample.raters.mean(axis=1)} | raters | {"truth": sample.truth}
    prediction = ndimage.gaussian_filter(sample.truth, (0, 0, 1, 1))
    grid = Grid(sample.spacing_mm, sample.voxel_mm3, sample.placement.slices)

    def measure() -> None:
        maps = {name: grid.case(reference) for name, reference in references.items()}
        case_rows(grid.case(prediction), maps, Wanted(("cord",), THRESHOLDS, CURVE), grid.scale((100.0,)))

    return measure


def _seconds(work: Callable[[], None], repeats: int) -> float:
    """Median processor time of one call."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
