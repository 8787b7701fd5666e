"""A batch that is cut is a tensor as any other: every function gives what it gives for the whole batch, with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from softseg_dist.numerics.cut_batch import CutBatch, Waiting, apart, cut, together


class Doubled(torch.autograd.Function):
    """A function of a user, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad_outputs[0]


def changed_in_place(x: Tensor) -> Tensor:
    y = x * 1
    y[1:3].mul_(2)
    y[:, 1] += 1
    return torch.relu_(y)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": lambda x: torch.relu_(x * 2) + x,
    "leaky relu": lambda x: functional.leaky_relu(x, 0.1),
    "elu": functional.elu,
    "prelu": nn.PReLU(4, 0.3),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(dim=1)[:, 1:],
    "interpolate": lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
    "nearest": lambda x: functional.interpolate(x, scale_factor=2),
    "pad": lambda x: functional.pad(x, (0, 1, 2, 0)),
    "pad by replication": lambda x: functional.pad(x, (0, 1, 0, 1), "replicate"),
    "pad items": lambda x: functional.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
    "max pool": lambda x: functional.max_pool2d(x, 2),
    "average pool": lambda x: functional.avg_pool2d(x, 2),
    "channels beside each other": lambda x: torch.cat([x, 2 * x], dim=1),
    "items below each other": lambda x: torch.cat([x, 2 * x]),
    "with a number": lambda x: 2 - x / 3,
    "with a tensor for all": lambda x: x * torch.linspace(0, 1, 4).view(1, 4, 1, 1),
    "with a tensor for each": lambda x: x * torch.linspace(0, 1, 7).view(7, 1, 1, 1),
    "mean over space": lambda x: x.mean((2, 3)),
    "mean over items": lambda x: x - x.mean(0),
    "maximum of a sample": lambda x: x / x.relu().amax((1, 2, 3), keepdim=True).clamp(min=0.1),
    "flat": lambda x: x.flatten(1),
    "flat with items": lambda x: x.flatten(),
    "items last": lambda x: x.movedim(0, -1),
    "one item": lambda x: x[2],
    "some items": lambda x: x[2:5],
    "items in another order": lambda x: x[torch.arange(6, -1, -1)],
    "a number of it": lambda x: x * x.abs().max().item(),
    "squeeze and excite": lambda x: (
        x * torch.sigmoid(nn.functional.linear(x.mean((2, 3)), torch.eye(4)))[..., None, None]
    ),
    "group norm": nn.GroupNorm(2, 4),
    "layer norm": nn.LayerNorm([4, 6, 5]),
    "instance norm": nn.InstanceNorm2d(4),
    "convolution of torch": lambda x: functional.conv2d(x, torch.ones(2, 4, 3, 3)),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "a function of a user": Doubled.apply,
    "checkpoint": lambda x: checkpoint(lambda y: torch.relu(y) * 2, x, use_reentrant=False),
    "in place": changed_in_place,
    "dropout": lambda x: functional.dropout(x, 0.5),
    "dropout of channels": lambda x: functional.dropout2d(x, 0.5),
    "chosen": lambda x: torch.where(x > 0, x, x.new_zeros(())),
}


def in_one(values: Tensor) -> Tensor:
    return values.detach().whole() if isinstance(values, CutBatch) else values.detach()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_a_cut_batch_is_that_of_the_batch(name: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4, 6, 5).contiguous(memory_format=layout)
    results = []
    for size in (7, 3, 1):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = FUNCTIONS[name](cut(leaf, size) if size < 7 else leaf)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        results.append((in_one(y), leaf.grad))
    (y, grad), *of_cut = results
    for y_of_cut, grad_of_cut in of_cut:
        torch.testing.assert_close(y_of_cut, y)
        torch.testing.assert_close(grad_of_cut, grad)


def test_the_way_through_a_network_stays_cut() -> None:
    x = cut(torch.randn(5, 4, 6, 6), 2)
    fine = torch.relu_(functional.pad(x, (1, 1)))
    coarse = functional.interpolate(functional.max_pool2d(fine, 2), scale_factor=2.0)
    joined = torch.cat([fine, coarse], dim=1).contiguous(memory_format=torch.channels_last)
    assert isinstance(joined, CutBatch)
    assert joined.shape == (5, 8, 6, 8)
    assert [portion.shape for portion in joined.portions] == [(2, 8, 6, 8), (2, 8, 6, 8), (1, 8, 6, 8)]


def test_apart_and_together_are_inverse_and_carry_gradients() -> None:
    x = torch.randn(5, 2, 3, 3, requires_grad=True)
    batch = together([portion * (at + 1) for at, portion in enumerate(apart(cut(x, 2)))])
    (batch * 2).sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0, 0, 0].tolist() == [2, 2, 4, 4, 6]


def test_a_portion_that_waits_is_made_once_and_changed_when_it_is_made() -> None:
    asked: list[int] = []

    def make(at: int) -> Tensor:
        asked.append(at)
        return torch.full((1, 1), float(at - 1))

    batch = CutBatch(Waiting(make, 3), [1, 1, 1])
    torch.relu_(batch)
    assert asked == [0]
    assert batch.detach().whole().flatten().tolist() == [0, 0, 1]
    assert asked == [0, 1, 2]
