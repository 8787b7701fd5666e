"""Layers that sum over a batch portion by portion, so that it does not matter how the portions are spread over workers.

Floating-point sums depend on their order, and training amplifies the last digit: without this a fit on two workers ends with
other weights than on one. Here a batch is cut into portions of some items, each of which stays on one worker. Whatever is summed
over items (batch statistics, gradients of parameters) is summed in float32 within a portion, and over portions in float64, where
the sum of so few digits is exact in any order. Under autocast convolutions are in bfloat16, and all sums as they are without.
For CPUs: on a GPU small portions cost too much, and its kernels have orders of their own.

Legend: b items here, C channels, *S space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from softseg_dist.numerics.activations import Stateless
from softseg_dist.numerics.alike import Layer, Lie, aligned, convolved_alike, gradients_alike
from softseg_dist.numerics.convolutions import Options, convolve, gradients

LOW_BITS = 0xFFFFF  # of a float64; without them a sum of thousands of numbers of similar size is exact

Exchange = Callable[[Tensor], Tensor]
"""The sum of a tensor over all workers."""


def summable(values: Tensor) -> Tensor:
    """`values` in float64, rounded so that sums of them do not depend on the order.

    >>> x = summable(1 + torch.rand(1000, dtype=torch.float64))
    >>> bool(x.sum() == x.flip(0).sum() == x[::2].sum() + x[1::2].sum())
    True
    """
    return (values.double().view(torch.int64) & ~LOW_BITS).view(torch.float64)


class Portions:
    """How batches are cut, and the gradients of parameters on their way from a backward pass to the optimizer, in float64."""

    def __init__(self, size: int, exchange: Exchange) -> None:
        self.size, self.exchange = size, exchange
        self._sums: dict[nn.Parameter, Tensor] = {}

    def rows(self, num_items: int, rank: int, num_workers: int) -> slice:
        """The rows of a batch of `num_items` that are this worker's: whole portions, or none.

        >>> [Portions(2, torch.clone).rows(7, rank, 3) for rank in range(3)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
        """
        portions = -(-num_items // self.size)
        first, last = (portions * (rank + step) // num_workers * self.size for step in (0, 1))
        return slice(first, min(last, num_items))

    def of(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The portions of tensors [b ...] that have the same items."""
        return zip(*([aligned(p) for p in t.split(self.size)] if len(t) else () for t in tensors), strict=True)

    def add(self, parameter: nn.Parameter | None, of_portions: Sequence[Tensor]) -> None:
        """Add the gradients of portions."""
        if parameter is None or not parameter.requires_grad or not of_portions:
            return
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros_like(parameter, dtype=torch.float64)
        total = self._sums[parameter]
        if parameter.ndim == 1:
            of_portions = [torch.stack(tuple(of_portions)).sum(0, dtype=torch.float64)]
        for portion in of_portions:  # one by one, which for large ones takes a tenth of the time
            total += portion

    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum over all portions of all workers into every parameter's `grad`, and forget it."""
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        sums = [self._of(parameter) for parameter in learned]
        everywhere = self.exchange(torch.cat([own.as_strided((own.numel(),), (1,)) for own in sums]))  # as they lie
        for parameter, own, values in zip(learned, sums, everywhere.split([s.numel() for s in sums]), strict=True):
            parameter.grad = values.as_strided(own.shape, own.stride()).to(parameter.dtype)
        self._sums.clear()

    def _of(self, parameter: nn.Parameter) -> Tensor:
        """What this worker has: from a layer of this module, or from torch's own backward pass."""
        if parameter in self._sums:
            return self._sums[parameter]
        total = torch.zeros_like(parameter, dtype=torch.float64)
        return total if parameter.grad is None else total.copy_(parameter.grad)


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
        elif isinstance(child, _InstanceNorm) and child.affine and not child.track_running_stats:
            setattr(module, name, _PortionsInstanceNorm(child, portions))
        else:
            in_portions(child, portions)


class _Replacement(nn.Module):
    """A layer that takes over the parameters and buffers of another one under their names."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, portions: Portions) -> None:
        super().__init__()
        self.portions = portions
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in layer._buffers.items():
            self.register_buffer(name, buffer)
        self.train(layer.training)


class _PortionsActivation(_Replacement):
    """An activation on one portion after the other: in what is left of a tensor after whole vectors torch computes other digits."""

    def __init__(self, layer: Stateless, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.activation = layer.activation

    def forward(self, logits: Tensor) -> Tensor:
        cut = [self.activation(portion) for (portion,) in self.portions.of(logits)]
        return torch.cat(cut) if cut else self.activation(logits)


class _Conv(_Replacement):
    """Any convolution, also a transposed one."""

    def __init__(self, layer: _ConvNd, portions: Portions) -> None:
        super().__init__(layer, portions)
        transposed = isinstance(layer, _ConvTransposeNd)
        assert not isinstance(layer.padding, str)
        self.options = Options(
            layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups
        )

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does not look into functions of our own.
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if self.training:
            return _Convolve.apply(x.to(precision), self.weight, self.bias, self)
        return convolve(x.to(precision), *_in(precision, self.weight, self.bias), self.options)


def _in(precision: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(precision), None if bias is None else bias.to(precision)


class _Convolve(torch.autograd.Function):
    """Portion by portion also where nothing is summed, unless that makes no difference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Conv) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        weight, bias = _in(x.dtype, weight, bias)
        of_bias = None if bias is None else Lie.of(bias)
        ctx.asked = Layer(Lie.of(weight), of_bias, layer.options, layer.portions.size)
        if len(x) <= layer.portions.size or convolved_alike(ctx.asked, x):
            return convolve(aligned(x), weight, bias, layer.options)
        return torch.cat([convolve(portion, weight, bias, layer.options) for (portion,) in layer.portions.of(x)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), (grad,), layer, needs_x = ctx.saved_tensors, grad_outputs, ctx.layer, ctx.needs_input_grad[0]
        weight, options, cut = layer.weight.detach().to(x.dtype), layer.options, list(layer.portions.of(x, grad))
        at_once = needs_x and len(cut) > 1 and gradients_alike(ctx.asked, x, grad)
        found = [gradients(p, g, weight, options, of_x=needs_x and not at_once) for p, g in cut]
        layer.portions.add(layer.weight, [of_weight for _, of_weight in found])
        if layer.bias is not None:
            space, kept = (0, *range(2, grad.ndim)), torch.promote_types(grad.dtype, torch.float32)
            layer.portions.add(layer.bias, [g.sum(space, dtype=kept) for _, g in cut])
        if not needs_x:
            return None, None, None, None
        if at_once:
            return gradients(x, grad, weight, options, of_weight=False)[0], None, None, None
        return torch.cat([of_x for of_x, _ in found]) if cut else torch.zeros_like(x), None, None, None


class _PortionsBatchNorm(_Replacement):
    """Batch norm over the items of all workers; at inference as ever."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: _BatchNorm, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.eps, self.momentum = layer.eps, layer.momentum

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        output, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * float(count / (count - 1).clamp(min=1)), share)
        return output


class _Normalize(torch.autograd.Function):
    """(x - mean) / sd * weight + bias with mean and sd [C] over all workers' items [b C *S], and its exact gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, layer: _PortionsBatchNorm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        told = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
        if len(x):
            cut = [portion for (portion,) in layer.portions.of(x)]
            moments = [torch.batch_norm_update_stats(portion, None, None, 0.0) for portion in cut]
            voxels = torch.tensor([[portion[:, 0].numel()] for portion in cut], dtype=torch.float64, device=x.device)
            means, variances = (torch.stack(of_portions).double() for of_portions in zip(*moments, strict=True))
            squares = summable(variances + means.square())
            told = torch.cat([(voxels * means).sum(0), (voxels * squares).sum(0), voxels.sum(0)])
        layer.portions.exchange(told)
        count = told[-1]
        exact_mean, square = (told[:-1] / count).view(2, -1)
        kept = torch.promote_types(x.dtype, torch.float32)
        mean, variance = exact_mean.to(kept), (square - exact_mean.square()).clamp(min=0).to(kept)
        ctx.save_for_backward(x, mean, variance, count)
        ctx.layer = layer
        ctx.mark_non_differentiable(mean, variance, count)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=layer.eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x, mean, variance, count), layer, weight = ctx.saved_tensors, ctx.layer, ctx.layer.weight
        grad, shape = grad_outputs[0], (1, -1, *[1] * (x.ndim - 2))
        fixed = weight, mean, variance, None, None, False, layer.eps, [False, True, True]
        of_portions = [
            torch.ops.aten.native_batch_norm_backward(g, p, *fixed)[1:] for p, g in layer.portions.of(x, grad)
        ]
        sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
        if of_portions:
            by_xhat, by_one = zip(*of_portions, strict=True)
            layer.portions.add(weight, by_xhat)
            layer.portions.add(layer.bias, by_one)
            sums = torch.stack([torch.stack(by).sum(0, dtype=torch.float64) for by in (by_xhat, by_one)])
        mean_by_xhat, mean_by_one = layer.portions.exchange(sums) / count
        # weight / sd * (dy - mean dy - xhat mean(dy xhat)), as a line in x and dy
        inverse = 1 / (variance.double() + layer.eps).sqrt()
        scale = inverse if weight is None else weight.double() * inverse
        slope = -scale * mean_by_xhat * inverse
        offset = -scale * mean_by_one - slope * mean.double()
        slope, offset, scale = (line.to(mean.dtype).view(shape) for line in (slope, offset, scale))
        return torch.addcmul(offset, x, slope).addcmul_(grad, scale).to(x.dtype), None, None, None


class _PortionsInstanceNorm(_Replacement):
    """Instance norm, whose statistics are an item's own; only its scale and offset sum over items."""

    def __init__(self, layer: _InstanceNorm, portions: Portions) -> None:
        super().__init__(layer, portions)
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        return _NormalizeItems.apply(x, self.weight, self.bias, self) if len(x) else x


class _NormalizeItems(torch.autograd.Function):
    """Torch's batch norm of each item by itself: its instance norm leaves the layout in which channels come last, and copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: _PortionsInstanceNorm) -> Tensor:
        normal, (means, inverses) = torch.empty_like(x), weight.new_empty(2, *x.shape[:2])
        for item, *into in zip(x.split(1), normal.split(1), means, inverses, strict=True):
            torch.native_batch_norm(item, weight, bias, None, None, True, 0.0, layer.eps, out=into)
        ctx.save_for_backward(x, means, inverses)
        ctx.layer = layer
        return normal

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (x, means, inverses), layer, wanted = ctx.saved_tensors, ctx.layer, [True, True, True]
        items = zip(grad_outputs[0].split(1), x.split(1), means, inverses, strict=True)
        backward = torch.ops.aten.native_batch_norm_backward
        found = [backward(g, i, layer.weight, None, None, m, v, True, layer.eps, wanted) for g, i, m, v in items]
        of_x, of_weight, of_bias = zip(*found, strict=True)
        layer.portions.add(layer.weight, of_weight)
        layer.portions.add(layer.bias, of_bias)
        return torch.cat(of_x), None, None, None
