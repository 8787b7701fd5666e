"""Send MLflow afterwards the records that could not be sent while a study ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.spool import SPOOL, Spool
from softseg_dist.record.status import status_of
from softseg_dist.study import Study
from softseg_dist.tracking.tracker import Connection, Tracker, connect, default_uri
from softseg_dist.training.task import FitResult, history_path


@dataclass(frozen=True)
class Synced:
    """`sent` of the records that had waited were sent, `waiting` wait still; `notes` are lines for the user."""

    tracking_uri: str
    sent: int
    waiting: int
    notes: tuple[str, ...]


def sync_run(run: str, tracking_uri: str | None = None) -> Synced:
    """Send the records that wait in a run folder, and then all of its ledger that MLflow does not have yet.

    Without `tracking_uri` they go to that of the run. Raises UserError if `run` is no run folder, or a driver
    uses it.
    """
    status = status_of(run)
    ledger, copy = Ledger(run), WorkingCopy(run)
    with ledger.lock():
        copy.pull(SPOOL, "mlflow_run", "mlflow.db", "study.json", "run.json", "report/*", "fits/*/*/history.jsonl")
        record = copy.folder / "run.json"
        recorded = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        uri = tracking_uri or recorded.get("tracking_uri") or default_uri(copy.folder)
        connection = Connection(lambda: connect(uri, copy.folder, status.study))
        if problem := connection.reach():
            return Synced(uri, 0, status.mlflow_waiting, (f"MLflow at {uri} is out of reach: {problem}",))
        sent, notes = _send_waiting(copy, connection)
        if not connection.lost:
            notes += _recall(ledger, copy, uri)
        waiting = len(Spool(copy.folder / SPOOL).read())
        copy.push(SPOOL, "mlflow_run", *(["mlflow.db"] if uri == default_uri(copy.folder) else []))
    return Synced(uri, sent, waiting, notes)


def _send_waiting(copy: WorkingCopy, connection: Connection) -> tuple[int, tuple[str, ...]]:
    """How many records were sent, which were refused, and why the others could not be sent."""
    spool = Spool(copy.folder / SPOOL)
    records = spool.read()
    refused: list[str] = []
    for done, record in enumerate(records):
        problem = connection.send(record)
        if problem and connection.lost:
            spool.replace(records[done:])
            return done - len(refused), (*refused, f"MLflow is out of reach now: {problem}")
        if problem:
            refused.append(f"MLflow refused {record['what']} {record['key']}: {problem}")
    spool.replace([])
    return len(records) - len(refused), tuple(refused)


def _recall(ledger: Ledger, copy: WorkingCopy, uri: str) -> tuple[str, ...]:
    recorded = json.loads((copy.folder / "study.json").read_bytes())
    fields = {name: value for name, value in recorded.items() if name not in ("type", "code")}
    study = Study.model_construct(**fields)  # its classes stay JSON: to make them would run the study's code
    results = list(ledger.results().values())
    status = status_of(ledger.folder)
    ended = [c.name for c in status.candidates if c.left == 0]
    tracker = Tracker(uri, copy.folder, study)
    tracker.recall(ledger.candidates(), results, ended, lambda result: _curve(copy.folder, result), ledger.races())
    for path in sorted((copy.folder / "report").glob("*")):
        tracker.artifact(path, "report")
    return tracker.close("FINISHED" if status.finished + status.failed == status.planned else "KILLED")


def _curve(folder: Path, result: FitResult) -> Iterator[dict[str, float]]:
    path = history_path(folder / "fits" / result.key)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        yield json.loads(line)
