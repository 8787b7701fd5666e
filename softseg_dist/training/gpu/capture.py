"""A whole training step as one graph of the device, which the host starts with a single call; and whether a step can be one.

A graph repeats the operations that were launched while it was captured. A step cannot be one if its next operation depends on
numbers that the device has computed, or if it takes numbers from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from softseg_dist.numerics.seeds import drawing

READ, SIZE = "a number is read from the device, as .item(), float() or if do", "the size of a tensor depends on numbers"
COMPARED, MADE = "tensors are compared by the host", "a tensor is made from numbers of the host"
COPIED = "a tensor is copied between host and device"
WAITING: dict[Callable[..., Any], str] = {
    **dict.fromkeys((Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__), READ),
    **dict.fromkeys((torch.equal, Tensor.equal, torch.allclose, Tensor.allclose), COMPARED),
    **dict.fromkeys((torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select), SIZE),
    **dict.fromkeys((torch.unique, Tensor.unique, torch.argwhere, Tensor.argwhere, torch.bincount), SIZE),
    torch.tensor: MADE,
}
WARM_UP = 3  # steps before a capture, in which torch chooses algorithms and allocates what stays

Step = Callable[[], None]


def obstacle(step: Step) -> str | None:
    """Why `step` cannot be captured; None if nothing is known to be in the way. Does the step twice: the first may make what stays.

    >>> x = torch.zeros(3)
    >>> obstacle(lambda: x.add_(1)), obstacle(lambda: x.add_(x.sum().item()))
    (None, 'a number is read from the device, as .item(), float() or if do')
    """
    step()
    with _Watch() as watch:
        step()
    return watch.found


def apart_from_captures(device: torch.device) -> AbstractContextManager[object]:
    """No other thread captures a graph while the block launches operations one by one on a CUDA device; nothing to do on a CPU.

    For a capture cuDNN tries all algorithms, which is a setting of the whole process. Where another thread meets a new convolution
    meanwhile, the trial waits for the device, and CUDA refuses that while any stream is captured.
    """
    return drawing if device.type == "cuda" else nullcontext()


def captured(step: Step, pool: Any) -> Step:
    """`step` as a graph of the current stream, after some steps. Graphs of one `pool` share memory. Raises whatever torch does."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    cudnn = torch.backends.cudnn
    with drawing:  # one at a time in a process: a capture looks at the whole device, and takes hold of its generator
        before, cudnn.benchmark = cudnn.benchmark, True  # torch tries all algorithms for a convolution that it meets first
        try:
            for _ in range(WARM_UP):
                step()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                step()
        finally:
            cudnn.benchmark = before
    return graph.replay


@contextmanager
def unchanged(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo, in place, what the block does to weights, buffers and the optimizer's state, which begins with zeros."""

    def tensors() -> Iterator[Tensor]:
        yield from (*model.parameters(), *model.buffers())
        for state in optimizer.state.values():
            yield from state.values()

    saved = {tensor: tensor.detach().clone() for tensor in tensors()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor in tensors():
                tensor.copy_(saved.get(tensor, torch.zeros_like(tensor)))


class _Watch(TorchFunctionMode):
    """Looks at every call of torch by Python code; `found` is the first that cannot be captured. Others make the capture fail."""

    found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found = self.found or _obstacle_in(func, args, result)
        return result


def _obstacle_in(func: Any, args: Any, result: Any) -> str | None:
    """Why this call of torch cannot be captured."""
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        indices = args[1] if isinstance(args[1], tuple) else (args[1],)
        return SIZE if any(isinstance(i, Tensor) and i.dtype is torch.bool for i in indices) else None
    if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_):
        source = args[1] if func is Tensor.copy_ else args[0]
        return None if source.device.type == result.device.type else COPIED
    return WAITING.get(func)


MOST_NETWORKS = 256  # that a process compiles; torch's own limit of 8 is meant for one network that keeps changing


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """`network` as one that is compiled when it is first called, and again for every other size of batch."""
    torch.compiler.config.recompile_limit = MOST_NETWORKS
    return torch.compile(network, dynamic=False)
