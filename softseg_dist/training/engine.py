"""How a fit is trained on the machine it got: in which precision, compiled or not, step by step or as one graph.

None of it changes what is trained. Weights, activation, loss, sums, optimizer and metrics are in float32 in any case; "bfloat16" is
about the network alone.
"""

from __future__ import annotations

from typing import Literal

import torch

from softseg_dist.frozen import Frozen
from softseg_dist.study import Optim

Precision = Literal["float32", "bfloat16"]


class Engine(Frozen):
    """What is used, and in `notes`, one line each, what is not, and why.

    `compiled`: the network's kernels are made for it. `graph`: the device runs a whole step, which the host only starts.
    """

    precision: Precision = "float32"
    compiled: bool = False
    graph: bool = False
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`bfloat16, compiled, graph`: what is used."""
        return ", ".join([self.precision] + ["compiled"] * self.compiled + ["graph"] * self.graph)


def choose_engine(optim: Optim, device: str) -> Engine:
    """The engine of a fit on `device` ("cpu", "cuda", "cuda:1").

    "auto" precision follows from the hardware alone, or candidates of one study would differ in it.
    """
    if not device.startswith("cuda"):
        notes = ("precision: bfloat16 is not used on a CPU",) if optim.precision == "bfloat16" else ()
        return Engine(notes=notes)
    if optim.precision == "auto":
        return Engine(precision="bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32")
    return Engine(precision=optim.precision)
