"""A convolution of a whole batch is taken for that of its portions only where no digit differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from softseg_dist import UNet
from softseg_dist.numerics import alike, portions
from softseg_dist.numerics.alike import Layer, Lie, convolved_alike, gradients_alike
from softseg_dist.numerics.convolutions import Options, convolve, gradients
from softseg_dist.numerics.portions import Portions, in_portions

PLAIN = Options((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
UP = Options((2, 2), (0, 0), (1, 1), True, (0, 0), 1)
VOLUMES = Options((1,) * 3, (1,) * 3, (1,) * 3, False, (0,) * 3, 1)
LAYERS = {
    "plain": (PLAIN, (8, 9, 3, 3), (8, 9, 12, 11)),
    "strided, one tap": (PLAIN._replace(padding=(0, 0), stride=(2, 2)), (16, 8, 1, 1), (8, 8, 12, 11)),
    "transposed": (UP, (8, 9, 2, 2), (8, 8, 6, 7)),
    "volumes": (VOLUMES, (8, 8, 3, 3, 3), (4, 8, 8, 6, 7)),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was found with a convolution that is patched is forgotten."""
    yield
    alike._convolved_alike.cache_clear()
    alike._gradients_alike.cache_clear()


def case(
    options: Options, of_weight: tuple[int, ...], of_x: tuple[int, ...], dtype: torch.dtype
) -> tuple[Layer, Tensor, Tensor]:
    """A layer in portions of two items, numbers for it, and a gradient of its result."""
    layout = torch.channels_last if len(of_x) == 4 else torch.channels_last_3d
    x = torch.randn(of_x).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(of_weight).to(dtype).contiguous(memory_format=layout)
    return Layer(Lie.of(weight), None, options, 2), x, torch.randn_like(convolve(x, weight, None, options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_another_order_of_sums_is_seen(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, grad = case(*LAYERS[name], dtype)
    of_c, of_o = (0, 1) if layer.options.transposed else (1, 0)

    def backwards(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        """Channels in the other order, of whole batches only."""
        if len(x) > 2:
            x, weight = x.flip(1), weight.flip(of_c)
        return convolve(x, weight, bias, options)

    def backwards_too(
        x: Tensor, grad: Tensor, weight: Tensor, options: Options, *, of_weight: bool
    ) -> tuple[Tensor, Tensor]:
        if len(x) > 2:
            grad, weight = grad.flip(1), weight.flip(of_o)
        return gradients(x, grad, weight, options, of_weight=of_weight)

    monkeypatch.setattr(alike, "convolve", backwards)
    monkeypatch.setattr(alike, "gradients", backwards_too)
    assert not convolved_alike(layer, x)
    assert not gradients_alike(layer, x, grad)


def test_the_same_order_is_seen_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, _ = case(*LAYERS["plain"], torch.float32)

    def one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor:
        return torch.cat([convolve(portion, weight, bias, options) for portion in x.split(2)])

    monkeypatch.setattr(alike, "convolve", one_by_one)
    assert convolved_alike(layer, x)
    elsewhere = torch.cat([torch.zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:].view(8, 12, 11, 9).permute(0, 3, 1, 2)
    assert Lie.of(elsewhere) == Lie.of(x)
    assert not convolved_alike(layer, elsewhere), "in memory it begins where a kernel may go another way"
    assert not convolved_alike(layer, x[:1].expand(8, -1, -1, -1)), "several numbers have one place"
    monkeypatch.setattr(alike, "MOST", x.numel() - 1)
    assert not convolved_alike(layer, x), "it is too large to try"


def test_of_few_terms_nothing_is_said() -> None:
    layer, x, grad = case(PLAIN, (3, 2, 3, 3), (8, 2, 12, 11), torch.float32)
    assert not convolved_alike(layer, x)
    assert not gradients_alike(layer, x, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 3])
def test_no_digit_depends_on_what_was_found(dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (24, 20, 16)[:dim]
    x = torch.randn(8, 1, *size)
    x[:, :, :9] = 0  # much of an image is

    def learned() -> list[Tensor]:
        torch.manual_seed(0)
        network = UNet(filters=(8, 16), norm="instance").build(1, 1, dim)
        network.to(memory_format=torch.channels_last if dim == 2 else torch.channels_last_3d)
        cut = Portions(2, lambda values: values)
        in_portions(network, cut)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = network(x)
        y.float().square().mean().backward()
        cut.finish(network.parameters())
        return [y, *(p.grad for p in network.parameters() if p.grad is not None)]

    as_found = learned()
    for name in ("convolved_alike", "gradients_alike"):
        monkeypatch.setattr(portions, name, lambda *_: False)
    assert all(torch.equal(a, b) for a, b in zip(as_found, learned(), strict=True))
