"""The Ray that fits run on: start one on this machine or connect to a cluster, and find out how many fits it holds at once."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray
from ray._private import worker as ray_worker

from softseg_dist.errors import UserError
from softseg_dist.study import Resources

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # explicit: else a token file left on the machine decides
    "MALLOC_ARENA_MAX": "1",  # Tune runs every fit in a new thread, whose own heap would keep what the fit has freed
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a study mean the same in driver and worker
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon a lane sees that a worker has died
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # the ledger is the state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
OBJECT_STORE_BYTES = 128 * 2**20  # nothing of size goes through Ray; its default takes 30 % of the memory


def bundle_of(resources: Resources) -> dict[str, float]:
    """What one worker of a fit holds. Where the study does not say, it gets one GPU if there is any."""
    gpus = resources.gpus_per_fit
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) > 0 else 0.0
    return {"CPU": float(resources.cpus_per_fit)} | ({"GPU": gpus} if gpus else {})


def places_for(bundle: Mapping[str, float], resources: Resources) -> int:
    """How many fits the machines that are there can hold at once; the workers of one fit may be on several machines.

    Raises UserError if they cannot hold one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = sum(int(min(node.get(kind, 0.0) // amount for kind, amount in bundle.items())) for node in nodes)
    if places < resources.workers_per_fit:
        raise UserError(_too_small(bundle, resources.workers_per_fit, places, nodes))
    return places // resources.workers_per_fit


def _too_small(bundle: Mapping[str, float], workers: int, places: int, nodes: Sequence[Mapping[str, float]]) -> str:
    wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in bundle.items())
    if places:
        return (
            f"one fit needs {workers} workers of {wanted} each, but there is room for {places} at once; "
            "lower --workers-per-fit, cpus_per_fit of the study's resources, or --gpus-per-fit"
        )
    largest = " and ".join(f"{max((node.get(kind, 0.0) for node in nodes), default=0):g} {kind}s" for kind in bundle)
    return (
        f"one fit needs {wanted} on one machine, but the most that one has is {largest}; "
        "lower cpus_per_fit of the study's resources, or --gpus-per-fit"
    )


@contextmanager
def ray_at(address: str | None) -> Iterator[None]:
    """A Ray to run on: the one that runs in this process already, that at `address`, or a new one on this machine."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        yield
        return
    local = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(**({"address": address} if address else local), logging_level=logging.CRITICAL, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of Ray's on the terminal: what matters of it reaches people through the session's notes."""
    logger = logging.getLogger("ray")
    level, shown = logger.level, ray_worker._worker_logs_enabled
    logger.setLevel(logging.CRITICAL + 1)
    ray_worker._worker_logs_enabled = False  # else the death of a worker is told on stdout, amid --json
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"ray\..*")
        try:
            yield
        finally:
            logger.setLevel(level)
            ray_worker._worker_logs_enabled = shown
