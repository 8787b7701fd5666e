"""Several workers train one model on batches that they share, with torch's DistributedDataParallel (DDP).

What is computed does not depend on the number of workers; its last digits do. Each worker has a part of the rows of every batch:
whatever runs over the batch runs over all workers, which are batch norm, dropout and the loss (`host_step`). A worker may have no
row of a small batch. It then passes an item through the network that another worker has, too, and drops the logits: many layers,
such as an instance norm, reject an empty batch, and DDP waits for a gradient of each parameter, which is 0 here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from softseg_dist.numerics.dropout import DROPOUTS
from softseg_dist.numerics.sync_batch_norm import BATCH_NORMS, GlooSyncBatchNorm
from softseg_dist.training.model import Model
from softseg_dist.training.task import Worker

BROKEN = ("Connection closed", "Connection reset", "connection lost", "NCCL", "gloo")


class WorkerGroup:
    """The workers of one fit and the model that they train together. Changes layers of `model` in place, not its state."""

    def __init__(self, model: Model, worker: Worker) -> None:
        self.model, self.worker = model, worker
        self.share = BatchShare(worker.rank, worker.num_workers)
        self._forward: Callable[[Tensor], Tensor] | None = model if worker.num_workers == 1 else None
        if worker.num_workers == 1:
            return
        _replace(model, DROPOUTS, lambda layer: _SharedDropout(layer, self.share) if layer.p else layer)
        if worker.device == "cpu":
            group = _second_group(distributed.group.WORLD)
            _replace(model, BATCH_NORMS, lambda layer: GlooSyncBatchNorm(layer, group))
        else:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for layer in model.modules():
            if isinstance(layer, GlooSyncBatchNorm | nn.SyncBatchNorm):
                _skip_borrowed(layer, self.share)

    def predict(self, image: Tensor) -> Tensor:
        """Images [b C *S] of this worker's rows -> prediction [b K *S], which is empty if this worker has none."""
        if self._forward is None:
            # Torch 2.13 warns about this option and names a newer one, which torch 2.11 does not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            self._forward = DistributedDataParallel(
                _SharedModel(self.model, self.share),
                broadcast_buffers=False,  # they are equal on all workers
                find_unused_parameters=_has_unused_parameters(self.model, image),
                gradient_as_bucket_view=True,
            )
        return self._forward(image)

    def backward(self, loss: Tensor) -> None:
        """Put into every parameter the gradient of the sum of all workers' `loss`."""
        self.model.zero_grad(set_to_none=True)
        (loss * self.worker.num_workers).backward()  # DDP takes the mean over workers


class BatchShare:
    """Which rows of a batch of `num_items` are this worker's: about as many as every other worker has.

    >>> shares = [BatchShare(rank, num_workers=4) for rank in range(4)]
    >>> [share.begin(7) for share in shares]
    [slice(0, 1, None), slice(1, 3, None), slice(3, 5, None), slice(5, 7, None)]
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self.begin(num_workers)

    def begin(self, num_items: int) -> slice:
        """Begin a batch of so many items; returns this worker's rows."""
        first, last = (num_items * (self.rank + step) // self.num_workers for step in (0, 1))
        self.num_items, self.rows = num_items, slice(first, last)
        return self.rows

    @property
    def empty(self) -> bool:
        """Has this worker none? Then the network gets an item that does not count."""
        return self.rows.start == self.rows.stop


def partner_died(error: Exception) -> bool:
    """Does this error follow from the death of another worker?"""
    return any(sign in str(error) for sign in BROKEN)


class _SharedModel(nn.Module):
    """The model as DDP calls it, on this worker's rows or on a borrowed item."""

    def __init__(self, model: Model, share: BatchShare) -> None:
        super().__init__()
        self.model, self.share = model, share

    def forward(self, image: Tensor) -> Tensor:
        """[b C *S] -> [b K *S], and a borrowed item [1 C *S] -> [0 K *S]."""
        logits = self.model.logits(image)
        return self.model.activation(logits[:0] if self.share.empty else logits)


class _SharedDropout(nn.Module):
    """Dropout of the whole batch in training, from the same seed on all workers; in evaluation that of the worker's own cases."""

    def __init__(self, dropout: nn.Module, share: BatchShare) -> None:
        super().__init__()
        self.dropout, self.share = dropout, share
        self.train(dropout.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.dropout(x)
        if self.share.empty:
            return x
        rows = self.share.rows
        around = [0, 0] * (x.ndim - 1) + [rows.start, self.share.num_items - rows.stop]
        return self.dropout(pad(x, around))[rows]


def _skip_borrowed(layer: nn.Module, share: BatchShare) -> None:
    """Let a synchronised batch norm see no item where this worker's one is borrowed, and give one of zeros in its place."""

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return (args[0][:0],) if layer.training and share.empty else None

    def after(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not (layer.training and share.empty):
            return None
        return output.new_zeros((1, *output.shape[1:])) + output.sum()  # the sum leads the backward pass to the layer

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _has_unused_parameters(model: nn.Module, image: Tensor) -> bool:
    """Is the prediction the same whatever some parameter is? In evaluation, which exchanges nothing and changes no state."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prediction: Tensor = model.eval()(image[:1])
    model.train()
    return any(gradient is None for gradient in torch.autograd.grad(prediction.sum(), learned, allow_unused=True))


def _replace(module: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[Any], nn.Module]) -> None:
    """Replace every layer of `kinds` inside `module` by what `make` gives for it."""
    for name, child in module.named_children():
        if isinstance(child, kinds):
            setattr(module, name, make(child))
        else:
            _replace(child, kinds, make)


@lru_cache(maxsize=1)
def _second_group(_: ProcessGroup | None) -> ProcessGroup:
    """The same workers once more, for all fits of this process: DDP sends gradients through the first group meanwhile."""
    return distributed.new_group()
