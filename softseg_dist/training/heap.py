"""Memory that a training step has freed is kept for the next step, which needs as much.

By default glibc returns large blocks to the system as soon as they are free, and the system clears every page anew when the next
one is asked for: a third of the time of a small 2D step, most of that of adding two large volumes. Other systems are left alone.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
MOST_BYTES = 2**31 - 1  # as large as they can be: no block goes back by itself


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep what is freed while the block runs, and give it back at its end. From the first time on large blocks lie in the heap."""
    libc = _libc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, MOST_BYTES)
    libc.mallopt(TRIM_THRESHOLD, MOST_BYTES)
    try:
        yield
    finally:
        libc.malloc_trim(0)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
