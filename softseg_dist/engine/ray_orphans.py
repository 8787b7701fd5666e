"""Resources that nobody holds any more, and that Ray does not free by itself.

A lane reserves CPUs and GPUs for its workers as a placement group. When the process that holds the lane is killed before the group
is up, Ray Train does not hear of it and the reservation stays: the study would wait for ever for its own resources. The driver
knows better, as Ray records that the creator has died.
"""

from __future__ import annotations

import time

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

EVERY_S = 2.0
REMOVED = PlacementGroupTableData.PlacementGroupState.Value("REMOVED")


class Orphans:
    """Looks for them now and then, when asked."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def sweep(self) -> None:
        """Free the resources of this driver's dead actors, unless that was done a moment ago."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + EVERY_S
            free_orphans()


def free_orphans() -> int:
    """Remove the placement groups of this driver whose creators have died; returns how many there were."""
    job, removed = ray.get_runtime_context().get_job_id(), 0
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        made_by_actor = group.creator_actor_id.strip(b"\xff")  # the driver's own groups have no such id
        dead = group.creator_actor_dead and not group.is_detached and group.state != REMOVED
        if dead and made_by_actor and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed


def wait_until_free(within_s: float = 15.0) -> None:
    """Wait, freeing what is orphaned, until nothing of this driver's lanes is reserved any more, or for `within_s`."""
    job, until = ray.get_runtime_context().get_job_id(), time.monotonic() + within_s
    while time.monotonic() < until:
        free_orphans()
        groups = map(PlacementGroupTableData.FromString, state._connect_and_get_accessor().get_placement_group_table())
        if all(g.state == REMOVED or g.creator_job_id.hex() != job or g.is_detached for g in groups):
            return
        time.sleep(0.1)
