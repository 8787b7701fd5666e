"""Train one candidate on everybody: one fit over all workers that there is room for, through Ray Train; on one if it is short."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from softseg_dist.engine.progress import Progress
from softseg_dist.engine.ray_cluster import bundle_of, places_for, quiet, ray_at, wait_for_room, wait_until_free
from softseg_dist.engine.ray_lanes import Lane, LostJob, Report, run_alone
from softseg_dist.engine.worker import Ending, Fit, reason_of, run_fit
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.search.searcher import MAX_ATTEMPTS
from softseg_dist.sources import Sources
from softseg_dist.study import Resources
from softseg_dist.training.task import FitResult, FitTask, Worker

GROUP_PAYS_S = 60.0  # of one worker: below, the 13 to 25 s that a group takes to start are not won back


def train_on_workers(
    task: FitTask,
    fit: Fit,
    resources: Resources,
    progress: Progress,
    address: str | None = None,
    max_wait_s: float | None = None,
    sources: Sources | None = None,
    alone_s: float = math.inf,
) -> FitResult:
    """Run a fit on as many workers as there is room for, but no more than a batch has items; goes on from its checkpoint.

    `alone_s`: how long it takes one worker; where that is less than `GROUP_PAYS_S`, one it is.
    A lost worker costs what has been trained since the last checkpoint. Arguments are those of `run_search`. Raises UserError if
    there is no room for one worker, or if the fit is lost again and again.
    """
    alone = resources.replace(workers_per_fit=1, max_concurrent=None, fits_per_gpu=None)

    def run(config: dict[str, Any], worker: Worker, report: Report) -> dict[str, str]:
        return run_fit(config, fit, sources, worker, report)

    def tell(report: Mapping[str, str]) -> None:
        told, epochs = json.loads(report["epoch"]), task.recipe.optim.epochs
        if told["epoch"] % max(1, epochs // 4) == 0:
            progress.note(
                f"{task.candidate} on all subjects: epoch {told['epoch']:g} of {epochs}, loss {told['loss']:.4g}"
            )

    place = Place.at(task.folder)
    with quiet(), ray_at(address):
        wait_for_room(alone, max_wait_s, progress.note, lambda: False)
        bundle = bundle_of(alone)
        num_workers = min(places_for(bundle, alone), task.recipe.optim.batch_size)
        if num_workers == 1 or alone_s < GROUP_PAYS_S:
            return _answer(partial(run_alone, run, bundle), task, str(place / ".stop"), tell)
        lane = Lane(run, num_workers, bundle, str(place / ".lane"))
        try:
            return _answer(lane.run, task, str(place / ".stop"), tell)
        finally:
            lane.close()
            wait_until_free()
            (place / ".lane").delete()


def _answer(run_job: Callable[[Any, Report], Any], task: FitTask, stop: str, report: Report) -> FitResult:
    lost = ""
    for attempt in range(MAX_ATTEMPTS):
        message = {"task": json.dumps(task.replace(attempt=attempt).model_dump(mode="json")), "stop": stop}
        try:
            ending = Ending.model_validate(json.loads(run_job(message, report)["ending"]))
        except LostJob as error:
            lost = str(error)
            continue
        if ending.kind == "user_error":
            raise UserError(f"{task.key}: {ending.text}")
        assert ending.result is not None, "nobody writes its stop file"
        return ending.result
    raise UserError(f"{task.key}: lost {MAX_ATTEMPTS} times, the last time: {reason_of(task, lost)}")
