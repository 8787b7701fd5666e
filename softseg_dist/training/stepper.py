"""How a fit trains an epoch: a stepper advances its progress, in the way that its device does best.

A fit keeps epochs, checkpoints and results. A stepper keeps the optimizer, draws batches and learns from them. All steppers compute
the same step. In which precision, compiled or not, operation by operation or as one graph, follows from the machine (`Execution`):
"bfloat16" is the precision of the network alone; weights, activation, loss, optimizer and metrics are always in float32.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from softseg_dist.frozen import Frozen
from softseg_dist.study import Optim, Recipe
from softseg_dist.training.batches import Batches
from softseg_dist.training.model import Model, Precision
from softseg_dist.training.task import FitTask, Worker

# To compile a U-Net takes about a minute, once per machine, where torch keeps it, and some seconds in every further process.
# It saves tenths of a millisecond (2D) to milliseconds (3D) of a step that is a graph anyway: about so many pay for the seconds.
COMPILE_STEPS = 5000
LEAVING_S = 5.0  # between checkpoints on a machine that ends soon


class Execution(Frozen):
    """What is used; `notes` say what is not, and why. `compiled`: kernels are made for it. `graph`: the device runs whole steps."""

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


class Diverged(Exception):
    """A loss that is not finite: the fit has failed, for good; the text says where and why. Epoch and step count from 0."""

    def __init__(self, loss: float, epoch: int, step: int, why: str) -> None:
        super().__init__(f"loss is {loss:g} in epoch {epoch + 1}, step {step + 1}: {why}")


@dataclass
class FitProgress:
    """How far a fit has come. `epoch` is being trained (from 0), `step` of its batches are done; `history` is its file's text.

    `best_sha256` is of the file with the weights of `best_epoch`, "" as long as there is none.
    """

    epoch: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    dead: int = 0
    dead_share: float = 0.0
    best_score: float = -math.inf
    best_epoch: int = 0
    best_sha256: str = ""
    history: str = ""
    elapsed_s: float = 0.0


class Request(NamedTuple):
    """What is requested of a fit while it trains: to stop, or to write its checkpoint (a fit that stops writes one, too)."""

    stop: bool = False
    save: bool = False


class Stepper(ABC):
    """Trains a model, whose weights are right whenever `advance` has returned. `execution` is what it really uses.

    `saved_s` is the time of the last checkpoint (`time.monotonic`).
    """

    adam: torch.optim.Optimizer

    def __init__(self, task: FitTask, batches: Batches, model: Model, worker: Worker, execution: Execution) -> None:
        self.task, self.recipe, self.optim, self.batches = task, task.recipe, task.recipe.optim, batches
        self.model, self.worker, self.execution = model, worker, execution
        self.saved_s = time.monotonic()
        self._begin()

    def checkpoint_is_due(self) -> bool:
        """Is the last checkpoint `checkpoint_every_s` old, or `LEAVING_S` where a machine ends soon? Counts on the first worker."""
        age_s = time.monotonic() - self.saved_s
        return age_s >= self.task.checkpoint_every_s or (age_s >= LEAVING_S and self.worker.leaving())

    @abstractmethod
    def _begin(self) -> None:
        """Make the optimizer, `adam`, and whatever else this way of training needs."""

    @abstractmethod
    def advance(self, progress: FitProgress) -> Request:
        """Train on from `progress.step` until a step after which something is requested, or to the end of the epoch.

        May return earlier. Keeps `step`, `losses` and `dead` of `progress` right. Raises Diverged if a loss is not finite.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the model's weights: the optimizer's state."""
        return self.adam.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave, by whatever kind of stepper; the model has its weights already."""
        how_it_steps = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({**state, "param_groups": how_it_steps})


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The learning rate of a step, from 0, of a fit of so many.

    >>> learning_rate(Optim(lr=1.0), step=5, num_steps=10)
    0.5
    """
    if optim.schedule == "constant":
        return optim.lr
    return optim.lr * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def cause(recipe: Recipe, logits: Tensor, prediction: Tensor) -> str:
    """Why a loss is not finite: the first place, on the way from `logits` [B L *S] to it, where a number is not."""
    if not torch.isfinite(logits).all():
        lr = f"{recipe.optim.lr:g}"
        return f"the network's output is not finite, its weights diverged; try a smaller lr than {lr} or clip_norm=1"
    if not torch.isfinite(prediction).all():
        return f"{recipe.activation} is not finite for finite logits"
    low, high = prediction.min().item(), prediction.max().item()
    return f"{recipe.loss} is not finite for finite predictions in [{low:g}, {high:g}]"
