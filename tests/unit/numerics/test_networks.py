"""Every network: shapes, sizes, equal weights for equal seeds, and the last bias."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet
from monai.networks.nets.basic_unet import UpCat
from public_classes import assert_covered
from pydantic import ValidationError
from torch import nn

from softseg_dist import Recipe
from softseg_dist.errors import UserError
from softseg_dist.numerics.networks import Network, UNet, _UpsampleAndConcatenate
from softseg_dist.numerics.seeds import seeded
from softseg_dist.training.model import build_model

NETWORKS: list[Network] = [
    UNet(filters=(4, 8)),
    UNet(filters=(2, 5, 3), norm="instance", upsample="deconv"),
    UNet(filters=(4, 4, 8), norm="instance"),
    UNet(filters=(3, 6, 12), upsample="deconv", dropout=0.2),
    UNet(filters=(4, 8, 8), dropout=0.2, order="relu-norm-dropout", last_kernel=3),
]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=repr)


def test_the_suite_runs_over_every_public_network() -> None:
    assert_covered(Network, NETWORKS)


@every_network
@pytest.mark.parametrize("size", [(8, 8), (11, 13), (9, 8, 5)])
def test_logits_have_the_size_of_the_image(network: Network, size: tuple[int, ...]) -> None:
    module = network.build(2, 3, len(size))
    logits = module(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@every_network
def test_equal_seeds_give_equal_weights(network: Network) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(network.build(1, 1, 2).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@every_network
def test_last_bias_is_added_to_the_logits(network: Network) -> None:
    assert_last_bias_is_added(network, dim=2)


def assert_last_bias_is_added(network: Network, dim: int) -> None:
    module, image, shift = network.build(1, 2, dim).eval(), torch.randn(1, 1, *(32,) * dim), torch.tensor([1.0, -2.0])
    bias = network.last_bias(module, num_logits=2)
    assert bias is not None
    with torch.no_grad():
        before = module(image)
        bias.add_(shift)
        moved = (module(image) - before).movedim(1, -1)
    torch.testing.assert_close(moved, shift.expand_as(moved), rtol=0, atol=1e-5)


class Layers(Network):
    """A network of a study file that gives `build` alone: `kind` says which."""

    kind: str

    def build(self, in_channels: int, out_channels: int, dim: int) -> nn.Module:
        """A new one."""
        convolution = nn.Conv2d if dim == 2 else nn.Conv3d
        strides, filters = (1, 2, 2), (2, 4, 4)
        match self.kind:
            case "sequential":
                return nn.Sequential(convolution(in_channels, 2, 3, padding=1), nn.ReLU(), convolution(2, out_channels, 1))
            case "hidden layer as wide as the logits":
                return nn.Sequential(convolution(in_channels, 2, 1), convolution(2, out_channels, 1), nn.Identity())
            case "layer of other width registered last":
                return nn.ModuleDict({"last": convolution(8, out_channels, 1), "first": convolution(in_channels, 8, 1)})
            case "no bias":
                return nn.Sequential(convolution(in_channels, 2, 1), convolution(2, out_channels, 1, bias=False))
            case "no layer":
                return nn.Sequential(nn.AvgPool2d(3, 1, padding=1))
            case "BasicUNet":
                return BasicUNet(dim, in_channels, out_channels, features=(2, 2, 2, 2, 2, 2))
        assert self.kind == "DynUNet"
        return DynUNet(dim, in_channels, out_channels, (3,) * 3, strides, (2,) * 2, filters)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["sequential", "hidden layer as wide as the logits", "BasicUNet", "DynUNet"])
def test_a_network_that_gives_build_alone_has_its_last_bias_found(kind: str, dim: int) -> None:
    assert_last_bias_is_added(Layers(kind=kind), dim)


def test_the_last_bias_is_that_of_a_layer_as_wide_as_the_logits() -> None:
    network = Layers(kind="layer of other width registered last")
    module = network.build(1, 3, 2)
    assert network.last_bias(module, num_logits=3) is module.get_submodule("last").bias


@pytest.mark.parametrize("kind", ["no bias", "no layer"])
def test_a_network_whose_last_layer_has_no_bias_is_trained_as_it_is_built(kind: str) -> None:
    network = Layers(kind=kind)
    assert network.last_bias(network.build(2, 2, 2), num_logits=2) is None
    model = build_model(Recipe(network=network), 1, 1, (8, 8), seed=3, mean_label=torch.tensor([0.1]))
    with seeded(3):
        expected = network.build(1, 1, 2).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.network.state_dict().items())


@every_network
def test_inference_on_an_image_does_not_depend_on_its_batch(network: Network) -> None:
    module = network.build(1, 1, 2).eval()
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(module(images), torch.cat([module(image) for image in images.split(1)]))


@every_network
def test_network_comes_back_from_json(network: Network) -> None:
    assert Network.model_validate(network.model_dump(mode="json")) == network


@pytest.mark.parametrize(("norm", "upsample"), list(itertools.product(["batch", "instance"], ["interp", "deconv"])))
def test_depth_is_the_number_of_filters(norm: str, upsample: str) -> None:
    for depth in (2, 3, 5):
        network = UNet.model_validate({"filters": (2,) * depth, "norm": norm, "upsample": upsample})
        smallest = 2 ** (depth - 1)
        assert network.build(1, 1, 2)(torch.randn(2, 1, smallest, 2 * smallest)).shape[2:] == (smallest, 2 * smallest)


@pytest.mark.parametrize("size", [(7, 64), (8, 8)])
def test_image_too_small_for_the_depth_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=f"4 levels .* at least 8 voxels .* 16 along one, got {size[0]} x {size[1]}"):
        UNet().build(1, 1, 2)(torch.zeros(1, 1, *size))


@pytest.mark.parametrize("fields", [{"filters": (8,)}, {"filters": (1, 2)}, {"norm": "layer"}, {"dropout": 1.0}])
def test_impossible_networks_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        UNet.model_validate(fields)


@pytest.mark.engine
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (32, 40, 35)])
def test_upsampling_computes_what_monais_block_does_and_a_compiler_follows(size: tuple[int, ...]) -> None:
    block = UpCat(len(size), 4, 2, 2, "relu", ("batch", {"affine": True}), bias=False, upsample="nontrainable")
    ours = _UpsampleAndConcatenate(block)
    skip, coarse = torch.randn(2, 2, *size), torch.randn(2, 4, *(n // 2 for n in size))
    expected, found = block(coarse, skip), ours(coarse, skip)
    assert list(ours.state_dict()) == list(block.state_dict())
    assert torch.equal(found, expected)
    both = [torch.autograd.grad(output.sum(), list(block.parameters())) for output in (expected, found)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    compiled = torch.compile(ours, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(coarse, skip), expected)
