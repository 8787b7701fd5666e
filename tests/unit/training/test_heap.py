"""A fit keeps the memory that it frees until it ends."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from softseg_dist.training.host_step import kept_heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
PAGES = 30 * 2**20 // resource.getpagesize()  # of each tensor


def new_pages() -> int:
    """How many pages the system has to clear for three large tensors, when as many have just been freed."""
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        a = torch.ones(30 * 2**18)
        b = a + 1
        c = a * b
        del a, b, c
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


def in_use() -> int:
    """Pages of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def show() -> None:
    """New pages within the block; pages in use there, and after it."""
    with kept_heap():
        new, inside = new_pages(), in_use()
    print(json.dumps([new, inside, in_use()]))


@pytest.mark.engine
def test_what_is_freed_is_used_again_and_given_back_at_the_end() -> None:
    # In a process of its own: after thousands of tests something may lie behind the heap, which then cannot grow.
    command = [sys.executable, "-c", "from test_heap import show; show()"]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    new, inside, after = json.loads(told.stdout)
    assert new < 0.1 * PAGES
    assert after < inside - 2 * PAGES
