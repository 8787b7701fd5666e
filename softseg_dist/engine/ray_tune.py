"""Run the fits of a study on Ray: one Tune trial is one fit.

Tune gives processes, placement and concurrency. The searcher decides what runs next, the ledger records it; Tune's own persistence,
loggers, retries and signal handling are switched off.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from softseg_dist.engine import ray_cluster
from softseg_dist.engine.context import RunContext
from softseg_dist.engine.ray_lanes import lane_of_process
from softseg_dist.engine.ray_packs import packs, run_in_pack, wait_until_released
from softseg_dist.engine.ray_private import Leaving, cause_in, forget_ended, free_orphans, lost_actors, name_logs, nodes_of
from softseg_dist.engine.session import Session, signals
from softseg_dist.engine.worker import ENDS_SOON, Ending, LostJob, StopFile, message_of, run_fit
from softseg_dist.places import Place
from softseg_dist.training.task import Worker

SWEEP_S = 2.0  # between two looks for the resources of killed lanes
LANE_HOLDER = {"node:__internal_head__": 0.001}  # a trial whose fit runs elsewhere must not hold what its workers need


@dataclass(frozen=True)
class RayBackend:
    """Fits in the workers of a Ray. `RunContext.fit` must be importable there.

    `address` is that of a running cluster; without it Ray is started on this machine, and stopped at the end. Where there is no
    room for one fit, `wait_for_room` waits for machines up to `max_wait_s`.
    """

    address: str | None = None
    max_wait_s: float | None = None

    def held(self) -> AbstractContextManager[None]:
        """One Ray for what runs while the block runs."""
        return ray_cluster.one_ray()

    def run_fits(self, session: Session, context: RunContext) -> None:
        """As `Backend.run_fits`. Raises UserError if no machine is large enough for one fit."""
        resources, asking_for = context.resources, ray_cluster.asking_for
        try:
            with ray_cluster.ray_at(self.address), signals(session), asking_for(resources, session.num_left) as withdraw:
                ray_cluster.wait_for_room(resources, self.max_wait_s, context.progress.note, lambda: session.interrupted)
                if self.address is not None:
                    ray_cluster.check_package()
                    stores = context.prepared.uri.rpartition("/")[0]
                    ray_cluster.check_reach({"--out": context.ledger.folder, "--stores": stores})
                    if "GPU" in ray_cluster.bundle_of(resources):
                        ray_cluster.check_devices()
                if session.interrupted:
                    return
                _tune(session, context, withdraw)
        finally:
            shutil.rmtree(context.ledger.working / ".tune", ignore_errors=True)


def _tune(session: Session, context: RunContext, withdraw: Callable[[], None]) -> None:
    resources, folder = context.resources, context.ledger.place
    bundle = ray_cluster.bundle_of(resources)
    alone = resources.workers_per_fit == 1
    with _frequent_collections(), _function(context, bundle, str(folder / ".tune")) as softseg_fit:
        tune.Tuner(
            tune.with_resources(softseg_fit, tune.PlacementGroupFactory([bundle if alone else LANE_HOLDER])),
            tune_config=tune.TuneConfig(
                search_alg=_TuneSearcher(session, context.stop_file, ray_cluster.Room(resources, bundle)),
                scheduler=_InOrder(),
                num_samples=-1,
                max_concurrent_trials=resources.max_concurrent or session.num_left,  # and `Room`, which follows the cluster
                reuse_actors=True,
                trial_name_creator=lambda trial: trial.config["name"],
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=str(context.ledger.working),  # on this machine: nothing of Tune's is kept
                name=".tune",
                verbose=0,
                callbacks=[_TuneEvents(session, withdraw)],
                failure_config=tune.FailureConfig(max_failures=0),  # a retry is a new trial: a fit knows its attempt
            ),
        ).fit()
    if not alone:
        ray_cluster.wait_until_free()


@contextmanager
def _frequent_collections() -> Iterator[None]:
    """Python collects cycles when a quarter has been added to what it looks at: here without the packages that were imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _function(context: RunContext, bundle: Mapping[str, float], lanes: str) -> Iterator[Callable[[dict[str, Any]], dict[str, str]]]:
    """The function of a Tune trial: it runs a fit itself, or on the workers of a lane, or in the host of a pack.

    A fit that was lost before runs in its trial's own process, where no other fit is lost with it.
    """
    run, device = partial(run_fit, context.fit, context.sources), "cuda" if "GPU" in bundle else "cpu"
    workers, size = context.resources.workers_per_fit, context.resources.fits_per_gpu

    def softseg_fit(config: dict[str, Any]) -> dict[str, str]:
        task = json.loads(config["task"])
        name_logs(config["name"])
        leaving = Leaving([ray.get_runtime_context().get_node_id()])
        if leaving():  # Tune uses its processes again; one that fails is replaced, elsewhere
            raise LostJob(ENDS_SOON)
        try:
            if workers > 1:
                lane = lane_of_process(run, workers, dict(bundle), lanes)
                return dict(lane.run(config, tune.report, StopFile(config["stop"])) or Ending(kind="interrupted").answer)
            if manager is not None and task["attempt"] == 0:
                return dict(run_in_pack(manager, task["folder"], config, tune.report))
        except LostJob as lost:  # as a value: Train is starting the workers again, which this process must not leave
            return Ending(kind="lost", text=str(lost), blameless=lost.blameless).answer
        if manager is not None:
            wait_until_released(manager, task["folder"])
        return dict(run(config, Worker(device=device, leaving=leaving), tune.report))

    together = packs(run, size) if size is not None and size > 1 else nullcontext()
    with together as manager:
        yield softseg_fit


class _Shared:
    """Tune pickles and copies what it is given; a session must be neither."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _TuneEvents(_Shared, TrialProgressCallback):
    """Reports fits whose process died or raised to the session, and frees the resources of lanes that were killed.

    Tune would add a `TrialProgressCallback` of its own, which prints nothing here and keeps every trial. `withdraw` is called as
    soon as trials ask for machines themselves.
    """

    def __init__(self, session: Session, withdraw: Callable[[], None]) -> None:
        super().__init__()
        self._session, self._withdraw, self._next_s = session, withdraw, 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if iteration:
            self._withdraw()
        if self._session.stopped and trials and all(trial.status == trial.PENDING for trial in trials):
            raise KeyboardInterrupt  # what waits for a machine has nothing to save
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + SWEEP_S
            free_orphans()
            ray_cluster.living_nodes()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """The searcher has it."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The searcher has it."""

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        path = Path(trial.error_file)  # Tune's own `get_error` looks where it has not been copied to yet
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A preempted fit never comes here: Tune starts it again.
        node_lost = "its node has died" in text or ray_cluster.node_is_gone(nodes_of(lost_actors(text)))
        cause = ENDS_SOON if ENDS_SOON in text else "its machine was lost" if node_lost else cause_in(text)
        self._session.ended_as(trial.trial_id, Ending(kind="lost", text=cause, blameless=node_lost or cause == ENDS_SOON))


class _InOrder(_Shared, FIFOScheduler):
    """First in, first out; Tune's own looks through all trials that there ever were, several times for every fit."""

    def __init__(self) -> None:
        super().__init__()
        self._added: list[Any] = []

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._added.append(trial)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        forget_ended(tune_controller)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        while self._added and self._added[0].status != self._added[0].PENDING:  # one that waits again is started by Tune itself
            self._added.pop(0)
        return self._added[0] if self._added else None


class _TuneSearcher(_Shared, Searcher):
    def __init__(self, session: Session, stop_file: Place, room: Callable[[], int]) -> None:
        super().__init__(metric=None, mode=None)
        self._session, self._stop_file, self._room = session, stop_file, room
        self._num_open = 0

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        task = self._session.next_fit(trial_id) if self._num_open < self._room() else None
        if task is None:
            return Searcher.FINISHED if self._session.ended else None
        self._num_open += 1
        return message_of(task, self._stop_file) | {"name": task.key}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if "epoch" in result and "ending" not in result:
            self._session.epoch(trial_id, json.loads(result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self._num_open -= 1
        if not error:  # errors come through `_TuneEvents`, which knows their cause
            self._session.ended_as(trial_id, Ending.of(result) if result and "ending" in result else Ending(kind="lost"))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state."""
