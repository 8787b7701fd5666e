"""A program: a cluster of several raylets on this machine, which grows and shrinks as it is told.

Prints {"address": HOST:PORT, "dashboard": URL} of a head with one CPU. Then every line on its standard input is an order,
answered by one line when it is done: `add N` starts a node of N CPUs, `kill` takes the last one away as a power cut would.
Ends with its input.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster

SMALL = {"object_store_memory": 100 * 2**20}

if __name__ == "__main__":
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head | SMALL)
    print(json.dumps({"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}), flush=True)
    nodes = []
    for order, *number in map(str.split, sys.stdin):
        if order == "add":
            nodes.append(cluster.add_node(num_cpus=int(number[0]), **SMALL))
        else:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()
