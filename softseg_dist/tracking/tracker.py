"""MLflow: study run > candidate run > fit run, written by one background thread of the driver alone.

The driver never waits for MLflow. Each event becomes a record (a small JSON object); the thread sends records in order. What
cannot be sent goes to `mlflow_spool.jsonl` in the run folder and is sent later: during the run, at its end, when the study runs
again, or by `sync_run`. Runs are found again by their tags, so sending a record twice does no harm.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softseg_dist.errors import in_words
from softseg_dist.frozen import leaves
from softseg_dist.places import replace_file
from softseg_dist.record.ledger import Ledger, RaceRecord, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import SPOOL, status_of
from softseg_dist.study import Study
from softseg_dist.training.task import FitResult, FitTask, history_of
from softseg_dist.words import next_command

if TYPE_CHECKING:
    from softseg_dist.tracking.server import MlflowServer

COLLECT_S = 0.5  # records of this long go out together, so that epochs cost one call per fit and half second
RETRY_S = 30.0  # pause between two tries to reach a server that is down
CLOSE_S = 60.0  # longest wait for the thread at the end of a run; what is left then is spooled
STUDY = "study"  # key of the study's run
Texts = dict[str, str] | None
Curve = Callable[[FitResult], list[dict[str, float]]]  # a fit -> its epochs
TrackingRecord = dict[str, Any]
NUMBERS = ("score", "test_score", "best_epoch", "epochs", "dead_share", "parameters", "duration_s", "peak_memory_mb")


def default_uri(folder: str | Path) -> str:
    """The SQLite database of a run folder: `mlflow ui --backend-store-uri` takes it."""
    return f"sqlite:///{Path(folder).absolute()}/mlflow.db"


class Tracker:
    """Records the events of a study; a thread sends them to MLflow. No method raises or waits, except `close`, which joins it.

    `uri` is any MLflow tracking URI; without one it is an SQLite database in the run folder, whose runs all carry one tag.
    `run` is the path or URI of the run, if `folder` is a copy of it.
    """

    def __init__(self, uri: str | None, folder: str | Path, study: Study, run: str = "") -> None:
        self.uri, self.folder, self.study = uri or default_uri(folder), Path(folder).absolute(), study
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records: queue.SimpleQueue[TrackingRecord | None] = queue.SimpleQueue()
        self._open: dict[str, None] = {}  # keys of open runs, parents first
        self._running: set[str] = set()  # candidates that were opened by a fit of this session
        self._known = False  # records are those of earlier sessions, which MLflow may have
        self._spool = Spool(self.folder / SPOOL)
        self.num_late = 0  # of the spooled records, those that were sent
        self._num_unkept = 0
        self._give_up = threading.Event()
        self._problem, self._sync = "", next_command("sync", run or folder)
        self._rejected: list[str] = []
        self._thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)
        self._thread.start()
        tags = {"softseg.fingerprint": study.fingerprint, "mlflow.note.content": study.question}
        self._put_open(STUDY, study.name, None, tags, {"objective": study.objectives[0].row.name, "seed": str(study.seed)})

    def data_set(self, name: str, digest: str, source: str) -> None:
        """Record on the study run which data it used; `digest` identifies the content."""
        self._put(what="data_set", key=STUDY, name=name, digest=digest[:36], source=source)

    def recall(self, ledger: Ledger, results: list[FitResult], ended: list[str], curve: Curve = lambda result: []) -> None:
        """Send the ledger's records of earlier sessions; runs that MLflow has closed already stay as they are.

        So nothing is missing, or stays RUNNING, after a driver was killed or the server changed. `ended` names the candidates
        with no fit left to run, `curve` gives the epochs of a fit if they are known.
        """
        self._known, races = True, ledger.races()
        for name, record in ledger.candidates().items():
            if not (own := [result for result in results if result.candidate == name]):
                continue
            self._put_candidate(name, record.recipe)
            for result in own:
                self._put_fit(result.key, record.recipe, {})
                for metrics in curve(result):
                    self.epoch(result.key, metrics)
                self.fit_ended(result)
            if name in ended:
                self.candidate_ended(name, own, races.get(name))
        self._known = False

    def fit_started(self, task: FitTask) -> None:
        """A fit starts, or starts again; its candidate's run begins with its first fit."""
        recipe = json_of(task.recipe)
        if task.candidate not in self._running:
            self._running.add(task.candidate)
            self._put_candidate(task.candidate, recipe)
        self._put_fit(task.key, recipe, {"softseg.attempt": str(task.attempt)})

    def epoch(self, key: str, metrics: Mapping[str, float]) -> None:
        """A fit has finished an epoch; `metrics["epoch"]` is the step."""
        self._put_log(key, {name: value for name, value in metrics.items() if name != "epoch"}, step=int(metrics.get("epoch", 0)))

    def fit_ended(self, result: FitResult) -> None:
        """A fit has ended, finished or failed."""
        tags = {"softseg.reason": result.reason, "softseg.engine": result.engine, "softseg.notes": "; ".join(result.notes)}
        self._put_log(result.key, self._numbers(result), tags={name: text for name, text in tags.items() if text})
        self.close_run(result.key, "FINISHED" if result.state == "finished" else "FAILED")

    def close_run(self, key: str, status: str) -> None:
        """Close a run. That of a fit without a result is "KILLED" if it was interrupted, "FAILED" if its processes died."""
        self._open.pop(key, None)
        self._put(what="close", key=key, status=status)

    def candidate_ended(self, name: str, results: list[FitResult], race: RaceRecord | None = None) -> None:
        """Nothing of a candidate runs any more: log mean and standard deviation over its fits, and the winner of a lost race.

        Nothing happens if its run is not open.
        """
        if name not in self._open:
            return
        metrics = {"failed_fits": float(sum(r.score is None for r in results))}
        numbers = [self._numbers(r) for r in results]
        for metric in ("score", "test_score", *(f"score_{second.row.name}" for second in self.study.objectives[1:])):
            values = [of_fit[metric] for of_fit in numbers if metric in of_fit]
            if values:
                metrics[f"{metric}_mean"] = statistics.fmean(values)
            if len(values) > 1:
                metrics[f"{metric}_sd"] = statistics.stdev(values)
        self._running.discard(name)
        self._put_log(name, metrics, tags={"softseg.raced_out_by": race.incumbent} if race else {})
        self.close_run(name, "FINISHED" if any(r.score is not None for r in results) else "FAILED")

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Store a file with the study run, under `folder`. One of the run folder is known by its place in it: that may move."""
        full = Path(path).absolute()
        known = full.relative_to(self.folder) if full.is_relative_to(self.folder) else full
        self._put(what="artifact", key=STUDY, path=str(known), folder=folder)

    def model(self, folder: str | Path) -> None:
        """Store a saved model with the study run and register it under the study's name; once per weights."""
        self._put(what="model", key=STUDY, path=str(Path(folder).absolute()), name=self.study.name)

    def close(self, status: str = "FINISHED", wait_s: float | None = CLOSE_S) -> tuple[str, ...]:
        """Close every open run ("FINISHED", "FAILED" or "KILLED" for the study's) and send what is left, for `wait_s` at most.

        Returns lines for the user: that the server was out of reach, or what it refused.
        """
        for key in reversed(list(self._open)):
            self.close_run(key, status if key == STUDY or status != "FINISHED" else "KILLED")
        self._records.put(None)
        self._thread.join(wait_s)
        self._give_up.set()
        self._thread.join(CLOSE_S / 6)
        notes = [f"MLflow refused {len(self._rejected)} records, the first: {self._rejected[0]}"] if self._rejected else []
        if waiting := len(self._spool.read()):
            later = f"{waiting} records wait in {self._spool.path} and are sent when the study runs again, or by: {self._sync}"
            notes.append(f"MLflow at {self.uri} was out of reach ({self._problem}); {later}")
        if self._thread.is_alive():
            notes.append(f"MLflow at {self.uri} did not answer in time; send it the content of the ledger: {self._sync}")
        if self._num_unkept:
            notes.append(f"{self._num_unkept} records for MLflow could not be kept: {self._problem}; send them: {self._sync}")
        return tuple(str(without_password(note)) for note in notes)

    def _numbers(self, result: FitResult) -> dict[str, float]:
        numbers = {name: float(value) for name in NUMBERS if (value := getattr(result, name)) is not None}
        names = [metric.row.name for metric in self.study.objectives[1:]]
        second = {f"score_{name}": result.scores[name] for name in names if name in result.scores}
        return numbers | second | {f"threshold_{rule}": value for rule, value in result.thresholds.items()}

    def _put(self, **record: Any) -> None:
        self._records.put({**record, "ms": int(time.time() * 1000), "known": self._known})

    def _put_candidate(self, name: str, recipe: Mapping[str, Any]) -> None:
        self._put_open(name, name, STUDY, {"softseg.candidate": name}, parameters(recipe))

    def _put_fit(self, key: str, recipe: Mapping[str, Any], tags: dict[str, str]) -> None:
        candidate, fit = key.rsplit("/", 1)
        split, _, repeat = fit.partition("-r")
        tags = {"softseg.candidate": candidate, "softseg.split": split, "softseg.repeat": repeat or "0"} | tags
        name = f"{fit} {candidate}"  # MLflow's table cuts long names at their end
        self._put_open(key, name, candidate, tags, parameters(recipe))

    def _put_open(self, key: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, str]) -> None:
        self._open[key] = None
        self._put(what="open", key=key, name=name, parent=parent, tags=tags)
        self._put_log(key, {}, params=params)

    def _put_log(self, key: str, metrics: Mapping[str, float], step: int = 0, params: Texts = None, tags: Texts = None) -> None:
        ms = int(time.time() * 1000)
        finite = [[name, value, ms, step] for name, value in metrics.items() if math.isfinite(value)]
        self._put(what="log", key=key, metrics=finite, params=params or {}, tags=tags or {})

    # What follows runs in the thread.

    def _serve(self) -> None:
        connection = Connection(lambda: connect(self.uri, self.folder, self.study.name))
        retry_at = 0.0
        unkept: list[TrackingRecord] = []
        last = False
        while not last:
            collected, last = self._collect()
            records, unkept = unkept + collected, []
            try:
                if last or time.monotonic() >= retry_at:
                    retry_at = 0.0 if self._deliver(connection, records) else time.monotonic() + RETRY_S
                else:
                    self._spool.append(records)
            except OSError as error:  # the disk is full, which the ledger reports; the records wait in memory
                self._problem, unkept = str(error), records
        self._num_unkept = len(unkept)

    def _collect(self) -> tuple[list[TrackingRecord], bool]:
        """The records of the next half second, and whether they are the last."""
        records, until = [self._records.get()], time.monotonic() + COLLECT_S
        with suppress(queue.Empty):
            while records[-1] is not None:
                records.append(self._records.get(timeout=max(0.0, until - time.monotonic())))
        return coalesced([record for record in records if record is not None]), records[-1] is None

    def _deliver(self, connection: Connection, records: list[TrackingRecord]) -> bool:
        """Send what is spooled and then `records`; False if the server is out of reach, with the rest spooled."""
        spooled = self._spool.read()
        pending = spooled + records
        for index, record in enumerate(pending):
            problem = "stopped waiting for it" if self._give_up.is_set() else connection.send(record)
            if problem is None:
                self.num_late += index < len(spooled)
                continue
            if connection.lost or self._give_up.is_set():
                self._problem = problem
                self._spool.replace(pending[index:])
                return False
            self._rejected.append(f"{record['what']} {record['key']}: {problem}")
        if spooled:
            self._spool.replace([])
        return True


class Spool:
    """Records that could not be sent yet, oldest first, in a file of JSON lines. A line torn by a crash is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[TrackingRecord]:
        """All records, oldest first."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError):
                records.append(json.loads(line))
        return records

    def append(self, records: Sequence[TrackingRecord]) -> None:
        """Add records at the end. Raises OSError if not all could be written; adding them again does no harm."""
        if not records:
            return
        with self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")  # ends a line that a crash or a full disk has torn
            file.write(_lines(records))

    def replace(self, records: Sequence[TrackingRecord]) -> None:
        """Make `records` the whole content; none removes the file. Raises OSError, with nothing changed, if that cannot be."""
        if records:
            replace_file(self.path, lambda partial: partial.write_bytes(_lines(records)))
        else:
            self.path.unlink(missing_ok=True)


def _lines(records: Sequence[TrackingRecord]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


class Connection:
    """A server that may be out of reach. A second request distinguishes that from a refused record."""

    def __init__(self, connect: Callable[[], MlflowServer]) -> None:
        self._connect = connect
        self._server: MlflowServer | None = None
        self.lost = False

    def send(self, record: TrackingRecord) -> str | None:
        """None if the server took the record, else what it said; `lost` says whether it can be reached at all."""
        try:
            self._server = self._server or self._connect()
            self.lost = False
            try:
                self._server.apply(record)
            except Exception:  # noqa: BLE001 - whatever MLflow raises: refused or out of reach is decided by the ping
                self._server.ping()
                self._server.apply(record)
        except Exception as error:  # noqa: BLE001 - an error of the tracking server must never reach the study
            # A server or database that cannot write now, as when its disk is full, takes the record later.
            unavailable = getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE"
            self.lost = unavailable or self._server is None or self.reach() is not None
            return in_words(error)[:300]
        return None

    def reach(self) -> str | None:
        """None if the server can be reached, else why not."""
        try:
            self._server = self._server or self._connect()
            self._server.ping()
        except Exception as error:  # noqa: BLE001 - out of reach, in whatever way
            self._server = None
            return in_words(error)[:300]
        return None


def connect(uri: str, folder: Path, study: str) -> MlflowServer:
    """Open MLflow. Imported here, in the thread: it takes two seconds, in which the study starts."""
    from softseg_dist.tracking.server import MlflowServer

    return MlflowServer(uri, folder, study, run_id_of(folder))


def run_id_of(folder: Path) -> str:
    """The tag that all MLflow runs of a run folder share, made at the first call."""
    path = folder / "mlflow_run"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()


def coalesced(records: Sequence[TrackingRecord]) -> list[TrackingRecord]:
    """The same records; logs of a run that follow each other, without another record of that run between, become the first."""
    joined: list[TrackingRecord] = []
    last: dict[str, TrackingRecord] = {}  # of each run
    for record in records:
        log = last.get(record["key"])
        if log and log["what"] == record["what"] == "log" and log["known"] == record["known"]:
            log["metrics"] += record["metrics"]
            log["params"] |= record["params"]
            log["tags"] |= record["tags"]
        else:
            last[record["key"]] = record
            joined.append(record)
    return joined


def without_password(uri: str | None) -> str | None:
    """A tracking URI as it may be recorded: the credentials come from the environment."""
    return None if uri is None else re.sub(r"(?<=://)[^/@\s]*@", "", uri)


def parameters(recipe: Mapping[str, Any]) -> dict[str, str]:
    """A recipe's JSON as flat parameters: `loss` is "AdaptiveWing", `loss.omega` is "14.0"."""
    return {path: value if isinstance(value, str) else json.dumps(value) for path, value in leaves(recipe)}


@dataclass(frozen=True)
class Synced:
    """`sent` of the records that had waited were sent, `waiting` wait still; `notes` are lines for the user."""

    tracking_uri: str
    sent: int
    waiting: int
    notes: tuple[str, ...]


def sync_run(run: str, tracking_uri: str | None = None) -> Synced:
    """Send the records that wait in a run folder, and then all of its ledger that MLflow does not have yet.

    Without `tracking_uri` they go to that of the run. Raises UserError if `run` is no run folder, or a driver uses it.
    """
    status = status_of(run)
    ledger, copy = Ledger(run), WorkingCopy(run)
    with ledger.lock():
        copy.pull(SPOOL, "mlflow_run", "mlflow.db", "report/*", "fits/*/*/history.jsonl")
        uri = tracking_uri or (ledger.read("run.json") or {}).get("tracking_uri") or default_uri(copy.folder)
        if problem := Connection(lambda: connect(uri, copy.folder, status.study)).reach():
            return Synced(uri, 0, status.mlflow_waiting, (f"MLflow at {uri} is out of reach: {problem}",))
        fields = ledger.read("study.json")  # its classes stay JSON: to make them would run its code
        study = Study.model_construct(**{name: value for name, value in fields.items() if name not in ("type", "code")})
        tracker = Tracker(uri, copy.folder, study, run)  # its thread sends first what waits
        ended = [candidate.name for candidate in status.candidates if candidate.left == 0]
        results, fits = list(ledger.results().values()), copy.folder / "fits"
        tracker.recall(ledger, results, ended, lambda result: history_of(fits / result.key, result))
        for path in sorted((copy.folder / "report").glob("*")):
            tracker.artifact(path, "report")
        notes = tracker.close("FINISHED" if status.finished + status.failed == status.planned else "KILLED", wait_s=None)
        waiting = len(Spool(copy.folder / SPOOL).read())
        copy.push(SPOOL, "mlflow_run", *(["mlflow.db"] if uri == default_uri(copy.folder) else []))
    return Synced(uri, tracker.num_late, waiting, notes)
