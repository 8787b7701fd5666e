"""Lanes: groups of workers that stay alive and run one job after the other, each job on all of them at once.

A lane is a Ray Train group (`TorchTrainer`) whose workers wait for jobs in a loop: starting the group takes seconds, a further job
milliseconds. A job that loses a worker, or fails in a way that leaves the others waiting, is lost; Train then starts the group
again, and the lane takes the next job. This module does not know what a job is.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import distributed

from softseg_dist.engine.ray_cluster import node_is_gone
from softseg_dist.engine.ray_folder import VARIABLE
from softseg_dist.engine.ray_private import Leaving
from softseg_dist.engine.worker import ENDS_SOON, LostJob, Report
from softseg_dist.errors import in_words
from softseg_dist.training.data_parallel import partner_died
from softseg_dist.training.task import Worker

WAIT_S = 5.0  # the longest time that a call of the mailbox waits for news; then it is called again

Run = Callable[[Any, Worker, Report], Any]
"""(message, worker, report) -> answer: a job, run by all workers of a lane with one message; rank 0's reports and answer count."""

Event = tuple[str, Any]
"""("report", what a job reports) while it runs, and then ("answer", its answer) or ("lost", why there is none)."""


class Mailbox:
    """Passes one job at a time to rank 0 of the group, and its events back. An actor."""

    def __init__(self) -> None:
        self._number, self._message, self._node = 0, None, ""  # of the present job, and the machine of rank 0, which has taken it
        self._events: list[Event] = []
        self._taken = self._ended = True
        self._changed = asyncio.Condition()

    async def put(self, message: Any) -> None:
        """Give a job; the former one has ended."""
        async with self._changed:
            self._number, self._message, self._events = self._number + 1, message, []
            self._taken = self._ended = False
            self._changed.notify_all()

    async def take(self, node: str) -> tuple[int, Any] | None:
        """The next job with its number, for rank 0 on `node`; None to call again. One that was taken before died with its group."""
        if self._taken:
            await self.tell(self._number, "lost", "one of its workers died (killed, out of memory, or its machine was lost)")
        async with self._changed:
            await self._until(lambda: not self._taken)
            if self._taken:
                return None
            self._taken, self._node = True, node
            return self._number, self._message

    async def node(self) -> str | None:
        """Where rank 0 of the present job is, by the node's id; None if it has not been taken."""
        return self._node if self._taken else None

    async def tell(self, number: int, kind: str, value: Any) -> None:
        """Pass on an event of a job that has not ended; one that has was given up."""
        async with self._changed:
            if number == self._number and not self._ended:
                self._events.append((kind, value))
                self._ended = kind != "report"
                self._changed.notify_all()

    async def news(self) -> list[Event]:
        """The new events; waits for one of them, but not for ever."""
        async with self._changed:
            await self._until(lambda: bool(self._events))
            events, self._events = self._events, []
            return events

    async def _until(self, predicate: Callable[[], bool]) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait_for(predicate), WAIT_S)


class FileStore(Backend):
    """As Train's own for torch, but workers meet through a file: a TCPStore listens on all interfaces, without a token."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Make the workers one process group."""
        start, size = distributed.init_process_group, len(worker_group)
        place, limit = f"file://{os.environ[VARIABLE]}/store-{uuid.uuid4().hex}", timedelta(seconds=backend_config.timeout_s)
        common = (backend_config.backend, place, limit, size)
        ray.get([worker_group.execute_single_async(rank, start, *common, rank) for rank in range(size)])


class PrivateTorch(TorchConfig):
    """A process group of workers on this machine, whose Ray is private."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What Train starts groups with."""
        return FileStore


class Lane:
    """A group of `num_workers`, each with `resources` ({"CPU": 1, "GPU": 1}), that runs `run` for each job. Ends with this process.

    `storage` is a path or URI that all nodes can write; Train keeps a file or two there. One thread at a time may use a lane.
    """

    def __init__(self, run: Run, num_workers: int, resources: dict[str, float], storage: str) -> None:
        self._mailbox: Any = ray.remote(num_cpus=0)(Mailbox).remote()
        gpus = resources.get("GPU", 0.0) > 0
        trainer = TorchTrainer(
            _wait_for_jobs,
            train_loop_config={"mailbox": self._mailbox, "run": run},
            torch_config=(PrivateTorch if VARIABLE in os.environ else TorchConfig)(backend="nccl" if gpus else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=num_workers, use_gpu=gpus, resources_per_worker=resources, placement_strategy="PACK"
            ),
            run_config=train.RunConfig(
                name=f"lane-{uuid.uuid4().hex[:12]}",
                storage_path=storage if "://" in storage else str(Path(storage).absolute()),
                failure_config=train.FailureConfig(max_failures=-1),  # the caller of a lost job counts its failures
            ),
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(trainer,), name="lane", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Can it take a job?"""
        return self._thread.is_alive()

    def run(self, message: Any, report: Report, stop: Callable[[], bool]) -> Any:
        """Run a job on all workers and return the answer of rank 0. Raises LostJob if there will be none.

        A job that runs asks itself whether to `stop`. Returns None if it is to stop and waits for machines.
        """
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        ray.get(self._mailbox.put.remote(message))
        while True:
            events = ray.get(self._mailbox.news.remote())
            if not events and stop() and self._waits():
                return None
            for kind, value in events:
                if kind == "answer":
                    return value
                if kind == "lost":
                    raise LostJob(value, blameless=node_is_gone(nodes))
                report(value)
            if not self.alive:
                lines = str(self._error).strip().splitlines() or [type(self._error).__name__]
                raise LostJob(f"its group of workers has ended: {lines[-1]}")

    def _waits(self) -> bool:
        node = ray.get(self._mailbox.node.remote())
        return node is None or node_is_gone({node})

    def _serve(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - `run` raises it, in the thread that waits for an answer
            self._error = error


_lane: Lane | None = None


def lane_of_process(run: Run, num_workers: int, resources: dict[str, float], storage: str) -> Lane:
    """The lane of this process, started by the first call. The arguments must be the same every time."""
    global _lane
    if _lane is None or not _lane.alive:
        _lane = Lane(run, num_workers, resources, storage)
    return _lane


def _wait_for_jobs(config: dict[str, Any]) -> None:
    """What every worker of a lane does. An exception here makes Train start the group again."""
    mailbox, run = config["mailbox"], config["run"]
    context = train.get_context()
    rank = context.get_world_rank()
    worker = Worker(device=str(get_device()), rank=rank, num_workers=context.get_world_size())
    node = ray.get_runtime_context().get_node_id()
    worker = replace(worker, leaving=Leaving(worker.gather([node])))
    while True:
        if rank == 0 and worker.leaving():
            raise LostJob(ENDS_SOON)  # between two jobs: the group starts again elsewhere
        job = [ray.get(mailbox.take.remote(node)) if rank == 0 else None]
        distributed.broadcast_object_list(job, src=0)
        if job[0] is None:
            continue
        number, message = job[0]

        def send(report: dict[str, str], number: int = number) -> None:
            if rank == 0:
                mailbox.tell.remote(number, "report", report)

        try:
            answer = run(message, worker, send)
        except Exception as error:
            died = "one of its workers died (killed, or out of memory)"
            ray.get(mailbox.tell.remote(number, "lost", died if partner_died(error) else in_words(error)))
            raise
        if rank == 0:
            ray.get(mailbox.tell.remote(number, "answer", answer))
