"""What a run uses, made unreliable: an S3 that fails, an MLflow server that comes and goes, a clock, a disk."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

CLOCK_FILE = "SOFTSEG_CHAOS_CLOCK"
CLOCK = r"""
/* A wall clock that a test can move: LD_PRELOAD it, and write the offset in seconds, a double, into the file that
   SOFTSEG_CHAOS_CLOCK names. CLOCK_MONOTONIC and the times of files, which the kernel gives, stay as they are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile double *offset;

static double moved(void) {
    if (!offset) {
        static double none = 0.0;
        const char *path = getenv("SOFTSEG_CHAOS_CLOCK");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        void *at = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
        if (file >= 0) close(file);
        offset = at == MAP_FAILED ? &none : (volatile double *)at;
    }
    return *offset;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += (time_t)moved();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    now->tv_sec = at.tv_sec;
    now->tv_usec = at.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (now) *now = at.tv_sec;
    return at.tv_sec;
}
"""


class Failing:
    """A WSGI application. While `on`, every `every`-th call begins `burst` that fail, with 500, 503 or a cut answer."""

    def __init__(self, app: Callable[..., Iterable[bytes]], every: int, burst: int, seed: str) -> None:
        self.app, self.every, self.burst, self.on, self.failed = app, every, burst, False, 0
        self._calls, self._draw, self._lock = 0, random.Random(seed), threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self._calls += self.on
            fails = self.on and self._calls >= self.every and self._calls % self.every < self.burst
            way = self._draw.choice(("500 Internal Server Error", "503 Slow Down", "")) if fails else None
            self.failed += fails
        if way is None:
            return self.app(environ, start_response)
        if not way:
            raise ConnectionResetError("the server hangs up")  # werkzeug closes the connection
        start_response(way, [("Content-Length", "0"), ("Connection", "close")])
        return [b""]


class Proxy:
    """Passes connections on to a port of this machine while `open`; closing it cuts those that there are."""

    def __init__(self, port: int) -> None:
        self._to, self._pairs, self.open, self._ended = port, list[socket.socket](), True, False
        self._listening = self._listen(0)
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _listen(self, port: int) -> socket.socket:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        return listening

    def flap(self, opened: bool) -> None:
        """Open or close it."""
        self.open = opened
        if not opened:
            for end in self._pairs:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an orderly end
                    end.shutdown(socket.SHUT_RDWR)
            self._pairs.clear()

    def close(self) -> None:
        """For good."""
        self._ended = True
        self.flap(opened=False)
        self._listening.close()

    def _accept(self) -> None:
        while not self._ended:
            try:
                client, _ = self._listening.accept()
                if not self.open:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                continue
            self._pairs += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(one, other), daemon=True).start()


def _copy(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def can_move_clock() -> bool:
    """Whether there is a C compiler, for the library that moves it."""
    return shutil.which("cc") is not None and sys.platform == "linux"


def clock_library(folder: Path) -> Path:
    """The library that moves the clock of the processes that load it."""
    library, source = folder / "clock.so", folder / "clock.c"
    source.write_text(CLOCK)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@contextmanager
def own_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """A small disk; needs a mount namespace of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(disk: Path, left_bytes: int) -> Path:
    """Fill a disk but for some bytes, with a file that is returned."""
    filler = disk / ".filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, max(0, filler.stat().st_size - left_bytes))
    return filler


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """New files of a disk cannot be opened for writing; those that are open can still be written."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@cache
def namespaces_allowed() -> bool:
    """Whether this user may mount a disk in a namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def set_back(file: Path, seconds: float) -> None:
    """Move the clock of the processes that have loaded the library with this file."""
    with file.open("r+b") as clock:
        clock.write(struct.pack("d", -seconds))


def new_clock(file: Path) -> None:
    """A clock that is right."""
    file.write_bytes(bytes(ctypes.sizeof(ctypes.c_double)))
