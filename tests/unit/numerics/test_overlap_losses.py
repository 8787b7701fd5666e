"""The Dice family: its numbers, how its members are related, what they say about soft, absent and tiny objects."""

from __future__ import annotations

import pytest
import torch
from test_losses import uniform
from torch import Tensor

from softseg_dist import (
    BCE,
    BatchDice,
    Dice,
    DiceSemimetric,
    FocalTversky,
    GeneralizedDice,
    JaccardMetric,
    Loss,
    Sum,
    Tversky,
    TverskySemimetric,
)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Dice(smooth=0), 1 - 2 * (0.2 * 0.3 + 0.5 * 0.5 + 0.9 * 1.0) / (1.6 + 1.9)),
        (Dice(smooth=0), 0.308571),
        (Dice(smooth=1), 1 - (2 * 1.21 + 1) / (3.5 + 1)),
        (DiceSemimetric(), (0.1 + 0.1 + 0.1) / (1.6 + 1.9)),
        (DiceSemimetric(), 0.085714),
        (DiceSemimetric(smooth=1), 1 - (3.5 - 0.3 + 1) / (3.5 + 1)),
        (JaccardMetric(), 1 - (3.5 - 0.3) / (3.5 + 0.3)),
        (JaccardMetric(), 0.157895),
        (JaccardMetric(smooth=1), 1 - (3.5 - 0.3 + 1) / (3.5 + 0.3 + 1)),
        (Tversky(smooth=0), 1 - 1.21 / (1.21 + 0.3 * (1.6 - 1.21) + 0.7 * (1.9 - 1.21))),
        (Tversky(alpha=1, beta=2), 1 - (1.21 + 1) / (1.21 + (1.6 - 1.21) + 2 * (1.9 - 1.21) + 1)),
        (TverskySemimetric(), 1 - 1.6 / (1.6 + 0.3 * 0.0 + 0.7 * 0.3)),
        (FocalTversky(smooth=0), (1 - 1.21 / (1.21 + 0.3 * 0.39 + 0.7 * 0.69)) ** (3 / 4)),
        (FocalTversky(smooth=0, gamma=0.5), (1 - 1.21 / (1.21 + 0.3 * 0.39 + 0.7 * 0.69)) ** 2),
        (GeneralizedDice(smooth=0), 0.308571),
        (BatchDice(smooth=0), 0.308571),
        (Sum(terms=(DiceSemimetric(), JaccardMetric()), weights=(2, 0.5)), 2 * 0.3 / 3.5 + 0.5 * 0.6 / 3.8),
    ],
    ids=str,
)
def test_overlap_losses_have_the_values_of_the_worked_example(loss: Loss, expected: float) -> None:
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


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_relatives_of_dice_are_equal_where_they_should_be(smooth: float) -> None:
    prediction, soft = uniform(3, 2, 5, 5), uniform(3, 2, 5, 5, seed=1)
    even, one = {"alpha": 0.5, "beta": 0.5}, {"alpha": 1, "beta": 1}
    fields = {"alpha": 0.2, "beta": 3, "smooth": smooth}
    one_class = prediction[:, :1], soft[:, :1]
    dml = DiceSemimetric(smooth=smooth).per_sample(*one_class)
    pairs = [
        (Tversky(**even, smooth=smooth)(prediction, soft), Dice(smooth=2 * smooth)(prediction, soft)),
        (TverskySemimetric(**even, smooth=smooth)(prediction, soft), DiceSemimetric(smooth=2 * smooth)(prediction, soft)),
        (TverskySemimetric(**one, smooth=smooth)(prediction, soft), JaccardMetric(smooth=2 * smooth)(prediction, soft)),
        (TverskySemimetric(**fields)(prediction, soft.round()), Tversky(**fields)(prediction, soft.round())),
        (JaccardMetric(smooth=smooth)(prediction, soft.round()), Tversky(**one, smooth=smooth / 2)(prediction, soft.round())),
        (JaccardMetric(smooth=smooth).per_sample(*one_class), 2 * dml / (1 + dml)),
        (FocalTversky(**fields, gamma=1)(prediction, soft), Tversky(**fields)(prediction, soft)),
        (GeneralizedDice(smooth=smooth)(*one_class), Dice(smooth=smooth)(*one_class)),
    ]  # fmt: skip
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_focal_tversky_is_continuous_where_its_power_becomes_a_line() -> None:
    target = torch.ones(1, 1, 10, dtype=torch.float64)
    around, loss = [target - 1e-7 / 0.7 * factor for factor in (1 - 1e-6, 1 + 1e-6)], FocalTversky(smooth=0)
    below, above = (loss(prediction, target).item() for prediction in around)
    assert below == pytest.approx(above, rel=1e-5)
    assert above == pytest.approx(1e-7 ** (3 / 4), rel=1e-5)


def two_classes(large: int, small: int, size: int = 100) -> Tensor:
    target = torch.zeros(1, 2, size, dtype=torch.float64)
    target[0, 0, :large], target[0, 1, size - small :] = 1, 1
    return target


def test_generalized_dice_weighs_classes_by_their_volumes_squared() -> None:
    target = two_classes(large=50, small=5)
    prediction = target * 0.8
    prediction[0, 0, 60] = 0.4
    w = (1 / 50**2, 1 / 5**2)
    overlap, both = (40.0, 4.0), (40.4 + 50, 4.0 + 5)
    expected = 1 - 2 * (w[0] * overlap[0] + w[1] * overlap[1]) / (w[0] * both[0] + w[1] * both[1])
    assert GeneralizedDice(smooth=0)(prediction, target).item() == pytest.approx(expected, rel=1e-12)


def test_generalized_dice_lets_no_absent_or_tiny_class_drown_the_others() -> None:
    absent, tiny = two_classes(large=50, small=0), two_classes(large=50, small=1)
    tiny[0, 1] *= 1e-6
    half = absent.clone()
    half[0, 0, :25] = 0
    assert GeneralizedDice(smooth=0)(half, absent).item() == pytest.approx(25 / 75)
    for target, weight in ((absent, 1), (tiny, 50**2)):  # relative to the large class
        prediction = target.clone()
        prediction[0, 1, 0] = 1
        assert GeneralizedDice(smooth=0)(prediction, target).item() == pytest.approx(weight / (100 + weight), rel=1e-5)


@pytest.mark.parametrize("smooth", [0.0, 2.0])
def test_batch_dice_is_dice_of_all_samples_laid_side_by_side(smooth: float) -> None:
    prediction, target = uniform(3, 2, 4, 5), uniform(3, 2, 4, 5, seed=1)
    side_by_side = [torch.cat(list(x), dim=2)[None] for x in (prediction, target)]
    expected = Dice(smooth=3 * smooth)(*side_by_side)
    torch.testing.assert_close(BatchDice(smooth=smooth)(prediction, target), expected, rtol=1e-12, atol=0)


def test_a_batch_of_equal_samples_costs_batch_dice_what_one_costs_dice() -> None:
    prediction, target = uniform(1, 2, 4, 5), uniform(1, 2, 4, 5, seed=1)
    of_batch = BatchDice()(prediction.expand(6, -1, -1, -1), target.expand(6, -1, -1, -1))
    torch.testing.assert_close(of_batch, Dice()(prediction, target), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (1, 0), (1, -1)])
def test_a_sum_wants_one_positive_weight_for_each_term(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"one weight for each of 2 terms|greater than 0"):
        Sum(terms=(Dice(), BCE()), weights=weights)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 0.9])
def test_semimetric_of_random_hard_raters_elicits_a_binary_map(share: float) -> None:
    disputed = torch.linspace(0, 1, 1001, dtype=torch.float64)
    prediction = torch.stack([torch.ones_like(disputed), disputed], dim=1)[:, None]
    wide, narrow = torch.ones_like(prediction), torch.stack([torch.ones(1001), torch.zeros(1001)], dim=1)[:, None]
    loss = DiceSemimetric()
    risk = share * loss.per_sample(prediction, wide) + (1 - share) * loss.per_sample(prediction, narrow)
    assert disputed[risk.argmin()].item() in (0, 1)
