"""A run ends well wherever it is stopped: what runs writes its checkpoint, MLflow's runs are closed, the same command goes on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import catches, softseg, softseg_here
from mlflow import MlflowClient

pytestmark = pytest.mark.engine

STUDY = """
import time
from softseg_dist import *

class Slow(Brier):
    def per_sample(self, prediction, target):
        time.sleep(0.02)
        return super().per_sample(prediction, target)

STUDY = Study(
    name="ending", question="?", data=Phantom(subjects=SUBJECTS, size=(16, 16), num_slices=2), preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2), holdout=HOLDOUT,
    candidates={"a": Recipe(network=UNet(filters=(2, 4)), loss=Slow(), optim=Optim(epochs=EPOCHS, batch_size=4))},
)
"""


def study_in(folder: Path, subjects: int = 8, epochs: int = 12, holdout: str = "None") -> Path:
    text = STUDY.replace("SUBJECTS", str(subjects)).replace("EPOCHS", str(epochs)).replace("HOLDOUT", holdout)
    (folder / "ending.py").write_text(text)
    return folder / "ending.py"


def started(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "softseg_dist.cli.main", "run", str(folder / "ending.py"), "--json", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(run: subprocess.Popen[str], kind: signal.Signals, when: Callable[[str], bool]) -> tuple[str, str]:
    """What a run prints that gets a signal as soon as it has printed a line, or done what `when` looks for."""
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if when(line):
            run.send_signal(kind)
            break
    out, err = run.communicate(timeout=60)
    return "".join(lines) + out, err


def states(folder: Path) -> dict[str, str]:
    """How the runs of MLflow stand, by their keys."""
    client = MlflowClient(f"sqlite:///{folder}/runs/ending/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ending").experiment_id])
    return {run.data.tags["softseg.key"]: run.info.status for run in runs}


def goes_on(folder: Path, *options: str) -> None:
    again = (softseg_here if options else softseg)("run", folder / "ending.py", *options, "--json", cwd=folder)
    assert (again.returncode, json.loads(again.stdout.splitlines()[-1])["end"]) == (0, "done"), again.stderr
    assert len(pd.read_parquet(folder / "runs/ending/results.parquet").groupby(["candidate", "split"])) == 2
    assert set(states(folder).values()) == {"FINISHED"}


@pytest.mark.parametrize("options", [("--local",), pytest.param((), marks=pytest.mark.long)], ids=["here", "on Ray"])
@pytest.mark.parametrize(
    ("kind", "where", "holdout"),
    [
        pytest.param(signal.SIGTERM, '"event": "start"', "None", id="start of Ray", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, '"event": "epoch"', "None", id="search", marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, '"event": "epoch"', "None", id="search, a lost terminal", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "training a on all", "None", id="final model"),
        pytest.param(signal.SIGHUP, "held-out subjects", "0.25", id="held-out subjects", marks=pytest.mark.long),
    ],
)
def test_a_signal_stops_a_run_resumably_wherever_it_is(
    tmp_path: Path, kind: signal.Signals, where: str, holdout: str, options: tuple[str, ...]
) -> None:
    study_in(tmp_path, holdout=holdout)
    out, err = stopped(run := started(tmp_path, *options), kind, lambda line: where in line)
    assert (run.returncode, err) == (130, "")
    assert json.loads(out.splitlines()[-1])["end"] == "interrupted"
    ended = states(tmp_path)
    assert ended["study"] == "KILLED"
    assert "RUNNING" not in ended.values()
    if "epoch" in where:
        assert list((tmp_path / "runs/ending/fits/a").glob("*/checkpoint.pt"))
    goes_on(tmp_path, *options)


def test_a_signal_during_preparation_ends_with_130_and_a_line(tmp_path: Path) -> None:
    study_in(tmp_path, subjects=1000)
    out, err = stopped(run := started(tmp_path, "--local"), signal.SIGTERM, lambda line: "prepared" in line)
    assert (run.returncode, err) == (130, "")
    assert json.loads(out.splitlines()[-1]) == {"end": "interrupted"}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_packages_are_imported_ends_with_130_and_says_nothing(tmp_path: Path, kind: signal.Signals) -> None:
    study_in(tmp_path)
    run = started(tmp_path, "--local")
    while not catches(run.pid, signal.SIGTERM):
        assert run.poll() is None
    run.send_signal(kind)
    assert run.communicate(timeout=60) == ("", "")
    assert run.returncode in (130, -signal.SIGINT)  # the second if it came during an `exec`; a shell calls it 130, too


def test_a_display_that_cannot_write_goes_mute_and_the_study_goes_on(tmp_path: Path) -> None:
    study_in(tmp_path)
    run = started(tmp_path, "--local")
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    assert (run.wait(timeout=120), run.stderr.read()) == (0, "")
    assert set(states(tmp_path).values()) == {"FINISHED"}


def test_a_run_without_standard_streams_is_as_any_other(tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-P", "-m", "softseg_dist.cli.main", "run", str(study_in(tmp_path)), "--local"])
    assert subprocess.run(["sh", "-c", f"{command} <&- >&- 2>&-"], cwd=tmp_path, timeout=120, check=False).returncode == 0
    assert set(states(tmp_path).values()) == {"FINISHED"}
    assert len(pd.read_parquet(tmp_path / "runs/ending/results.parquet").groupby(["candidate", "split"])) == 2
