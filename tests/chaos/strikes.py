"""The kinds of faults: what each needs around the run, when it may come, what it does, and how the command may then end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from random import Random

import psutil
from flaky import (
    CLOCK_FILE,
    Failing,
    Proxy,
    can_move_clock,
    clock_library,
    fill,
    namespaces_allowed,
    new_clock,
    own_disk,
    read_only,
    set_back,
)
from watched import NAME, Command, Watched, hung

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "engine")]
from commands import catches, softseg

FIT, WORKER = "ray::ImplicitFunc", "ray::RayTrainWorker"  # titles of the processes of fits, and of workers of a fit of two
MOMENTS = {  # the first file of this name
    "prepared": "stores/*.arrow",
    "training": f"runs/{NAME}/fits/*/*/history.jsonl",
    "one fit done": f"runs/{NAME}/fits/*/[0-9]*.json",
    "a second split": f"runs/{NAME}/fits/*/001*",
    "collected": f"runs/{NAME}/results.parquet",
    "final model": f"runs/{NAME}/fits/*/refit*",
}
SHORT_S, LONG_S, SHARE_LONG = 5.0, 60.0, 0.1  # a stopped process
DISK_MB = 24
INTERRUPTED = -signal.SIGINT  # Python ends so, silently, if the signal came during an `exec`; a shell calls this 130, too


@dataclass
class Scene:
    """A fault: where it acts, what was drawn for it, and when it came."""

    draw: Random
    folder: Path
    mode: str = "ray"  # or "local", or "pair": two workers per fit
    moment: str = "start"
    delay_s: float = 0.0
    disk: Path = field(init=False)
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    watched: Watched = field(init=False)
    database: Path | None = None  # of MLflow, if it is not in the run folder
    names: Callable[[], set[str]] = field(init=False)
    begin: Callable[[], object] = lambda: None  # what makes a server fail
    undo: list[Callable[[], object]] = field(default_factory=list)  # after the command that was struck
    at_end: list[Callable[[], str]] = field(default_factory=list)  # before all is compared; gives what went wrong
    struck: float | None = None
    did: str = ""
    codes: tuple[int, ...] = ()  # with which the command may end, too

    def __post_init__(self) -> None:
        self.disk = self.folder / "d"
        self.names = lambda: {str(path.relative_to(self.disk)) for path in self.disk.rglob("*")}

    def wait(self, command: Command, happened: Callable[[], bool]) -> bool:
        """Wait for something that the run does; False if it ends before."""
        while command.process.poll() is None:
            with suppress(FileNotFoundError):  # a folder that was just removed
                if happened():
                    return True
            time.sleep(0.03)
        return False

    def comes(self, command: Command) -> bool:
        """Wait for the moment of the fault; False if the run has ended before it."""
        pattern = MOMENTS.get(self.moment)
        if pattern and not self.wait(command, lambda: any(fnmatch(name, pattern) for name in self.names())):
            return False
        until = time.monotonic() + self.delay_s
        return self.wait(command, lambda: time.monotonic() >= until)

    def victim(self, command: Command, *titles: str) -> psutil.Process | None:
        """One of the processes with such a title, as soon as there are any; None if the run ends before."""
        found: list[psutil.Process] = []

        def look() -> bool:
            found.extend(process for title in titles for process in self.watched.titled(title))
            return bool(found)

        return self.draw.choice(sorted(found, key=lambda process: process.pid)) if self.wait(command, look) else None


Strike = Callable[[Scene, Command], None]
Around = Callable[[Scene], AbstractContextManager[None]]


@contextmanager
def nothing(scene: Scene) -> Iterator[None]:
    """A folder of this machine."""
    scene.disk.mkdir()
    yield


@contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    """A disk of its own."""
    with own_disk(scene.disk, DISK_MB):
        yield


@contextmanager
def movable_clock(scene: Scene) -> Iterator[None]:
    """Processes of the run take their time from a file."""
    scene.disk.mkdir()
    file = scene.folder / "clock"
    new_clock(file)
    scene.environment = {"LD_PRELOAD": str(clock_library(scene.folder)), CLOCK_FILE: str(file)}
    yield


@contextmanager
def failing_s3(scene: Scene) -> Iterator[None]:
    """Runs and stores in a bucket."""
    from s3_server import BUCKET, s3_server, stored

    scene.disk.mkdir()
    often = scene.draw.random() < 0.5
    every, burst = (scene.draw.randint(3, 12), 1) if often else (scene.draw.randint(30, 60), scene.draw.randint(2, 12))
    made: list[Failing] = []

    def failing(app: Callable[..., object]) -> Failing:
        made.append(Failing(app, every, burst, str(scene.draw.random())))  # type: ignore[arg-type]
        return made[0]

    with s3_server(failing) as environment:
        scene.environment, scene.names = environment | {"CHECKPOINT_EVERY_S": "1"}, lambda: set(stored())
        scene.options = ("--out", f"s3://{BUCKET}/runs", "--stores", f"s3://{BUCKET}/stores")

        def look() -> str:
            for name, (written, content) in stored().items():
                if fnmatch(name, MOMENTS["one fit done"]) and "/" not in name.partition("/fits/")[2].partition("/")[2]:
                    scene.watched.note(name.removeprefix(f"runs/{NAME}/"), (written, content))
            return ""

        def fetch() -> str:
            look()
            scene.watched.stop_looking()  # a file that is half fetched would seem changed
            for name, (written, content) in stored().items():
                (scene.disk / name).parent.mkdir(parents=True, exist_ok=True)
                (scene.disk / name).write_bytes(content)
                os.utime(scene.disk / name, ns=(written, written))
            return ""

        def fail(on: bool) -> None:
            made[0].on = on
            scene.did = f"each {every}th call begins {burst} that fail, {made[0].failed} failed"

        scene.begin, scene.undo, scene.at_end = partial(fail, on=True), [look, partial(fail, on=False)], [fetch]
        yield


@contextmanager
def flapping_mlflow(scene: Scene) -> Iterator[None]:
    """MLflow on a server behind a proxy."""
    from test_tracking import free_port, server

    scene.disk.mkdir()
    with server(port := free_port(), scene.folder / "mlflow"):
        proxy = Proxy(port)
        scene.environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{proxy.port}"}
        scene.database = scene.folder / "mlflow" / "server.db"
        ended = threading.Event()

        def flap() -> None:
            while not ended.wait(scene.draw.uniform(0.1, 3)):
                proxy.flap(opened=not proxy.open)
            proxy.flap(opened=True)

        flapping = threading.Thread(target=flap, daemon=True)

        def stop() -> None:
            ended.set()
            if flapping.is_alive():
                flapping.join()

        def sync() -> str:
            sent = softseg("sync", scene.watched.run, "--json", cwd=scene.folder, env=scene.watched.environment)
            return "" if sent.returncode == 0 else f"softseg sync: {sent.stdout}{sent.stderr}"

        scene.begin, scene.undo, scene.at_end = flapping.start, [stop], [sync]
        try:
            yield
        finally:
            stop()
            proxy.close()


def kill_driver(scene: Scene, command: Command) -> None:
    command.process.kill()
    scene.struck = time.time()


def kill(*titles: str) -> Strike:
    """Of the processes with these titles, one."""

    def strike(scene: Scene, command: Command) -> None:
        if (victim := scene.victim(command, *titles)) is not None:
            with suppress(psutil.NoSuchProcess):
                scene.did = victim.name()
                victim.kill()
                scene.struck = time.time()

    return strike


def stop_process(scene: Scene, command: Command) -> None:
    """Of driver or fit."""
    fit = scene.mode == "ray" and scene.draw.random() < 0.5
    victim = scene.victim(command, FIT) if fit else psutil.Process(command.process.pid)
    seconds = LONG_S if scene.draw.random() < SHARE_LONG else SHORT_S
    scene.did = f"{'fit' if fit else 'driver'}, {seconds:.0f} s"
    if victim is not None:
        with suppress(psutil.NoSuchProcess):
            victim.suspend()
            scene.struck = time.time()
            time.sleep(seconds)
            victim.resume()


def send_signal(scene: Scene, command: Command) -> None:
    """As a terminal does to its processes, or a scheduler to one."""
    kind = scene.draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    if not scene.wait(command, lambda: catches(command.process.pid, signal.SIGTERM)):
        return
    scene.did, scene.struck = kind.name, time.time()
    scene.codes = (0,) if scene.moment == "final model" else ()  # all may be done by then
    scene.at_end.append(lambda: next((line for _, line in command.lines if "wait in" in line), ""))  # its thread must not hang
    send = os.kill if kind == signal.SIGTERM else os.killpg
    send(command.process.pid, kind)


def fill_disk(scene: Scene, command: Command) -> None:
    left = scene.draw.choice((0, 0, scene.draw.randint(0, 200_000)))
    filler = fill(scene.disk, left)
    scene.did, scene.struck = f"{left} bytes left", time.time()
    scene.undo.append(filler.unlink)


def make_read_only(scene: Scene, command: Command) -> None:
    context = read_only(scene.disk)
    context.__enter__()
    scene.struck = time.time()
    scene.undo.append(lambda: context.__exit__(None, None, None))


def delete_store(scene: Scene, command: Command) -> None:
    for store in (scene.disk / "stores").glob("*.arrow"):
        store.unlink()
        scene.struck = time.time()


def move_clock(scene: Scene, command: Command) -> None:
    seconds = scene.draw.choice((60.0, 3600.0, 7 * 86400.0)) * scene.draw.uniform(0.5, 1.5)
    set_back(scene.folder / "clock", seconds)
    scene.did, scene.struck = f"{seconds:.0f} s", time.time()


def begin_to_fail(scene: Scene, command: Command) -> None:
    scene.struck = time.time()
    scene.begin()


def second_driver(scene: Scene, command: Command) -> None:
    scene.struck = time.time()
    second = scene.watched.start()
    scene.undo.append(lambda: hung(second, 240.0))


@dataclass(frozen=True)
class Kind:
    """What is done, how often of all, to which runs, when, and with which exit codes the command may end.

    `says`: what its line says if that is 2.
    """

    name: str
    share: float
    strike: Strike
    modes: tuple[str, ...]
    codes: tuple[int, ...]
    moments: tuple[str, ...] = tuple(MOMENTS)
    says: str = ""
    around: Around = nothing
    trains_again: bool = False  # is the time until then of interest?


ON_RAY, OFTEN_HERE = ("ray",), ("ray", "local", "local")
EVER, RUNS = ("start", "start", *MOMENTS), ("training", "one fit done", "a second split")
DISK = ("start", "prepared", "training", "one fit done", "a second split", "collected", "final model")
KINDS = [
    Kind("the driver is killed", 12, kill_driver, ("ray", "local"), (-9,), EVER, trains_again=True),
    Kind("the process of a fit is killed", 10, kill(FIT), ON_RAY, (0,), (*RUNS, "final model"), trains_again=True),
    Kind("a worker of a fit of two is killed", 7, kill(WORKER), ("pair",), (0,), RUNS, trains_again=True),
    Kind("the holder of a group of workers is killed", 6, kill(FIT, "ray::TrainController"), ("pair",), (0, 1), RUNS,
         trains_again=True),
    Kind("Ray's raylet is killed", 6, kill("raylet"), ("ray", "pair"), (0, 1, 2), (*RUNS, "final model"), "Ray",
         trains_again=True),
    Kind("the driver or a fit stops for a while", 8, stop_process, OFTEN_HERE, (0,), EVER),
    Kind("Ctrl-C, SIGTERM or SIGHUP", 12, send_signal, OFTEN_HERE, (130, INTERRUPTED), EVER),
    Kind("the disk is full", 7, fill_disk, OFTEN_HERE, (0, 2), DISK, "No space left", small_disk),
    Kind("the disk can be read only", 6, make_read_only, OFTEN_HERE, (0, 2), DISK, "Read-only|read-only", small_disk),
    Kind("the store is deleted", 4, delete_store, OFTEN_HERE, (0, 2), ("prepared", *RUNS, "collected"), r"stores"),
    Kind("the clock is set back", 5, move_clock, OFTEN_HERE, (0,), EVER, around=movable_clock),
    Kind("S3 fails every k-th call", 6, begin_to_fail, OFTEN_HERE, (0, 2), ("start", "prepared", "training"), "s3://",
         failing_s3),
    Kind("the MLflow server comes and goes", 6, begin_to_fail, ("local",), (0, 1), ("start",), around=flapping_mlflow),
    Kind("a second driver", 5, second_driver, OFTEN_HERE, (0, 2), ("start", "start", "start", "prepared", "training"),
         "in use by"),
]  # fmt: skip


def kinds() -> list[Kind]:
    """Those that this machine allows."""
    lacking = {small_disk: not namespaces_allowed(), movable_clock: not can_move_clock()}
    return [kind for kind in KINDS if not lacking.get(kind.around)]
