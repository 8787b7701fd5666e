"""A process has one clock for all time limits in it: the one that runs out first ends the process, if it is still held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITH_LIMITS = """
import sys, threading
from pathlib import Path
from softseg_dist.engine.worker import time_limit
def wait(limit_s, name):
    with time_limit(limit_s, Path(sys.argv[1]) / name):
        threading.Event().wait()
"""


def run(folder: Path, code: str) -> int:
    return subprocess.run([sys.executable, "-c", WITH_LIMITS + code, str(folder)], timeout=60).returncode


def test_the_limit_that_runs_out_first_leaves_the_stacks_whichever_was_set_first(tmp_path: Path) -> None:
    threads = "[threading.Thread(target=wait, args=of).start() for of in ((50, 'a'), (0.2, 'b'), (40, 'c'))]"
    assert run(tmp_path, threads) != 0
    assert {path.name: bool(path.read_text()) for path in tmp_path.iterdir()} == {"a": False, "b": True, "c": False}
    assert "in wait" in (tmp_path / "b").read_text()


def test_a_limit_that_is_let_go_ends_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    let_go = """
with time_limit(0.3, Path(sys.argv[1]) / "a"), time_limit(50, Path(sys.argv[1]) / "b"):
    pass
threading.Event().wait(0.5)
"""
    assert run(tmp_path, let_go) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_next_limit_is_watched_when_the_first_is_let_go(tmp_path: Path) -> None:
    assert run(tmp_path, "with time_limit(0.1, Path(sys.argv[1]) / 'a'): pass\nwait(0.2, 'b')") != 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_no_limit_leaves_nothing_but_takes_old_stacks_away(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    assert run(tmp_path, "with time_limit(None, Path(sys.argv[1]) / 'a'): pass") == 0
    assert list(tmp_path.iterdir()) == []
