"""All uses of Ray's private or unstable names, for the versions of Ray that are tested.

tests/unit/engine/test_ray_private.py lists the names, and says which one is gone when Ray changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.experimental.internal_kv import _internal_kv_get
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, remove_placement_group
from typing_extensions import override

REMOVED = PlacementGroupTableData.PlacementGroupState.Value("REMOVED")


class JobWithoutPaths(JobConfig):
    """A job whose workers do not look for modules in the driver's working folder, or in that of its script.

    Ray puts both first on the workers' path, where a file hides a module of its name, unless the job brings its own working folder.
    """

    @override
    def _runtime_env_has_working_dir(self) -> bool:
        return True


def ask_for_machines(bundle: dict[str, float], count: int) -> None:
    """Request `count` bundles of a cluster that grows; 0 withdraws the request."""
    request_resources(bundles=[bundle] * count)


def grows() -> bool:
    """Has the cluster an autoscaler that can add machines?

    Ray runs one everywhere. Without one of its own, version 1 names the machines of a cluster `node_<id>`, each a type of its own.
    Version 2 is switched on only for clusters that grow.
    """
    if is_autoscaler_v2():
        return True
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith("node_") for name in types)


def node_of_actor(actor: str) -> str:
    """The id of the node of an actor, both in hexadecimal."""
    return str(ray_state.actors(actor)["Address"]["NodeID"])


@contextmanager
def no_worker_logs() -> Iterator[None]:
    """Ray prints nothing about workers while the block runs, or it would print their deaths on stdout, between lines of --json."""
    shown = ray_worker._worker_logs_enabled
    ray_worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = shown


def free_orphans() -> int:
    """Remove the placement groups of this driver whose creators have died; returns how many groups it had, of living ones too.

    A killed lane of workers leaves its group reserved, without the dashboard or with a second Ray on the machine.
    """
    job = ray.get_runtime_context().get_job_id()
    table = ray_state.state._connect_and_get_accessor().get_placement_group_table()
    groups = map(PlacementGroupTableData.FromString, table)
    reserved = [g for g in groups if g.state != REMOVED and not g.is_detached and g.creator_job_id.hex() == job]
    for group in reserved:
        made_by_actor = group.creator_actor_id.strip(b"\xff")  # the driver's own groups have no such id
        if group.creator_actor_dead and made_by_actor:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(reserved)


def lost_actor(text: str) -> str | None:
    """The id of the actor that Ray's message about a dead process calls unavailable; None if it names none."""
    found = re.search(r"The actor ([0-9a-f]{32}) is unavailable", text)
    return None if found is None else found[1]


def cause_in(text: str) -> str:
    """The part of Ray's message about a dead process that people need: the exception inside it, if there is one."""
    if "low on memory" in text:
        return "its process was killed because the machine ran low on memory; lower --max-concurrent or batch_size"
    inner = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception): .+", text, flags=re.MULTILINE)
    return inner[-1] if inner else ""
