"""The watcher of spot machines against a real Ray with token authentication: what it drains, and how long it waits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timed]

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
