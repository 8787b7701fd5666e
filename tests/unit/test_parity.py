"""Forward values, losses and gradients of `softseg_parity` against a reference in plain torch that is written from the facts alone.

The facts: blocks conv 3x3 - ReLU - batch norm - dropout of whole channels; last conv 3x3; conventional: sigmoid and one Dice ratio
over batch and classes with s = 1; SoftSeg: NormReLU by the maximum of the batch, divided by the sum over several classes, and
Adaptive Wing summed. Where they say nothing the reference does what the docstring says: two blocks per level, max pooling, a 1x1
convolution before bilinear up-sampling with aligned corners, the skipped map first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from softseg_dist import UNet, softseg_parity
from softseg_dist.training.model import build_model

DEPTH = 3


def parameters(network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of every layer of the network, in the order in which its modules were made."""
    state = dict(network.named_parameters())
    return ((state[name], state[name.replace("weight", "bias")]) for name in state if name.endswith("weight"))


def reference_unet(image: Tensor, layers: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits [B K X Y]: the network in training, without dropout, by functions of torch alone."""

    def block(x: Tensor) -> Tensor:
        for _ in range(2):
            x = functional.relu(functional.conv2d(x, *next(layers), padding=1))
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            scale, offset = (p[None, :, None, None] for p in next(layers))
            x = (x - mean) / (variance + 1e-5).sqrt() * scale + offset
        return x

    maps = [block(image)]
    for _ in range(DEPTH - 1):
        maps.append(block(functional.max_pool2d(maps[-1], 2)))
    x = maps.pop()
    for skipped in reversed(maps):
        x = functional.interpolate(functional.conv2d(x, *next(layers)), scale_factor=2, mode="bilinear", align_corners=True)
        x = block(torch.cat([skipped, x], dim=1))
    return functional.conv2d(x, *next(layers), padding=1)


def reference_dice(p: Tensor, y: Tensor) -> Tensor:
    p, y = p.reshape(-1), y.reshape(-1)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def reference_normrelu(x: Tensor) -> Tensor:
    r = torch.where(x > 0, x, torch.zeros_like(x))
    p = r / r.max()
    if p.shape[1] > 1:
        total = p.sum(1, keepdim=True)
        p = torch.where(total > 0, p / total.where(total > 0, torch.ones_like(total)), torch.zeros_like(p))
    return p


def reference_wing(p: Tensor, y: Tensor) -> Tensor:
    omega, theta, alpha = 14.0, 0.5, 2.1
    d = (y - p).abs()
    A = omega / (1 + theta ** (alpha - y)) * (alpha - y) * theta ** (alpha - y - 1)
    C = theta * A - omega * torch.log(1 + theta ** (alpha - y))
    inside = d < theta
    near = omega * torch.log(1 + torch.where(inside, d, torch.full_like(d, 0.25)) ** (alpha - y))
    return torch.where(inside, near, A * d - C).sum()


Function = Callable[[Tensor], Tensor]
REFERENCE: dict[str, tuple[Function, Callable[[Tensor, Tensor], Tensor]]] = {
    "conventional": (lambda x: 1 / (1 + torch.exp(-x)), reference_dice),
    "softseg": (reference_normrelu, reference_wing),
}
every_recipe = pytest.mark.parametrize("name", REFERENCE)
every_number_of_classes = pytest.mark.parametrize("classes", [1, 3])


def fixed_tensors(classes: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    """An image [B 1 32 24] and a soft target [B K 32 24]."""
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(batch, 1, 32, 24, generator=generator, dtype=torch.float64)
    target = functional.avg_pool2d(torch.rand(batch, classes, 32, 24, generator=generator, dtype=torch.float64).round(), 3, 1, 1)
    return image, target / max(1, classes - 1)


@every_recipe
@every_number_of_classes
def test_prediction_loss_and_gradients_are_those_of_the_reference(name: str, classes: int) -> None:
    torch.manual_seed(1)
    recipe = softseg_parity()[name]
    network = recipe.network.replace(dropout=0.0, filters=(6, 10, 14)).build(1, classes, 2).double().train()  # type: ignore[call-arg]
    image, target = fixed_tensors(classes)
    if recipe.label == "hard":
        target = (target >= 0.5).double()
    prediction = recipe.activation(network(image))
    loss = recipe.loss(prediction, target)
    weights = list(network.parameters())
    gradients = torch.autograd.grad(loss, weights)

    activation, loss_of = REFERENCE[name]
    expected = activation(reference_unet(image, parameters(network)))
    expected_loss = loss_of(expected, target)
    torch.testing.assert_close(prediction, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for gradient, right in zip(gradients, torch.autograd.grad(expected_loss, weights), strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-9 * largest)
    assert largest > 0
    assert 0.02 < expected.mean().item() < 0.98


@every_recipe
@every_number_of_classes
def test_loss_and_gradient_on_given_logits_are_those_of_the_reference(name: str, classes: int) -> None:
    recipe = softseg_parity()[name]
    logits = torch.randn(4, classes, 32, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    _, target = fixed_tensors(classes)
    activation, loss_of = REFERENCE[name]
    found, right = recipe.loss(recipe.activation(logits), target), loss_of(activation(logits), target)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, right)), rtol=1e-6, atol=1e-9)


@every_recipe
def test_each_block_is_conv_relu_norm_dropout_of_whole_channels_and_the_last_conv_is_3x3(name: str) -> None:
    recipe = softseg_parity()[name]
    network = recipe.network.build(1, 1, 2)
    kinds = [type(layer) for layer in network.modules() if not list(layer.children())]
    of_block = [nn.Conv2d, nn.ReLU, nn.BatchNorm2d, nn.Dropout2d]
    assert kinds[:8] == of_block * 2
    assert kinds.count(nn.Dropout2d) == 2 * (2 * DEPTH - 1)
    last = list(network.modules())[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.kernel_size == (3, 3)
    assert all(layer.bias is not None for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_dropout_takes_whole_channels_of_each_item() -> None:
    network = UNet(filters=(16, 16), dropout=0.5, order="relu-norm-dropout").build(1, 1, 2).train()
    seen: list[Tensor] = []
    drop = next(layer for layer in network.modules() if isinstance(layer, nn.Dropout2d))
    drop.register_forward_hook(lambda _, args, output: seen.append((output == 0).flatten(2).float().mean(2)))
    network(torch.randn(8, 1, 16, 16))
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
    assert 0.2 < seen[0].float().mean() < 0.8  # the share of channels that are dropped; of each channel all or nothing


def test_the_recipes_differ_in_label_activation_and_loss_alone() -> None:
    conventional, softseg = softseg_parity(fusion="mean").values()
    assert (conventional.label, softseg.label) == ("hard", "soft")
    assert conventional.replace(label="soft", activation=softseg.activation, loss=softseg.loss) == softseg
    assert softseg.fusion == "mean"
    assert {recipe.fusion for recipe in softseg_parity().values()} == {"random_rater"}
    optim = softseg.optim
    assert (optim.lr, optim.schedule, optim.epochs, optim.patience) == (1e-3, "cosine", 200, 50)


@every_recipe
def test_a_fit_of_it_starts_alive(name: str) -> None:
    recipe = softseg_parity(fusion="mean")[name]
    model = build_model(recipe, 1, 1, (8, 8), seed=0, mean_label=torch.tensor([0.1]))
    prediction = model.eval()(torch.randn(2, 1, 16, 16))
    assert prediction.isfinite().all()
    assert prediction.max() > 0
    assert recipe.loss(prediction, torch.zeros_like(prediction)).isfinite()
