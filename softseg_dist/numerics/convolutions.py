"""Convolutions of a few items, as fast as of many: of one small volume in float32 torch would take a slow algorithm.

Such a volume is given to torch as a batch of two: as its two halves where these join into its result, else beside an empty one.

Legend: b items, C channels, O of the result, D H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SMALL = 20480  # numbers: up to so many, torch takes a convolution of one volume for too small for the fast algorithm
LAYOUT = torch.channels_last_3d


class Options(NamedTuple):
    """What torch.convolution wants to know."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    """The convolution [b O *S] of `x` [b C *S]."""
    if not _slow(x):
        return torch.convolution(x, weight, bias, *options)
    if (halo := _halo(x, weight, options)) is None:
        return torch.convolution(_doubled(x), weight, bias, *options)[:1]
    return _joined(torch.convolution(_halves(x, halo, options), weight, bias, *_inside(options)))


def gradients(
    x: Tensor, grad: Tensor, weight: Tensor, options: Options, *, of_x: bool = True, of_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """Those of `x` and of the weight, given that of the result; what is not wanted is undefined."""
    wanted = [of_x, of_weight, False]  # that of the bias is for the caller to sum: torch takes long for it
    if not _slow(x):
        return _backward(grad, x, weight, options, wanted)
    if (halo := _halo(x, weight, options)) is None:
        of_both, of_weights = _backward(_doubled(grad), _doubled(x), weight, options, wanted)
        return of_both[:1] if of_x else of_both, of_weights
    apart = grad.permute(0, 2, 3, 4, 1).unflatten(1, (2, -1)).squeeze(0).permute(0, 4, 1, 2, 3)
    of_halves, of_weights = _backward(apart, _halves(x, halo, options), weight, _inside(options), wanted)
    return _added(of_halves, x, halo, options) if of_x else of_halves, of_weights


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, options: Options, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *options, wanted)
    return of_x, of_weight


def _slow(x: Tensor) -> bool:
    return x.shape[0] == 1 and x.ndim == 5 and x.dtype == torch.float32 and x.shape[1:4].numel() <= SMALL


def _halo(x: Tensor, weight: Tensor, options: Options) -> int | None:
    """How many planes two halves of `x` share; None if halves do not join."""
    halo = options.dilation[0] * (weight.shape[2] - 1)
    planes = x.shape[2] + 2 * options.padding[0] - halo
    return None if options.transposed or options.stride[0] != 1 or planes % 2 else halo


def _inside(options: Options) -> Options:
    """Options for halves, which bring their padding along the first axis."""
    return options._replace(padding=(0, *options.padding[1:]))


def _halves(x: Tensor, halo: int, options: Options) -> Tensor:
    """[1 C D H W] -> [2 C d H W] with what the first axis is padded by."""
    padded = functional.pad(x, (0, 0, 0, 0, options.padding[0], options.padding[0]))
    half = (padded.shape[2] - halo) // 2
    return torch.cat([padded[:, :, : half + halo], padded[:, :, half:]]).contiguous(memory_format=LAYOUT)


def _joined(halves: Tensor) -> Tensor:
    """[2 O d H W] -> [1 O 2d H W], where it lies."""
    return halves.permute(0, 2, 3, 4, 1).flatten(0, 1).unsqueeze(0).permute(0, 4, 1, 2, 3)


def _added(halves: Tensor, x: Tensor, halo: int, options: Options) -> Tensor:
    """The gradient of `x` from that of its halves: what both of them had seen gets both."""
    first, second = halves.split(1)
    padding, half = options.padding[0], first.shape[2] - halo
    of_padded = torch.zeros_like(functional.pad(x, (0, 0, 0, 0, padding, padding)))
    of_padded[:, :, : half + halo] = first
    of_padded[:, :, half:] += second
    return of_padded[:, :, padding : padding + x.shape[2]].contiguous(memory_format=LAYOUT)


def _doubled(values: Tensor) -> Tensor:
    return torch.cat([values, torch.zeros_like(values)]).contiguous(memory_format=LAYOUT)
