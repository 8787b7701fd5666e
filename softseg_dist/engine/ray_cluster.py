"""The Ray that fits run on: start it or connect to a cluster, check its nodes, wait for resources, free those of lost workers.

softseg run STUDY --address auto        # on a machine of the cluster; --address HOST:PORT names the head
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softseg_dist.data.processes import num_processors
from softseg_dist.engine.ray_private import (
    JobWithoutPaths,
    connect,
    draining_nodes,
    environment,
    free_orphans,
    grows,
    no_worker_logs,
    private_ray,
    shut_down,
)
from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.study import Resources
from softseg_dist.words import listed

ENVIRONMENT = {  # whatever that of the user says
    "MALLOC_ARENA_MAX": "1",  # Tune runs every fit in a new thread, whose own heap would keep the freed memory
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a study mean the same in driver and worker
    "RAY_TRAIN_V2_ENABLED": "1",  # in the former Train a lane waits for ever
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon a lane sees that a worker has died
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # the ledger is the state
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TORCH_DISTRIBUTED_DEBUG": "OFF",  # with DETAIL torch 2.13 crashes in a lane
}
REFUSED = dict.fromkeys(("RAY_AIR_LOCAL_CACHE_DIR", "TUNE_RESULT_DIR"))  # of older Rays; Tune does not run with them
OBJECT_STORE_BYTES = 128 * 2**20  # nothing of size goes through Ray; its default takes 30 % of the memory
CONNECT_S = 60.0  # a slow network, and Ray's import from a slow disk
ANSWER_S = 3.0
PROBE_S = 120.0  # a node starts a process first, which may import much from a slow disk
SHOWN_NODES = 4  # a refusal is one line of text
GROWING_WAIT_S = 600.0  # a cloud's machine with a large image needs minutes
MOST_ASKED_FOR = 200  # workers of fits; a cluster that has grown so far grows on by the fits that wait
LOOK_S = 2.0
GONE = "Ray's raylet on this machine has died (killed, or out of memory); what has finished is kept, the same command goes on"
TOKEN_WANTED = "the cluster refuses the token, or there is none; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"

TRY = """
import json, sys, ray
try:
    ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
    print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
except Exception as error:
    print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
"""


def bundle_of(resources: Resources) -> dict[str, float]:
    """What one worker of a fit holds."""
    gpus = resources.gpus_of_worker(ray.cluster_resources().get("GPU", 0.0) > 0)
    return {"CPU": float(resources.cpus_per_fit)} | ({"GPU": gpus} if gpus else {})


def living_nodes() -> list[Mapping[str, Any]]:
    """What Ray knows of the machines that are there. Raises UserError if there is none, as fits would wait for one for ever."""
    if not (nodes := [node for node in ray.nodes() if node["Alive"]]):
        raise UserError(GONE)
    return nodes


def places_for(resources: Resources, bundle: Mapping[str, float]) -> int:
    """How many fits the machines can hold at once. Their workers hold a `bundle` each, and may be on several machines.

    Raises UserError if they cannot hold one.
    """
    nodes = [node["Resources"] for node in _nodes()]
    places = sum(min(int(node.get(kind, 0.0) / amount + 1e-9) for kind, amount in bundle.items()) for node in nodes)
    if places < resources.workers_per_fit:
        raise UserError(_too_small(bundle, resources.workers_per_fit, places, nodes))
    return places // resources.workers_per_fit


class Room:
    """How many fits may run or wait for their place now, as machines come and go: as many as the cluster has places for.

    On a cluster that grows as many again wait, which makes it grow. Of fits of several workers one waits, as each holds processes.
    Not more wait than that, so that a search knows the results there are when it decides what runs next.
    """

    def __init__(self, resources: Resources, bundle: Mapping[str, float]) -> None:
        self._resources, self._bundle, self._grows = resources, bundle, grows()
        self._places, self._next_s = 0, 0.0

    def __call__(self) -> int:
        """The number, which is found anew every `LOOK_S` seconds."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + LOOK_S
            try:
                self._places = places_for(self._resources, self._bundle)
            except UserError:  # all machines are gone; a fit waits for another one
                self._places = 0
        ahead = self._places if self._resources.workers_per_fit == 1 else 1
        return max(1, self._places + ahead * self._grows)


def num_asked_for(resources: Resources, num_fits: int) -> int:
    """For how many workers machines are asked for, if so many fits are left.

    >>> num_asked_for(Resources(workers_per_fit=2, max_concurrent=3), 10)
    6
    """
    return min(min(num_fits, resources.max_concurrent or num_fits) * resources.workers_per_fit, MOST_ASKED_FOR)


@contextmanager
def asking_for(resources: Resources, num_fits: int) -> Iterator[Callable[[], None]]:
    """Ask a cluster that grows for machines for so many fits; yields what withdraws that, which the end of the block does, too.

    The requests are placement groups of this process: they go with it, however it ends, which Ray's `request_resources` does not.
    That also gets nothing at all of some autoscalers if it asks for more than the cluster's limit.
    """
    bundle = bundle_of(resources)
    count = num_asked_for(resources, num_fits) if grows() else 0
    with ExitStack() as requests:
        for _ in range(count):
            requests.callback(remove_placement_group, placement_group([bundle]))
        yield requests.close


def wait_for_room(resources: Resources, max_wait_s: float | None, note: Callable[[str], None], stopped: Callable[[], bool]) -> None:
    """Return when there is room for one fit, or `stopped`.

    `max_wait_s`: None waits `GROWING_WAIT_S` where machines can be added, else not at all. `note` gets one line about the wait.
    Raises UserError that names what is missing if it is still missing then.
    """
    limit_s = (GROWING_WAIT_S if grows() else 0.0) if max_wait_s is None else max_wait_s
    deadline_s = time.monotonic() + limit_s
    noted = False
    while not stopped():
        try:
            places_for(resources, bundle_of(resources))
            return
        except UserError as error:
            if time.monotonic() >= deadline_s:
                waited = f" (waited {limit_s:g} s)" if limit_s else ""
                raise UserError(f"{error}{waited}") from None
            if not noted:
                note(f"waiting up to {limit_s:g} s for machines: {error}")
                noted = True
        time.sleep(0.5)


def node_is_gone(nodes: Set[str]) -> bool:
    """Is one of these machines (their ids in hexadecimal) gone?

    Ray knows that only after a machine has missed several heartbeats; one that runs answers at once.
    """
    alive = {node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]}
    return not nodes <= alive.keys() or not all(_answers(alive[node]) for node in nodes)


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=ANSWER_S):
            return True
    except OSError:
        return False


def _too_small(bundle: Mapping[str, float], workers: int, places: int, nodes: Sequence[Mapping[str, float]]) -> str:
    wanted = " and ".join(f"{amount:g} {kind}s" for kind, amount in bundle.items())
    lower = "cpus_per_fit of the study's resources, or --gpus-per-fit"
    if places:
        room = f"but there is room for {places} at once; lower --workers-per-fit, {lower}"
        return f"one fit needs {workers} workers of {wanted} each, {room}"
    largest = " and ".join(f"{max((node.get(kind, 0.0) for node in nodes), default=0):g} {kind}s" for kind in bundle)
    return f"one fit needs {wanted} on one machine, but the most that one has is {largest}; lower {lower}"


@contextmanager
def ray_at(address: str | None) -> Iterator[None]:
    """A Ray to run on, which prints nothing: that of this process, if it has one, that at `address`, or a new one on this machine.

    Raises UserError if there is none at `address`, it wants a token, or it is of another version.
    """
    with quiet(), environment(ENVIRONMENT | REFUSED), ExitStack() as stack:
        if not ray.is_initialized():
            keep = _HELD[0] if _HELD else stack
            options = {"job_config": JobWithoutPaths(), "logging_level": logging.CRITICAL, "log_to_driver": False}
            if address is None:
                keep.enter_context(private_ray(options | {"object_store_memory": OBJECT_STORE_BYTES, "num_cpus": num_processors()}))
            else:
                found = _reachable(address)
                known = {"env_vars": ENVIRONMENT | {"RAY_ADDRESS": found}}  # there may be other Rays
                connect(address=found, runtime_env=known, **options)
                keep.callback(shut_down)
        yield


_HELD: list[ExitStack] = []


@contextmanager
def one_ray() -> Iterator[None]:
    """What `ray_at` starts while the block runs stays until its end, so that it is started once. May be nested."""
    with ExitStack() as stack:
        _HELD.append(stack)
        try:
            yield
        finally:
            _HELD.pop()


def _reachable(address: str) -> str:
    """HOST:PORT of the cluster at `address`, from which a process of this machine can connect.

    A process of its own tries it: Ray takes a minute to give up, writes the cause to stderr only, and may end the process.
    """
    said = ""
    command = [sys.executable, "-c", TRY, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as trying:
        limit = threading.Timer(CONNECT_S, trying.kill)
        limit.start()
        try:
            assert trying.stdout is not None
            for said in trying.stdout:
                if said.startswith('{"') or "InvalidAuthToken" in said or "Failed to connect to GCS" in said:
                    break
        finally:
            limit.cancel()
            trying.kill()
    answer = json.loads(said) if said.startswith('{"') else {"error": said.strip()}
    if "address" in answer:
        return str(answer["address"])
    error = " ".join(answer["error"].split())
    if "InvalidAuthToken" in error or "authentication" in error.lower():
        error = TOKEN_WANTED
    elif "Failed to connect to GCS" in error or "Could not find any running Ray" in error or not error:
        here = "on a machine of the cluster; from elsewhere softseg submit runs a study"
        error = f"no Ray answers there; give the HOST:PORT that `ray start --head` prints, and run this {here}"
    raise UserError(f"--address {address}: {error}")


@contextmanager
def quiet() -> Iterator[None]:
    """Ray prints nothing on the terminal: the session's notes report what matters of it."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings(), no_worker_logs():
        warnings.filterwarnings("ignore", module=r"ray\..*")
        try:
            yield
        finally:
            logger.setLevel(level)


def wait_until_free(within_s: float = 15.0) -> None:
    """Wait, removing orphans, until this driver's lanes reserve nothing any more, or for `within_s`."""
    until = time.monotonic() + within_s
    while free_orphans() and time.monotonic() < until:
        time.sleep(0.1)


def check_reach(folders: Mapping[str, str | Path]) -> None:
    """Raise UserError, naming nodes and folder, if a node that runs fits cannot see or write one of `folders`.

    `folders` maps what a folder is for, in the words of the command line (`--out`), to its path or URI. They are made if they are
    missing. A cluster of one node is not checked, and neither is a node that joins later.
    """
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    nodes = _nodes_for_fits()
    for purpose, folder in folders.items():
        place, token = Place.at(folder if "://" in str(folder) else Path(folder).absolute()), f".reach-{secrets.token_hex(8)}"
        (place / token).write(b"")
        try:
            problems = _problems(nodes, probe, [(str(place), token, f"{token}.{number}") for number in range(len(nodes))])
        finally:
            for name in place.names():  # with the files of a node that died
                if name.startswith(token):
                    (place / name).delete()
        if problems:
            of = f"{len(problems)} of {len(nodes)} nodes of the cluster cannot use it: {listed(problems, SHOWN_NODES, '; ')}"
            to_do = "Give a folder on a disk that all nodes share, or a URI such as s3://bucket/folder"
            raise UserError(f"{purpose} {folder}: {of}. {to_do}")


def check_package() -> None:
    """Raise UserError, naming nodes and versions, if a node that runs fits has not this version of this package."""
    ours = version("softseg_dist")

    def other_version() -> str:  # nested: it travels by value, so that a node without the package can answer
        try:
            theirs = version("softseg_dist")
        except PackageNotFoundError:
            return "has none"
        return "" if theirs == ours else f"has {theirs}"

    nodes = _nodes_for_fits()
    if problems := _problems(nodes, other_version, [()] * len(nodes)):
        rule = f"softseg_dist {ours} must be installed on all nodes of the cluster"
        raise UserError(f"{rule}, but {listed(problems, SHOWN_NODES, '; ')}; give all nodes one image or environment")


def check_devices() -> None:
    """Raise UserError, naming nodes, if torch cannot compute on each GPU of a node. Nodes that join later are not asked."""
    nodes = [node for node in _nodes_for_fits() if node["Resources"].get("GPU", 0) > 0]
    claims = [(str(int(node["Resources"]["GPU"])),) for node in nodes]
    if problems := _problems(nodes, device_trouble, claims, max_calls=1):  # the process ends, and frees what it holds of a GPU
        of = f"{len(problems)} of {len(nodes)} nodes with GPUs cannot run fits: {listed(problems, SHOWN_NODES, '; ')}"
        to_do = "Install a torch for CUDA there and a driver that is new enough for it, or give --gpus-per-fit 0"
        raise UserError(f"{of}. {to_do}")


def device_trouble(num_gpus: str) -> str:
    """Why torch cannot compute on so many GPUs of this machine; "" if it can. A task that holds none sees all (`ENVIRONMENT`)."""
    try:
        for device in range(int(num_gpus)):
            torch.ones(1, device=f"cuda:{device}").add(1).item()
    except (RuntimeError, AssertionError) as error:  # an assertion if torch is built without CUDA
        return f"torch {torch.__version__} cannot use its GPU {device}: {(str(error).strip() or 'it failed').splitlines()[0]}"
    return ""


def probe(folder: str, token: str, trace: str) -> str:
    """Why this machine cannot use `folder`, in which the driver has written the file `token`; "" if it can.

    It writes and removes the file `trace` there.
    """
    try:
        place = Place.at(folder)
        if (place / token).read() is None:
            return "does not see it"
        (place / trace).write(b"")
        (place / trace).delete()
    except (OSError, UserError) as error:
        return f"cannot use it: {getattr(error, 'strerror', None) or error}"
    return ""


def _nodes() -> list[Mapping[str, Any]]:
    """The nodes that take fits, if they are large enough."""
    draining = draining_nodes()
    return [node for node in living_nodes() if node["NodeID"] not in draining]


def _nodes_for_fits() -> list[Mapping[str, Any]]:
    return [node for node in _nodes() if node["Resources"].get("CPU", 0) > 0]


def _problems(
    nodes: Sequence[Mapping[str, Any]], question: Callable[..., str], arguments: Sequence[tuple[str, ...]], **options: Any
) -> list[str]:
    """What nodes answer, if it is not "", after a node's address and the start of its id: several may share a machine."""
    waiting = []
    for node, given in zip(nodes, arguments, strict=True):
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        waiting.append(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned, **options)(question).remote(*given))
    answers = {node["NodeID"]: (node["NodeManagerAddress"], _answer(task)) for node, task in zip(nodes, waiting, strict=True)}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # one may have gone
    return [f"{address} ({node[:6]}) {answer}" for node, (address, answer) in answers.items() if answer and node in alive]


def _answer(waiting: Any) -> str:
    try:
        answer: str = ray.get(waiting, timeout=PROBE_S)
    except GetTimeoutError:
        return f"did not answer in {PROBE_S:g} s"
    except RayError as error:
        return f"could not be checked: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return answer
