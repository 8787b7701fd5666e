"""Layers in portions compute what torch's do, and their sums do not depend on how portions are spread."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from softseg_dist import AdaptiveWing, NormReLU, Sigmoid, UNet
from softseg_dist.numerics.activations import Stateless
from softseg_dist.numerics.portions import Portions, in_portions, summable

LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (7, 3, 11, 9)),
    "strided, no bias": (nn.Conv2d(3, 4, 2, stride=2, bias=False), (6, 3, 10, 8)),
    "grouped": (nn.Conv2d(4, 4, 3, groups=2), (5, 4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(3, 2, 2, stride=2), (5, 3, 6, 5)),
    "volume": (nn.Conv3d(2, 3, 3, padding=1), (3, 2, 6, 5, 4)),
    "batch norm": (nn.BatchNorm2d(3), (7, 3, 6, 5)),
    "batch norm of volumes": (nn.BatchNorm3d(2), (3, 2, 4, 5, 3)),
    "batch norm without scale": (nn.BatchNorm2d(3, affine=False), (5, 3, 6, 5)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True), (7, 3, 6, 5)),
}


def grown(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Output and gradients of a weighted sum of it, as torch computes them."""
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def both(name: str) -> tuple[nn.Sequential, nn.Sequential, Portions, tuple[int, ...]]:
    """A layer as torch has it, the same one in portions of two items, the portions, and a shape for it."""
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    theirs, ours = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
    portions = Portions(2, lambda values: values)
    in_portions(ours, portions)
    assert type(ours[0]) is not type(layer)
    return theirs, ours, portions, shape


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_portions_is_the_layer(name: str) -> None:
    theirs, ours, portions, shape = both(name)
    x = 3 + 2 * torch.randn(shape)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, of_x, of_parameters = grown(theirs, one)
    y2, of_x2, _ = grown(ours, two)
    if parameters := list(ours.parameters()):
        portions.finish(parameters)
    torch.testing.assert_close(y2, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_x2, of_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([p.grad for p in ours.parameters()], of_parameters, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (layer, _) in LAYERS.items() if not isinstance(layer, Stateless)])
def test_a_layer_in_portions_in_bfloat16_differs_by_rounding_from_the_layer(name: str) -> None:
    theirs, ours, portions, shape = both(name)
    x = torch.randn(shape)
    y, _, of_parameters = grown(theirs, x.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        y2 = ours(x.bfloat16().requires_grad_())
    assert y2.dtype == torch.bfloat16
    (y2.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    if parameters := list(ours.parameters()):
        portions.finish(parameters)
    torch.testing.assert_close(y2.float(), y, rtol=0.02, atol=0.02)
    for ours_of, theirs_of in zip(parameters, of_parameters, strict=True):
        assert ours_of.grad is not None
        assert theirs_of is not None
        assert ours_of.grad.dtype == torch.float32
        assert (ours_of.grad - theirs_of).norm() <= 0.02 * theirs_of.norm() + 0.01 * y.numel() ** 0.5


@pytest.mark.parametrize("lower", [False, True], ids=["float32", "bfloat16"])
def test_gradients_add_up_to_the_same_digits_wherever_portions_are(lower: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(UNet(filters=(2, 4), norm="instance").build(1, 1, 2), Stateless(Sigmoid()))
    portions = Portions(3, lambda values: values)
    in_portions(network, portions)
    x, y = torch.randn(17, 1, 13, 11), torch.rand(17, 1, 13, 11)
    parameters = list(network.parameters())

    def gradients(*parts: slice) -> list[Tensor]:
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                prediction = network(x[part]).float()
            losses = [AdaptiveWing().per_sample(p, t) for p, t in portions.of(prediction, y[part])]
            torch.cat(losses).sum().backward()
        portions.finish(parameters)
        return [p.grad.clone() for p in parameters if p.grad is not None]

    together = gradients(slice(0, 17))
    for num_workers in (2, 3, 4, 6):
        parts = [portions.rows(17, rank, num_workers) for rank in reversed(range(num_workers))]
        apart = gradients(*[part for part in parts if part.stop > part.start])
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True)), num_workers


def test_evaluation_computes_what_torch_computes_to_the_last_digit() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(UNet(filters=(4, 8)).build(1, 1, 2), Stateless(NormReLU())).eval()
    ours = copy.deepcopy(theirs)
    in_portions(ours, Portions(2, lambda values: values))
    x = torch.randn(9, 1, 12, 12)
    assert torch.equal(ours.eval()(x), theirs(x))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 12))
def test_every_item_is_in_one_part_and_no_portion_is_cut(num_items: int, size: int, num_workers: int) -> None:
    parts = [Portions(size, lambda values: values).rows(num_items, rank, num_workers) for rank in range(num_workers)]
    assert [i for part in parts for i in range(num_items)[part]] == list(range(num_items))
    assert all(part.start % size == 0 for part in parts if part.stop > part.start)


@given(st.lists(st.floats(1e-2, 1e2), min_size=1, max_size=64))  # 33 bits each: 64 of them may differ by 2^14
def test_sums_of_summable_numbers_do_not_depend_on_the_order(values: list[float]) -> None:
    x = summable(torch.tensor(values, dtype=torch.float64))
    assert torch.equal(x, summable(x))
    assert torch.allclose(x, torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=0)
    assert sum(x.tolist()) == sum(x.flip(0).tolist()) == float(x.sort().values.sum())


def test_an_activation_over_the_whole_batch_is_not_cut() -> None:
    whole = nn.Sequential(Stateless(NormReLU(over="batch")), Stateless(NormReLU()))
    in_portions(whole, Portions(1, lambda values: values))
    assert isinstance(whole[0], Stateless)
    assert not isinstance(whole[1], Stateless)
