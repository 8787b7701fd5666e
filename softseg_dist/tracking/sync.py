"""Send MLflow afterwards the records that could not be sent while a study ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from softseg_dist.record.ledger import Ledger
from softseg_dist.record.remote import WorkingCopy
from softseg_dist.record.status import SPOOL, status_of
from softseg_dist.study import Study
from softseg_dist.tracking.tracker import Connection, Spool, Tracker, connect, default_uri
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

    Without `tracking_uri` they go to that of the run. Raises UserError if `run` is no run folder, or a driver uses it.
    """
    status = status_of(run)
    ledger, copy = Ledger(run), WorkingCopy(run)
    with ledger.lock():
        copy.pull(SPOOL, "mlflow_run", "mlflow.db", "study.json", "run.json", "report/*", "fits/*/*/history.jsonl")
        record = copy.folder / "run.json"
        recorded = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        uri = tracking_uri or recorded.get("tracking_uri") or default_uri(copy.folder)
        if problem := Connection(lambda: connect(uri, copy.folder, status.study)).reach():
            return Synced(uri, 0, status.mlflow_waiting, (f"MLflow at {uri} is out of reach: {problem}",))
        tracker = Tracker(uri, copy.folder, _study(copy))  # its thread sends first what waits
        ended = [candidate.name for candidate in status.candidates if candidate.left == 0]
        results = list(ledger.results().values())
        tracker.recall(ledger.candidates(), results, ended, lambda result: _curve(copy.folder, result), ledger.races())
        for path in sorted((copy.folder / "report").glob("*")):
            tracker.artifact(path, "report")
        complete = status.finished + status.failed == status.planned
        notes = tracker.close("FINISHED" if complete else "KILLED", wait_s=None)
        waiting = len(Spool(copy.folder / SPOOL).read())
        copy.push(SPOOL, "mlflow_run", *(["mlflow.db"] if uri == default_uri(copy.folder) else []))
    return Synced(uri, tracker.num_late, waiting, notes)


def _study(copy: WorkingCopy) -> Study:
    """The recorded study. Its classes stay JSON: to make them would run the study's code."""
    recorded = json.loads((copy.folder / "study.json").read_bytes())
    return Study.model_construct(**{name: value for name, value in recorded.items() if name not in ("type", "code")})


def _curve(folder: Path, result: FitResult) -> Iterator[dict[str, float]]:
    path = history_path(folder / "fits" / result.key)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        yield json.loads(line)
