"""Batch norm over workers is torch's batch norm; tests/engine/test_data_parallel.py has it on several workers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

from softseg_dist.numerics.sync_batch_norm import GlooSyncBatchNorm

LAYERS = {
    "slices": (nn.BatchNorm2d(3), (7, 3, 6, 5)),
    "volumes": (nn.BatchNorm3d(2), (3, 2, 4, 5, 3)),
    "without scale": (nn.BatchNorm2d(3, affine=False), (5, 3, 6, 5)),
    "mean of all batches": (nn.BatchNorm2d(3, momentum=None), (5, 3, 6, 5)),
    "without memory": (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 6, 5)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(scope="module")
def group() -> Iterator[ProcessGroup]:
    """This process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert distributed.group.WORLD is not None
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def learned(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Output, and gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), x.grad, [parameter.grad for parameter in layer.parameters()]


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_torchs_batch_norm_in_training_and_evaluation(name: str, dtype: torch.dtype, group: ProcessGroup) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    theirs, ours = copy.deepcopy(layer).to(dtype), GlooSyncBatchNorm(copy.deepcopy(layer).to(dtype), group)
    near = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for _ in range(2):
        x = 3 + 2 * torch.randn(shape, dtype=dtype)
        for a, b in zip(learned(ours, x), learned(theirs, x), strict=True):
            torch.testing.assert_close(a, b, **near)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), **near)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **near)


def test_it_takes_bfloat16_and_keeps_its_statistics_in_float32(group: ProcessGroup) -> None:
    torch.manual_seed(0)
    layer, x = nn.BatchNorm2d(3), torch.randn(7, 3, 6, 5)
    ours = GlooSyncBatchNorm(copy.deepcopy(layer), group)
    y, of_x, of_parameters = learned(ours, x.bfloat16())
    exact, of_exact_x, of_exact = learned(layer, x)
    assert y.dtype == torch.bfloat16
    assert of_x is not None
    assert ours.running_mean is not None
    assert ours.running_mean.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(of_x.float(), of_exact_x, rtol=0.05, atol=0.05)
    for a, b in zip(of_parameters, of_exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.5)


def test_an_empty_batch_takes_part(group: ProcessGroup) -> None:
    ours = GlooSyncBatchNorm(nn.BatchNorm2d(3), group)
    y, of_x, of_parameters = learned(ours, torch.empty(0, 3, 5, 5))
    assert y.shape == (0, 3, 5, 5)
    assert of_x is not None
    assert of_x.shape == (0, 3, 5, 5)
    assert all(gradient is not None and not gradient.any() for gradient in of_parameters)
