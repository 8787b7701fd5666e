"""Records of the tracker, carried out by an MLflow client: the only module that imports MLflow.

The tracker imports it in its thread, since importing MLflow takes seconds.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
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

from softseg_dist.tracking.tracker import TrackingRecord  # noqa: E402
from softseg_dist.training.saved_model import read_card  # noqa: E402

CHUNK = 100  # MLflow takes 100 parameters or tags and 1000 metrics in one call
PARAM_CHARS, TAG_CHARS = 6000, 5000  # MLflow's limits
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the pages show training runs, not language models
CLOSED = ("FINISHED", "FAILED")
RUN_TAG, KEY_TAG, WEIGHTS_TAG = "softseg.run", "softseg.key", "softseg.weights_sha256"


class MlflowServer:
    """One experiment, named after the study, and in it the runs of one run folder, found by their tags."""

    def __init__(self, uri: str, folder: Path, study: str, run: str) -> None:
        os.environ |= ENVIRONMENT | os.environ  # MLflow reads the others at each request
        # MLflow may have been imported before this module, by MONAI, without the environment above.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        _make_database(uri)
        self._client = MlflowClient(uri)
        self._folder = folder
        self._run = run
        self._experiment = self._find_experiment(study, (folder / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None)
        self._ids: dict[str, str] = {}
        self._ended: set[str] = set()  # keys of runs that are closed for good
        self._find_runs()

    def ping(self) -> None:
        """Raises whatever the client raises if the server cannot be reached."""
        self._client.search_experiments(max_results=1)

    def apply(self, record: TrackingRecord) -> None:
        """Do what one record says. A "known" one repeats an earlier session's, and is skipped for a run that is closed."""
        if record.get("known") and record["key"] in self._ended:
            return
        getattr(self, f"_{record['what']}")(record)

    def _find_experiment(self, name: str, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return str(self._client.create_experiment(name, artifact_location=artifacts, tags=EXPERIMENT_TAGS))
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)

    def _find_runs(self) -> None:
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`{RUN_TAG}` = '{self._run}'", ViewType.ACTIVE_ONLY, max_results=1000, page_token=token
            )
            for run in page:
                key = run.data.tags[KEY_TAG]
                self._ids[key] = run.info.run_id
                if run.info.status in CLOSED:
                    self._ended.add(key)
            if not (token := page.token):
                return

    def _open(self, record: TrackingRecord) -> None:
        key = record["key"]
        if (run_id := self._ids.get(key)) is None:
            tags = {RUN_TAG: self._run, KEY_TAG: key} | record["tags"]
            if record["parent"] in self._ids:
                tags["mlflow.parentRunId"] = self._ids[record["parent"]]
            cut = {name: value[:TAG_CHARS] for name, value in tags.items()}
            run = self._client.create_run(self._experiment, start_time=record["ms"], tags=cut, run_name=record["name"])
            run_id = self._ids[key] = run.info.run_id
        else:
            self._client.update_run(run_id, status="RUNNING")
            self._batch(run_id, tags=_tags(record["tags"]))

    def _log(self, record: TrackingRecord) -> None:
        metrics = [Metric(name[:250], value, ms, step) for name, value, ms, step in record["metrics"]]
        params = [Param(name[:250], value[:PARAM_CHARS]) for name, value in record["params"].items()]
        self._batch(self._ids[record["key"]], metrics, params, _tags(record["tags"]))

    def _close(self, record: TrackingRecord) -> None:
        self._client.set_terminated(self._ids[record["key"]], record["status"], end_time=record["ms"])
        if record["status"] in CLOSED:
            self._ended.add(record["key"])

    def _data_set(self, record: TrackingRecord) -> None:
        data = Dataset(name=record["name"], digest=record["digest"], source_type="local", source=record["source"])
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._ids[record["key"]], datasets=[DatasetInput(data, tags)])

    def _artifact(self, record: TrackingRecord) -> None:
        self._client.log_artifact(self._ids[record["key"]], str(self._folder / record["path"]), record["folder"] or None)

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
        self._client.log_artifacts(run_id, str(folder), place)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{place}"
        tags = {WEIGHTS_TAG: card.weights_sha256, "softseg.candidate": card.candidate}
        self._client.create_model_version(name, source, run_id, tags, description=card.intended_use, await_creation_for=0)

    def _batch(self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        for start in range(0, max(len(metrics), len(params), len(tags)), CHUNK):
            part = slice(start, start + CHUNK)
            self._client.log_batch(run_id, metrics=metrics[part], params=params[part], tags=tags[part])


def _make_database(uri: str) -> None:
    """Make an SQLite database whole or not at all: one whose tables are half made, MLflow never opens again."""
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # MLflow remembers a path that failed
    try:
        MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tags(tags: dict[str, str]) -> list[Any]:
    return [RunTag(name, value[:TAG_CHARS]) for name, value in tags.items()]
