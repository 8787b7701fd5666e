"""How a fit is trained on the machine it got: in which precision, compiled or not, step by step or as one graph.

None of it changes what is trained. Weights, activation, loss, optimizer and metrics are in float32 in any case; "bfloat16" is the
precision of the network alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from softseg_dist.frozen import Frozen
from softseg_dist.study import Optim

Precision = Literal["float32", "bfloat16"]

# To compile a U-Net takes about a minute, once per machine, where torch keeps it, and some seconds in every further process.
# It saves tenths of a millisecond (2D) to milliseconds (3D) of a step that is a graph anyway: about so many pay for the seconds.
COMPILE_STEPS = 5000


class Execution(Frozen):
    """What is used, and in `notes`, one line each, what is not, and why.

    `compiled`: the network's kernels are made for it. `graph`: the device runs a whole step, which the host only starts.
    """

    precision: Precision = "float32"
    compiled: bool = False
    graph: bool = False
    notes: tuple[str, ...] = ()

    def without(self, part: Literal["compiled", "graph"], why: str) -> Execution:
        """This one without `part`, and with a note that says why."""
        return self.replace(**{part: False}, notes=(*self.notes, f"{part}: not used, {why}"))

    @property
    def name(self) -> str:
        """`bfloat16, compiled, graph`: what is used."""
        return ", ".join([self.precision] + ["compiled"] * self.compiled + ["graph"] * self.graph)


def choose_execution(optim: Optim, device: str, num_workers: int, num_steps: int) -> Execution:
    """The execution of a fit of `num_steps` on `device` ("cpu", "cuda:1"); "auto" precision follows from the hardware alone."""
    on_cuda = device.startswith("cuda")
    precision = _best_precision(on_cuda) if optim.precision == "auto" else optim.precision
    execution = Execution(precision=precision, compiled=on_cuda and optim.compile != "off", graph=on_cuda)
    if not on_cuda:  # torch 2.13 fails to compile a channels-last U-Net there
        return execution.without("compiled", "a CPU runs the network as it is") if optim.compile == "on" else execution
    if num_workers > 1:
        why = "several workers share each batch and exchange gradients in every step"
        execution = execution.without("graph", why)
        return execution.without("compiled", why) if optim.compile == "on" else execution.replace(compiled=False)
    if optim.compile == "auto" and num_steps < COMPILE_STEPS:
        return execution.without("compiled", f"a fit of fewer than {COMPILE_STEPS} steps ends before it pays; compile='on' does it")
    return execution


def _best_precision(on_cuda: bool) -> Precision:
    """bfloat16 if the hardware computes in it; otherwise torch only emulates it, which is slower than float32."""
    if on_cuda:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    report: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.10 has none
    return "bfloat16" if report().get("avx512_bf16") else "float32"
