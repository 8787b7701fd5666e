"""Layers that sum over a batch portion by portion, as `portions` says, and give the batch on in portions.

Outside of training they are torch's layers.

Legend: b items here, C channels, *S space.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from softseg_dist.numerics.activations import Stateless
from softseg_dist.numerics.convolutions import Options, convolve, gradients
from softseg_dist.numerics.cut_batch import CutBatch, Waiting, apart, cut, portions_of, together
from softseg_dist.numerics.portions import Portions, summable

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
ROW = 512  # numbers


def in_portions(module: nn.Module, portions: Portions) -> None:
    """Replace every layer inside `module` that sums over items; parameters, buffers and their names stay.

    Other layers with parameters work too, as exactly as torch sums.
    """
    for name, child in module.named_children():
        if isinstance(child, _ConvNd) and child.padding_mode == "zeros" and not isinstance(child.padding, str):
            setattr(module, name, _Conv(child, portions))
        elif isinstance(child, _BatchNorm):
            setattr(module, name, _PortionsBatchNorm(child, portions))
        elif isinstance(child, Stateless) and child.activation.per_sample:
            setattr(module, name, _PortionsActivation(child, portions))
        elif isinstance(child, _InstanceNorm) and not child.track_running_stats:
            setattr(module, name, _PortionsInstanceNorm(child, portions))
        else:
            in_portions(child, portions)


class _Replacement(nn.Module):
    """A layer that takes over the parameters and buffers of another one under their names."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, portions: Portions) -> None:
        super().__init__()
        self.portions = portions
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or isinstance(x, CutBatch):
            return self.in_portions(cut(x, self.portions.size))
        return self.alone(x)

    @abstractmethod
    def in_portions(self, x: CutBatch) -> Tensor:
        """The layer in training."""

    @abstractmethod
    def alone(self, x: Tensor) -> Tensor:
        """The layer outside of it, as ever."""


class _PortionsActivation(_Replacement):
    """An activation on one portion after the other: in what is left of a tensor after whole vectors torch computes other digits."""

    def __init__(self, layer: Stateless, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.activation = layer.activation

    def in_portions(self, x: CutBatch) -> Tensor:
        return together([self.activation(portion) for portion in apart(x)])

    def alone(self, x: Tensor) -> Tensor:
        return self.activation(x)


class _Conv(_Replacement):
    """Any convolution, also a transposed one."""

    weight: nn.Parameter

    def __init__(self, layer: _ConvNd, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.layer = (layer,)  # in a tuple: its parameters are this module's
        transposed = isinstance(layer, _ConvTransposeNd)
        assert not isinstance(layer.padding, str)
        self.options = Options(
            layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups
        )

    def in_portions(self, x: CutBatch) -> Tensor:
        return _Convolve.apply(x, self.weight, self.bias, self)

    def alone(self, x: Tensor) -> Tensor:
        (layer,) = self.layer
        y: Tensor = layer(x)
        return y


class _Convolve(torch.autograd.Function):
    """Portion by portion also where nothing is summed: how torch computes a convolution depends on the number of items."""

    @staticmethod
    def forward(ctx: Any, x: CutBatch, weight: Tensor, bias: Tensor | None, layer: _Conv) -> CutBatch:
        ctx.save_for_backward(x)
        ctx.layer, portions = layer, x.portions
        fixed = weight.detach(), None if bias is None else bias.detach(), layer.options
        return CutBatch(Waiting(lambda at: convolve(portions[at], *fixed), len(x.lengths)), x.lengths)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), layer, needs_x = ctx.saved_tensors, ctx.layer, ctx.needs_input_grad[0]
        if not x.shape[0]:
            return torch.zeros_like(x) if needs_x else None, None, None, None
        portions, grads = x.portions, portions_of(grad_outputs[0], x.lengths)
        weight, bias, options = layer.weight.detach(), layer.bias, layer.options

        def gradient(at: int) -> Tensor:
            of_x, of_weight, of_bias = gradients(
                portions[at], grads[at], weight, options, of_x=needs_x, of_bias=bias is not None
            )
            layer.portions.add(layer.weight, [of_weight])
            layer.portions.add(bias, [of_bias])
            return of_x

        waiting = Waiting(gradient, len(x.lengths))
        layer.portions.wait_for(waiting)
        return CutBatch(waiting, x.lengths) if needs_x else None, None, None, None


class _PortionsBatchNorm(_Replacement):
    """Batch norm over the items of all workers; at inference as ever."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: _BatchNorm, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.eps, self.momentum = layer.eps, layer.momentum

    def in_portions(self, x: CutBatch) -> Tensor:
        return self.alone(x) if self._knows and not self.training else _Normalize.apply(x, self.weight, self.bias, self)

    def alone(self, x: Tensor) -> Tensor:
        if not self._knows:
            return self.in_portions(cut(x, self.portions.size))
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def remember(self, mean: NDArray[np.float32], variance: NDArray[np.float32], count: float) -> None:
        """Keep the statistics [C] of a batch with `count` numbers per channel, for inference."""
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = np.float32(self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked))
            unbiased = variance * np.float32(count / max(count - 1, 1))
            for kept, newest in ((self.running_mean.numpy(), mean), (self.running_var.numpy(), unbiased)):
                kept += share * (newest - kept)

    @property
    def _knows(self) -> bool:
        return self.running_mean is not None


class _Normalize(torch.autograd.Function):
    """(x - mean) / sd * weight + bias with mean and sd [C] over all workers' items [b C *S], and its exact gradient.

    What is known of channels is computed by numpy, which is faster with few numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, x: CutBatch, weight: Tensor | None, bias: Tensor | None, layer: _PortionsBatchNorm
    ) -> CutBatch:
        channels = x.shape[1]
        told = np.zeros(2 * channels + 1)
        if x.shape[0]:
            voxels = np.array([[portion.numel() // channels] for portion in x.portions], np.float64)
            moments = [torch.batch_norm_update_stats(portion, None, None, 0.0) for portion in x.portions]
            means, variances = (np.array([m.numpy() for m in of], np.float64) for of in zip(*moments, strict=True))
            told[:channels] = (voxels * means).sum(0)
            told[channels:-1] = (voxels * summable(variances + means**2)).sum(0)
            told[-1] = voxels.sum()
        told = layer.portions.exchange(torch.from_numpy(told)).numpy()
        exact_mean, square = told[:-1].reshape(2, -1) / told[-1]
        mean, variance = exact_mean.astype(np.float32), (square - exact_mean**2).clip(min=0).astype(np.float32)
        layer.remember(mean, variance, told[-1])
        ctx.save_for_backward(x)
        ctx.layer, ctx.of_channels = layer, (mean, variance, told[-1])
        slope = 1 / np.sqrt(variance + np.float32(layer.eps))
        if weight is not None:
            slope *= weight.detach().numpy()
        return lines([x.portions], x.lengths, -mean * slope + (0 if bias is None else bias.detach().numpy()), slope)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), layer, (mean, variance, count) = ctx.saved_tensors, ctx.layer, ctx.of_channels
        weight, grads = layer.weight, portions_of(grad_outputs[0], x.lengths)
        fixed = weight, torch.from_numpy(mean), torch.from_numpy(variance), None, None, False, layer.eps
        sums = np.zeros((2, x.shape[1]))
        if x.shape[0]:
            backward = torch.ops.aten.native_batch_norm_backward
            pairs = zip(x.portions, grads, strict=True)
            of_portions = [backward(g, p, *fixed, [False, True, True])[1:] for p, g in pairs]
            sums = np.array([[s.numpy() for s in pair] for pair in of_portions], np.float64).sum(0)
            layer.portions.add(weight, [torch.from_numpy(sums[0])])
            layer.portions.add(layer.bias, [torch.from_numpy(sums[1])])
        mean_by_xhat, mean_by_one = layer.portions.exchange(torch.from_numpy(sums)).numpy() / count
        # weight / sd * (dy - mean dy - xhat mean(dy xhat)), as a line in x and dy
        inverse = 1 / np.sqrt(variance.astype(np.float64) + layer.eps)
        scale = inverse if weight is None else weight.detach().numpy() * inverse
        slope = -scale * mean_by_xhat * inverse
        return (
            lines([x.portions, grads], x.lengths, -scale * mean_by_one - slope * mean, slope, scale),
            None,
            None,
            None,
        )


def lines(inputs: Sequence[Sequence[Tensor]], lengths: list[int], *coefficients: NDArray[np.floating]) -> CutBatch:
    """offset + slope_1 x_1 + slope_2 x_2 ..., channel by channel, for every portion of the inputs x_i [b C *S].

    `coefficients` are offset and slopes [C], taken in float32. Where channels come last in memory, many voxels are taken as one
    row, as torch is slow on rows of few numbers.
    """
    of_channels = np.array(coefficients, np.float32)
    in_rows: dict[int, Sequence[Tensor]] = {}

    def line(at: int) -> Tensor:
        values = [of_portions[at] for of_portions in inputs]
        x, voxels = values[0], _voxels_per_row(values)
        if voxels not in in_rows:
            shape = (-1,) if voxels else (of_channels.shape[1], *[1] * (x.ndim - 2))
            in_rows[voxels] = [torch.from_numpy(one.reshape(shape)) for one in np.tile(of_channels, max(1, voxels))]
        if not voxels:
            return _line(values, *in_rows[0]).to(x.dtype)
        width = voxels * x.shape[1]
        rows = [value.as_strided((x.numel() // width, width), (width, 1)) for value in values]
        result = _line(rows, *in_rows[voxels])
        return (result if result.dtype is x.dtype else result.to(x.dtype)).as_strided(x.shape, x.stride())

    return CutBatch(Waiting(line, len(lengths)), lengths)


def _line(values: Sequence[Tensor], offset: Tensor, *slopes: Tensor) -> Tensor:
    result = torch.addcmul(offset, values[0], slopes[0])
    for value, slope in zip(values[1:], slopes[1:], strict=True):
        result.addcmul_(value, slope)
    return result


def _voxels_per_row(values: Sequence[Tensor]) -> int:
    """So many voxels of these portions lie in a row that there is no remainder; 0 if their numbers do not lie together at all."""
    x = values[0]
    layout = LAYOUTS.get(x.ndim)
    if layout is None or not x.shape[0] or not all(value.is_contiguous(memory_format=layout) for value in values):
        return 0
    channels = x.shape[1]
    return _divisor(x.numel() // channels, max(1, ROW // channels))


@lru_cache
def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(n for n in range(most, 0, -1) if number % n == 0)


class _PortionsInstanceNorm(_Replacement):
    """Instance norm, whose statistics are an item's own; only its scale and offset sum over items."""

    def __init__(self, layer: _InstanceNorm, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.eps = layer.eps

    def in_portions(self, x: CutBatch) -> Tensor:
        normal = together([functional.instance_norm(p, eps=self.eps) if p.shape[0] else p for p in apart(x)])
        return normal if self.weight is None else _Scale.apply(normal, self.weight, self.bias, self)

    def alone(self, x: Tensor) -> Tensor:
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


class _Scale(torch.autograd.Function):
    """x * weight + bias, channel by channel."""

    @staticmethod
    def forward(ctx: Any, x: CutBatch, weight: Tensor, bias: Tensor, layer: _PortionsInstanceNorm) -> CutBatch:
        ctx.save_for_backward(x)
        ctx.layer = layer
        shape = (1, -1, *[1] * (x.ndim - 2))
        return CutBatch([torch.addcmul(bias.view(shape), portion, weight.view(shape)) for portion in x.portions])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        grads, space = portions_of(grad_outputs[0], x.lengths), [0, *range(2, x.ndim)]
        layer.portions.add(layer.weight, [(p * g).sum(space) for p, g in zip(x.portions, grads, strict=True)])
        layer.portions.add(layer.bias, [g.sum(space) for g in grads])
        scale = layer.weight.view(1, -1, *[1] * (x.ndim - 2))
        return CutBatch([g * scale for g in grads]), None, None, None
