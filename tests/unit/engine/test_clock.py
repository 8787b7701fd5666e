"""A process has one clock for all time limits in it: the one that runs out first ends the process, if it is still held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# One process imports the package and runs every scenario in a fork of its own, with a folder of its own.
SCENARIOS = """
import json, os, sys, threading, time
from pathlib import Path
from softseg_dist.engine.worker import time_limit

HERE = Path(sys.argv[1])

def wait(folder, limit_s, name):
    with time_limit(limit_s, folder / name):
        threading.Event().wait()

def at_once(folder):
    for limit_s, name in ((50, "a"), (0.2, "b"), (40, "c")):
        threading.Thread(target=wait, args=(folder, limit_s, name)).start()
    threading.Event().wait()

def released(folder):
    with time_limit(0.3, folder / "a"), time_limit(50, folder / "b"):
        pass
    time.sleep(0.5)

def released_then_held(folder):
    with time_limit(0.1, folder / "a"):
        pass
    wait(folder, 0.2, "b")

def without_limit(folder):
    (folder / "a").write_text("old")
    with time_limit(None, folder / "a"):
        pass

codes = {}
for scenario in (at_once, released, released_then_held, without_limit):
    folder = HERE / scenario.__name__
    folder.mkdir()
    if (child := os.fork()) == 0:
        scenario(folder)
        os._exit(0)
    codes[scenario.__name__] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock")


@pytest.fixture(scope="module")
def codes(here: Path) -> dict[str, int]:
    """The exit code of every scenario; what it leaves lies in its folder in `here`."""
    command = [sys.executable, "-c", SCENARIOS, str(here)]
    done = subprocess.run(command, timeout=60, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_the_limit_that_runs_out_first_leaves_the_stacks_whichever_was_set_first(codes: dict[str, int], here: Path) -> None:
    assert codes["at_once"] != 0
    left = {path.name: bool(path.read_text()) for path in (here / "at_once").iterdir()}
    assert left == {"a": False, "b": True, "c": False}
    assert "in wait" in (here / "at_once/b").read_text()


def test_a_limit_that_is_released_does_not_end_the_process_and_leaves_nothing(codes: dict[str, int], here: Path) -> None:
    assert codes["released"] == 0
    assert list((here / "released").iterdir()) == []


def test_the_next_limit_is_watched_when_the_first_is_released(codes: dict[str, int], here: Path) -> None:
    assert codes["released_then_held"] != 0
    assert [path.name for path in (here / "released_then_held").iterdir()] == ["b"]


def test_no_limit_leaves_nothing_and_removes_old_stacks(codes: dict[str, int], here: Path) -> None:
    assert codes["without_limit"] == 0
    assert list((here / "without_limit").iterdir()) == []
