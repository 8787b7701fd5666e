"""Run a study on a cluster from a machine outside it, as a Ray job: the study file and its helper modules are sent.

softseg submit STUDY --address http://HEAD:8265 --out s3://lab/runs --stores s3://lab/stores
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from softseg_dist.engine.context import SUBMITTED_BY
from softseg_dist.engine.ray_cluster import TOKEN_WANTED
from softseg_dist.errors import UserError
from softseg_dist.places import Address, Place
from softseg_dist.sources import Sources
from softseg_dist.words import next_command

EXIT_CODES = (0, 1, 2, 130)  # those of `softseg run`, which are passed on
NOT_FOUND = 127  # a shell's code for a command that is not there
CONNECT_S = 5.0
RECONNECT_S = 2.0
GIVE_UP_S = 600.0  # a job goes on without its submitter: after this long, say how to follow it

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # they log every upload to stderr


@dataclass(frozen=True)
class Job:
    """A submitted study: the address of the cluster's dashboard, and the job's id there."""

    address: str
    id: str

    @property
    def commands(self) -> dict[str, str]:
        """How to follow and to stop it with Ray's own command line."""
        follow = next_command("job", "logs", self.id, program="ray", follow=True, address=self.address)
        return {"follow": follow, "stop": next_command("job", "stop", self.id, program="ray", address=self.address)}


def submit(sources: Sources, address: str, folders: Mapping[str, str | None], flags: Sequence[str] = ()) -> Job:
    """Start `softseg run`, as the head of the cluster at `address` has it, with a study file and its helper modules.

    `folders` maps options to paths of the head or URIs, `flags` are further arguments. Raises UserError if a path is relative, or
    the cluster does not answer or refuses the token, or if an argument holds credentials.
    """
    _public(address)
    arguments = [text for option, path in folders.items() if path for text in (option, _lasting(option, path))]
    arguments += [shlex.quote(_public(flag)) for flag in flags]
    command = ["softseg", "run", shlex.quote(sources.study), "--address", "auto", *arguments]
    with tempfile.TemporaryDirectory() as folder, _as_user_error(address):
        for file, text in sources.texts.items():
            (Place.at(folder) / file).write(text.encode())
        job_id = _client(address).submit_job(
            entrypoint=" ".join(command),
            entrypoint_num_cpus=0,  # it trains nothing, and a head may have no CPUs for work
            runtime_env={"working_dir": folder, "env_vars": {SUBMITTED_BY: version("softseg_dist")}},
            metadata={"study": sources.study},
        )
    return Job(address, job_id)


def follow(job: Job, write: Callable[[str], None]) -> int:
    """Pass what the job prints to `write` until it ends; returns the exit code of its `softseg run`.

    A lost connection is made again, and no text is passed twice. Raises UserError if the connection stays lost, or if the job
    ended in another way than `softseg run` does.
    """
    log, connected_s = _Log(write), time.monotonic()
    while True:
        try:
            with _as_user_error(job.address):
                client = _client(job.address)
                asyncio.run(log.follow(client, job.id))
                info = client.get_job_info(job.id)
        except UserError as error:
            if time.monotonic() - connected_s > GIVE_UP_S:
                raise UserError(f"{error}; the job goes on; follow it with: {job.commands['follow']}") from None
        else:
            if info.status.is_terminal():
                return _exit_code(job, info)
            connected_s = time.monotonic()
        time.sleep(RECONNECT_S)


class _Log:
    """What a job has printed. Ray sends it from the beginning with every connection; only new text is passed on."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._num_written = write, 0

    async def follow(self, client: Any, job_id: str) -> None:
        num_received = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, self._num_written - num_received) :]
            num_received += len(text)
            self._num_written = max(self._num_written, num_received)
            if new:
                self._write(new)


def _exit_code(job: Job, info: Any) -> int:
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 130
    if info.driver_exit_code in EXIT_CODES:
        return int(info.driver_exit_code)
    if info.driver_exit_code == NOT_FOUND:
        raise UserError("the cluster's head has no softseg command; install softseg_dist there (see cluster/Dockerfile)")
    reason = " ".join((info.message or "Ray gives no reason").split())
    raise UserError(f"job {job.id} ended before its study did, submitting it again goes on: {reason}")


def _lasting(option: str, path: str) -> str:
    """`path`, quoted for a shell on the head, which expands its own home folder."""
    if path.startswith("~/"):
        return "~/" + shlex.quote(path[2:])
    if path.startswith("/") or "://" in path:
        return shlex.quote(_public(path))
    raise UserError(f"{option} {path}: a job's own folder does not last; give an absolute path of the head, or a URI")


def _public(word: str) -> str:
    """The word, which all who can reach the cluster may read. Raises UserError if it is an address with credentials."""
    if (address := Address.of(word)).secrets:
        do = "give them to the head: AWS_ACCESS_KEY_ID, MLFLOW_TRACKING_USERNAME and the like in its environment"
        raise UserError(f"{address.shown}: Ray shows the command of a job, so it takes no credentials; {do}")
    return word


def _client(address: str) -> Any:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would use them and not the address that the user gave
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address must be that of the dashboard, like http://HEAD:8265, got {address}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), timeout=CONNECT_S):
        return JobSubmissionClient(address)  # without the check above, its requests would wait for minutes


@contextmanager
def _as_user_error(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise UserError(f"{address}: {TOKEN_WANTED}") from error
    except (OSError, RuntimeError, aiohttp.ClientError) as error:  # the client raises RuntimeError
        reason = " ".join(str(error).split()) or type(error).__name__
        asked = "is the address right, is a tunnel open?"
        raise UserError(f"{address}: the cluster's dashboard does not answer or refuses ({reason}); {asked}") from error
