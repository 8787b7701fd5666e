"""Can every node of a cluster use the folders of a run? Found out before the first fit, by asking the nodes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softseg_dist.errors import UserError
from softseg_dist.places import Place

ANSWER_S = 120.0  # a node starts a process first, which may import much from a slow disk
SHOWN_NODES = 4  # a refusal is one line of text


def check_reach(folders: Mapping[str, str | Path]) -> None:
    """Raise UserError, naming nodes and folder, if a node that runs fits cannot see or write one of `folders`.

    `folders` maps what a folder is for, in the words of the command line (`--out`), to its path or URI. They are made if they are
    missing. Nothing is asked where there is one node only. A node that joins later is not asked.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = [node for node in alive if node["Resources"].get("CPU", 0) > 0]
    if len(alive) < 2:
        return
    for purpose, folder in folders.items():
        place = Place.at(folder if "://" in str(folder) else Path(folder).absolute())
        with _token(place) as token:
            answers = _ask(asked, place, token)
        problems = {name: answer for name, answer in answers.items() if answer}
        if problems:
            raise UserError(_refusal(purpose, folder, problems, len(asked)))


def probe(folder: str, token: str, trace: str) -> str:
    """What keeps this machine from using `folder`, where somebody has left the file `token`; "" if nothing does.

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


def _ask(nodes: Sequence[Mapping[str, Any]], place: Place, token: str) -> dict[str, str]:
    """The answer of each node, by its address and the start of its id: several may share a machine."""
    asking = {}
    for number, node in enumerate(nodes):
        pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(probe)
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        asking[name] = task.remote(str(place), token, f"{token}.{number}")
    return {name: _answer(waiting) for name, waiting in asking.items()}


def _answer(waiting: Any) -> str:
    try:
        answer: str = ray.get(waiting, timeout=ANSWER_S)
    except GetTimeoutError:
        return f"did not answer in {ANSWER_S:g} s"
    except RayError as error:
        return f"could not be asked: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return answer


@contextmanager
def _token(place: Place) -> Iterator[str]:
    """The name of a file that is in `place` while the block runs."""
    token = f".reach-{secrets.token_hex(8)}"
    (place / token).write(b"")
    try:
        yield token
    finally:
        for name in place.names():  # with what a node that died has left
            if name.startswith(token):
                (place / name).delete()


def _refusal(purpose: str, folder: str | Path, problems: Mapping[str, str], num_nodes: int) -> str:
    shown = [f"{name} {problem}" for name, problem in list(problems.items())[:SHOWN_NODES]]
    more = f"; and {len(problems) - SHOWN_NODES} more" if len(problems) > SHOWN_NODES else ""
    return (
        f"{purpose} {folder}: {len(problems)} of {num_nodes} nodes of the cluster cannot use it: {'; '.join(shown)}{more}. "
        "Give a folder on a disk that all nodes share, or a URI such as s3://bucket/folder"
    )
