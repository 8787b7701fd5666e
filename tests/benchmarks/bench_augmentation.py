"""What does augmenting a batch cost? Image and label of 16 slices of 96 x 96, affine and elastic, on one thread.

Beside it every transform of intensity and Mixup by itself, at its defaults.

Run:    python tests/benchmarks/bench_augmentation.py
Target: less than 20 ms for a batch
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from record import Headline, record

from softseg_dist import (
    Affine,
    Augmentation,
    BiasField,
    Blur,
    Contrast,
    Elastic,
    Frame,
    Gamma,
    LowResolution,
    Mixup,
    Noise,
    Pairing,
)
from softseg_dist.numerics.augmentation import apply, draw_all, join
from softseg_dist.numerics.labels import LabelMode

BATCH, SIZE, REPEATS = 16, 96, 30
MOVES = (Affine(degrees=20, scale=0.1, shift=0.03), Elastic(spacing_mm=8, std_mm=1))
ALONE = (Noise(), Gamma(), Contrast(), BiasField(), Blur(), LowResolution())
SPACING_MM, EVERY = (0.5, 0.5), list(range(BATCH))
HEADLINES = (
    Headline(
        key="batched_ms",
        what="affine and elastic augmentation of 16 slices of 96 x 96, image and label, one thread",
        unit="ms",
        at_most=20,
    ),
)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, BATCH, 1, SIZE, SIZE, generator=generator)

    def augment(transforms: Sequence[Augmentation], seeds: Sequence[int], mode: LabelMode = "soft") -> None:
        frame = Frame.of(image, SPACING_MM)
        apply(image[seeds], target[seeds], draw_all(transforms, seeds, frame), mode, frame)

    def one_by_one() -> None:
        for i in range(BATCH):
            augment(MOVES, [i])

    rows: dict[str, tuple[str, Callable[[], object]]] = {
        "batched_ms": ("batched, soft", partial(augment, MOVES, EVERY)),
        "hard_each_ms": ("batched, hard_each (label interpolated twice)", partial(augment, MOVES, EVERY, "hard_each")),
        "one_by_one_ms": ("one slice after the other, soft", one_by_one),
    }
    for transform in ALONE:
        work = partial(augment, (transform,), EVERY)
        name = type(transform).__name__
        rows[f"{name.lower()}_ms"] = f"{name} alone", work

    def mixed() -> tuple[torch.Tensor, torch.Tensor]:
        drawn = draw_all((Mixup(),), range(BATCH), Frame.of(image, SPACING_MM), (Pairing,))
        return join(image, target, image.flip(0), target.flip(0), drawn)

    rows["mixup_ms"] = "Mixup alone, partners at hand", mixed
    figures = {key: _milliseconds(work) for key, (_, work) in rows.items()}
    print(f"{'16 slices of 96 x 96, image and label':<48}{'ms':>8}{'ratio':>8}")
    for key, (words, _) in rows.items():
        print(f"{words:<48}{figures[key]:>8.1f}{figures[key] / figures['batched_ms']:>8.2f}")
    record("augmentation", figures, HEADLINES)


def _milliseconds(work: Callable[[], object]) -> float:
    """Median processor time of one call."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - started))
    return statistics.median(times)


if __name__ == "__main__":
    main()
