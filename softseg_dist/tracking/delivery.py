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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from softseg_dist.errors import UserError, in_words, no_room
from softseg_dist.frozen import digest, unsealed
from softseg_dist.places import Address, replace_file

if TYPE_CHECKING:
    from softseg_dist.tracking.server import MlflowServer

COLLECT_S, LONGEST_S = 0.5, 30.0  # records of this long go out together: all epochs of a fit in one call
SHARE = 0.2  # of the time goes to sending at most, so that a queue that grows is sent in fewer and larger calls
RETRY_S = 30.0  # pause between two tries to reach a server that is down
PROBE_S = 3.0
ENVIRONMENT_URI = "MLFLOW_TRACKING_URI"
TAKEN = 5_000  # lines of the spool that are in memory at a time, some 1 kB each; what waits behind them is in the file
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
    """The queue, oldest first: a file of lines, each JSON behind its digest. What a process that dies leaves is sent by the next.

    In memory are the records that are being sent, and those that the disk did not take, until it does. Damaged lines are left out.
    One process uses the file at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self._lock = threading.Lock()
        self._taken = deque[TrackingRecord]()  # from the file, to be sent
        self._unwritten: list[TrackingRecord] = []
        self._old, self._start = self._size(), 0  # bytes of the file that earlier sessions wrote, and that were taken
        self._is_torn = self._old > 0  # the last line may have no end
        self._is_late = self._is_closed = False  # what was taken is of an earlier session
        self.num_sent = self.num_late = 0

    def append(self, records: Sequence[TrackingRecord]) -> None:
        """Add records at the end."""
        with self._lock:
            self._unwritten += records
            self._write()

    def collect(self) -> list[TrackingRecord]:
        """What is to be sent next, in this order: what is left of the last time or, if nothing is, up to `TAKEN` lines."""
        with self._lock:
            self._take()
            return list(self._taken)

    def sent(self) -> None:
        """Forget the first record."""
        with self._lock:
            self._taken.popleft()
            self.num_sent += 1
            self.num_late += self._is_late

    def shorten(self) -> None:
        """Leave out of the file what was sent, once that is an eighth of it; nothing remains if nothing waits."""
        with self._lock:
            if not (self._is_closed or self._taken) and 8 * self._start >= self._size():
                self._leave_out_sent()

    def close(self) -> int:
        """Leave in the file what was not sent, for the next session; returns how many records that are."""
        with self._lock:
            self._take()
            num_waiting = len(self._taken) + sum(1 for _ in self._lines_left()) + len(self._unwritten)
            self._leave_out_sent()
            self._is_closed = True
            return num_waiting

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def _write(self) -> None:
        """Add to the file what it has not got. What a full disk took of it is a torn line, and is written again."""
        if not self._unwritten:
            return
        try:
            with self.path.open("ab") as file:
                file.write(b"\n" * self._is_torn + _lines(self._unwritten))
            self.problem, self._is_torn, self._unwritten = "", False, []
        except OSError as error:  # which the ledger reports
            self.problem, self._is_torn = str(error), True

    def _take(self) -> None:
        """Read what comes next, unless something is left to be sent."""
        self._write()
        while not self._taken and (lines := self._next_lines()):
            self._taken.extend(coalesced(_records(lines)))

    def _next_lines(self) -> list[bytes]:
        """At most `TAKEN` lines, all of earlier sessions or none."""
        lines, self._is_late = list[bytes](), self._start < self._old
        for line in islice(self._lines_left(), TAKEN):
            lines.append(line)
            self._start += len(line)
            if self._is_late and self._start >= self._old:
                break
        return lines

    def _lines_left(self) -> Iterator[bytes]:
        if self.path.is_file():
            with self.path.open("rb") as file:
                file.seek(self._start)
                yield from file

    def _leave_out_sent(self) -> None:
        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.write(_lines(self._taken))
                file.writelines(self._lines_left())

        with suppress(OSError):  # the disk is full: what is sent twice does no harm
            if self._taken or self._start < self._size():
                replace_file(self.path, write)
            else:
                self.path.unlink(missing_ok=True)
            self._old, self._start = max(self._old - self._start, 0), 0


def _lines(records: Sequence[TrackingRecord]) -> bytes:
    """Each behind its digest, as `unsealed` reads it."""
    texts = map(json.dumps, records)
    return "".join(f"{digest(text)}{text}\n" for text in texts).encode()


def _records(lines: Sequence[bytes]) -> Iterator[TrackingRecord]:
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # damaged
            record = unsealed(line.rstrip(b"\n"))
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
        return self._spool.close()

    def _serve(self) -> None:
        pause_s, has_ended = COLLECT_S, False
        while not has_ended:
            closing, started, num_sent = self._closing.wait(pause_s), time.monotonic(), self._spool.num_sent
            try:
                records = self._spool.collect()
                has_ended = closing and not records
                for record in records:
                    if has_ended := self._give_up.is_set():
                        break
                    self._send(record)
                pause_s = min(max(COLLECT_S, (time.monotonic() - started) * (1 / SHARE - 1)), LONGEST_S)
            except Exception as error:  # noqa: BLE001 - an error of the tracking server must never reach the study
                self.problem, pause_s, has_ended = self._address.redact(in_words(error))[:300], RETRY_S, closing
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
