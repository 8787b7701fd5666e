"""Dropout by counting: at the rate it says, independent between values, layers and seeds, and the same wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from softseg_dist.numerics.dropout import CountedDropout, _mixed, count_dropout
from softseg_dist.numerics.sampling import active_dropout


def dropped(layer: CountedDropout, *shape: int, seed: int = 0) -> np.ndarray:
    """Which ones of so many are dropped, as numbers 0 and 1."""
    layer.seed.fill_(seed)
    values: np.ndarray = (layer(torch.ones(shape)) == 0).double().numpy()
    return values


def layer_of(dropout: nn.Module, number: int = 0) -> CountedDropout:
    return CountedDropout(dropout, number, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_it_drops_the_share_it_says_and_keeps_the_mean(p: float) -> None:
    layer, shape = layer_of(nn.Dropout(p)), (4, 16, 64, 64)
    error = 4 * (p * (1 - p) / np.prod(shape)) ** 0.5
    for seed in range(5):
        assert dropped(layer, *shape, seed=seed).mean() == pytest.approx(p, abs=error)
    assert layer(torch.ones(shape)).mean().item() == pytest.approx(1, abs=error / (1 - p))


def test_values_are_dropped_independently_of_those_beside_them_above_them_and_in_other_channels_and_items() -> None:
    drop = dropped(layer_of(nn.Dropout(0.5)), 20, 20, 32, 32) - 0.5
    for axis in range(4):
        for step in (1, 2, 4, 8):
            moved = np.roll(drop, step, axis)
            assert abs((drop * moved).mean() / 0.25) < 4 / drop.size**0.5, (axis, step)


def test_whether_four_corners_of_a_rectangle_drop_is_independent_too() -> None:
    """Each number comes from one of a channel and one of a place, which must not show."""
    drop = 2 * dropped(layer_of(nn.Dropout(0.5)), 8, 32, 64, 64).reshape(256, 4096) - 1
    corners = drop[:-1, :-1] * drop[:-1, 1:] * drop[1:, :-1] * drop[1:, 1:]
    assert abs(corners.mean()) < 5 / corners.size**0.5


def test_layers_and_seeds_drop_independently() -> None:
    shape = 4, 16, 32, 32
    one = dropped(layer_of(nn.Dropout(0.5)), *shape) - 0.5
    others = [dropped(layer_of(nn.Dropout(0.5), number=n), *shape) for n in (1, 2, 3)]
    others += [dropped(layer_of(nn.Dropout(0.5)), *shape, seed=seed) for seed in (1, 2, 2**30)]
    for other in others:
        assert abs((one * (other - 0.5)).mean() / 0.25) < 4 / one.size**0.5


def test_the_same_seed_drops_the_same_in_any_layout_and_precision() -> None:
    layer, x = layer_of(nn.Dropout(0.3)), torch.rand(2, 3, 8, 8) + 1
    laid_out = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), layer(laid_out))
    assert torch.equal(layer(x) == 0, layer(x.bfloat16()) == 0)


@pytest.mark.parametrize("dropout", [nn.Dropout2d(0.5), nn.Dropout3d(0.5)])
def test_whole_channels_go_where_the_replaced_layer_dropped_whole_channels(dropout: nn.Module) -> None:
    size = (4, 4) if isinstance(dropout, nn.Dropout2d) else (4, 4, 4)
    drop = dropped(layer_of(dropout), 16, 64, *size).reshape(16 * 64, -1)
    assert set(drop.mean(1)) == {0, 1}
    assert drop.mean() == pytest.approx(0.5, abs=0.07)


def test_the_hash_is_the_published_one_of_unsigned_numbers() -> None:
    x = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint32)
    h = x ^ (x >> np.uint32(16))
    h *= np.uint32(0x7FEB352D)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    assert np.array_equal(_mixed(torch.from_numpy(x.view(np.int32))).numpy().view(np.uint32), h)


def test_it_takes_the_place_of_dropout_layers_without_a_change_of_state_and_leaves_inference_to_them() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.5), nn.Sequential(nn.Dropout2d(0.2), nn.Dropout(0.0)))
    names, seed = list(model.state_dict()), torch.zeros(1, dtype=torch.int32)
    assert count_dropout(model, seed) == 2
    assert list(model.state_dict()) == names
    assert len(active_dropout(model)) == 2  # Monte Carlo dropout finds the layers it makes active
    x = torch.rand(1, 1, 8, 8)
    assert torch.equal(model.eval()(x), model[0](x))
    model[1].dropout.train()
    assert not torch.equal(model(x), model(x))


def test_the_gradient_is_that_of_what_stays() -> None:
    layer, x = layer_of(nn.Dropout(0.25)), torch.ones(1, 2, 4, 4, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert torch.equal(x.grad, output.detach())
