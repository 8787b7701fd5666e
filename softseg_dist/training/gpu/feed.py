"""Inputs of each step on their way from the host to the device: in one copy, and some steps ahead.

The device reads them at the same address in every step, so that a graph can read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

AHEAD = 8  # steps that the host may be ahead; a fit that is stopped still does so many
ALIGNMENT = 64  # bytes

Fields = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and type of tensors by their names."""

Inputs = Mapping[str, Tensor]
"""The tensors themselves, as the device reads them in a step."""


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
    """Packed tensors on their way to a device: `inputs` are those of the step that is launched next.

    On a CPU nothing is copied. Copies to a CUDA device run on a stream of their own, while the device computes on the current one.
    """

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self._here = PackedTensors(fields, device)
        self.inputs: Inputs = self._here.of
        self._slots = [_Slot(fields, device) for _ in range(AHEAD)] if device.type == "cuda" else []
        self._side = torch.cuda.Stream(device) if self._slots else None
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())  # which makes the slots
        self._sent = 0

    def send(self, write: Callable[[dict[str, Tensor]], None]) -> None:
        """Let `write` fill in the tensors of the next step; waits only if the host is too far ahead."""
        if self._side is None:
            write(self._here.of)
            return
        slot, current = self._slots[self._sent % AHEAD], torch.cuda.current_stream()
        self._sent += 1
        slot.taken.synchronize()
        write(slot.host.of)
        with torch.cuda.stream(self._side):
            slot.device.memory.copy_(slot.host.memory, non_blocking=True)
            slot.arrived.record()
        current.wait_event(slot.arrived)
        self._here.memory.copy_(slot.device.memory)
        slot.taken.record(current)


class _Slot:
    """Packed tensors in pinned memory, their copy on the device, and the events of its arrival and of its use."""

    def __init__(self, fields: Fields, device: torch.device) -> None:
        self.host = PackedTensors(fields, torch.device("cpu"), pinned=True)
        self.device = PackedTensors(fields, device)
        self.arrived, self.taken = torch.cuda.Event(), torch.cuda.Event()
