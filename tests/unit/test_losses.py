"""One suite over all losses, then the numbers and facts of each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softseg_dist.frozen import Frozen
from softseg_dist.numerics.losses import BCE, AdaptiveWing, Brier, Dice, DiceSemimetric, Loss

LOSSES: list[Loss] = [
    AdaptiveWing(),
    AdaptiveWing(omega=8, theta=0.3, epsilon=0.7),
    Dice(),
    Dice(smooth=0),
    DiceSemimetric(),
    DiceSemimetric(smooth=1),
    BCE(),
    Brier(),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_one_voxel(loss: Loss, prediction: float, target: float) -> float:
    voxel = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    return loss(prediction * voxel, target * voxel).item()


# ---------------------------------------------------------------- all losses


@every_loss
@pytest.mark.parametrize("p", [0.0, 1e-30, 0.3, 1.0])
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_are_finite_at_the_extremes(loss: Loss, p: float, y: float, dtype: torch.dtype) -> None:
    prediction = torch.full((2, 2, 3, 3), p, dtype=dtype, requires_grad=True)
    value = loss(prediction, torch.full_like(prediction, y))
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


@every_loss
def test_loss_is_zero_for_a_perfect_prediction_of_a_hard_target(loss: Loss) -> None:
    for target in (uniform(2, 2, 4, 4).round(), torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4)):
        assert loss(target, target) == 0


@pytest.mark.parametrize("loss", [x for x in LOSSES if not isinstance(x, (Dice, BCE))], ids=str)
def test_loss_is_zero_only_for_a_perfect_prediction_of_a_soft_target(loss: Loss) -> None:
    target = uniform(2, 2, 4, 4)
    assert loss(target, target) == 0
    off = target.clone()
    off[0, 0, 0, 0] += 1e-3
    assert loss(off, target) > 0


@every_loss
def test_loss_of_a_sample_does_not_depend_on_its_batch(loss: Loss) -> None:
    prediction, target = uniform(5, 2, 4, 4), uniform(5, 2, 4, 4, seed=1)
    whole = loss.per_sample(prediction, target)
    alone = torch.cat([loss.per_sample(p, y) for p, y in zip(prediction.split(2), target.split(2), strict=True)])
    assert whole.shape == (5,)
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss(prediction, target), alone.mean(), rtol=1e-12, atol=0)


@every_loss
def test_gradient_of_a_batch_is_the_mean_of_those_of_its_halves(loss: Loss) -> None:
    prediction, target = uniform(4, 2, 4, 4).requires_grad_(), uniform(4, 2, 4, 4, seed=1)
    (whole,) = torch.autograd.grad(loss(prediction, target), prediction)
    halves = [loss(prediction[part], target[part]) for part in (slice(0, 2), slice(2, 4))]
    (mean,) = torch.autograd.grad(sum(halves) / 2, prediction)
    torch.testing.assert_close(whole, mean, rtol=1e-12, atol=1e-15)


@every_loss
def test_loss_of_a_slice_is_that_of_a_volume_of_one_slice(loss: Loss) -> None:
    prediction, target = uniform(2, 2, 4, 5), uniform(2, 2, 4, 5, seed=1)
    assert loss(prediction, target) == loss(prediction[..., None], target[..., None])


@every_loss
def test_single_precision_is_enough(loss: Loss) -> None:
    prediction, target = uniform(3, 2, 16, 16), uniform(3, 2, 16, 16, seed=1)
    torch.testing.assert_close(
        loss(prediction.float(), target.float()).double(), loss(prediction, target), rtol=1e-5, atol=0
    )


@every_loss
def test_gradient_is_the_slope(loss: Loss) -> None:
    prediction = (uniform(2, 2, 2, 2) * 0.9 + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(loss, (prediction, uniform(2, 2, 2, 2, seed=1)))


@every_loss
def test_loss_comes_back_from_json(loss: Loss) -> None:
    assert Loss.model_validate(loss.model_dump(mode="json")) == loss
    assert isinstance(loss, Frozen)


@every_loss
def test_prediction_and_target_of_different_shapes_are_refused(loss: Loss) -> None:
    with pytest.raises(AssertionError, match=r"prediction \(1, 1, 4\)"):
        loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 1))


# ---------------------------------------------------------------- Adaptive Wing


@pytest.mark.parametrize(
    ("prediction", "target", "omega", "expected"),
    [
        (0, 1, 14, 10.259383),
        (0, 1, 8, 5.862504),
        (1, 0, 14, 8.495946),
        (1, 0, 8, 4.854826),
        (0.2, 0.5, 14, 1.903953),
        (0.2, 0.5, 8, 1.087973),
        (0.25, 0.75, 14, 4.633319),
        (0.25, 0.75, 8, 2.647611),
        (0.49, 0, 14, 2.824809),
        (0.51, 0, 14, 3.046449),
    ],
)
def test_adaptive_wing_has_the_published_values(
    prediction: float, target: float, omega: float, expected: float
) -> None:
    assert of_one_voxel(AdaptiveWing(omega=omega), prediction, target) == pytest.approx(expected, abs=5e-7)


@given(p=st.floats(0, 1), y=st.floats(0, 1), theta=st.floats(0.05, 0.95), epsilon=st.floats(0.1, 3))
@settings(max_examples=50, deadline=None)
def test_adaptive_wing_is_the_two_branch_formula(p: float, y: float, theta: float, epsilon: float) -> None:
    omega, alpha, d = 14.0, 2.1, abs(p - y)
    ratio = theta / epsilon
    A = omega / (1 + ratio ** (alpha - y)) * (alpha - y) * ratio ** (alpha - y - 1) / epsilon
    C = theta * A - omega * math.log(1 + ratio ** (alpha - y))
    expected = omega * math.log1p((d / epsilon) ** (alpha - y)) if d < theta else A * d - C
    loss = AdaptiveWing(omega=omega, theta=theta, alpha=alpha, epsilon=epsilon)
    assert of_one_voxel(loss, p, y) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_adaptive_wing_is_continuous_in_value_and_slope_at_theta(target: float) -> None:
    sign = -1 if target > 0.5 else 1
    beside = [torch.tensor([[[target + sign * (0.5 + e)]]], dtype=torch.float64) for e in (-1e-9, 1e-9)]
    pairs = []
    for prediction in beside:
        prediction.requires_grad_()
        value = AdaptiveWing()(prediction, torch.full_like(prediction, target))
        pairs.append((value.item(), torch.autograd.grad(value, prediction)[0].item()))
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-6)


def test_adaptive_wing_refuses_an_exponent_without_a_gradient_at_zero() -> None:
    with pytest.raises(ValueError, match="greater than 2"):
        AdaptiveWing(alpha=1.9)


# ---------------------------------------------------------------- Dice and its soft form


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Dice(smooth=0), 1 - 2 * (0.2 * 0.3 + 0.5 * 0.5 + 0.9 * 1.0) / (1.6 + 1.9)),
        (Dice(smooth=0), 0.308571),
        (Dice(smooth=1), 1 - (2 * 1.21 + 1) / (3.5 + 1)),
        (DiceSemimetric(), (0.1 + 0.1 + 0.1) / (1.6 + 1.9)),
        (DiceSemimetric(), 0.085714),
        (DiceSemimetric(smooth=1), 1 - (3.5 - 0.3 + 1) / (3.5 + 1)),
    ],
    ids=str,
)
def test_dice_losses_have_the_values_of_the_worked_example(loss: Loss, expected: float) -> None:
    prediction = torch.tensor([[[0.2, 0.5, 0.9, 0.0]]], dtype=torch.float64)
    target = torch.tensor([[[0.3, 0.5, 1.0, 0.1]]], dtype=torch.float64)
    assert loss(prediction, target).item() == pytest.approx(expected, abs=5e-7)


def test_dice_is_misspecified_on_soft_targets_and_its_semimetric_is_not() -> None:
    half = torch.full((1, 1, 100, 100), 0.5)
    assert Dice(smooth=0)(half, half).item() == pytest.approx(1 - 2 * 0.25 / 1.0)
    assert Dice(smooth=0)(torch.ones_like(half), half).item() == pytest.approx(1 - 2 * 0.5 / 1.5)
    assert DiceSemimetric()(half, half) == 0 < DiceSemimetric()(torch.ones_like(half), half)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_semimetric_equals_dice_for_hard_targets(smooth: float) -> None:
    prediction, target = uniform(3, 2, 5, 5), uniform(3, 2, 5, 5, seed=1).round()
    torch.testing.assert_close(
        DiceSemimetric(smooth=smooth)(prediction, target), Dice(smooth=smooth)(prediction, target), rtol=1e-12, atol=0
    )


def test_dice_is_averaged_over_classes_whatever_their_size() -> None:
    target = torch.zeros(1, 2, 10, 10)
    target[0, 0], target[0, 1, 0, 0] = 1, 1
    prediction = target.clone()
    prediction[0, 1] = 0
    assert Dice(smooth=0)(prediction, target).item() == pytest.approx((0 + 1) / 2)


@pytest.mark.parametrize(("loss", "teaches"), [(DiceSemimetric(), False), (DiceSemimetric(smooth=1), True)], ids=str)
def test_an_empty_target_teaches_the_semimetric_through_smooth_alone(loss: Loss, teaches: bool) -> None:
    prediction = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(prediction, torch.zeros_like(prediction)), prediction)
    assert (grad.abs().max().item() > 1e-6) is teaches


# ---------------------------------------------------------------- voxel-wise losses, and what each elicits


def test_bce_and_brier_have_values_of_their_formulas() -> None:
    assert of_one_voxel(BCE(), 0.2, 0.7) == pytest.approx(-(0.7 * math.log(0.2) + 0.3 * math.log(0.8)))
    assert of_one_voxel(BCE(), 0, 1) == pytest.approx(-math.log(1e-7))
    assert of_one_voxel(Brier(), 0.2, 0.7) == pytest.approx(0.5**2)


def elicited(loss: Loss, share: float) -> float:
    """The prediction that minimises the expected loss of a voxel that the share `share` of raters calls foreground."""
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64).reshape(-1, 1, 1)
    risk = share * loss.per_sample(grid, torch.ones_like(grid)) + (1 - share) * loss.per_sample(
        grid, torch.zeros_like(grid)
    )
    return grid.flatten()[risk.argmin()].item()


@pytest.mark.parametrize("loss", [BCE(), Brier()], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7])
def test_bce_and_brier_elicit_the_mean_of_random_raters(loss: Loss, share: float) -> None:
    assert elicited(loss, share) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("share", "minimiser"), [(0.1, 0.050), (0.25, 0.138), (0.4, 0.269), (0.5, 0.423), (0.509, 0.442), (0.5095, 0.967)]
)
def test_adaptive_wing_elicits_less_than_the_mean_and_jumps_to_nearly_one(share: float, minimiser: float) -> None:
    assert elicited(AdaptiveWing(), share) == pytest.approx(minimiser, abs=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.9])
def test_semimetric_of_random_hard_raters_elicits_a_binary_map(share: float) -> None:
    disputed = torch.linspace(0, 1, 1001, dtype=torch.float64)
    prediction = torch.stack([torch.ones_like(disputed), disputed], dim=1)[:, None]
    wide, narrow = torch.ones_like(prediction), torch.stack([torch.ones(1001), torch.zeros(1001)], dim=1)[:, None]
    loss = DiceSemimetric()
    risk = share * loss.per_sample(prediction, wide) + (1 - share) * loss.per_sample(prediction, narrow)
    assert disputed[risk.argmin()].item() in (0, 1)
