"""Does one convolution of a whole batch give, digit for digit, what it gives of the batch's portions? Then one call does for all.

How a convolution is computed depends on shape, layout and type of what it is given and on the number of threads, not on the numbers
in it. So it is tried once for each of those, with numbers whose sums would be nothing if they were exact: what comes out was lost
on the way, and another order of the same terms loses something else. Of few terms that cannot be told, so these are taken for
different.

Legend: b items, C channels, O of the result, *S space.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from softseg_dist.numerics.convolutions import Options, convolve, gradients

ALIGNMENT = 64  # bytes: of all memory that torch allocates on a CPU
FEWEST = 8  # terms of a sum
# Numbers: to try takes as much memory as three such tensors, and of larger ones a call for each portion costs little.
MOST = 2**24
CANCELLING = 3  # of the terms: each brings a sum nearer to nothing, by as many digits as it has


class Lie(NamedTuple):
    """How a tensor lies in memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, values: Tensor) -> Lie:
        """That of `values`."""
        return cls(tuple(values.shape), values.stride(), values.dtype)

    def filled(self, values: Tensor) -> Tensor:
        """`values`, or as many of them as it takes, as a tensor that lies so."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).copy_(values)


class Layer(NamedTuple):
    """A convolution, and how many items are a portion of the batches that it is given."""

    weight: Lie
    bias: Lie | None
    options: Options
    size: int


def aligned(portion: Tensor) -> Tensor:
    """The portion as it would lie in memory of its own: how it is computed depends on that too."""
    return portion if _is_aligned(portion) else portion.clone()


def convolved_alike(layer: Layer, x: Tensor) -> bool:
    """Is the convolution of `x` [b C *S] that of its portions, one after the other?"""
    return _can_be_tried(x) and _convolved_alike(layer, Lie.of(x), torch.get_num_threads())


def gradients_alike(layer: Layer, x: Tensor, grad: Tensor) -> bool:
    """Is the gradient of `x` [b C *S], given that of the result [b O *S], that of its portions?"""
    return _can_be_tried(grad) and _gradients_alike(layer, Lie.of(x), Lie.of(grad), torch.get_num_threads())


def _is_aligned(values: Tensor) -> bool:
    return values.data_ptr() % ALIGNMENT == 0


def _can_be_tried(values: Tensor) -> bool:
    """Others are too large, begin where a kernel may go another way, or have one place for several numbers."""
    return values.numel() <= MOST and _is_aligned(values) and 0 not in values.stride()


@lru_cache(maxsize=4096)
def _convolved_alike(layer: Layer, x: Lie, threads: int) -> bool:
    if (found := _cancelling(layer, 0 if layer.options.transposed else 1)) is None:
        return False
    channels, weight = found
    bias, values = layer.bias and layer.bias.filled(torch.zeros(())), x.filled(channels)
    parts = [convolve(aligned(part), weight, bias, layer.options) for part in values.split(layer.size)]
    return _same(convolve(values, weight, bias, layer.options), torch.cat(parts))


@lru_cache(maxsize=4096)
def _gradients_alike(layer: Layer, x: Lie, grad: Lie, threads: int) -> bool:
    if (found := _cancelling(layer, 1 if layer.options.transposed else 0)) is None:
        return False
    channels, weight = found
    ones, values = x.filled(torch.ones(())), grad.filled(channels)

    def of_x(part: Tensor, of_part: Tensor) -> Tensor:
        return gradients(part, of_part, weight, layer.options, of_weight=False)[0]

    parts = zip(ones.split(layer.size), values.split(layer.size), strict=True)
    return _same(of_x(ones, values), torch.cat([of_x(aligned(p), aligned(g)) for p, g in parts]))


def _cancelling(layer: Layer, axis: int) -> tuple[Tensor, Tensor] | None:
    """A value for each channel [1 C 1 ..] and a weight whose products with them, along `axis` of the weight, add up to nothing.

    The values differ much in size, so that sums are rounded. None if there are too few of them.
    """
    lie, terms = layer.weight, layer.weight.shape[axis]
    if terms < FEWEST or layer.options.groups > 1:
        return None
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(24 * torch.rand(terms, generator=generator) - 12)
    values = (sizes * torch.randn(terms, generator=generator)).to(lie.dtype).double()
    weight = lie.filled(torch.randn(lie.shape, generator=generator))
    of_channels = weight.movedim(axis, -1)
    cancelling = [terms * number // CANCELLING for number in range(CANCELLING)]
    of_channels[..., cancelling] = 0
    for channel in cancelling:
        of_channels[..., channel] = (-(of_channels.double() @ values) / values[channel]).to(lie.dtype)
    return values.view(1, -1, *[1] * (weight.ndim - 2)), weight


def _same(whole: Tensor, parts: Tensor) -> bool:
    return whole.stride() == parts.stride() and torch.equal(whole, parts)
