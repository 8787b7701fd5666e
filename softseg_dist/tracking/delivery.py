"""The way to an MLflow server: its address, the spool of what it has not got yet, and the thread that sends.

A record is in `mlflow_spool.jsonl` of the run folder before it is sent and leaves it when it was. So what waits survives a full
disk, a server that is away, a close that gives up and a killed driver. Runs are found by tags: sent twice does no harm.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from softseg_dist.errors import UserError, in_words, no_room
from softseg_dist.frozen import digest, unsealed
from softseg_dist.places import Address, replace_file

if TYPE_CHECKING:
    from softseg_dist.tracking.server import MlflowServer

COLLECT_S, LONGEST_S = 0.5, 30.0  # records of this long go out together: all epochs of a fit in one call
SHARE = 0.5  # of the time goes to sending at most, so that a queue that grows is sent in fewer and larger calls
RETRY_S = 30.0  # pause between two tries to reach a server that is down
PROBE_S = 3.0
ENVIRONMENT_URI = "MLFLOW_TRACKING_URI"
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
    scheme, mark, _ = address.shown.partition("://")
    plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    if address.shown == "databricks" or (mark and scheme in {"http", "https", "databricks"} | plugins):
        return address
    from sqlalchemy import exc, make_url  # takes a part of a second

    try:
        url = make_url(address.original)
        url.get_dialect().import_dbapi()
    except (exc.ArgumentError, ImportError, ValueError) as error:
        shown = address.shown if mark else re.sub(r"^.*@|[?#].*$", "", address.shown)
        why = f"needs the package {error.name}: pip install it" if isinstance(error, ImportError) else "is no address of MLflow"
        do = "give http://HOST:PORT of a server, or a database such as sqlite:////FOLDER/mlflow.db"
        raise UserError(f"the tracking URI {shown} {why}; {do}") from None
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "").absolute()
        is_database = path.is_file() and path.open("rb").read(16) in (b"", b"SQLite format 3\0")
        if not is_database and (path.exists() or not path.parent.is_dir()):
            raise UserError(f"the tracking URI {address.shown}: {path} is no SQLite database and cannot become one; correct it")
        _, mark, query = address.original.partition("?")
        address = Address.of(f"{sqlite_uri(path)}{mark}{query}")
    return address


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite database. One that is quoted names its driver: else MLflow makes the folder of the quoted path."""
    text = str(path)
    return f"sqlite:///{text}" if unquote(text) == text and "?" not in text else f"sqlite+pysqlite:///{quote(text)}"


def check_server(address: Address | None) -> None:
    """Raise UserError if something answers at an http address that is not MLflow. A server that is down is no mistake."""
    if address is None or not address.shown.startswith("http"):
        return
    request = f"{address.shown.partition('?')[0].rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        with urllib.request.urlopen(request, timeout=PROBE_S) as answer:
            json.load(answer)
    except (OSError, HTTPException, ValueError) as error:
        code = error.code if isinstance(error, urllib.error.HTTPError) else None
        if code == 404 or not isinstance(error, OSError):  # other codes may ask for the login that the client has
            raise UserError(f"what answers at the tracking URI {address.shown} is not an MLflow server; correct it") from None


class Spool:
    """The queue, oldest first, in memory and in a file of lines, each JSON behind its digest: what a process that dies leaves.

    One process uses the file at a time. What the disk does not take waits in memory until it does. Damaged lines are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self._lock = threading.Lock()
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        self._records = deque(coalesced(_records(lines)))
        self._new: list[TrackingRecord] = []  # since the last `collect`
        self._num_old, self.num_sent, self.num_late = len(self._records), 0, 0  # `late`: sent, of earlier sessions
        self._is_whole, self._is_closed = not lines, False  # nothing is torn or missing in the file

    def append(self, records: Sequence[TrackingRecord]) -> None:
        """Add records at the end."""
        with self._lock:
            self._new += records
            self._write(records)

    def collect(self) -> list[TrackingRecord]:
        """All that waits now, to be sent in this order."""
        with self._lock:
            self._records, self._new = deque(coalesced([*self._records, *self._new])), []
            return list(self._records)

    def sent(self) -> None:
        """Forget the first record."""
        with self._lock:
            self._records.popleft()
            self.num_late += self.num_sent < self._num_old
            self.num_sent += 1

    def shorten(self, *, last: bool = False) -> int:
        """Leave in the file what was not sent, and no file if there is nothing; returns how many records wait."""
        with self._lock:
            if not self._is_closed:
                self._write()
            self._is_closed |= last
            return len(self._records) + len(self._new)

    def _write(self, added: Sequence[TrackingRecord] = ()) -> None:
        """Add records to the file, or write all of it."""
        try:
            if added and self._is_whole:
                with self.path.open("ab") as file:
                    file.write(_lines(added))
            elif waiting := [*self._records, *self._new]:
                replace_file(self.path, lambda partial: partial.write_bytes(_lines(waiting)))
            else:
                self.path.unlink(missing_ok=True)
            self.problem, self._is_whole = "", True
        except OSError as error:  # the disk is full, which the ledger reports
            self.problem, self._is_whole = str(error), False


def _lines(records: Sequence[TrackingRecord]) -> bytes:
    """Each behind its digest, as `unsealed` reads it."""
    texts = map(json.dumps, records)
    return "".join(f"{digest(text)}{text}\n" for text in texts).encode()


def _records(lines: Sequence[bytes]) -> Iterator[TrackingRecord]:
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # damaged
            record = unsealed(line)
            hash((record["what"], record["key"]))
            if record["what"] == "log":
                record |= {"metrics": [*record["metrics"]], "params": {**record["params"]}, "tags": {**record["tags"]}}
            yield record


def coalesced(records: Iterable[TrackingRecord]) -> list[TrackingRecord]:
    """The same records; logs of a run that follow each other, without another record of that run between, become the first."""
    joined: list[TrackingRecord] = []
    last: dict[str, TrackingRecord] = {}  # of each run
    for record in records:
        log = last.get(record["key"])
        if log and log["what"] == record["what"] == "log" and log.get("known") == record.get("known"):
            log["metrics"] += record["metrics"]
            log["params"] |= record["params"]
            log["tags"] |= record["tags"]
        else:
            last[record["key"]] = record
            joined.append(record)
    return joined


class Delivery:
    """A thread that sends the spool. `problem`: why the server is out of reach; `refused`: what it did not take, and why."""

    def __init__(self, spool: Spool, address: Address, connect: Callable[[Address], MlflowServer]) -> None:
        self._spool, self._address, self._connect = spool, address, connect
        self._server: MlflowServer | None = None
        self.problem, self.num_refused = "", 0
        self.refused: dict[str, str] = {}
        self._closing, self._give_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, wait_s: float | None) -> int:
        """Wait while records are sent, each within `wait_s`; returns how many wait still."""
        self._closing.set()
        before = -1
        with suppress(KeyboardInterrupt):  # waiting no longer loses nothing
            while self._thread.is_alive() and before != self._spool.num_sent:
                before = self._spool.num_sent
                self._thread.join(wait_s)
        self._give_up.set()
        self._spool.collect()
        return self._spool.shorten(last=True)

    def _serve(self) -> None:
        pause_s, closing = COLLECT_S, False
        while not closing:
            closing, started, num_sent = self._closing.wait(pause_s), time.monotonic(), self._spool.num_sent
            try:
                for record in self._spool.collect():
                    if self._give_up.is_set():
                        break
                    self._send(record)
                pause_s = min(max(COLLECT_S, (time.monotonic() - started) * (1 / SHARE - 1)), LONGEST_S)
            except Exception as error:  # noqa: BLE001 - an error of the tracking server must never reach the study
                self.problem, pause_s = self._address.redact(in_words(error))[:300], RETRY_S
                self._disconnect()
            if self._spool.num_sent > num_sent:
                self._spool.shorten()
        self._disconnect()

    def _send(self, record: TrackingRecord) -> None:
        """Raises what the server's client raises if the record is to be sent again later. Notes what the server refuses of it."""
        refused: list[tuple[str, str]] = []
        for _ in range(2):  # a server that can be reached is asked once more
            try:
                self._server = self._server or self._connect(self._address)
                refused = self._server.apply(record)
                break
            except Exception as error:
                if self._server is None or no_room(error) or LATER.search(f"{getattr(error, 'error_code', '')} {error}"):
                    raise
                self._server.ping()
                refused = [(f"{record['what']} {record['key']}", in_words(error))]
        self.problem, self.num_refused = "", self.num_refused + len(refused)
        for item, reason in refused:
            self.refused.setdefault(item, f"of {record['key']}: {self._address.redact(reason)[:300]}")
        self._spool.sent()

    def _disconnect(self) -> None:
        if self._server is not None:
            self._server.close()
        self._server = None
