"""How a batch is cut into portions, and what is summed over them, so that it does not matter how they are spread over workers.

Floating-point sums depend on their order, and training amplifies the last digit: without this a fit on two workers ends with
other weights than on one. Here a batch is cut into portions of some items, each of which stays on one worker. Whatever is summed
over items (batch statistics, gradients of parameters) is summed in float32 within a portion, and over portions in float64, where
the sum of so few digits is exact in any order. For CPUs: on a GPU small portions cost too much, and its kernels have orders of
their own.

Legend: b items here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

LOW_BITS = 0xFFFFF  # of a float64; without them a sum of thousands of numbers of similar size is exact

Exchange = Callable[[Tensor], Tensor]
"""The sum of a tensor over all workers."""


def summable(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values` rounded so that sums of them do not depend on the order.

    >>> x = summable(1 + np.random.default_rng(0).random(1000))
    >>> bool(x.sum() == x[::-1].sum() == x[::2].sum() + x[1::2].sum())
    True
    """
    return (values.view(np.int64) & ~LOW_BITS).view(np.float64)


class Portions:
    """How batches are cut, and the gradients of parameters on their way from a backward pass to the optimizer, in float64."""

    def __init__(self, size: int, exchange: Exchange) -> None:
        self.size, self.exchange = size, exchange
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._waiting: list[Sequence[Tensor]] = []

    def rows(self, num_items: int, rank: int, num_workers: int) -> slice:
        """The rows of a batch of `num_items` that are this worker's: whole portions, or none.

        >>> [Portions(2, torch.clone).rows(7, rank, 3) for rank in range(3)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
        """
        portions = -(-num_items // self.size)
        first, last = (portions * (rank + step) // num_workers * self.size for step in (0, 1))
        return slice(first, min(last, num_items))

    def add(self, parameter: nn.Parameter | None, of_portions: Sequence[Tensor]) -> None:
        """Add the gradients of portions."""
        if parameter is None or not parameter.requires_grad or not of_portions:
            return
        for of_portion in of_portions:
            if parameter in self._sums:
                self._sums[parameter] += of_portion
            else:
                self._sums[parameter] = of_portion.to(torch.float64, copy=True)

    def wait_for(self, portions: Sequence[Tensor]) -> None:
        """Gradients of portions are added when these are made, at the latest by `finish`."""
        self._waiting.append(portions)

    @torch.no_grad()
    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the sum over all portions of all workers into every parameter's `grad`, and forget it."""
        for portions in self._waiting:
            list(portions)  # made now, if not before
        self._waiting.clear()
        learned = [parameter for parameter in parameters if parameter.requires_grad]
        everywhere = self.exchange(torch.cat([self._of(parameter).flatten() for parameter in learned]))
        for parameter, values in zip(learned, everywhere.split([p.numel() for p in learned]), strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(values.view(parameter.shape))
        self._sums.clear()

    def _of(self, parameter: nn.Parameter) -> Tensor:
        """What this worker has: from a layer in portions, or from torch's own backward pass."""
        if parameter in self._sums:
            return self._sums[parameter]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return gradient.double()
