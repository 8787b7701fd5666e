"""Dropout by counting: what is dropped follows from a seed in a tensor, the layer and the place, not from a generator's state.

Several fits of one process can then drop at once, each as if it were alone. A CUDA graph drops other values in each replay. CPU and
GPU drop the same. Legend: B batch, C channels, *S space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WEYL = 0x9E3779B9  # 2^32 divided by the golden ratio: its multiples are far apart
WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
COUNTED = (nn.Dropout, *WHOLE_CHANNELS)
DROPOUTS = (nn.Dropout, *WHOLE_CHANNELS, nn.AlphaDropout, nn.FeatureAlphaDropout)  # all layers of torch that draw


def count_dropout(module: nn.Module, seed: Tensor) -> int:
    """Replace all dropout inside `module`, but alpha dropout, by layers that drop by `seed`, int32 [1]; returns how many."""
    layers = ((parent, name, child) for parent in module.modules() for name, child in parent.named_children())
    found = [(parent, name, child) for parent, name, child in layers if isinstance(child, COUNTED) and child.p > 0]
    for number, (parent, name, child) in enumerate(found):
        setattr(parent, name, CountedDropout(child, number, seed))
    return len(found)


class CountedDropout(nn.Module):
    """A dropout layer in training; outside of it what the replaced `dropout` is: nothing, unless that is made active.

    Values are dropped one by one, or by whole channels if `dropout` does so; what stays is divided by the share that stays.
    """

    seed: Tensor

    def __init__(self, dropout: nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d, number: int, seed: Tensor) -> None:
        super().__init__()
        self.dropout = dropout
        self.key = _signed(WEYL * (number + 1))
        self.whole_channels = isinstance(dropout, WHOLE_CHANNELS)
        self.first_kept = _signed(round(min(dropout.p, 1) * 2**32) - 2**31) if dropout.p < 1 else None
        self.register_buffer("seed", seed, persistent=False)
        self.train(dropout.training)

    def forward(self, x: Tensor) -> Tensor:
        """Drop of `x` [B C *S]."""
        if not self.training:
            return self.dropout(x)
        if self.first_kept is None:
            return x * 0
        return x.masked_fill(self._numbers(x) < self.first_kept, 0) * (1 / (1 - self.dropout.p))

    def _numbers(self, x: Tensor) -> Tensor:
        """A pseudo-random int32 for every value of `x` [B C *S], or for every channel [B C 1 ..]; laid out channels last."""
        batch, channels, *size = x.shape
        key = _mixed(self.seed + self.key)
        of_channel = _mixed(_mixed(torch.arange(batch * channels, dtype=torch.int32, device=x.device) + key))
        if self.whole_channels:
            return of_channel.view(batch, channels, *[1] * len(size))
        of_place = _mixed(torch.arange(math.prod(size), dtype=torch.int32, device=x.device) ^ key)
        both = of_channel.view(batch, 1, channels) + of_place.view(1, -1, 1)
        scattered = (both ^ ((both >> 15) & 0x1FFFF)) * 0x2C1B3C6D  # the upper bits depend on all bits
        return scattered.view(batch, *size, channels).movedim(-1, 1)


def _signed(number: int) -> int:
    """The int32 with the last 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31


def _mixed(x: Tensor) -> Tensor:
    """A hash of int32 numbers: "lowbias32" of Wellons, Prospecting for hash functions, 2018. Products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)
