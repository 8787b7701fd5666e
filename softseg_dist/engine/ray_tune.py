"""Run the fits of a study on Ray Tune: one Tune trial is one fit.

Tune gives processes, placement and concurrency. What runs next is decided by `searcher`, what is recorded by `ledger`; Tune's
own persistence, loggers, retries and signal handling are switched off.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ray import tune
from ray.tune.search import Searcher

from softseg_dist.data.splits import Split
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.ray_cluster import (
    Orphans,
    bundle_of,
    cause_in,
    fits_at_once,
    node_is_gone,
    quiet,
    ray_at,
    wait_for_room,
    wait_until_free,
)
from softseg_dist.engine.ray_lanes import LostJob, Report, lane_of_process
from softseg_dist.engine.ray_packs import packs, run_in_pack, vacate, with_size
from softseg_dist.engine.ray_reach import check_package, check_reach
from softseg_dist.engine.session import Outcome, Session
from softseg_dist.engine.worker import Ending, Fit, StopFile, run_fit
from softseg_dist.record.ledger import Ledger
from softseg_dist.search.candidate import is_tuning
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.search.searcher import MakeTask, StudySearcher
from softseg_dist.sources import Sources
from softseg_dist.study import Recipe, Resources, Study
from softseg_dist.tracking.tracker import Tracker
from softseg_dist.training.task import FitTask, Worker

LANE_HOLDER = {"node:__internal_head__": 0.001}  # a trial whose fit runs elsewhere must not hold what its workers need


def run_search(
    study: Study,
    splits: Sequence[Split],
    store: str | Path,
    fingerprint: str,
    ledger: Ledger,
    fit: Fit,
    resources: Resources,
    tracker: Tracker | None,
    progress: Progress,
    address: str | None = None,
    sources: Sources | None = None,
    max_wait_s: float | None = None,
) -> Outcome:
    """Run every fit of the study that the ledger does not have yet; returns how the study stands then.

    `ledger` must have the study open. `fit` must be importable in the workers. `address` is that of a running cluster; without
    it Ray is started on this machine, and stopped at the end. Where there is no room for one fit, machines are waited for up to
    `max_wait_s` (see `wait_for_room`). `sources` are those of the study, for workers
    that meet classes defined in them. The first Ctrl-C (or SIGTERM) lets running fits write their checkpoints; the second one
    stops at once.

    Raises UserError if another driver uses the run folder, no machine is large enough for one fit, or `propose` or a fit reports
    a mistake of the user's. Fits that have ended stay recorded in every case.
    """

    make_task = _task_maker(study, str(store), fingerprint, ledger, resources)
    with ledger.lock():
        stop_file = StopFile(str(ledger.place / ".stop"))
        stop_file.remove()  # left by a session that was killed
        session = Session(StudySearcher(study, splits, ledger, make_task), tracker, progress, stop_file)
        try:
            session.start()
            if not session.ended:
                with quiet(), ray_at(address), _signals(session):  # Ray sets a SIGTERM handler of its own
                    wait_for_room(resources, max_wait_s, progress.note, lambda: session.interrupted)
                    if address is not None:
                        check_package()
                        check_reach({"--out": ledger.folder, "--stores": str(store).rpartition("/")[0]})
                    if not session.interrupted:
                        if resources.fits_per_gpu == "auto":
                            name, recipe = next(iter((study.candidates or sample_proposals(study)).items()))
                            first = make_task(name, recipe, splits[0], 0)
                            resources = with_size(resources, first, sources, progress.note)
                        _tune(session, fit, resources, ledger, sources)
        except KeyboardInterrupt:
            session.interrupted = True
        finally:
            progress.close()
            stop_file.remove()
            ledger.discard(".tune")
        if session.error is not None:
            raise session.error
        return session.outcome()


def _task_maker(study: Study, store: str, fingerprint: str, ledger: Ledger, resources: Resources) -> MakeTask:
    def make_task(candidate: str, recipe: Recipe, split: Split, attempt: int) -> FitTask:
        return FitTask(
            study=study.name,
            seed=study.seed,
            candidate=candidate,
            recipe=recipe,
            split=split,
            objective=study.objective,
            second_objective=study.second_objective,
            uncertainty=() if is_tuning(candidate) else study.uncertainty,
            store=store,
            store_fingerprint=fingerprint,
            folder=ledger.fit_folder(candidate, split),
            threads=resources.cpus_per_fit,
            checkpoint_every_s=resources.checkpoint_every_s,
            time_limit_s=resources.time_limit_s,
            attempt=attempt,
        )

    return make_task


def _tune(session: Session, fit: Fit, resources: Resources, ledger: Ledger, sources: Sources | None) -> None:
    workers = resources.workers_per_fit
    bundle = bundle_of(resources)
    with _trainable(fit, resources, bundle, str(ledger.place / ".tune"), sources) as softseg_fit:
        tune.Tuner(
            tune.with_resources(softseg_fit, tune.PlacementGroupFactory([bundle if workers == 1 else LANE_HOLDER])),
            tune_config=tune.TuneConfig(
                search_alg=_TuneSearcher(session, str(ledger.place / ".stop")),
                num_samples=-1,
                max_concurrent_trials=fits_at_once(resources),
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                storage_path=str(ledger.working),  # on this machine: nothing of Tune's is kept
                name=".tune",
                verbose=0,
                callbacks=[_TuneErrors(session)] if workers == 1 else [_TuneErrors(session), _Sweeper()],
                failure_config=tune.FailureConfig(max_failures=0),  # a retry is a new trial: a fit knows its attempt
            ),
        ).fit()
    if workers > 1:
        wait_until_free()


@contextmanager
def _trainable(
    fit: Fit, resources: Resources, bundle: Mapping[str, float], lanes: str, sources: Sources | None
) -> Iterator[Callable[[dict[str, Any]], dict[str, str]]]:
    """What a Tune trial does: a fit, or to have it done by the workers of a lane or the host of a pack.

    A fit that was lost before runs in its trial's own process, where it can take no other one with it.
    """
    workers, size = resources.workers_per_fit, resources.fits_per_gpu
    device = "cuda" if "GPU" in bundle else "cpu"

    def run_here(config: dict[str, Any], worker: Worker, report: Report) -> dict[str, str]:
        return run_fit(config, fit, sources, worker, report)

    def softseg_fit(config: dict[str, Any]) -> dict[str, str]:
        task = json.loads(config["task"])
        try:
            if workers > 1:
                return dict(lane_of_process(run_here, workers, dict(bundle), lanes).run(config, tune.report))
            if landlord is not None and task["attempt"] == 0:
                return dict(run_in_pack(landlord, task["folder"], config, tune.report))
        except LostJob as lost:  # as a value: Train is starting the workers again, which this process must live to see
            ending = Ending(kind="lost", text=str(lost), blameless=lost.blameless)
            return {"ending": json.dumps(ending.model_dump(mode="json"))}
        if landlord is not None:
            vacate(landlord, task["folder"])
        return run_here(config, Worker(device=device), tune.report)

    together = packs(run_here, size, resources.time_limit_s) if isinstance(size, int) and size > 1 else nullcontext()
    with together as landlord:
        yield softseg_fit


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


class _Shared:
    """Tune pickles and copies what it is given; a session must be neither."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of Tune's has nothing to do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class _TuneErrors(_Shared, tune.Callback):
    """Tells the session of fits whose process died or raised."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        path = Path(trial.error_file)  # Tune's own `get_error` looks where it has not been copied to yet
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._session.ended_as(trial.trial_id, None, cause_in(text), node_lost=_node_lost(text))


def _node_lost(text: str) -> bool:
    """Was a fit ended by the loss of its machine, as Ray tells it? A preempted one never comes here: Tune starts it again."""
    unheard = re.search(r"The actor ([0-9a-f]{32}) is unavailable", text)
    return "its node has died" in text or (unheard is not None and node_is_gone(unheard[1]))


class _Sweeper(_Shared, tune.Callback):
    """Frees, between two steps of Tune, what lanes have left behind that were killed."""

    def __init__(self) -> None:
        self._orphans = Orphans()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._orphans.sweep()


class _TuneSearcher(_Shared, Searcher):
    """Tune's view of a session."""

    def __init__(self, session: Session, stop: str) -> None:
        super().__init__(metric=None, mode=None)
        self._session, self._stop = session, stop

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        task = self._session.next_fit(trial_id)
        if task is None:
            return Searcher.FINISHED if self._session.ended else None
        return {"task": json.dumps(task.model_dump(mode="json")), "stop": self._stop}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        if "epoch" in result and "ending" not in result:
            self._session.epoch(trial_id, json.loads(result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # errors come through `_TuneErrors`, which knows their cause
            told = (result or {}).get("ending")
            self._session.ended_as(trial_id, None if told is None else Ending.model_validate(json.loads(told)))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """The ledger is the state."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """The ledger is the state."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """The ledger is the state."""


@contextmanager
def _signals(session: Session) -> Iterator[None]:
    """SIGINT and SIGTERM stop the session gently, the second one at once. Only a main thread can do that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.stop()

    kinds = (signal.SIGINT, signal.SIGTERM)
    before: list[Callable[[int, FrameType | None], Any] | int | None] = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
