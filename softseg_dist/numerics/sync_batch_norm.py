"""Batch norm over the items of all workers, for workers that meet through gloo; on GPUs torch's SyncBatchNorm does this.

The forward and the backward pass need one all-reduce each, of 2 C + 1 and 2 C numbers in float64. Torch's own kernels compute the
rest: by autograd through the means the layer would take four times as long.

Legend: b items of this worker (0 is allowed), C channels, *S space.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup, Work
from torch.nn import functional

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
AWAKE_S = 0.05  # a sum that takes longer is waited for asleep


class GlooSyncBatchNorm(nn.Module):
    """Takes over parameters, buffers and their names from `layer`, one of `BATCH_NORMS`.

    In training, mean and variance [C] are those of all workers' items: every worker of `group` must call the layer.
    In evaluation the layer is what `layer` is.
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
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            unbiased = variance * (count / max(count - 1, 1.0))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return output


class _Normalize(torch.autograd.Function):
    """(x - mean) / sd * weight + bias, and its gradient. Returns mean, variance [C] and the number of values of a channel, too.

    Numbers per channel are NumPy's: a dozen operations of torch's cost more than a pass over a small map.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, group: ProcessGroup, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        channels = x.shape[1]
        sums = np.zeros(2 * channels + 1)
        if len(x):
            own_mean, own_variance = (moment.double().numpy() for moment in torch.batch_norm_update_stats(x, None, None, 0.0))
            sums[:] = *own_mean, *(own_variance + own_mean**2), 1.0
            sums *= x.numel() // channels
        _wait_for(distributed.all_reduce(torch.from_numpy(sums), group=group, async_op=True))
        count = max(sums[-1].item(), 1.0)
        means, squares = (sums[:-1] / count).reshape(2, channels)
        moments = np.stack([means, np.maximum(squares - means**2, 0)])
        mean, variance = torch.from_numpy(moments).to(torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.group, ctx.eps, ctx.count = group, eps, count
        ctx.mark_non_differentiable(mean, variance)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (x, weight, mean, variance), grad, eps = ctx.saved_tensors, grad_outputs[0], ctx.eps
        own = mean.new_zeros(2, len(mean))  # sums of dy xhat and of dy
        if len(x):
            fixed = weight, mean, variance, None, None, False, eps, [False, True, True]
            own = torch.stack(torch.ops.aten.native_batch_norm_backward(grad, x, *fixed)[1:])
        sums = own.to(torch.float64, copy=True)
        sent = distributed.all_reduce(sums, group=ctx.group, async_op=True)
        # weight / sd * (dy - mean dy - xhat mean(dy xhat)): the first term is computed while the sums travel.
        of_grad = functional.batch_norm(grad, torch.zeros_like(mean), variance, weight, None, eps=eps)
        scale = (1 if weight is None else weight.detach().numpy()) / np.sqrt(variance.double().numpy() + eps)
        _wait_for(sent)
        slope, offset = torch.from_numpy(-scale * sums.numpy() / ctx.count).to(mean.dtype)
        of_x = functional.batch_norm(x, mean, variance, slope, offset, eps=eps)
        of_weight, of_bias = (None, None) if weight is None else own.to(weight.dtype)
        return of_grad.add_(of_x), of_weight, of_bias, None, None


def _wait_for(sent: Work) -> None:
    """Wait awake at first, giving way to every other thread: a processor that fell asleep takes longer to wake up than the sum."""
    until = time.monotonic() + AWAKE_S
    while not sent.is_completed() and time.monotonic() < until:
        os.sched_yield()
    sent.wait()
