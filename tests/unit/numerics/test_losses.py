"""One suite over all losses, then the numbers and facts of each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from public_classes import assert_covered
from torch import Tensor

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.numerics.losses import (
    BCE,
    L1,
    AdaptiveWing,
    BatchDice,
    Brier,
    Dice,
    DiceSemimetric,
    Focal,
    FocalTversky,
    GeneralizedDice,
    Huber,
    JaccardMetric,
    Loss,
    Sum,
    Tversky,
    TverskySemimetric,
)

EXACT: list[Loss] = [  # 0 if and only if p = y, soft or hard
    AdaptiveWing(),
    AdaptiveWing(omega=8, theta=0.3, epsilon=0.7),
    AdaptiveWing(reduction="sum"),
    Brier(),
    L1(),
    Huber(),
    Huber(delta=0.05),
    Focal(),
    Focal(gamma=1),
    DiceSemimetric(),
    DiceSemimetric(smooth=1),
    JaccardMetric(),
    JaccardMetric(smooth=1),
    TverskySemimetric(),
    TverskySemimetric(alpha=2, beta=0.1, smooth=1),
    Sum(terms=(DiceSemimetric(), Brier()), weights=(1, 10)),
    Sum(terms=(AdaptiveWing(reduction="sum"), Brier()), weights=(1, 10)),
]
OF_PRODUCTS: list[Loss] = [  # mis-specified on soft targets
    Dice(),
    Dice(smooth=0),
    Tversky(),
    Tversky(alpha=2, beta=0.1, smooth=0),
    FocalTversky(),
    FocalTversky(gamma=0.5, smooth=0),
    GeneralizedDice(),
    GeneralizedDice(smooth=0),
    BatchDice(),
    BatchDice(smooth=0),
    BatchDice(over="batch and classes"),
    Sum(terms=(Dice(), BatchDice()), weights=(0.5, 2)),
    Sum(terms=(BatchDice(over="batch and classes"),), weights=(1,)),
]
MIXED: list[Loss] = [BCE(), Sum(terms=(Sum(terms=(BatchDice(),), weights=(1,)), BCE()), weights=(3, 0.1))]
LOSSES = EXACT + OF_PRODUCTS + MIXED
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_one_voxel(loss: Loss, prediction: float, target: float) -> float:
    voxel = torch.full((1, 1, 1, 1), 1.0, dtype=torch.float64)
    return loss(prediction * voxel, target * voxel).item()


# ---------------------------------------------------------------- all losses


def test_the_suite_runs_over_every_public_loss() -> None:
    assert_covered(Loss, LOSSES)


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
@pytest.mark.parametrize("prediction", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_finite_whatever_is_empty(loss: Loss, prediction: float) -> None:
    target = torch.zeros(3, 3, 4, 4)  # an empty sample, one of a full, an empty and a nearly empty class, a full one
    target[1, 0], target[1, 2, 0, 0], target[2] = 1, 1e-6, 1
    p = torch.full_like(target, prediction, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(p, target), p)
    assert loss(p, target).isfinite()
    assert grad.isfinite().all()


@every_loss
def test_loss_is_zero_for_a_perfect_prediction_of_a_hard_target(loss: Loss) -> None:
    for target in (uniform(2, 2, 4, 4).round(), torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4)):
        assert loss(target, target) == 0


@pytest.mark.parametrize("loss", EXACT, ids=str)
def test_loss_is_zero_only_for_a_perfect_prediction_of_a_soft_target(loss: Loss) -> None:
    target = uniform(2, 2, 4, 4)
    assert loss(target, target) == 0
    for change in (1e-3, -1e-3):
        off = target.clone()
        off[0, 0, 0, 0] += change
        assert loss(off, target) > 0


@pytest.mark.parametrize("loss", [*EXACT, BCE()], ids=str)
@pytest.mark.parametrize("softness", [0.0, 0.3, 1.0])
def test_no_prediction_costs_less_than_the_target_where_a_loss_is_right_for_soft_ones(loss: Loss, softness: float) -> None:
    for seed in range(5):
        target = torch.lerp(uniform(2, 2, 3, 3, seed=seed).round(), uniform(2, 2, 3, 3, seed=seed), softness)
        predictions = [uniform(2, 2, 3, 3, seed=seed + 9), target.round(), 1 - target, 0.9 * target, target.sqrt()]
        assert all(loss(target, target) <= loss(prediction, target) for prediction in predictions)


@pytest.mark.parametrize("loss", OF_PRODUCTS, ids=str)
def test_a_loss_of_products_has_its_minimum_on_a_soft_target_at_a_binary_map(loss: Loss) -> None:
    target = 0.2 + 0.6 * uniform(1, 1, 8)
    binary = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 8)[:, None]
    best = min(loss(p[None], target).item() for p in binary)
    soft = [loss(p[None, None], target).item() for p in uniform(200, 8, seed=1)]
    assert best < loss(target, target).item()
    assert best < min(soft)


@every_loss
def test_what_a_sample_adds_to_a_loss_does_not_depend_on_its_batch(loss: Loss) -> None:
    prediction, target = uniform(5, 2, 4, 4), uniform(5, 2, 4, 4, seed=1)
    pairs = list(zip(prediction.split(2), target.split(2), strict=True))
    for values in (loss.per_sample, loss.averaged):
        whole, alone = values(prediction, target), torch.cat([values(p, y) for p, y in pairs])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0)
    assert loss.per_sample(prediction, target).shape == (5,)
    assert loss.averaged(prediction, target).shape == (5, loss.num_averaged(2))
    for p, y, one in zip(prediction.split(1), target.split(1), loss.per_sample(prediction, target), strict=True):
        torch.testing.assert_close(loss(p, y), one, rtol=1e-12, atol=0)


@every_loss
def test_loss_and_gradient_of_a_batch_follow_from_the_averages_of_its_parts(loss: Loss) -> None:
    prediction, target = uniform(5, 2, 4, 4).requires_grad_(), uniform(5, 2, 4, 4, seed=1)
    whole = loss(prediction, target)
    shares = [loss.averaged(p, y) / 5 for p, y in zip(prediction.split(2), target.split(2), strict=True)]
    means = sum(share.detach().sum(0) for share in shares).requires_grad_()
    in_parts = loss.of_averages(means, 2, 5)
    torch.testing.assert_close(in_parts, whole, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(in_parts, means)
    (of_parts,) = torch.autograd.grad(sum((share * slope).sum() for share in shares), prediction)
    torch.testing.assert_close(of_parts, torch.autograd.grad(whole, prediction)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.num_averaged(2) == 1 and "'sum'" not in repr(x)], ids=str)
def test_loss_of_a_batch_is_the_mean_over_its_samples(loss: Loss) -> None:
    prediction, target = uniform(5, 2, 4, 4), uniform(5, 2, 4, 4, seed=1)
    torch.testing.assert_close(loss(prediction, target), loss.per_sample(prediction, target).mean(), rtol=1e-12, atol=0)


@every_loss
def test_loss_of_a_slice_is_that_of_a_volume_of_one_slice(loss: Loss) -> None:
    prediction, target = uniform(2, 2, 4, 5), uniform(2, 2, 4, 5, seed=1)
    assert loss(prediction, target) == loss(prediction[..., None], target[..., None])


@every_loss
def test_single_precision_is_enough(loss: Loss) -> None:
    prediction, target = uniform(3, 2, 16, 16), uniform(3, 2, 16, 16, seed=1)
    torch.testing.assert_close(loss(prediction.float(), target.float()).double(), loss(prediction, target), rtol=1e-5, atol=0)


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
    message = r"target's shape \(1, 1, 1\), got \(1, 1, 4\)"
    for compute in (loss, loss.per_sample, loss.averaged):
        with pytest.raises(UserError, match=message):
            compute(torch.zeros(1, 1, 4), torch.zeros(1, 1, 1))


class AveragesTwo(Loss):
    """A loss of a study file whose own methods would broadcast."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.averaged(prediction, target).sum(dim=1)

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = (prediction - target).flatten(1)
        return torch.stack([difference.abs().mean(1), difference.square().mean(1)], dim=1)

    def num_averaged(self, classes: int) -> int:
        return 2

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        return averages.sum(dim=-1)


class AveragesTwice(AveragesTwo):
    """A subclass of it, which calls the method that it replaces."""

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 2 * super().averaged(prediction, target)


@pytest.mark.parametrize("loss", [AveragesTwo(), AveragesTwice()], ids=str)
def test_a_loss_of_a_study_file_cannot_skip_the_check_of_shapes(loss: Loss) -> None:
    prediction, target = uniform(2, 3, 1, 4, 4), uniform(2, 1, 4, 4)  # as deep supervision gives: it would broadcast
    for compute in (loss, loss.per_sample, loss.averaged, Sum(terms=(loss,), weights=(1,)).averaged):
        with pytest.raises(UserError, match=r"shape \(2, 1, 4, 4\), got \(2, 3, 1, 4, 4\).*deep supervision"):
            compute(prediction, target)
    assert loss(target, target) == 0


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
def test_adaptive_wing_has_the_published_values(prediction: float, target: float, omega: float, expected: float) -> None:
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


# ---------------------------------------------------------------- voxel-wise losses, and what each elicits


def test_bce_and_brier_have_values_of_their_formulas() -> None:
    assert of_one_voxel(BCE(), 0.2, 0.7) == pytest.approx(-(0.7 * math.log(0.2) + 0.3 * math.log(0.8)))
    assert of_one_voxel(BCE(), 0, 1) == pytest.approx(-math.log(1e-7))
    assert of_one_voxel(Brier(), 0.2, 0.7) == pytest.approx(0.5**2)


def test_l1_huber_and_focal_have_values_of_their_formulas() -> None:
    assert of_one_voxel(L1(), 0.2, 0.7) == pytest.approx(0.5)
    assert of_one_voxel(Huber(delta=0.6), 0.2, 0.7) == pytest.approx(0.5**2 / 2)
    assert of_one_voxel(Huber(delta=0.1), 0.2, 0.7) == pytest.approx(0.1 * (0.5 - 0.1 / 2))
    assert of_one_voxel(Huber(delta=1), 0.1, 1) == pytest.approx(of_one_voxel(Brier(), 0.1, 1) / 2)
    assert of_one_voxel(Focal(gamma=3), 0.2, 1) == pytest.approx(-((1 - 0.2) ** 3) * math.log(0.2))
    assert of_one_voxel(Focal(gamma=3), 0.2, 0) == pytest.approx(-(0.2**3) * math.log(1 - 0.2))
    assert of_one_voxel(Focal(), 0.2, 0.7) == pytest.approx(0.5**2 * of_one_voxel(BCE(), 0.2, 0.7))


def elicited(loss: Loss, share: float) -> float:
    """The prediction that minimises the expected loss of a voxel that the share `share` of raters calls foreground."""
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64).reshape(-1, 1, 1)
    risk = share * loss.per_sample(grid, torch.ones_like(grid)) + (1 - share) * loss.per_sample(grid, torch.zeros_like(grid))
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


@pytest.mark.parametrize(
    ("loss", "share", "minimiser"),
    [
        (L1(), 0.49, 0),
        (L1(), 0.51, 1),
        (Huber(), 0.25, 0.5 * 0.25 / 0.75),
        (Huber(delta=0.1), 0.4, 0.1 * 0.4 / 0.6),
        (Huber(delta=0.1), 0.6, 1 - 0.1 * 0.4 / 0.6),
        (Huber(delta=1), 0.3, 0.3),
        (Focal(), 0.25, 0.399),
        (Focal(), 0.5, 0.5),
    ],
    ids=str,
)
def test_other_losses_elicit_what_they_say(loss: Loss, share: float, minimiser: float) -> None:
    assert elicited(loss, share) == pytest.approx(minimiser, abs=5e-4)
