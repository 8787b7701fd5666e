"""Records of the tracker, carried out by an MLflow client. Only this module imports MLflow, in a thread: it takes seconds."""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # a slow server holds up the thread, never the study; but closing waits for the thread
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the spool retries
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # the tracker reports what goes wrong, in one line
}
os.environ |= ENVIRONMENT | os.environ  # MLflow reads some of them when it is imported

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # noqa: E402
from mlflow.utils import chunk_list  # noqa: E402
from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name  # noqa: E402
from sqlalchemy import make_url  # noqa: E402

from softseg_dist.places import partial_of  # noqa: E402
from softseg_dist.tracking.delivery import TrackingRecord, sqlite_uri  # noqa: E402
from softseg_dist.training.saved_model import read_card  # noqa: E402

ROOT_VARIABLE = "_MLFLOW_SERVER_ARTIFACT_ROOT"
KINDS = {Metric: "metric", Param: "parameter", RunTag: "tag"}
MOST_METRICS, MOST_TEXTS = 900, 100  # that MLflow takes in one call
PARAM_CHARS, TAG_CHARS = 6000, 5000  # MLflow's limits
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the pages show training runs, not language models
CLOSED = ("FINISHED", "FAILED")
LOCATIONS = {"experiments": "artifact_location", "runs": "artifact_uri", "model_versions": "source"}  # columns with absolute places
Refused = list[tuple[str, str]]  # what MLflow did not take of a record, and why
RUN_TAG, KEY_TAG, WEIGHTS_TAG = "softseg.run", "softseg.key", "softseg.weights_sha256"


class MlflowServer:
    """One experiment, named after the study, and in it the runs of one run folder, found by their tags."""

    def __init__(self, uri: str, folder: Path, study: str, run: str) -> None:
        os.environ |= ENVIRONMENT | os.environ  # MLflow reads the others at each request
        # MLflow may have been imported before this module, by MONAI, without the environment above.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        database = Path(make_url(uri).database or "") if uri.startswith("sqlite") else None
        self._artifacts = (database.parent / "mlartifacts").as_uri() if database else None
        if database and not database.exists():
            _make_database(database)
        is_own = database == folder / "mlflow.db"
        if is_own:
            _relocate(folder, study)
        self._client = MlflowClient(uri, uri if is_own else None)  # its models do not go to MLFLOW_REGISTRY_URI
        self._uri, self._folder, self._study, self._run = uri, folder, study, run
        self._experiment = self._find_experiment()
        self._ids: dict[str, str] = {}
        self._ended: set[str] = set()  # keys of runs that are closed for good
        self._find_runs()

    def ping(self) -> None:
        """Raises whatever the client raises if the server cannot be reached."""
        self._client.search_experiments(max_results=1)

    def close(self) -> None:
        """Give back the open files and sockets of a database; MLflow keeps them otherwise."""
        _dispose(self._client)

    def apply(self, record: TrackingRecord) -> Refused:
        """Do what one record says. A "known" one repeats an earlier session's, and is skipped for a run that is closed.

        Returns what MLflow refuses of a log. Raises whatever the client raises if it refuses all, or cannot be reached.
        """
        if record.get("known") and record["key"] in self._ended:
            return []
        actions = {"open": self._open, "log": self._log, "close": self._close}
        actions |= {"data_set": self._data_set, "artifact": self._artifact, "model": self._model}
        try:
            return actions[record["what"]](record) or []
        except MlflowException:
            if not self._is_restored(self._ids.get(record["key"])):
                raise
            return actions[record["what"]](record) or []

    def _find_experiment(self) -> str:
        experiment = self._client.get_experiment_by_name(self._study)
        if experiment is None:
            return str(self._client.create_experiment(self._study, artifact_location=self._artifacts, tags=EXPERIMENT_TAGS))
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _find_runs(self) -> None:
        token, own = None, f"tags.`{RUN_TAG}` = '{self._run}'"
        while True:  # by pages: runs take memory
            page = self._client.search_runs([self._experiment], own, ViewType.ALL, max_results=1000, page_token=token)
            for run in page:
                key = run.data.tags[KEY_TAG]
                if run.info.lifecycle_stage == "deleted":  # to be restored
                    self._ids.setdefault(key, run.info.run_id)
                    continue
                self._ids[key] = run.info.run_id
                if run.info.status in CLOSED:
                    self._ended.add(key)
            if not (token := page.token):
                return

    def _is_restored(self, run_id: str | None) -> bool:
        """Restore a run that was deleted in MLflow's pages; False if it was not."""
        if run_id is None or self._client.get_run(run_id).info.lifecycle_stage == "active":
            return False
        self._experiment = self._find_experiment()
        if self._client.get_run(run_id).info.lifecycle_stage != "active":  # restoring the experiment may have done it
            self._client.restore_run(run_id)
        return True

    def _open(self, record: TrackingRecord) -> None:
        key = record["key"]
        if (run_id := self._ids.get(key)) is None:
            tags = {RUN_TAG: self._run, KEY_TAG: key} | record["tags"]
            if record["parent"] in self._ids:
                tags["mlflow.parentRunId"] = self._ids[record["parent"]]
            cut = {name: value[:TAG_CHARS] for name, value in tags.items()}
            run = self._client.create_run(self._experiment, start_time=record["ms"], tags=cut, run_name=record["name"])
            self._ids[key] = run.info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
            self._log(record | {"metrics": [], "params": {}})

    def _log(self, record: TrackingRecord) -> Refused:
        metrics = [Metric(name[:250], value, ms, step) for name, value, ms, step in record["metrics"]]
        params = [Param(name[:250], value[:PARAM_CHARS]) for name, value in record["params"].items()]
        tags = [RunTag(name, value[:TAG_CHARS]) for name, value in record["tags"].items()]
        return self._batch(self._ids[record["key"]], [*metrics, *params, *tags])

    def _close(self, record: TrackingRecord) -> None:
        self._client.set_terminated(self._ids[record["key"]], record["status"], end_time=record["ms"])
        if record["status"] in CLOSED:
            self._ended.add(record["key"])

    def _data_set(self, record: TrackingRecord) -> None:
        data = Dataset(name=record["name"], digest=record["digest"], source_type="local", source=record["source"])
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._ids[record["key"]], datasets=[DatasetInput(data, tags)])

    def _artifact(self, record: TrackingRecord) -> None:
        self._artifacts_of(self._ids[record["key"]]).log_artifact(str(self._folder / record["path"]), record["folder"] or None)

    def _artifacts_of(self, run_id: str) -> Any:
        """Not by the client, which remembers where those of a run are: in a copied folder they are elsewhere."""
        return get_artifact_repository(self._client.get_run(run_id).info.artifact_uri, tracking_uri=self._uri)

    def _model(self, record: TrackingRecord) -> None:
        """Register the present content of the folder, unless it is registered already."""
        folder, name, run_id = Path(record["path"]), record["name"], self._ids[record["key"]]
        card = read_card(folder)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name, description=card.question)
        versions = self._client.search_model_versions(f"name = '{name}'")
        if any(version.tags.get(WEIGHTS_TAG) == card.weights_sha256 for version in versions):
            return
        place = f"model/{card.weights_sha256[:12]}"  # one each, or a later model would replace what a version points to
        self._artifacts_of(run_id).log_artifacts(str(folder), place)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {WEIGHTS_TAG: card.weights_sha256, "softseg.candidate": card.candidate}
        self._client.create_model_version(name, source, run_id, tags, description=card.intended_use, await_creation_for=0)

    def _batch(self, run_id: str, items: Sequence[Any]) -> Refused:
        """Log metrics, parameters and tags; what MLflow's rules for names do not allow is not even tried."""
        bad = {item.key for item in items if not validate_param_and_metric_name(item.key) or path_not_unique(item.key)}
        refused = [(item, "MLflow does not take such a name") for item in items if item.key in bad]
        allowed = [item for item in items if item.key not in bad]
        metrics = chunk_list([item for item in allowed if isinstance(item, Metric)], MOST_METRICS)
        texts = chunk_list([item for item in allowed if not isinstance(item, Metric)], MOST_TEXTS)
        for some, others in zip_longest(metrics, texts, fillvalue=()):
            refused += self._log_batch(run_id, [*some, *others])
        return [(f"{KINDS[type(item)]} {item.key!r}", reason) for item, reason in refused]

    def _log_batch(self, run_id: str, items: Sequence[Any]) -> list[tuple[Any, str]]:
        """Log what MLflow takes in one call, or what it takes of it: halves of what it refuses are tried again."""
        metrics, params, tags = ([item for item in items if type(item) is kind] for kind in KINDS)
        try:
            self._client.log_batch(run_id, metrics, params, tags)
        except MlflowException as error:
            if error.get_http_status_code() != 400 or self._client.get_run(run_id).info.lifecycle_stage != "active":
                raise
            if len(items) == 1:
                return [(items[0], str(error))]
            half = len(items) // 2
            return self._log_batch(run_id, items[:half]) + self._log_batch(run_id, items[half:])
        return []


def _dispose(client: MlflowClient) -> None:
    for store in (client._tracking_client.store, client._get_registry_client().store):
        if (engine := getattr(store, "engine", None)) is not None:
            engine.dispose()


def _make_database(path: Path) -> None:
    """Make an SQLite database whole or not at all: one whose tables are half made, MLflow never opens again."""
    partial = partial_of(path.with_name(f"{secrets.token_hex(4)}.{path.name}"))  # MLflow remembers a path that failed
    before = os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = (path.parent / "mlartifacts").as_uri()  # else the working folder, where a ' is an error
    try:
        client = MlflowClient(sqlite_uri(partial), sqlite_uri(partial))
        client.search_experiments(max_results=1)
        _dispose(client)
        partial.replace(path)
    finally:
        os.environ.pop(ROOT_VARIABLE)
        os.environ |= {} if before is None else {ROOT_VARIABLE: before}
        partial.unlink(missing_ok=True)


def _relocate(folder: Path, study: str) -> None:
    """Make the places of artifacts those of a run folder that was moved or copied; MLflow records them as absolute paths."""
    artifacts = (folder / "mlartifacts").as_uri()
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        found = database.execute("SELECT artifact_location FROM experiments WHERE name = ?", (study,)).fetchone()
        if found is None or found[0] == artifacts:
            return
        for table, column in LOCATIONS.items():
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            database.execute(change, (artifacts, len(found[0]) + 1, len(found[0]), found[0]))
