"""A fit on one device of its own: the host draws and launches, some steps ahead, and reads losses once per epoch.

A step is one function of the device's memory. From the inputs that the host has sent (`Feed`) it gathers and augments a batch,
learns from it and records how that went. As a graph (`capture`) it is launched with one call; otherwise it is launched operation by
operation, with the same result.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from softseg_dist.errors import UserError, in_words
from softseg_dist.numerics.activations import dead_samples
from softseg_dist.numerics.dropout import count_dropout
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.training.gpu.capture import Step, apart_from_captures, captured, compiled, obstacle, unchanged
from softseg_dist.training.gpu.device_batches import Fields, Inputs, device_batches
from softseg_dist.training.stepper import Diverged, FitProgress, Request, Stepper, cause, learning_rate

OF_A_STEP: Fields = {
    "lr": ((), torch.float32),
    "dropout": ((1,), torch.int32),
    "row": ((1,), torch.int64),  # of the step, among those of the epoch
}
RECORDED = 6  # numbers of a step: loss, dead samples, lowest and highest logit, lowest and highest prediction
AHEAD = 8  # steps that the host may be ahead; a fit that is stopped still does so many
ALIGNMENT = 64  # bytes
CPU = torch.device("cpu")
_of_thread = threading.local()
SERIOUS = (UserError, torch.OutOfMemoryError)  # nothing that another way to run the step would change


class PackedTensors:
    """Tensors in one piece of memory: `of` has them by name, `memory` all their bytes."""

    def __init__(self, fields: Fields, device: torch.device, *, pinned: bool = False) -> None:
        ends, end = {}, 0
        for name, (shape, dtype) in fields.items():
            first = -(-end // ALIGNMENT) * ALIGNMENT
            end = first + math.prod(shape) * dtype.itemsize
            ends[name] = first, end
        self.memory = torch.zeros(end, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.of = {name: self.memory[slice(*ends[name])].view(dtype).view(shape) for name, (shape, dtype) in fields.items()}


class Feed:
    """Inputs of each step on their way to a device, in one copy, some steps ahead: `inputs` are those of the step launched next.

    The device reads them at the same address in every step, so that a graph can read them. On a CPU nothing is copied. Copies to a
    CUDA device run on a stream of their own, while the device computes on the current one. Torch hands out the same 32 streams of
    each priority again and again: those of high priority are for copies, so that none of them is one on which another fit computes.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self._here = PackedTensors(fields, device)
        self.inputs: Inputs = self._here.of
        # Inputs in pinned memory, their copy on the device, and the events of its arrival and of its use.
        self._slots = [
            (PackedTensors(fields, CPU, pinned=True), torch.zeros_like(self._here.memory), torch.cuda.Event(), torch.cuda.Event())
            for _ in range(AHEAD if device.type == "cuda" else 0)
        ]
        self._side = torch.cuda.Stream(device, priority=-1) if self._slots else None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())  # which makes the slots
        self._sent = 0

    def send(self, write: Callable[[dict[str, Tensor]], None]) -> None:
        """Let `write` fill in the tensors of the next step; waits only if the host is too far ahead."""
        if self._side is None:
            write(self._here.of)
            return
        (host, copy, arrived, taken), current = self._slots[self._sent % AHEAD], torch.cuda.current_stream()
        self._sent += 1
        taken.synchronize()
        write(host.of)
        with torch.cuda.stream(self._side):
            copy.copy_(host.memory, non_blocking=True)
            arrived.record()
        current.wait_event(arrived)
        self._here.memory.copy_(copy)
        taken.record(current)


class DeviceStepper(Stepper):
    """Returns after every epoch, or when something is requested of the fit. Changes dropout layers of `model`, not its state."""

    def _begin(self) -> None:
        self.device = next(self.model.parameters()).device
        on_cuda = self.device.type == "cuda"
        self.device_batches, notes = device_batches(self.batches, self.device)
        self.execution = self.execution.replace(notes=(*self.execution.notes, *notes))
        self.dropout_seed = torch.zeros(1, dtype=torch.int32, device=self.device)
        count_dropout(self.model.network, self.dropout_seed)
        self.network = compiled(self.model.network) if self.execution.compiled else None
        lr, decay = torch.tensor(self.optim.lr, device=self.device), self.optim.weight_decay
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=decay, fused=True, capturable=on_cuda)
        # It does step without being captured: before the capture, to warm up.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        self.records = torch.zeros(self.batches.steps_per_epoch, RECORDED, device=self.device)
        self.stream = _stream(self.device) if on_cuda else None
        self._pool: Any = None  # memory that the graphs share
        # By the number of items in a batch: its inputs, and the graph of its step if there is one.
        self._ways: dict[int, tuple[Feed, Step | None]] = {}

    def advance(self, progress: FitProgress) -> Request:
        """Launch the steps that are left of the epoch, and read what they have written down."""
        order, size, first = self.batches.order(progress.epoch), self.optim.batch_size, progress.step
        request = Request()
        with self._own_stream():
            while progress.step < self.batches.steps_per_epoch and not any(request):
                members = order[progress.step * size : (progress.step + 1) * size]
                self._launch(progress.epoch, progress.step, members)
                progress.step += 1
                request = Request(self.worker.stop(), self.checkpoint_is_due())
            recorded = self.records[first : progress.step].tolist()  # waits for the device
        for step, (loss, dead, *extremes) in enumerate(recorded, start=first):
            if not math.isfinite(loss):
                logits, prediction = torch.tensor(extremes).view(2, 2)
                raise Diverged(loss, progress.epoch, step, cause(self.recipe, logits, prediction))
            progress.losses.append(loss)
            progress.dead += int(dead)
        return request

    def _launch(self, epoch: int, step: int, members: Sequence[int]) -> None:
        if (size := len(members)) not in self._ways:
            feed = Feed({**self.device_batches.fields(size), **OF_A_STEP}, self.device)
            feed.send(lambda into: self._write(into, epoch, step, members))
            self._ways[size] = feed, self._graph(lambda: self._step(feed.inputs))
        feed, graph = self._ways[size]
        feed.send(lambda into: self._write(into, epoch, step, members))
        if graph is None:
            with apart_from_captures(self.device):
                self._step(feed.inputs)
        else:
            graph()

    def _write(self, into: dict[str, Tensor], epoch: int, step: int, members: Sequence[int]) -> None:
        """Write all inputs of a step."""
        self.device_batches.write(into, epoch, members)
        done = epoch * self.batches.steps_per_epoch + step
        into["lr"].fill_(learning_rate(self.optim, done, self.batches.num_steps))
        into["dropout"].fill_(seed_of(self.batches.seed, "dropout", epoch, step) % 2**31)
        into["row"].fill_(step)

    def _step(self, inputs: Inputs) -> None:
        """Learn from a batch. Nothing here waits for the device, or needs to know what it has computed."""
        with torch.no_grad():
            self.dropout_seed.copy_(inputs["dropout"])
            self.adam.param_groups[0]["lr"].copy_(inputs["lr"])
            image, target = self.device_batches.batch(inputs)
        logits = self.model.logits(image, self.network)
        prediction = self.model.activation(logits)
        loss = self.recipe.loss(*self.batches.known(prediction, target))
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.adam.step()
        with torch.no_grad():
            extremes = [*logits.aminmax(), *prediction.aminmax()]
            row = torch.stack([loss.float(), dead_samples(prediction).float(), *(value.float() for value in extremes)])
            self.records.index_copy_(0, inputs["row"], row[None])

    def _graph(self, step: Step) -> Step | None:
        """A graph of `step`, compiled if that works; None if there is to be no graph, or cannot be. What does not work is noted."""
        if not (self.execution.compiled or self.execution.graph):
            return None
        with apart_from_captures(self.device), unchanged(self.model, self.adam):
            if self.execution.graph:
                network, self.network = self.network, None  # a compiled one hides its operations
                reason = obstacle(step)
                self.network = network
                if reason is not None:
                    self.execution = self.execution.without("graph", reason)
            if self.execution.compiled:
                with self._or_without("compiled"):
                    step()
                self.network = self.network if self.execution.compiled else None
            if self.execution.graph:
                with self._or_without("graph"):
                    self._pool = self._pool or torch.cuda.graph_pool_handle()
                    return captured(step, self._pool)
        return None

    @contextmanager
    def _or_without(self, part: Literal["compiled", "graph"]) -> Iterator[None]:
        """Train on without `part`, with a note, if a compiler or the device refuses what the block does."""
        try:
            yield
        except SERIOUS:
            raise
        except Exception as error:  # noqa: BLE001 - whatever they raise: there is another way
            self.execution = self.execution.without(part, in_words(error)[:200])  # torch's errors go on for pages

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Everything is launched on a stream of this fit's, behind what was launched before, so that fits can share a device."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The current one; for the default, which cannot be captured, one of this thread's own, as each has a cuBLAS workspace."""
    current = torch.cuda.current_stream(device)
    if current != torch.cuda.default_stream(device):
        return current
    if not hasattr(_of_thread, "stream"):
        _of_thread.stream = torch.cuda.Stream(device)
    return _of_thread.stream
