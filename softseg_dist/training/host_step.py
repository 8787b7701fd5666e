"""A fit on CPUs, or on several GPUs that share each batch: the host starts every operation, and reads the loss after each step.

Memory that a step frees is kept for the next one, which needs as much. By default glibc returns large blocks to the system at once,
and the system clears each page again for the next block: a third of the time of a small 2D step. Other systems need no such care.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from softseg_dist.numerics.activations import dead_samples
from softseg_dist.numerics.seeds import seed_of, seeded
from softseg_dist.training.data_parallel import WorkerGroup
from softseg_dist.training.stepper import Diverged, FitProgress, Request, Stepper, cause, learning_rate

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
MOST_BYTES = 2**31 - 1  # as large as they can be: no block goes back by itself


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keep freed memory while the block runs, and return it at the end. After the first call large blocks are in the heap."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, MOST_BYTES)
    libc.mallopt(TRIM_THRESHOLD, MOST_BYTES)
    try:
        yield
    finally:
        libc.malloc_trim(0)


class HostStepper(Stepper):
    """Returns after every step."""

    def _begin(self) -> None:
        self.group = WorkerGroup(self.model, self.worker)
        parameters = self.model.parameters()
        self.adam = torch.optim.AdamW(parameters, lr=self.optim.lr, weight_decay=self.optim.weight_decay, foreach=True)
        self._order: tuple[int, list[int]] = -1, []

    def advance(self, progress: FitProgress) -> Request:
        if self._order[0] != progress.epoch:
            self._order = progress.epoch, self.batches.order(progress.epoch)
        first = progress.step * self.optim.batch_size
        members = self._order[1][first : first + self.optim.batch_size]
        with seeded(seed_of(self.batches.seed, "step", progress.epoch, progress.step)):  # dropout, with no state
            request = self.step(progress, members)
        progress.step += 1
        return request

    def step(self, now: FitProgress, members: Sequence[int]) -> Request:
        """Learn from a batch, of which each worker takes its rows; returns what is requested of the fit."""
        worker, loss = self.worker, self.recipe.loss
        rows = self.group.share.begin(len(members))
        for group in self.adam.param_groups:
            done = now.epoch * self.batches.steps_per_epoch + now.step
            group["lr"] = learning_rate(self.optim, done, self.batches.num_steps)
        image, target = self.batches.batch(now.epoch, members[rows] or members[:1], worker.device)
        prediction = self.group.predict(image)
        if len(prediction):
            averaged = loss.averaged(*self.batches.known(prediction, target))
        else:
            averaged = prediction.flatten(1).sum(1, keepdim=True).expand(-1, loss.num_averaged(prediction.shape[1]))
        shares = averaged / len(members)  # in the means over the batch [b M]
        slope, (total, dead, stop, save) = self._agree(shares, prediction)
        if not math.isfinite(total):
            causes = [found for found in worker.gather([self._cause(image, prediction, shares)]) if found]
            raise Diverged(total, now.epoch, now.step, next(iter(causes), f"{loss} is not finite for finite averages"))
        self.group.backward((shares * slope.to(shares.dtype)).sum())
        if self.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm)
        self.adam.step()
        now.losses.append(total)
        now.dead += int(dead)
        return Request(stop > 0, save > 0)

    def _agree(self, shares: Tensor, prediction: Tensor) -> tuple[Tensor, list[float]]:
        """The slope [M] of the loss by the means over the batch, and [loss, dead samples, stop, save], in one all-reduce."""
        mine = torch.zeros(3, dtype=torch.float64, device=shares.device)
        mine[0] = dead_samples(prediction.detach())
        if self.worker.leads:
            mine[1] = self.worker.stop()
            mine[2] = self.checkpoint_is_due()
        sums = self.worker.sum(torch.cat([mine, shares.detach().double().sum(0)]))
        means = sums[3:].requires_grad_()
        loss = self.recipe.loss.of_averages(means, prediction.shape[1], self.group.share.num_items)
        (slope,) = torch.autograd.grad(loss, means)
        agreed: list[float] = torch.cat([loss.detach().reshape(1), sums[:3]]).tolist()
        return slope, agreed

    def _cause(self, image: Tensor, prediction: Tensor, shares: Tensor) -> str:
        """Where the first number that is not finite came from; "" if it was another worker's."""
        if torch.isfinite(shares).all():
            return ""
        with torch.no_grad():
            logits = self.model.eval().logits(image)
        return cause(self.recipe, logits, prediction)
