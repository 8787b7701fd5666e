"""A Ray that a run starts is for its user alone: sockets, job endpoints, tokens, modes, keys; and nothing of it stays.

The run is a driver of its own, `scripted.py`, whose fits last until it is stopped. It has planted keys and a dead RAY_ADDRESS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest

from softseg_dist.engine.ray_cluster import GONE
from softseg_dist.engine.ray_folder import VARIABLE

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
SECRETS = {name: f"planted-{name}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
JOBS = ["/api/jobs/", "/api/job_agent/jobs/"]
TWICE = """
import os, ray
from softseg_dist.engine.ray_cluster import one_ray, ray_at
before = dict(os.environ)
for _ in range(2):
    with one_ray(), ray_at(None):
        started = ray.get_runtime_context().gcs_address
        assert ray.get(ray.remote(os.getenv).remote("RAY_AUTH_MODE")) == "token"
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ
        with ray_at(None):
            assert ray.get_runtime_context().gcs_address == started
    assert dict(os.environ) == before and not ray.is_initialized()
"""
CONNECT = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('connected')"


@contextmanager
def driver_of(folder: Path, script: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | SECRETS | {"PYTHONPATH": str(HERE), "RAY_ADDRESS": "127.0.0.1:1", "MARK": str(folder)}
    command = [sys.executable, str(HERE / "scripted.py"), str(folder), json.dumps(script)]
    with (folder.parent / "out").open("w") as out:
        driver = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


def wait_until(happened: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def relatives(mark: str) -> list[psutil.Process]:
    """The driver and all processes that come from it, also those whose parents have died."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("MARK") == mark:
                found.append(process)
    return found


def listening(processes: list[psutil.Process]) -> dict[tuple[str, int], str]:
    """Address -> process of all sockets that accept connections."""
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            name = process.name()
            found |= {tuple(c.laddr): name for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def abstract_sockets(processes: list[psutil.Process]) -> set[str]:
    """Unix sockets without a file, which have no mode."""
    found = set()
    for process in processes:
        with suppress(psutil.Error):
            found |= {c.laddr for c in process.net_connections("unix") if c.laddr.startswith(("@", "\0"))}
    return found


def post_job(port: int, path: str) -> int | None:
    """The status that answers a job that is posted without a token; None if the answer is none of HTTP."""
    body = json.dumps({"entrypoint": "true"}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return None


def connected_without_token(port: int) -> str:
    """What Ray says to another driver."""
    nothing = {"HOME": "/nonexistent", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray then leaves 127.0.0.1 as it is
    bare = {name: value for name, value in os.environ.items() if name not in TOKENS} | nothing
    command = [sys.executable, "-c", CONNECT, f"127.0.0.1:{port}"]
    with subprocess.Popen(command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as other:
        assert other.stdout is not None
        said = next((line for line in other.stdout if "InvalidAuthToken" in line or "connected" in line), "")
        other.kill()
    return said


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_can_be_reached_by_its_user_alone_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    run, seen, ended = tmp_path / "run", {}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.update(listening(relatives(str(run))))

    with driver_of(run, {"sleep_s": 600.0, "workers_per_fit": workers}) as driver:
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            wait_until(lambda: driver.poll() is not None or len(list(run.glob("fits/*/*/starts"))) == 2 // workers, 120)
        finally:
            ended.set()
            watching.join()
        processes = relatives(str(run))
        seen |= listening(processes)
        assert len(seen) > 4
        assert {address: name for address, name in seen.items() if address[0] not in ("127.0.0.1", "::ffff:127.0.0.1")} == {}
        assert abstract_sockets(processes) == set()
        with ThreadPoolExecutor(20) as posts:
            answers = set(posts.map(post_job, sorted(port for _, port in seen for _ in JOBS), JOBS * len(seen)))
        assert answers == {None, 401}
        gcs = next(port for (_, port), name in seen.items() if name == "gcs_server")
        assert "InvalidAuthToken" in connected_without_token(gcs)
        folder = Path(next(p.environ()[VARIABLE] for p in processes if p.name() == "gcs_server"))
        check_folder(folder, processes)
        os.killpg(driver.pid, signal.SIGTERM)  # to the driver alone: Ray's processes are in groups of their own
        assert driver.wait(60) == 0
    assert json.loads((tmp_path / "out").read_text().splitlines()[-1])["interrupted"]
    assert relatives(str(run)) == []
    assert not folder.exists()


def check_folder(folder: Path, processes: list[psutil.Process]) -> None:
    """Modes, and where token and keys may be read."""
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    token = (folder / "token").read_text()
    assert len(token) == 64
    texts = {" ".join(process.cmdline()) for process in processes}
    texts |= {file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file() and file.name != "token"}
    assert not [text for text in texts for secret in (token, *SECRETS.values()) if secret in text]


def test_a_process_may_start_one_after_another_and_has_its_environment_back() -> None:
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "t" * 32}
    ended = subprocess.run([sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


@pytest.mark.long
@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0, 2.0, 4.0])
def test_nothing_is_left_a_minute_after_the_driver_was_killed_at_its_start(tmp_path: Path, after_s: float) -> None:
    run = tmp_path / "run"
    with driver_of(run, {"sleep_s": 600.0}) as driver:
        wait_until(lambda: any(VARIABLE in process.environ() for process in alive(str(run))), 60)
        folder = Path(next(found for process in alive(str(run)) if (found := process.environ().get(VARIABLE))))
        time.sleep(after_s)  # the moment of the accident
        driver.kill()
        driver.wait()
    wait_until(lambda: not folder.exists() and relatives(str(run)) == [], 60)
    assert not [file for file in Path("/dev/shm").glob("*plasma*") if file.stat().st_uid == os.getuid()]


@pytest.mark.long
def test_a_run_whose_raylet_dies_ends_with_a_sentence_that_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with driver_of(run, {"sleep_s": 600.0}) as driver:
        wait_until(lambda: len(list(run.glob("fits/*/*/starts"))) == 2, 120)
        next(process for process in relatives(str(run)) if process.name() == "raylet").kill()
        assert driver.wait(120) == 1
    assert (tmp_path / "out").read_text().splitlines()[-1].endswith(GONE)
    wait_until(lambda: relatives(str(run)) == [], 60)


def alive(mark: str) -> list[psutil.Process]:
    return [process for process in relatives(mark) if process.is_running()]
