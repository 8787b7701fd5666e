"""Batch norm over the items of all workers, for workers that meet through gloo; on GPUs torch's SyncBatchNorm does this.

The forward and the backward pass need one all-reduce each, of 2 C + 1 and 2 C numbers in float64. Torch's own kernels compute the
rest: by autograd through the means the layer would take four times as long.

Legend: b items of this worker (0 is allowed), C channels, *S space.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup, Work
from torch.nn import functional

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AWAKE_S = 0.05  # a sum that takes longer is waited for asleep


class GlooSyncBatchNorm(nn.Module):
    """Takes over parameters, buffers and their names from `layer`, one of `BATCH_NORMS`.

    In training, mean and variance [C] are those of all workers' items: every worker of `group` must call the layer. In evaluation
    the layer is what `layer` is.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, group: ProcessGroup) -> None:
        super().__init__()
        self.group, self.eps, self.momentum = group, layer.eps, layer.momentum
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """[b C *S] -> [b C *S]."""
        if not self.training:
            own = self.running_mean is None
            fixed = self.running_mean, self.running_var, self.weight, self.bias
            return functional.batch_norm(x, *fixed, training=own, eps=self.eps)
        output, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.group, self.eps)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            unbiased = variance * float(count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return output


class _Normalize(torch.autograd.Function):
    """(x - mean) / sd * weight + bias, and its gradient. Returns mean, variance [C] and the number of values of a channel, too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, group: ProcessGroup, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = x.new_zeros(2 * x.shape[1] + 1, dtype=torch.float64)
        if len(x):
            count = x.numel() // x.shape[1]
            mean, variance = (m.double() for m in torch.batch_norm_update_stats(x, None, None, 0.0))
            sums = count * torch.cat([mean, variance + mean.square(), mean.new_ones(1)])
        _wait_for(distributed.all_reduce(sums, group=group, async_op=True))
        total = sums[-1]
        mean, squares = (sums[:-1] / total).chunk(2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, variance = mean.to(dtype), (squares - mean.square()).clamp(min=0).to(dtype)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.group, ctx.eps = group, eps
        ctx.mark_non_differentiable(mean, variance, total)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (x, weight, mean, variance, total), grad = ctx.saved_tensors, grad_outputs[0]
        sums = torch.zeros(2, x.shape[1], dtype=torch.float64)
        if len(x):
            fixed = weight, mean, variance, None, None, False, ctx.eps, [False, True, True]
            sums = torch.stack(torch.ops.aten.native_batch_norm_backward(grad, x, *fixed)[1:]).double()
        own = (None, None) if weight is None else sums.to(weight.dtype).unbind()
        totals = sums.clone()  # of float64 weights `own` are views
        sent = distributed.all_reduce(totals, group=ctx.group, async_op=True)
        # weight / sd * (dy - mean dy - xhat mean(dy xhat)) is a line in dy, computed while the sums travel, plus a line in x
        inverse = 1 / (variance.double() + ctx.eps).sqrt()
        scale = inverse if weight is None else weight.double() * inverse
        of_x = _line(grad, scale, torch.zeros_like(scale))
        _wait_for(sent)
        by_normal, by_one = totals / total
        slope = -scale * by_normal * inverse
        offset = -scale * by_one - slope * mean.double()
        return of_x.add_(_line(x, slope, offset)), *own, None, None


def _wait_for(sent: Work) -> None:
    """Wait awake at first, giving way to every other thread: a processor that fell asleep takes longer to wake up than the sum."""
    until = time.monotonic() + AWAKE_S
    while not sent.is_completed() and time.monotonic() < until:
        os.sched_yield()
    sent.wait()


def _line(x: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """slope x + offset, of x [b C *S] and slope and offset [C], by a batch norm of mean 0, variance 1: one pass, bfloat16 too."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    zero, one = torch.zeros_like(slope, dtype=dtype), torch.ones_like(slope, dtype=dtype)
    return functional.batch_norm(x, zero, one, slope.to(dtype), offset.to(dtype), eps=0.0)
