"""The watcher of spot machines against a real Ray with token authentication: what it drains, and how long it waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import starts
from test_cluster import WITH_TOKEN, Raylets, driver, told

from softseg_dist.record.ledger import Ledger
from softseg_dist.training.task import checkpoint_path, history_path

pytestmark = pytest.mark.engine

# In a process of its own: authentication is on or off for all of a process, and other tests have it off.
SCENARIO = """
import subprocess, sys, time
import ray
from ray.cluster_utils import Cluster

small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
cluster.add_node(**small)
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(num_cpus=1)  # as a fit does: a drained node whose resources are all free ends at once
class Fit:
    def train(self, seconds):
        time.sleep(seconds)

fit = Fit.remote()
ray.get(fit.train.remote(0))
still = fit.train.remote(60)
drain = [sys.executable, sys.argv[1], "--address", cluster.address, "--now"]
before = time.monotonic()
done = subprocess.run([*drain, "3"], capture_output=True, text=True)
waited = time.monotonic() - before
assert done.returncode == 0, done.stdout + done.stderr
assert waited >= 3, "it did not wait for the fit that runs"
busy = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
drained = set(ray._private.state.state.get_draining_nodes())
assert busy and busy <= drained, (busy, drained)
ray.kill(fit)
done = subprocess.run([*drain, "60"], capture_output=True, text=True)
assert time.monotonic() - before < 60, "it waited although nothing runs"
ray.shutdown()
cluster.shutdown()
print("drained", flush=True)
"""


@pytest.mark.timed
def test_a_drained_node_takes_no_new_fits_and_those_that_run_are_waited_for() -> None:
    watcher = Path(__file__).parents[2] / "cluster/spot/drain_on_notice.py"
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", textwrap.dedent(SCENARIO), str(watcher)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip().endswith("drained"), done.stdout + done.stderr


STUDY = '''"""One fit that runs for half a minute, and writes no checkpoint of its own accord."""
from softseg_dist import MonteCarlo, Optim, Phantom, Preprocess, Recipe, Resources, Study, UNet

STUDY = Study(
    name="spot", question="Does it outlive a drain?", data=Phantom(subjects=6, size=(24, 24), num_slices=4),
    preprocess=Preprocess(dim=2), splits=MonteCarlo(count=1), validate_every=1000,
    candidates={"a": Recipe(network=UNet(filters=(4, 8)), optim=Optim(epochs=1000, batch_size=8, patience=None))},
    resources=Resources(workers_per_fit=WORKERS, cpus_per_fit=2 // WORKERS, checkpoint_every_s=1e6),
)
'''


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_a_fit_on_a_drained_node_loses_at_most_what_it_trained_since_the_notice(tmp_path: Path, workers: int) -> None:
    (tmp_path / "spot.py").write_text(STUDY.replace("WORKERS", str(workers)))
    raylets = Raylets()
    raylets.order("add 2")
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", "spot.py", "--address", raylets.address]
    process = subprocess.Popen(command, cwd=tmp_path, env=WITH_TOKEN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    fit = tmp_path / "runs/spot/fits/a/000"

    def epochs() -> int:
        return len(history_path(fit).read_text().splitlines()) if history_path(fit).is_file() else 0

    wait_until(lambda: epochs() > 10, process)
    assert not checkpoint_path(fit).exists()
    noticed = epochs()
    raylets.order("drain")
    wait_until(checkpoint_path(fit).exists, process)
    raylets.order("kill")
    raylets.order("add 2")
    out, _ = process.communicate(timeout=600)
    raylets.end()
    assert process.returncode == 0, out
    result = Ledger(tmp_path / "runs/spot").results()["a/000"]
    assert result.resumed_epoch is not None
    assert noticed <= result.resumed_epoch < result.epochs
    assert result.attempt == 0


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_does_not_wait_for_a_machine(tmp_path: Path, workers: int) -> None:
    (tmp_path / "spot.py").write_text(STUDY.replace("WORKERS", str(workers)))
    raylets = Raylets()
    raylets.order("add 2")
    command = [sys.executable, "-m", "softseg_dist.cli.main", "run", "spot.py", "--address", raylets.address]
    process = subprocess.Popen(command, cwd=tmp_path, env=WITH_TOKEN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    fit = tmp_path / "runs/spot/fits/a/000"
    wait_until(history_path(fit).is_file, process)
    raylets.order("drain")
    wait_until(checkpoint_path(fit).exists, process)
    raylets.order("kill")
    time.sleep(5)  # Tune starts the fit again, as soon as there is a machine
    process.terminate()
    out, _ = process.communicate(timeout=60)
    raylets.end()
    assert process.returncode == 130, out
    assert "Interrupted; the same command continues it." in out


@pytest.mark.long
def test_fits_that_begin_after_the_notice_begin_elsewhere(tmp_path: Path) -> None:
    raylets = Raylets()
    raylets.order("add 2")
    process = driver(tmp_path, address=raylets.address, cpus_per_fit=2, sleep_s=1)
    wait_until(lambda: len(Ledger(tmp_path).results()) > 0, process)
    raylets.order("drain")
    raylets.order("add 2")
    out = told(process)
    raylets.end()
    assert json.loads(out.splitlines()[-1])["finished"] == 6
    assert out.count("its machine ends soon; trying again") == 1
    assert set(starts(tmp_path).values()) == {1}
