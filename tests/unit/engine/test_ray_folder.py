"""The private folder of a Ray: for this user alone, on a short path; it goes with its driver, in whatever way that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softseg_dist import Recipe
from softseg_dist.data.splits import Split
from softseg_dist.engine import ray_folder
from softseg_dist.engine.ray_folder import LOCK, PREFIX, SOCKET, VARIABLE, private_folder, processes_of
from softseg_dist.engine.worker import Ending, message_of, run_fit
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.training.task import FitResult, FitTask, Worker

DRIVER = f"""
import os, subprocess, sys
sys.path.insert(0, {str(Path(ray_folder.__file__).parent)!r})
from ray_folder import VARIABLE, private_folder
with private_folder() as folder:
    child = subprocess.Popen(["sleep", "600"], env=os.environ | {{VARIABLE: str(folder)}}, stdout=subprocess.DEVNULL)
    print(folder, child.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where folders are made; `tmp_path` is too long for sockets."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def start_driver() -> tuple[subprocess.Popen[str], Path, int]:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    folder, pid = driver.stdout.readline().split()
    end = time.monotonic() + 20
    while sys.platform == "linux" and processes_of(Path(folder)) != [int(pid)]:  # it has no environment yet while it begins
        assert time.monotonic() < end
        time.sleep(0.02)
    return driver, Path(folder), int(pid)


def wait_until_gone(path: Path) -> None:
    """The folder, and then its watcher."""
    end = time.monotonic() + 20
    while path.exists() or processes_of(path):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not tell the environment of other processes")
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_folder_and_processes_go_with_their_driver(base: Path, how: str) -> None:
    driver, folder, _ = start_driver()
    bystander = subprocess.Popen([sys.executable, "-c", "input()", str(folder)], stdin=subprocess.PIPE)  # it only names the folder
    if how == "ends":
        driver.communicate("")
    else:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    wait_until_gone(folder)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_the_next_start_clears_what_driver_and_watcher_left_but_nothing_of_the_living(base: Path) -> None:
    left, born, old, foreign = (base / f"{PREFIX}{name}" for name in ("left", "born", "old", "foreign"))
    for folder in (left, born, old):
        folder.mkdir()
    (left / LOCK).write_text("1")
    os.utime(old, (0, 0))
    foreign.symlink_to(base)
    driver, alive, _ = start_driver()  # with the processes of `driver` goes nothing of this
    with private_folder() as own, private_folder() as other:
        assert {own, other, alive, born, foreign} == set(base.glob(f"{PREFIX}*"))
        assert own.stat().st_mode & 0o777 == 0o700
        driver.communicate("")
    assert {born, foreign} == set(base.glob(f"{PREFIX}*"))


def test_a_temporary_folder_that_is_too_long_for_sockets_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    with private_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert len(os.fsencode(folder.parent / SOCKET)) < 107
        assert VARIABLE not in os.environ


def test_a_further_worker_of_a_fit_writes_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what a killed one leaves would stay."""

    def fit(task: FitTask, worker: Worker) -> FitResult:
        raise UserError(task.folder)

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    split = Split(index=0, train=("s1",), validation=("s2",), test=("s3",))
    task = FitTask(
        study="s", seed=0, candidate="a", recipe=Recipe(), split=split, objective="brier_skill", store="none.arrow",
        store_fingerprint="0" * 16, folder=str(tmp_path / "fit"),
    )  # fmt: skip
    message = message_of(task, Place.at(tmp_path / "stop"))
    ending = Ending.of(run_fit(fit, None, message, Worker(rank=1), print))
    assert Path(ending.text).parent == tmp_path
