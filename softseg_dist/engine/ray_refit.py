"""Train one candidate on all subjects: one fit over all workers that there is room for, or on one worker if it is short."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.ray_cluster import bundle_of, places_for, quiet, ray_at, wait_for_room, wait_until_free
from softseg_dist.engine.ray_lanes import Lane, run_alone
from softseg_dist.engine.worker import Report, run_fit, run_until_done
from softseg_dist.places import Place
from softseg_dist.training.task import FitResult, FitTask, Worker

GROUP_PAYS_S = 60.0  # of one worker: a group takes 13 to 25 s to start, which a shorter fit does not win back


def train_on_workers(
    context: RunContext,
    task: FitTask,
    alone_s: float = math.inf,
    address: str | None = None,
    max_wait_s: float | None = None,
) -> FitResult:
    """Run a fit on as many workers as there is room for, but no more than a batch has items; it resumes from its checkpoint.

    `alone_s` is the time that one worker would take; below `GROUP_PAYS_S` one worker runs the fit. A lost worker costs what was
    trained since the last checkpoint. `address` and `max_wait_s` as in `RayBackend`. Raises UserError if there is no room for one
    worker, or if the fit is lost repeatedly.
    """
    alone = context.resources.replace(workers_per_fit=1, max_concurrent=None, fits_per_gpu=None)
    fit, sources, note = context.fit, context.sources, context.progress.note

    def run(message: dict[str, Any], worker: Worker, report: Report) -> dict[str, str]:
        return run_fit(message, fit, sources, worker, report)

    place = Place.at(task.folder)
    with quiet(), ray_at(address):
        wait_for_room(alone, max_wait_s, note, lambda: False)
        bundle = bundle_of(alone)
        num_workers = min(places_for(bundle, alone), task.recipe.optim.batch_size)
        if num_workers == 1 or alone_s < GROUP_PAYS_S:
            return run_until_done(partial(run_alone, run, bundle), task, str(place / ".stop"), note)
        lane = Lane(run, num_workers, bundle, str(place / ".lane"))
        try:
            return run_until_done(lane.run, task, str(place / ".stop"), note)
        finally:
            lane.close()
            wait_until_free()
            (place / ".lane").delete()
