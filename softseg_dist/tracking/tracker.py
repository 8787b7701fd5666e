"""MLflow: study run > candidate run > fit run, written by one background thread of the driver alone.

The driver never waits for MLflow. Each event becomes a record (a small JSON object) in the spool (see `delivery`), which a thread
sends in order: during the run, at its end, when the study runs again, or by `sync_run`.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softseg_dist.errors import in_words
from softseg_dist.frozen import leaves
from softseg_dist.places import Address
from softseg_dist.record.ledger import Ledger, RaceRecord, json_of
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import SPOOL, status_of
from softseg_dist.study import Study
from softseg_dist.tracking.delivery import Delivery, Spool, TrackingRecord, server_address, sqlite_uri
from softseg_dist.training.task import FitResult, FitTask, history_of
from softseg_dist.words import count, listed, next_command

if TYPE_CHECKING:
    from softseg_dist.tracking.server import MlflowServer

CLOSE_S = 60.0  # at the end of a run: as long as one record is waited for; what is left then is in the spool
STUDY = "study"  # key of the study's run
Texts = dict[str, str] | None
Curve = Callable[[FitResult], list[dict[str, float]]]  # a fit -> its epochs
NUMBERS = ("score", "test_score", "best_epoch", "epochs", "dead_share", "parameters", "duration_s", "peak_memory_mb")


def default_uri(folder: str | Path) -> str:
    """The SQLite database of a run folder: `mlflow ui --backend-store-uri` takes it."""
    return sqlite_uri(Path(folder).absolute() / "mlflow.db")


class Tracker:
    """Records the events of a study; a thread sends them to MLflow. No method raises or waits, except `close`, which joins it.

    `uri` is by default that of MLFLOW_TRACKING_URI, or else an SQLite database in the run folder. `run` is the path or URI of the
    run, if `folder` is a copy of it. Raises UserError if `uri` can be no address of MLflow.
    """

    def __init__(self, uri: str | Address | None, folder: str | Path, study: Study, run: str = "") -> None:
        self.folder, self.study = Path(folder).absolute(), study
        address = server_address(uri) or Address.of(default_uri(self.folder))
        self.uri = address.shown
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, None] = {}  # keys of open runs, parents first
        self._running: set[str] = set()  # candidates that were opened by a fit of this session
        self._recalled: list[TrackingRecord] | None = None  # a candidate's of earlier sessions, which MLflow may have
        self._sync = next_command("sync", run or folder)
        self.num_waiting = self.num_late = 0  # after `close`: records that wait, and those of earlier sessions that were sent
        self._spool = Spool(self.folder / SPOOL)
        self._delivery = Delivery(self._spool, address, lambda address: connect(address.original, self.folder, study.name))
        tags = {"softseg.fingerprint": study.fingerprint, "mlflow.note.content": study.question}
        self._put_open(STUDY, study.name, None, tags, {"objective": study.objectives[0].row.name, "seed": str(study.seed)})

    def data_set(self, name: str, digest: str, source: str) -> None:
        """Record on the study run which data it used; `digest` identifies the content."""
        self._put(what="data_set", key=STUDY, name=name, digest=digest[:36], source=source)

    def recall(self, ledger: Ledger, results: list[FitResult], ended: list[str], curve: Curve = lambda result: []) -> None:
        """Send what the ledger knows of earlier sessions, after a driver was killed or the server changed; closed runs stay.

        `ended` names the candidates with no fit left to run, `curve` gives the epochs of a fit if they are known.
        """
        races = ledger.races()
        for name, record in ledger.candidates().items():
            if not (own := [result for result in results if result.candidate == name]):
                continue
            self._recalled = []
            self._put_candidate(name, record.recipe)
            for result in own:
                self._put_fit(result.key, record.recipe, {})
                for metrics in curve(result):
                    self.epoch(result.key, metrics)
                self.fit_ended(result)
            if name in ended:
                self.candidate_ended(name, own, races.get(name))
            records, self._recalled = self._recalled, None
            self._spool.append(records)

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
        """Nothing of a candidate runs any more: if its run is open, log mean and deviation of its fits, and who won a lost race."""
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
        """Close every open run, the study's as `status`, and send what is left while MLflow takes records, each within `wait_s`.

        Returns lines for the user: what waits and why, what was refused.
        """
        for key in reversed(list(self._open)):
            self.close_run(key, status if key == STUDY or status != "FINISHED" else "KILLED")
        self.num_waiting, self.num_late, notes = self._delivery.close(wait_s), self._spool.num_late, []
        if refused := self._delivery.refused:
            items = f"{count(self._delivery.num_refused, 'item')} ({listed(list(refused))})"
            notes.append(f"MLflow refused {items}, the first: {' '.join(next(iter(refused.items())))}")
        if self.num_waiting and self._spool.problem:
            lost = f"{self.num_waiting} records for MLflow could not be kept: {self._spool.problem}"
            notes.append(f"{lost}; send them: {self._sync}")
        elif self.num_waiting:
            problem = self._delivery.problem
            state = f"was out of reach ({problem})" if problem else "is behind, it took no record any more"
            later = f"{self.num_waiting} records wait in {self._spool.path} and are sent when the study runs again"
            notes.append(f"MLflow at {self.uri} {state}; {later}, or by: {self._sync}")
        return tuple(notes)

    def _numbers(self, result: FitResult) -> dict[str, float]:
        numbers = {name: float(value) for name in NUMBERS if (value := getattr(result, name)) is not None}
        names = [metric.row.name for metric in self.study.objectives[1:]]
        second = {f"score_{name}": result.scores[name] for name in names if name in result.scores}
        return numbers | second | {f"threshold_{rule}": value for rule, value in result.thresholds.items()}

    def _put(self, **record: Any) -> None:
        record |= {"ms": int(time.time() * 1000), "known": self._recalled is not None}
        if self._recalled is not None:
            self._recalled.append(record)
        else:
            self._spool.append([record])

    def _put_candidate(self, name: str, recipe: Mapping[str, Any]) -> None:
        self._put_open(name, name, STUDY, {"softseg.candidate": name}, parameters(recipe))

    def _put_fit(self, key: str, recipe: Mapping[str, Any], tags: dict[str, str]) -> None:
        candidate, fit = key.rsplit("/", 1)
        split, _, repeat = fit.partition("-r")
        tags = {"softseg.candidate": candidate, "softseg.split": split, "softseg.repeat": repeat or "0"} | tags
        self._put_open(key, f"{fit} {candidate}", candidate, tags, parameters(recipe))  # its table cuts the end of long names

    def _put_open(self, key: str, name: str, parent: str | None, tags: dict[str, str], params: dict[str, str]) -> None:
        self._open[key] = None
        self._put(what="open", key=key, name=name, parent=parent, tags=tags)
        self._put_log(key, {}, params=params)

    def _put_log(self, key: str, metrics: Mapping[str, float], step: int = 0, params: Texts = None, tags: Texts = None) -> None:
        ms = int(time.time() * 1000)
        finite = [[name, value, ms, step] for name, value in metrics.items() if math.isfinite(value)]
        self._put(what="log", key=key, metrics=finite, params=params or {}, tags=tags or {})


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
        folder = copy.folder.absolute()
        known = tracking_uri or (ledger.read("run.json") or {}).get("tracking_uri")
        address = (server_address(known) if known else None) or Address.of(default_uri(folder))
        uri, login = address.shown, server_address(None)
        address = login if login and login.shown == uri else address  # what was recorded has none
        try:
            connect(address.original, folder, status.study).close()
        except Exception as error:  # noqa: BLE001 - out of reach, in whatever way
            note = f"MLflow at {uri} is out of reach: {address.redact(in_words(error))[:300]}"
            return Synced(uri, 0, status.mlflow_waiting, (note,))
        fields = ledger.read("study.json")  # its classes stay JSON: to make them would run its code
        study = Study.model_construct(**{name: value for name, value in fields.items() if name not in ("type", "code")})
        tracker = Tracker(address, folder, study, run)  # its thread sends first what waits
        ended = [candidate.name for candidate in status.candidates if candidate.left == 0]
        results, fits = list(ledger.results().values()), folder / "fits"
        tracker.recall(ledger, results, ended, lambda result: history_of(fits / result.key, result))
        for path in sorted((folder / "report").glob("*")):
            tracker.artifact(path, "report")
        notes = tracker.close("FINISHED" if status.finished + status.failed == status.planned else "KILLED", wait_s=None)
        copy.push(SPOOL, "mlflow_run", *(["mlflow.db"] if uri == default_uri(folder) else []))
    return Synced(uri, tracker.num_late, tracker.num_waiting, notes)
