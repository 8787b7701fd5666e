"""A cluster of several raylets with token authentication: connecting, waiting for machines, losing them, submitting studies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import NUM_SPLITS, processes, starts

from softseg_dist.record.ledger import Ledger

pytestmark = pytest.mark.engine
HERE = Path(__file__).parent
WITHOUT_TOKEN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SOFTSEG_"))} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": f"{HERE}:{HERE.parents[1]}",
}
WITH_TOKEN = WITHOUT_TOKEN | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}
STUDY = '''"""Tiny."""
from softseg_dist import Dice, MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Sigmoid, Study, UNet

STUDY = Study(
    name="tiny", question="Does it run?", data=Phantom(subjects=6, size=(24, 24), num_slices=4), preprocess=Preprocess(dim=2),
    splits=MonteCarlo(count=2), candidates={"a": Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=2, batch_size=8))},
    resources=Resources(cpus_per_fit=CPUS),
)
'''


class Raylets:
    """The program `raylets.py`, and what it is told."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(HERE / "raylets.py"), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=WITH_TOKEN
        )
        told = json.loads(self._line())
        self.address, self.dashboard = told["address"], told["dashboard"]

    def order(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()
        assert self._line() == "done\n"

    def end(self) -> None:
        self.process.communicate(timeout=60)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    cluster = Raylets()
    yield cluster
    cluster.end()


def softseg(*args: object, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "softseg_dist.cli.main", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def study_file(folder: Path, cpus: int = 1) -> Path:
    path = folder / "tiny.py"
    path.write_text(STUDY.replace("CPUS", str(cpus)))
    return path


def driver(folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "scripted.py"), str(folder), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=WITH_TOKEN)


def told(process: subprocess.Popen[str]) -> str:
    """What a driver that ends well has printed from now on."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    return out


def refusal(ended: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was refused."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    return ended.stderr


def test_what_a_cluster_cannot_do_is_one_line(raylets: Raylets, tmp_path: Path) -> None:
    study = study_file(tmp_path, cpus=9)
    command = ["run", study, "--address", raylets.address]
    waited = refusal(softseg(*command, "--max-wait", 1, cwd=tmp_path, env=WITH_TOKEN))
    assert "one fit needs 9 CPUs on one machine, but the most that one has is 1 CPUs" in waited
    assert "(waited 1 s)" in waited
    assert "set RAY_AUTH_MODE=token" in refusal(softseg(*command, cwd=tmp_path, env=WITHOUT_TOKEN))
    other = refusal(softseg(*command, cwd=tmp_path, env=WITH_TOKEN | {"SOFTSEG_SUBMITTED_BY": "0.0.1"}))
    assert "submitted by softseg_dist 0.0.1, but the cluster has" in other


def test_a_submitted_study_runs_to_its_report(raylets: Raylets, tmp_path: Path) -> None:
    study = study_file(tmp_path)
    command = ["submit", study, "--address", raylets.dashboard, "--debug"]
    assert "set RAY_AUTH_MODE=token" in refusal(softseg(*command, cwd=tmp_path, env=WITHOUT_TOKEN))
    assert "an absolute path of the head, or a URI" in refusal(softseg(*command, "--out", "r", cwd=tmp_path, env=WITH_TOKEN))
    folders = ["--out", tmp_path / "runs", "--stores", tmp_path / "stores"]
    done = softseg(*command, *folders, "--json", cwd=tmp_path, env=WITH_TOKEN)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [event["fit"] for event in events if event.get("event") == "fit"] == ["a/000", "a/001"]
    assert events[-1]["end"] == "done"
    assert Path(events[-1]["report"]).is_file()


def test_a_fit_waits_for_the_machine_that_can_hold_it(raylets: Raylets, tmp_path: Path) -> None:
    process = driver(tmp_path, address=raylets.address, cpus_per_fit=2, max_wait_s=100)
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert "waiting up to 100 s for machines: one fit needs 2 CPUs on one machine" in lines[1]
    raylets.order("add 2")
    assert json.loads(told(process).splitlines()[-1])["finished"] == 6
    raylets.order("kill")


def wait_for_processes(number: int, folder: Path, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while len(processes(folder)) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_study_uses_a_machine_that_joins_and_outlives_its_loss(raylets: Raylets, tmp_path: Path) -> None:
    process = driver(tmp_path, address=raylets.address, together=2, sleep_s=0.7, max_concurrent=None)
    wait_for_processes(1, tmp_path, process)
    raylets.order("add 1")
    wait_for_processes(2, tmp_path, process)
    before = set(Ledger(tmp_path).results())
    raylets.order("kill")
    out = told(process)
    assert json.loads(out.splitlines()[-1]) == {"finished": 6, "failed": 0, "unfinished": 0, "interrupted": False}
    assert out.count("its machine was lost; trying again") == 1
    results = Ledger(tmp_path).results()
    assert {result.attempt for result in results.values()} == {0}, "losing a machine is no failure of the fit"
    repeated = {key for key, count in starts(tmp_path).items() if count > 1}
    assert len(repeated) == 1
    assert not repeated & before
    assert len(results) == 2 * NUM_SPLITS


@pytest.fixture
def claimed_gpu(raylets: Raylets) -> Iterator[None]:
    """One of two nodes claims a GPU, which it has not."""
    raylets.order("gpu 1")
    yield
    raylets.order("kill")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_is_refused_before_the_first_fit(raylets: Raylets, claimed_gpu: None, tmp_path: Path) -> None:
    refused = refusal(softseg("run", study_file(tmp_path), "--address", raylets.address, cwd=tmp_path, env=WITH_TOKEN))
    assert "1 of 1 nodes with GPUs cannot run fits: " in refused
    assert f"torch {torch.__version__} cannot use its GPU 0: " in refused
    assert "or give --gpus-per-fit 0" in refused
    assert not list((tmp_path / "runs/tiny").glob("fits/a/00*"))


def test_fits_without_gpus_run_beside_gpus(raylets: Raylets, claimed_gpu: None, tmp_path: Path) -> None:
    process = driver(tmp_path, address=raylets.address, together=2, max_concurrent=None, gpus_per_fit=0)
    assert json.loads(told(process).splitlines()[-1])["finished"] == 6


@pytest.mark.long
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_cluster_without_workers_grows_for_a_study_and_shrinks_after_it(tmp_path: Path, version: str) -> None:
    cluster = Raylets("grow", version)
    process = driver(tmp_path, address=cluster.address, together=3, max_concurrent=None)
    out = told(process)
    assert "waiting up to 600 s for machines: one fit needs 1 CPUs on one machine, but the most that one has is 0" in out
    assert json.loads(out.splitlines()[-1])["finished"] == 6
    assert len(processes(tmp_path)) == 3, "the cluster grows to its limit, with the flags that the documentation gives"
    cluster.order("alone")
    cluster.end()
