"""How a fit trains an epoch: a stepper advances its progress, in the way that its device does best.

A fit keeps epochs, checkpoints and results. A stepper keeps the optimizer, draws batches and learns from them. All steppers compute
the same step.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softseg_dist.study import Optim, Recipe
from softseg_dist.training.batches import Batches
from softseg_dist.training.execution import Execution
from softseg_dist.training.model import Model
from softseg_dist.training.task import FitTask, Worker


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
        """Whether the last checkpoint is `checkpoint_every_s` old; counts on the first worker."""
        return time.monotonic() - self.saved_s >= self.task.checkpoint_every_s

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
