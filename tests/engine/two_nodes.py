"""A program: a cluster of two nodes, the second in another working directory, asked whether it can use folders.

`python two_nodes.py HERE THERE '{"--out": FOLDER, ...}'`: the driver and the first node start in HERE, the second in THERE. A
folder `/proc/self/cwd/...` is another one for each, as a local disk is. Prints "" or what is refused.
"""

from __future__ import annotations

import json
import os
import sys

import ray
from ray.cluster_utils import Cluster

from softseg_dist.engine.ray_cluster import ENVIRONMENT, check_reach
from softseg_dist.errors import UserError

if __name__ == "__main__":
    here, there, folders = sys.argv[1:]
    os.environ.update(ENVIRONMENT | {"RAY_AUTH_MODE": "disabled"})
    cluster = Cluster()
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    for folder in (here, there):
        os.chdir(folder)
        cluster.add_node(**options)
    os.chdir(here)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        check_reach(json.loads(folders))
        print(json.dumps(""))
    except UserError as error:
        print(json.dumps(str(error)))
    ray.shutdown()
    cluster.shutdown()
