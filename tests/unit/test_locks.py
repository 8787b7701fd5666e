"""Locks: one holder, who is named; a killed process frees its lock; a file system without locks is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from softseg_dist import Phantom, Preprocess
from softseg_dist.data.store import build_store
from softseg_dist.errors import UserError
from softseg_dist.locks import GLANCE_S, hold, holder, is_locked_here
from softseg_dist.record.ledger import Ledger


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it is killed or the block ends."""
    code = """import sys; from softseg_dist.locks import hold; from pathlib import Path
with hold(Path(sys.argv[1])): print("held", flush=True); input()"""
    arguments = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_another_process_holds_is_refused_and_its_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run" / ".lock"
    with held_elsewhere(path) as process:
        owner = f"process {process.pid} on {os.uname().nodename}"
        assert holder(path) == owner
        with pytest.raises(UserError, match=f"{path.parent}: in use by {owner}; wait"), hold(path):
            pass
        with pytest.raises(UserError, match="s3://lab/run: in use by"), hold(path, "s3://lab/run"):
            pass


def test_a_lock_cannot_be_taken_twice_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with hold(path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), hold(path):
            pass
        assert holder(path) is not None
    with hold(path):
        pass
    assert holder(path) is None


def test_a_killed_process_frees_its_lock_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with held_elsewhere(path) as process:
        process.kill()
        process.wait()
        assert str(process.pid) in path.read_text()
        assert holder(path) is None
        with hold(path):
            assert path.read_text().startswith(f"process {os.getpid()} on")


def test_a_lock_is_waited_for_if_asked(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    order = []

    def follow() -> None:
        with hold(path, wait=True):
            order.append("second")

    with hold(path):
        thread = Thread(target=follow)
        thread.start()
        thread.join(2 * GLANCE_S)
        assert thread.is_alive()
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]


def test_a_look_at_a_lock_keeps_no_driver_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, answers = fcntl.flock, [BlockingIOError(errno.EAGAIN, "somebody looks")]

    def looked_at_once(file: int, operation: int) -> None:
        if answers:
            raise answers.pop()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", looked_at_once)
    with hold(tmp_path / ".lock"):
        assert not answers


def test_a_folder_that_nobody_has_locked_has_no_holder_and_gets_no_file(tmp_path: Path) -> None:
    assert holder(tmp_path / ".lock") is None
    assert not list(tmp_path.iterdir())


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with hold(path):
        pass
    before = path.read_text(), path.stat().st_mtime_ns
    assert holder(path) is None
    assert (path.read_text(), path.stat().st_mtime_ns) == before


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the operating system answer every lock with an error."""

    def set_to(number: int) -> None:
        def flock(file: object, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return set_to


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_in_one_line_with_what_to_do(
    answer: Callable[[int], None], tmp_path: Path, number: int
) -> None:
    answer(number)
    refused = rf"^{tmp_path}.*does not support locks \({os.strerror(number)}\); give a folder on a local disk or a bucket URI"
    for wait in (False, True):
        with pytest.raises(UserError, match=refused), hold(tmp_path / ".lock", wait=wait):
            pass
    with pytest.raises(UserError, match=refused), Ledger(tmp_path / "run").lock():
        pass
    data = Phantom(subjects=1, size=(16, 16), num_slices=1)
    with pytest.raises(UserError, match=refused) as error:
        build_store(tmp_path / "stores", data.cases(None), data, Preprocess(dim=2))
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "stores").iterdir() if path.suffix in (".new", ".draft", ".arrow")]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EBADF])
def test_a_lock_that_cannot_be_looked_at_is_not_called_free(answer: Callable[[int], None], tmp_path: Path, number: int) -> None:
    path = tmp_path / ".lock"
    with hold(path):
        pass
    answer(number)
    assert f"process {os.getpid()} on" in str(holder(path))
    assert "if it still runs: the lock" in str(holder(path))


def test_other_errors_of_the_operating_system_are_not_taken_for_a_missing_lock(
    answer: Callable[[int], None], tmp_path: Path
) -> None:
    answer(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), hold(tmp_path / ".lock"):
        pass


def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock"), (tmp_path / ".lock").open("r+") as second:
        start = time.monotonic()
        assert not is_locked_here(second, 0.1)
        assert 0.1 <= time.monotonic() - start < 30
        assert not is_locked_here(second)
