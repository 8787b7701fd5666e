"""All uses of Ray's private or unstable names, for the versions of Ray that are tested.

tests/unit/engine/test_ray_private.py lists the names, and says which one is gone when Ray changes.
"""

from __future__ import annotations

import gc
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import node as ray_node
from ray._private import ray_constants
from ray._private import services as ray_services
from ray._private import state as ray_state
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stub lacks them
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.experimental.internal_kv import _internal_kv_get
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, remove_placement_group
from typing_extensions import override

from softseg_dist.engine.ray_folder import RAY, VARIABLE, private_folder
from softseg_dist.errors import UserError, in_words
from softseg_dist.interrupts import held_back

LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
PRIVATE = {  # the environment of all processes of a Ray that we start on this machine; None removes a variable
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": None,  # it would win over the file
    "RAY_ADDRESS": None,  # of another Ray
    "RAY_REDIS_ADDRESS": None,
    "RAY_RUNTIME_ENV_HOOK": None,  # for jobs on a cluster
    "SPT_NOENV": "1",  # a process that sets its title keeps its environment, by which `processes_of` finds it
    "PYTHONBREAKPOINT": None,  # Ray sets its own, and leaves it
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on loopback only, as Ray does on macOS
    "RAY_enable_metrics_collection": "0",  # else the agent serves Prometheus, without a token
    "RAY_LOGGER_LEVEL": "warning",  # below it the log of the agent holds the value of every variable of a runtime_env
    "GLOO_SOCKET_IFNAME": LOOPBACK,
    "NCCL_SOCKET_IFNAME": LOOPBACK,
}
REMOVED = PlacementGroupTableData.PlacementGroupState.Value("REMOVED")


class JobWithoutPaths(JobConfig):
    """A job whose workers do not look for modules in the driver's working folder, or in that of its script.

    Ray puts both first on the workers' path, where a file hides a module of its name, unless the job brings its own working folder.
    """

    @override
    def _runtime_env_has_working_dir(self) -> bool:
        return True


@contextmanager
def private_ray(options: Mapping[str, Any]) -> Iterator[Path]:
    """A new Ray on this machine that its user alone can reach; yields its folder. `options` are arguments of `ray.init`.

    It has a random token, listens on loopback, and has neither dashboard, job endpoint nor Prometheus. The environment is as
    before once it has started, so that processes that this one starts are none of Ray's. Raises UserError if it does not start.
    """
    from ray.tune.execution import class_cache  # late, as it takes a second that `softseg submit` need not wait

    with ExitStack() as stack:
        try:
            folder = stack.enter_context(private_folder())
        except OSError as error:
            raise UserError(f"no folder for Ray: {error}; set RAY_TMPDIR to a folder on a local disk, with a short path") from error
        # Tune puts cloud keys into a runtime_env, which Ray shows in command lines and logs. Workers here inherit them.
        harmless = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}
        stack.enter_context(_replaced(class_cache, "ENV_VARS_TO_PROPAGATE", harmless))
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        stack.callback(_read_environment)
        stack.callback(shut_down)
        with (
            environment(PRIVATE | {"RAY_AUTH_TOKEN_PATH": str(token), VARIABLE: str(folder)}),
            _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False),  # Ray read the variable when it was imported
            _replaced(ray_utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),  # agents without servers
            _replaced(ray_node.Node, "start_monitor", lambda node: None),  # the autoscaler, which serves Prometheus
            _replaced(ray_node.Node, "start_api_server", _no_api_server),
            # The terminal's signals and those of a job scheduler are for the driver, which asks fits to checkpoint.
            _replaced(ray_services, "ConsolePopen", partial(ray_services.ConsolePopen, start_new_session=True)),
        ):
            _read_environment()
            try:
                connect(address="local", include_dashboard=False, _temp_dir=str(folder / RAY), **options)
            except Exception as error:
                raise UserError(f"Ray does not start on this machine ({in_words(error)}); --local does without") from error
        yield folder


def connect(**options: Any) -> None:
    """`ray.init` without its handler of SIGTERM. Signals wait for its end: one that interrupts Ray's C++ makes it wait for ever."""
    with held_back(), _replaced(ray_utils, "set_sigterm_handler", lambda handler: None):
        ray.init(**options)


def shut_down() -> None:
    """Disconnect from Ray, and end it if this process has started it. Signals wait for its end.

    A reference of Ray's that another thread's garbage collection frees meanwhile would end this process at once.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with held_back():
            ray.shutdown()
    finally:
        if was_enabled:
            gc.enable()


def _no_api_server(node: Any, **options: Any) -> None:
    """In place of that of the dashboard. Agents look for its address every second until there is one: a port that nothing has."""
    address, space = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
    node.get_gcs_client().internal_kv_put(address, b"127.0.0.1:0", True, space)


def _read_environment() -> None:
    """Ray keeps token and settings that it has read in this process, also for the next Ray."""
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables of the environment while the block runs; None removes one."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def grows() -> bool:
    """Has the cluster an autoscaler that can add machines?

    Ray runs one everywhere. Without one of its own, version 1 names the machines of a cluster `node_<id>`, each a type of its own.
    Version 2 is switched on only for clusters that grow.
    """
    if is_autoscaler_v2():
        return True
    status = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith("node_") for name in types)


def draining_nodes() -> set[str]:
    """The ids, in hexadecimal, of the nodes that have notice of their end: they run on, and take nothing new."""
    return set(ray_state.state.get_draining_nodes())


class Leaving:
    """Does one of these nodes end soon? Ray is asked every two seconds at most."""

    def __init__(self, nodes: Collection[str]) -> None:
        self._nodes, self._next_s, self._seen = set(nodes), 0.0, False

    def __call__(self) -> bool:
        """The answer; a notice is not taken back."""
        if not self._seen and time.monotonic() >= self._next_s:
            self._seen = not self._nodes.isdisjoint(draining_nodes())
            self._next_s = time.monotonic() + 2
        return self._seen


def nodes_of(actors: Iterable[str]) -> set[str]:
    """The ids of the nodes of actors, all in hexadecimal."""
    return {str(ray_state.actors(actor)["Address"]["NodeID"]) for actor in actors}


def no_worker_logs() -> AbstractContextManager[None]:
    """Ray prints nothing about workers while the block runs, or it would print their deaths on stdout, between lines of --json."""
    return _replaced(ray_worker, "_worker_logs_enabled", False)


def name_logs(name: str) -> None:
    """From here on the log files of this process bear a name, which Ray's dashboard and `ray logs` show."""
    for stream in (sys.stdout, sys.stderr):
        print(f"{ray_constants.LOG_PREFIX_ACTOR_NAME}{name}", file=stream, flush=True)


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


def forget_ended(controller: Any) -> None:
    """Let Tune's controller forget the trials that have ended: it would keep all of them, and look through them again and again."""
    controller._trials[:] = [trial for trial in controller._trials if not trial.is_finished()]
    for kept in (controller._live_trials, controller._stopped_trials, controller._failed_trials, controller._trials_to_cache):
        kept.intersection_update(controller._trials)


def lost_actors(text: str) -> list[str]:
    """The ids of the actors that Ray's message about a dead process calls unavailable."""
    return re.findall(r"The actor ([0-9a-f]{32}) is unavailable", text)


def cause_in(text: str) -> str:
    """The part of Ray's message about a dead process that people need: the exception inside it, if there is one."""
    if "low on memory" in text:
        return "its process was killed because the machine ran low on memory; lower --max-concurrent or batch_size"
    inner = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception): .+", text, flags=re.MULTILINE)
    return inner[-1] if inner else ""
