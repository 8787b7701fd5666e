"""How a batch is read from the store: memory that is allocated per batch, and time, against loading whole cases.

Run:    python tests/benchmarks/bench_store.py
Target: reading allocates hardly more than the batch itself, at most 1.1 times
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import Headline, record

from softseg_dist import Phantom, Preprocess
from softseg_dist.data.store import Store, build_store

SUBJECTS, BATCH, REPEATS = 40, 16, 200
HEADLINES = (
    Headline(
        key="allocated_per_batch", what="memory allocated to read a batch from the store", unit="times the batch", at_most=1.1
    ),
)


def main() -> None:
    data, preprocess = Phantom(subjects=SUBJECTS), Preprocess(dim=2)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(build_store(Path(folder), data.cases(None), data, preprocess))
        generator = np.random.default_rng(0)
        picks = [
            list(zip(generator.integers(0, SUBJECTS, BATCH), generator.integers(0, 8, BATCH), strict=True)) for _ in range(REPEATS)
        ]

        def by_view(items: list[tuple[int, int]]) -> np.ndarray:
            return np.stack([store.sample(case).image[item] for case, item in items])

        def by_copy(items: list[tuple[int, int]]) -> np.ndarray:
            return np.stack([np.array(store.sample(case).image)[item] for case, item in items])

        batch_bytes = by_view(picks[0]).nbytes
        view_bytes, view_s = _measure(by_view, picks)
        copy_bytes, copy_s = _measure(by_copy, picks)
    print(f"{'way of reading 16 slices of 48 x 48':<40}{'x batch size':>14}{'ms':>8}")
    print(f"{'views of the memory map (what we do)':<40}{view_bytes / batch_bytes:>14.2f}{view_s * 1e3:>8.2f}")
    print(f"{'whole cases copied':<40}{copy_bytes / batch_bytes:>14.2f}{copy_s * 1e3:>8.2f}")
    figures = {"allocated_per_batch": view_bytes / batch_bytes, "time_copy_to_view": copy_s / view_s}
    record("store", figures, HEADLINES)


def _measure(read: Callable[[list[tuple[int, int]]], np.ndarray], picks: list[list[tuple[int, int]]]) -> tuple[int, float]:
    """Bytes allocated at most while a batch is read, and seconds per batch."""
    read(picks[0])
    started = time.perf_counter()
    for items in picks:
        read(items)
    seconds = (time.perf_counter() - started) / len(picks)
    tracemalloc.start()
    read(picks[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, seconds


if __name__ == "__main__":
    main()
