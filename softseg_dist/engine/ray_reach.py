"""Checks, by a task on each node, that every node of a cluster has this package and can use the folders of a run."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softseg_dist.errors import UserError
from softseg_dist.places import Place
from softseg_dist.words import listed

ANSWER_S = 120.0  # a node starts a process first, which may import much from a slow disk
SHOWN_NODES = 4  # a refusal is one line of text


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
            raise UserError(
                f"{purpose} {folder}: {len(problems)} of {len(nodes)} nodes of the cluster cannot use it: "
                f"{listed(problems, SHOWN_NODES, '; ')}. "
                "Give a folder on a disk that all nodes share, or a URI such as s3://bucket/folder"
            )


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
        raise UserError(
            f"softseg_dist {ours} must be installed on all nodes of the cluster, but {listed(problems, SHOWN_NODES, '; ')}; "
            "give all nodes one image or environment"
        )


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


def _nodes_for_fits() -> list[Mapping[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]


def _problems(nodes: Sequence[Mapping[str, Any]], question: Callable[..., str], arguments: Sequence[tuple[str, ...]]) -> list[str]:
    """What nodes answer, if it is not "", after a node's address and the start of its id: several may share a machine."""
    waiting = []
    for node, given in zip(nodes, arguments, strict=True):
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        waiting.append(ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(question).remote(*given))
    answers = {node["NodeID"]: (node["NodeManagerAddress"], _answer(task)) for node, task in zip(nodes, waiting, strict=True)}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # one may have gone
    return [f"{address} ({node[:6]}) {answer}" for node, (address, answer) in answers.items() if answer and node in alive]


def _answer(waiting: Any) -> str:
    try:
        answer: str = ray.get(waiting, timeout=ANSWER_S)
    except GetTimeoutError:
        return f"did not answer in {ANSWER_S:g} s"
    except RayError as error:
        return f"could not be checked: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return answer
