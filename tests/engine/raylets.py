"""A program: a cluster of several raylets on this machine, which grows and shrinks as it is told, or by itself.

Prints {"address": HOST:PORT, "dashboard": URL} of a head with one CPU. Then every line on its standard input is an order,
answered by one line when it is done: `add N` starts a node of N CPUs, `gpu N` one that claims a GPU besides. `drain` tells the last
one that it ends in 30 s, `kill` takes it away as a power cut would. `alone` waits until the head is the only node. Ends with its
input.

`python raylets.py grow`: a head without CPUs, and Ray's autoscaler with its fake cloud, which adds up to three nodes of one CPU;
`python raylets.py grow v2`: the same with version 2 of the autoscaler, as on Kubernetes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.services import get_node_ip_address
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 100 * 2**20}
PROVIDER = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def growing_head(v2: bool) -> dict[str, Any]:
    """Arguments of a head whose autoscaler starts nodes on this machine and ends them after some idle seconds."""
    os.environ |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    if v2:
        os.environ |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    flags = dict.fromkeys(("disable_launch_config_check", "disable_node_updaters", "use_node_id_as_ip"), True)
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    worker = {"resources": {"CPU": 1} | SMALL, "node_config": {}, "min_workers": 0, "max_workers": 3}
    one = {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID} if v2 else {}
    config = {
        "cluster_name": "fake",
        "provider": {"type": "external", "module": PROVIDER, "gcs_address": f"{get_node_ip_address()}:{port}", **flags, **one},
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "max_workers": 3,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in COMMANDS},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(config, file)
    named = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    return {"num_cpus": 0, "gcs_server_port": port, "autoscaling_config": file.name, "env_vars": named}


def wait_until(happened: Any, limit_s: float = 60) -> None:
    deadline_s = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


if __name__ == "__main__":
    grows, v2 = "grow" in sys.argv[1:], "v2" in sys.argv[1:]
    head = growing_head(v2) if grows else {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head | SMALL | {"dashboard_agent_listen_port": 0})
    if grows and not v2:  # the autoscaler is at work
        client = GcsClient(address=cluster.address)
        wait_until(lambda: client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None))
    print(json.dumps({"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}), flush=True)
    nodes = []
    for order, *number in map(str.split, sys.stdin):
        if order in ("add", "gpu"):
            nodes.append(cluster.add_node(num_cpus=int(number[0]), num_gpus=int(order == "gpu"), **SMALL))
        elif order == "drain":
            command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address]
            command += ["--node-id", nodes[-1].node_id, "--deadline-remaining-seconds", "30"]
            subprocess.run([*command, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"], check=True)
        elif order == "kill":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            wait_until(lambda: len(cluster.global_state._live_node_ids()) == 1)
        print("done", flush=True)
    children = psutil.Process().children(recursive=True)
    cluster.shutdown()
    for process in psutil.wait_procs(children, timeout=10)[1]:  # nodes that the autoscaler has started
        process.kill()
    if grows:
        Path(head["autoscaling_config"]).unlink()
