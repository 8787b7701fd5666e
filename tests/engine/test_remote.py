"""Run folder and stores on a real S3 server: machines that share nothing else run one study, with the results of a local run.

A machine is its cache folder: what lies in another machine's cannot be found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import softseg, softseg_here
from s3_server import BUCKET
from test_cli import STUDY, table, write

from softseg_dist.places import Place

pytestmark = pytest.mark.engine
RUN = f"s3://{BUCKET}/runs/tiny"
SHARED = ("--out", f"s3://{BUCKET}/runs", "--stores", f"s3://{BUCKET}/stores")


def machine(folder: Path) -> dict[str, str]:
    """The environment of a machine that has nothing but its own cache and scratch folders."""
    (folder / "tmp").mkdir(parents=True)
    ray = {"RAY_TMPDIR": tempfile.gettempdir()}  # its sockets must have short names
    return os.environ | ray | {"SOFTSEG_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}


def comparable(numbers: str) -> dict[str, object]:
    """What of a report's numbers does not depend on where, when and how fast the study ran."""
    found = json.loads(numbers)
    return {name: found[name] for name in ("answer", "comparisons", "caveats")}


@pytest.mark.long
def test_a_study_on_s3_survives_its_driver_and_ends_as_on_one_machine(s3: dict[str, str], tmp_path: Path) -> None:
    study = write(tmp_path, STUDY)
    first, second, third = (machine(tmp_path / name) for name in ("first", "second", "third"))
    local = softseg("run", study, "--local", "--json", cwd=tmp_path)
    assert local.returncode == 0, local.stderr

    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", str(study), "--json", *SHARED]
    driver = subprocess.Popen(command, cwd=tmp_path, env=first, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while not (ended := [n for n in Place.at(RUN).walk() if n.endswith(("/000.json", "/001.json"))]):
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)  # polling what another process writes
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    kept = {name: (Place.at(RUN) / name).read() for name in ended}
    assert len(kept) < 8

    again = softseg("run", study, "--json", *SHARED, cwd=tmp_path, env=second)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    last = json.loads(again.stdout.splitlines()[-1])
    assert (last["finished"], last["failed"], last["run"]) == (8, 0, RUN)
    assert {name: (Place.at(RUN) / name).read() for name in ended} == kept, "what had finished did not run again"

    left = set(Place.at(RUN).walk())
    assert {"study.json", "results.parquet", "run.json", "code.json", "report/index.html", "mlflow.db"} <= left
    assert study.read_bytes() in [(Place.at(RUN) / name).read() for name in left if name.startswith("sources/")]
    assert not [name for name in left if name.endswith((".pt", ".stop")) or ".tune" in name]
    assert len(Place.at(f"s3://{BUCKET}/stores").names()) == 1
    assert list((tmp_path / "second/cache/stores").glob("*.arrow"))
    assert not list((tmp_path / "second/tmp").glob("softseg-fit-*")), "scratch folders are removed"

    (Place.at(RUN) / "results.parquet").pull(tmp_path / "s3" / "results.parquet")
    pd.testing.assert_frame_equal(table(tmp_path / "s3"), table(tmp_path / "runs/tiny"))
    from_anywhere = softseg_here("report", RUN, "--json", cwd=tmp_path, env=third)
    assert comparable(from_anywhere.stdout) == comparable(softseg_here("report", "runs/tiny", "--json", cwd=tmp_path).stdout)
    page = Path(softseg_here("report", RUN, cwd=tmp_path, env=third).stdout.strip())
    assert "third/cache" in str(page)
    assert f"softseg report {RUN} --json" in page.read_text()
    assert (page.parent / "overlays.png").is_file(), "the store and the winner's weights are found as well"
    status = json.loads(softseg_here("status", RUN, "--json", cwd=tmp_path, env=third).stdout)
    assert (status["finished"], status["left"], status["running"]) == (8, 0, [])
    database = f"sqlite:///{tmp_path}/mlflow.db"
    synced = softseg_here("sync", RUN, "--tracking-uri", database, "--json", cwd=tmp_path, env=third)
    assert (synced.returncode, json.loads(synced.stdout)["notes"]) == (0, []), synced.stdout


def test_a_bucket_that_is_not_there_is_one_line_with_exit_code_2(s3: dict[str, str], tmp_path: Path) -> None:
    study = write(tmp_path, STUDY)
    ran = softseg_here("run", study, "--local", "--out", "s3://nobody-has-this", cwd=tmp_path, env=machine(tmp_path / "first"))
    assert ran.returncode == 2, ran.stderr
    assert "s3://nobody-has-this/tiny" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
