"""One model over the batch of all workers: what they learn together is what one worker would learn from the whole batch.

On CPUs that holds to the last digit for up to ALIKE workers (`numerics.portions`), else up to rounding. A worker may have no item
of a batch at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from softseg_dist.numerics.portions import Portions, in_portions
from softseg_dist.training.task import Worker

ALIKE = 4  # portions of a batch, unless there are more workers: more would cost time, fewer would leave workers idle
BROKEN = ("Connection closed", "Connection reset", "connection lost", "NCCL", "gloo")


class Team:
    """The workers of one fit and the model that they train together. Changes layers of `model` in place, not its state.

    `batch_size` counts the items of all workers in a full batch.
    """

    def __init__(self, model: nn.Module, worker: Worker, batch_size: int) -> None:
        self.model, self.worker, self.num_items = model, worker, batch_size
        cuts = max(ALIKE, worker.num_workers) if worker.device == "cpu" else worker.num_workers
        self.portions = Portions(-(-batch_size // cuts), worker.sum)
        if worker.device == "cpu":
            in_portions(model, self.portions)
        elif worker.num_workers > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if worker.num_workers > 1:
            _share_dropout(model, self)

    def begin(self, num_items: int) -> slice:
        """Begin a batch of so many items; returns which rows of it are this worker's."""
        self.num_items = num_items
        return self.portions.rows(num_items, self.worker.rank, self.worker.num_workers)

    def backward(self, loss: Tensor) -> None:
        """Put into every parameter the gradient of the sum of all workers' `loss`."""
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        if self.worker.device == "cpu" or self.worker.num_workers > 1:
            self.portions.finish(self.model.parameters())


def partner_died(error: Exception) -> bool:
    """Is this what a worker meets when another one has died, and so not the cause?"""
    return any(sign in str(error) for sign in BROKEN)


def _share_dropout(module: nn.Module, team: Team) -> None:
    for name, child in module.named_children():
        if isinstance(child, _DropoutNd):
            setattr(module, name, _SharedDropout(child, team))
        else:
            _share_dropout(child, team)


class _SharedDropout(nn.Module):
    """Dropout whose mask is drawn for the whole batch, from a generator that all workers have seeded alike.

    Outside of training a worker has cases of its own, of which it drops what `dropout` does: nothing, unless that is made active.
    """

    def __init__(self, dropout: _DropoutNd, team: Team) -> None:
        super().__init__()
        self.dropout, self.team = dropout, [team]  # in a list: the team's model is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout.p == 0:
            alone: Tensor = self.dropout(x)
            return alone
        (team,) = self.team
        strided = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        layout = strided if x.is_contiguous(memory_format=strided) else torch.contiguous_format
        ones = torch.ones((team.num_items, *x.shape[1:]), dtype=x.dtype, device=x.device)
        mask: Tensor = self.dropout(ones.contiguous(memory_format=layout))
        return x * mask[team.begin(team.num_items)]
