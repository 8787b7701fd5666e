"""The way to an MLflow server: its address, the spool of what it has not got yet, and the thread that sends.

A record is in `mlflow_spool.jsonl` of the run folder before it is sent and leaves it when it was. So what waits survives a full
disk, a server that is away, a close that gives up and a killed driver. Runs are found by tags: sent twice does no harm.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softseg_dist.errors import UserError, in_words, no_room
from softseg_dist.places import Address, replace_file

if TYPE_CHECKING:
    from softseg_dist.tracking.server import MlflowServer

COLLECT_S, LONGEST_S = 0.5, 30.0  # records of this long go out together: all epochs of a fit in one call
SHARE = 0.2  # of the time goes to sending, so that a queue that grows is sent in fewer and larger calls
RETRY_S = 30.0  # pause between two tries to reach a server that is down
PROBE_S = 3.0
CHUNK_BYTES = 2**20  # of the spool are sent at a time
LONGEST_BYTES = 2**22  # of the spool stay in the file after they were sent
ENVIRONMENT_URI = "MLFLOW_TRACKING_URI"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql", "oracle")
LATER = re.compile(  # errors after which the same record may be sent again: no answer, no login, too busy
    r"API request to \S+ failed with (timeout )?exception|failed with error code (40[138]|429|50[234])"
    r"|TEMPORARILY_UNAVAILABLE|DEADLINE_EXCEEDED|LIMIT_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAUTHORIZED"
)
TrackingRecord = dict[str, Any]


def server_address(given: str | Address | None) -> Address | None:
    """The address of an MLflow server or database, by default that of MLFLOW_TRACKING_URI; None if there is neither.

    Raises UserError if MLflow has no such kind of address, or the folder or the driver of the database is not there.
    """
    if given is None and not (given := os.environ.get(ENVIRONMENT_URI)):
        return None
    address = given if isinstance(given, Address) else Address.of(given)
    scheme, mark, rest = address.shown.partition("://")
    kind, plugins = scheme.partition("+")[0], {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if address.shown != "databricks" and (not mark or kind not in ("http", "https", "databricks", *DATABASES, *plugins)):
        shown = address.shown if mark else re.sub(r"^.*@|[?#].*$", "", address.shown)
        do = "give http://HOST:PORT of a server, or a database such as sqlite:////FOLDER/mlflow.db"
        raise UserError(f"the tracking URI {shown} is no address of MLflow; {do}")
    if kind == "sqlite" and (name := rest.partition("?")[0].removeprefix("/")) and not name.startswith("file:"):
        path = Path(name).absolute()
        if not path.parent.is_dir():
            raise UserError(f"the tracking URI {address.shown}: there is no folder {path.parent}; make it, or correct the path")
        if path.exists() and (path.is_dir() or path.open("rb").read(16) not in (b"", b"SQLite format 3\0")):
            raise UserError(f"the tracking URI {address.shown}: {path} is not an SQLite database; give another file")
        return Address.of(f"{scheme}:///{path}{address.shown[len(scheme) + 4 + len(name) :]}")
    if kind in DATABASES:
        _check_driver(address)
    return address


def _check_driver(address: Address) -> None:
    from sqlalchemy import exc, make_url

    try:
        make_url(address.original()).get_dialect().import_dbapi()
    except ImportError as error:
        raise UserError(f"the tracking URI {address.shown} needs the package {error.name}: pip install it") from None
    except (exc.ArgumentError, exc.NoSuchModuleError, ValueError):
        raise UserError(f"the tracking URI {address.shown} is no address of a database that SQLAlchemy knows") from None


def check_server(address: Address | None) -> None:
    """Raise UserError if something answers at an http address that is not MLflow. A server that is down is no mistake."""
    if address is None or not address.shown.startswith("http"):
        return
    try:
        request = f"{address.shown.partition('?')[0].rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
        with urllib.request.urlopen(request, timeout=PROBE_S) as answer:
            body = answer.read()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 407, 408, 429) or error.code >= 500:  # it may take the login that the client has
            return
        body = error.read()
    except http.client.HTTPException as error:
        if isinstance(error, OSError):  # it has hung up
            return
        body = b""
    except OSError:
        return
    try:
        known = isinstance(json.loads(body), dict)
    except ValueError:
        known = False
    if not known:
        raise UserError(f"what answers at the tracking URI {address.shown} is not an MLflow server; correct host, port or path")


class Spool:
    """The queue, in a file of JSON lines, oldest first; a line torn by a crash is left out. One process uses it at a time.

    What the disk does not take waits in memory until it does.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self._lock = threading.Lock()
        self._base = 0  # bytes that were cut from the beginning of the file since
        self._first, self._end = 0, path.stat().st_size if path.is_file() else 0  # the bytes of what was not sent
        self._old = self._end  # here the records of earlier sessions end
        self._unkept: list[TrackingRecord] = []
        self._closed = False

    def append(self, records: Sequence[TrackingRecord]) -> None:
        """Add records at the end."""
        with self._lock:
            self._unkept += records
            try:
                with self.path.open("a+b") as file:
                    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                        file.write(b"\n")  # ends a line that a crash or a full disk has torn
                    file.write(_lines(self._unkept))
                self._unkept, self._end = [], self._base + self.path.stat().st_size
            except OSError as error:  # the disk is full, which the ledger reports
                self.problem = str(error)

    @property
    def end(self) -> int:
        """Where the last record ends now."""
        return self._end

    def take(self, end: int) -> tuple[list[TrackingRecord], bool, Callable[[], None]]:
        """The next records up to `end`, whether they are of an earlier session, and what to call when all of them were sent."""
        with self._lock:
            records, first = self._read(end)
            while not records and first > self._first:  # nothing but torn lines
                self._first = first
                records, first = self._read(end)
            old = first <= self._old

        def release() -> None:
            with self._lock:
                if self._closed:
                    return
                self._first = first
                if self.path.is_file() and (first == self._end or first - self._base > LONGEST_BYTES):
                    self._cut()

        return coalesced(records), old, release

    def close(self) -> tuple[int, int]:
        """Leave what was not sent, and no file if there is nothing; returns how many records wait, and how many only in memory."""
        self.append(())
        with self._lock:
            self._closed, num_waiting = True, int(self._first < self._end)
            try:
                lines = self.path.read_bytes()[self._first - self._base :].split(b"\n") if num_waiting else []
                waiting = coalesced([*filter(None, map(_record, lines))])
                num_waiting = len(waiting)
                if waiting:
                    replace_file(self.path, lambda partial: partial.write_bytes(_lines(waiting)))
                elif self.path.is_file():
                    self.path.unlink()
            except OSError as error:  # it stays as it was
                self.problem = str(error)
        return num_waiting, len(self._unkept)

    def _cut(self) -> None:
        """Shorten the file to what was not sent."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._first - self._base)
                rest = file.read(self._end - self._first)
            if rest:
                replace_file(self.path, lambda partial: partial.write_bytes(rest))
            else:
                os.truncate(self.path, 0)
            self._base = self._first
        except OSError as error:
            self.problem = str(error)

    def _read(self, end: int) -> tuple[list[TrackingRecord], int]:
        """Records from the first that was not sent, of a chunk or one line more, and where they end; torn lines are left out."""
        until = self._old if self._first < self._old else min(end, self._end)
        if self._first >= until:
            return [], self._first
        try:
            with self.path.open("rb") as file:
                file.seek(self._first - self._base)
                text = file.read(min(CHUNK_BYTES, until - self._first))
                text += b"" if text.endswith(b"\n") else file.readline()
        except OSError as error:
            self.problem = str(error)
            return [], self._first
        return [*filter(None, map(_record, text.split(b"\n")))], self._first + len(text) if text else until


def _lines(records: Sequence[TrackingRecord]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _record(line: bytes) -> TrackingRecord | None:
    """The record in a line; None if it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_one = isinstance(record, dict) and isinstance(record.get("key"), str) and isinstance(record.get("what"), str)
    kinds = {"metrics": list, "params": dict, "tags": dict} if is_one and record["what"] == "log" else {}
    return record if is_one and all(isinstance(record.get(name), kind) for name, kind in kinds.items()) else None


def coalesced(records: Sequence[TrackingRecord]) -> list[TrackingRecord]:
    """The same records; logs of a run that follow each other, without another record of that run between, become the first."""
    joined: list[TrackingRecord] = []
    last: dict[str, TrackingRecord] = {}  # of each run
    for record in records:
        log = last.get(record["key"])
        if log and log["what"] == record["what"] == "log" and log.get("known") == record.get("known"):
            log["metrics"] = log["metrics"] + record["metrics"]
            log["params"], log["tags"] = log["params"] | record["params"], log["tags"] | record["tags"]
        else:
            last[record["key"]] = record = dict(record)
            joined.append(record)
    return joined


class Connection:
    """A server that may be out of reach; `problem` says why. `refused` has what it did not take: how often, and why first."""

    def __init__(self, address: Address, connect: Callable[[str], MlflowServer]) -> None:
        self._address, self._connect = address, connect
        self._server: MlflowServer | None = None
        self.problem = ""
        self.refused: dict[str, tuple[int, str]] = {}

    def send(self, record: TrackingRecord) -> bool:
        """False if the record is to be sent again later. What the server refuses of it is noted: it would do so again."""
        try:
            try:
                refused = self._open().apply(record)
            except Exception as error:  # whatever MLflow raises: a server that can be reached is asked once more
                if self._server is None or self._is_for_later(error):
                    raise
                self._server.ping()
                refused = self._server.apply(record)
        except Exception as error:  # noqa: BLE001 - an error of the tracking server must never reach the study
            problem = self._in_words(error)
            if self._server is None or self._is_for_later(error) or self.reach() is not None:
                self.problem = problem
                return False
            refused = [(f"{record['what']} {record['key']}", problem)]
        self.problem = ""
        for item, reason in refused:
            number, first = self.refused.get(item, (0, f"of {record['key']}: {self._address.redact(reason)[:300]}"))
            self.refused[item] = number + 1, first
        return True

    def reach(self) -> str | None:
        """None if the server can be reached, else why not."""
        try:
            self._open().ping()
        except Exception as error:  # noqa: BLE001 - out of reach, in whatever way
            self.close()
            return self._in_words(error)
        return None

    def close(self) -> None:
        """Give back files and sockets."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def _open(self) -> MlflowServer:
        self._server = self._server or self._connect(self._address.original())
        return self._server

    def _is_for_later(self, error: Exception) -> bool:
        """Not those that a server gives for what it will never take. A disk that is full now takes the record later."""
        return no_room(error) is not None or LATER.search(f"{getattr(error, 'error_code', '')} {error}") is not None

    def _in_words(self, error: Exception) -> str:
        return self._address.redact(in_words(error))[:300]


class Delivery:
    """A thread that sends what is put, in order. `num_late` counts the records of earlier sessions that were sent."""

    def __init__(self, spool: Spool, connection: Connection) -> None:
        self._spool, self._connection = spool, connection
        self._pending: deque[TrackingRecord] = deque()
        self._old, self._release = False, lambda: None
        self._num_sent = self.num_late = 0
        self._wake, self._closing, self._give_up = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, records: Sequence[TrackingRecord]) -> None:
        """Keep records for the thread."""
        self._spool.append(records)
        self._wake.set()

    def close(self, wait_s: float | None) -> tuple[int, int]:
        """Wait while records are sent, each within `wait_s`; returns how many wait in the spool, and how many only in memory."""
        self._closing.set()
        self._wake.set()
        before = -1
        try:
            while self._thread.is_alive() and before != self._num_sent:
                before = self._num_sent
                self._thread.join(wait_s)
        except KeyboardInterrupt:  # waiting no longer loses nothing
            pass
        self._give_up.set()
        return self._spool.close()

    def _serve(self) -> None:
        pause_s, closing = COLLECT_S, False
        while not closing:
            self._wake.wait()
            self._closing.wait(pause_s)
            self._wake.clear()
            closing, started = self._closing.is_set(), time.monotonic()
            if self._send_all(self._spool.end):  # what comes meanwhile collects
                pause_s = min(max(COLLECT_S, (time.monotonic() - started) * (1 / SHARE - 1)), LONGEST_S)
            else:
                pause_s = RETRY_S
                self._wake.set()
        self._connection.close()

    def _send_all(self, end: int) -> bool:
        """Send what is in the spool up to `end`; False if the server is out of reach, or the wait is over."""
        while True:
            while self._pending:
                if self._give_up.is_set() or not self._connection.send(self._pending[0]):
                    return False
                self._pending.popleft()
                self._num_sent += 1
                self.num_late += self._old
            self._release()
            records, self._old, self._release = self._spool.take(end)
            if not records:
                return True
            self._pending.extend(records)
