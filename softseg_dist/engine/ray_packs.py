"""Packs: several fits of one GPU run as threads of one process, which share its store, its graphs and its compiled code.

Processes that share a GPU gain nothing, as it serves one of them at a time; streams of one process do. A fit stays a Tune trial
with its share of the GPU, its folder and its row in the ledger, but the trial's process is only a client: it sends its job to the
host of its GPU and passes the reports on. The driver owns the manager and the manager owns the hosts. So a host outlives each of
its clients, and all hosts end with the driver, however it ends. `Host` and `HostManager` take any job.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from queue import SimpleQueue
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softseg_dist.engine.ray_lanes import Event, Run
from softseg_dist.engine.ray_private import Leaving, cause_in
from softseg_dist.engine.worker import LostJob, Report
from softseg_dist.errors import in_words
from softseg_dist.numerics.seeds import drawing
from softseg_dist.places import is_running
from softseg_dist.training.task import Worker

CPU = "cpu"  # stands for the GPU of a host without one
TRIES = 3  # a host that dies before it has begun a job was dying already; another one will do
ENDED = "the process that it shared with other fits has ended"


class Host:
    """Runs jobs in threads, each on a stream of its own. An actor of `size` + 1 threads, on the machine of its clients.

    `gpu` is as in CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, run: Run, size: int, gpu: str) -> None:
        if gpu != CPU:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self._run, self._device = run, CPU if gpu == CPU else "cuda"
        self._leaving = Leaving([ray.get_runtime_context().get_node_id()])
        self._streams: SimpleQueue[torch.cuda.Stream | None] = SimpleQueue()
        for _ in range(size):
            self._streams.put(torch.cuda.Stream() if gpu != CPU and torch.cuda.is_available() else None)
        self._jobs: dict[str, threading.Thread] = {}

    def run(self, key: str, message: Any, client: int) -> Iterator[Event]:
        """Run a job for the process `client`: ("began", None), reports, and at last ("answer", ...) or ("lost", why).

        The job stops when its client has died.
        """
        news: SimpleQueue[Event] = SimpleQueue()
        worker = Worker(device=self._device, stop=lambda: not is_running(client), leaving=self._leaving)
        self._jobs[key] = threading.Thread(target=self._work, args=(message, worker, news), name=key, daemon=True)
        self._jobs[key].start()
        event = "began", None
        while event[0] not in ("answer", "lost"):
            yield event
            event = news.get()
        del self._jobs[key]
        yield event

    def wait_for(self, key: str) -> None:
        """Return when the job `key` does not run here any more."""
        if (job := self._jobs.get(key)) is not None:
            job.join()

    def _work(self, message: Any, worker: Worker, news: SimpleQueue[Event]) -> None:
        stream = self._streams.get()  # the same few again and again: memory that a stream has freed is for that stream
        too_large = False
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                ended = "answer", self._run(message, worker, lambda report: news.put(("report", report)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - its client gets the error
            if isinstance(error, torch.AcceleratorError):
                os._exit(1)  # no thread can use the GPU any more
            too_large = isinstance(error, torch.OutOfMemoryError)
            ended = "lost", in_words(error)
        if too_large:  # it is tried again in a process of its own, which needs what it has freed here
            with drawing:
                torch.cuda.empty_cache()
        self._streams.put(stream)
        news.put(ended)


class HostManager:
    """Knows which host runs which job. An actor."""

    def __init__(self, run: Run, size: int) -> None:
        self._run, self._size = run, size
        self._hosts: dict[tuple[str, str], Any] = {}
        self._jobs: dict[str, Any] = {}

    def place(self, key: str, node: str, gpu: str) -> Any:
        """The host of a GPU, started if there is none; the job `key` is going to run there."""
        if (node, gpu) not in self._hosts:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            host = ray.remote(num_cpus=0)(Host).options(max_concurrency=self._size + 1, scheduling_strategy=here)
            self._hosts[node, gpu] = host.remote(self._run, self._size, gpu)
        self._jobs[key] = self._hosts[node, gpu]
        return self._jobs[key]

    def release(self, key: str) -> Any:
        """The job has ended, or is going to run elsewhere. Returns the host where it may still run, if its client died before."""
        return self._jobs.pop(key, None)

    def host_died(self, key: str) -> None:
        """Remove a job and its dead host."""
        dead = self._jobs.pop(key)  # and not whatever runs now on its GPU, which another client may have started
        self._hosts = {where: host for where, host in self._hosts.items() if host != dead}


@contextmanager
def packs(run: Run, size: int) -> Iterator[Any]:
    """The manager of packs of up to `size` jobs, while the block runs; at its end all hosts end. `run` must be importable."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    manager = ray.remote(num_cpus=0)(HostManager).options(scheduling_strategy=here).remote(run, size)
    try:
        yield manager
    finally:
        ray.kill(manager)


def run_in_pack(manager: Any, key: str, message: Any, report: Report) -> Any:
    """Run a job in the host of this process's GPU and return its answer. Raises LostJob if there will be none."""
    wait_until_released(manager, key)
    node = ray.get_runtime_context().get_node_id()
    gpu = ",".join(map(str, ray.get_gpu_ids())) or CPU
    cause = ENDED
    for _ in range(TRIES):
        began = False
        host = ray.get(manager.place.remote(key, node, gpu))
        try:
            for news in host.run.options(num_returns="streaming").remote(key, message, os.getpid()):
                kind, value = ray.get(news)
                began = True
                if kind == "report":
                    report(value)
                elif kind != "began":
                    manager.release.remote(key)
                    if kind == "lost":
                        raise LostJob(value)
                    return value
        except RayActorError as error:
            cause = cause_in(str(error)) or ENDED
            ray.get(manager.host_died.remote(key))
            if began:
                break
    raise LostJob(cause)


def wait_until_released(manager: Any, key: str) -> None:
    """Return when no host runs the job; one may run it for some more steps if a former client of it has died."""
    with suppress(RayActorError):  # then all its jobs have ended
        if (host := ray.get(manager.release.remote(key))) is not None:
            ray.get(host.wait_for.remote(key))
