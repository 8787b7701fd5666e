"""Losses: how far a prediction is from a target that may be soft. The activation is never inside.

Legend: B batch, K classes, *S space (2 or 3 axes). `prediction` and `target` are [B K *S] in [0, 1]. Every loss is
a mean over samples of a value per sample, so that a batch may be split over workers: the mean of their means,
weighted by their numbers of samples, is the loss of the whole batch. None waits for the device. Use float32 or
float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from softseg_dist.frozen import Frozen

SMALLEST_PROBABILITY = 1e-7  # BCE's logarithm is cut here: no voxel costs more than 16.1
SMALLEST_SUM = 1e-7  # a Dice denominator of less than this has nothing in it


class Loss(Frozen, ABC):
    """A number to minimise. A subclass gives `per_sample`; plain torch, no `.item()`."""

    @abstractmethod
    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of each sample of `prediction` and `target` [B K *S] in [0, 1], whatever the others are."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean over samples of `per_sample`, a scalar."""
        assert prediction.shape == target.shape, f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
        return self.per_sample(prediction, target).mean()


class AdaptiveWing(Loss):
    """A regression loss that is steeper near y = 1 than near y = 0: SoftSeg's.

        d = |y - p|;  L = omega ln(1 + (d/epsilon)^(alpha-y)) if d < theta, else A d - C,

    with A and C such that value and slope are continuous at theta; the mean over voxels and classes. 0 if and only
    if p = y. The largest value, at (p, y) = (0, 1), is 10.26 for the defaults. It does not elicit the mean of
    random raters: for a vote share of 0.25 its minimiser is 0.138, and at 0.509 it jumps from 0.44 to 0.97.

    Source: Wang, Bo, Fuxin, Adaptive Wing Loss, ICCV 2019; omega = 14, and 8 for MS lesions, as in Gros et al. 2021
    (doi 10.1016/j.media.2021.102038).

    >>> import torch
    >>> AdaptiveWing()(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor(10.2594)
    """

    short: ClassVar[str] = "wing"
    omega: PositiveFloat = 14.0
    theta: PositiveFloat = 0.5
    alpha: float = Field(2.1, gt=2)  # at 2 or less the exponent at y = 1 is at most 1, and the gradient at p = y jumps
    epsilon: PositiveFloat = 1.0

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        distance = (target - prediction).abs()
        exponent = self.alpha - target
        # A d - C is the curve at theta plus the slope A beyond it. Cutting d at theta instead of choosing between two
        # formulas computes one logarithm and leaves no unchosen branch to put NaN into the gradient.
        curve = self.omega * (distance.clamp(max=self.theta) / self.epsilon).pow(exponent).log1p()
        at_theta = (exponent * math.log(self.theta / self.epsilon)).exp()
        slope = self.omega * exponent * at_theta / ((1 + at_theta) * self.theta)
        return (curve + slope * (distance - self.theta).relu()).flatten(1).mean(dim=1)


class Dice(Loss):
    """1 - (2 sum p y + s) / (sum p + sum y + s), per sample and class, then averaged over classes. SoftSeg's control.

    0 for a perfect prediction of a hard target, and when both are empty; 1 at no overlap (nearly, if s > 0).
    Mis-specified on soft targets: with y = 0.5 everywhere, p = 0.5 costs 0.5 and p = 1 costs 0.333. Use
    `DiceSemimetric` there. `smooth` is s, in voxels: what an empty target teaches comes from it alone.

    Source: Milletari, Navab, Ahmadi, 3DV 2016 (doi 10.1109/3DV.2016.79), with a linear denominator.

    >>> import torch
    >>> Dice(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.3086)
    """

    short: ClassVar[str] = "dice"
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        # The same number as 1 - ratio, without the cancellation, and 0 instead of 0/0 when both are empty.
        mismatch = prediction + target - 2 * prediction * target
        return _over_both_sums(mismatch, prediction, target, self.smooth)


class DiceSemimetric(Loss):
    """1 - (|p| + |y| - |p-y| + s) / (|p| + |y| + s), per sample and class, then averaged: Dice for soft targets.

    |.| are L1 norms. 0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0).
    Equals `Dice` of the same `smooth` when y is hard. With s = 0, the published form, an empty target costs 1 whatever
    p > 0 is, without gradient: where many samples are empty choose `smooth` > 0, in voxels.

    Source: Wang et al., Dice Semimetric Losses, MICCAI 2023 (arXiv 2303.16296), DML_1.

    >>> import torch
    >>> DiceSemimetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.0857)
    """

    short: ClassVar[str] = "dml"
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        return _over_both_sums((prediction - target).abs(), prediction, target, self.smooth)


def _over_both_sums(mismatch: Tensor, prediction: Tensor, target: Tensor, smooth: float) -> Tensor:
    """sum mismatch / (sum p + sum y + s) per sample and class, averaged over classes [B]; 0 where both are empty."""
    both = (prediction + target).flatten(2).sum(dim=2) + smooth
    return (mismatch.flatten(2).sum(dim=2) / both.clamp_min(SMALLEST_SUM)).mean(dim=1)


class BCE(Loss):
    """-(y ln p + (1-y) ln(1-p)), the mean over voxels and classes. Elicits the mean of random raters.

    0 for a perfect prediction of a hard target; for a soft target the perfect prediction costs the entropy of y.
    Logarithms are cut at 1e-7: p = 0 at y = 1 costs 16.1, without gradient instead of an infinite one.

    >>> import torch
    >>> BCE()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.6931)
    """

    short: ClassVar[str] = "bce"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        log_p = prediction.clamp_min(SMALLEST_PROBABILITY).log()
        log_q = (1 - prediction).clamp_min(SMALLEST_PROBABILITY).log()
        return -(target * log_p + (1 - target) * log_q).flatten(1).mean(dim=1)


class Brier(Loss):
    """(p - y)^2, the mean over voxels and classes. 0 if and only if p = y; elicits the mean of random raters.

    Source: Brier, Monthly Weather Review 78 (1950), doi 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    >>> import torch
    >>> Brier()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.2500)
    """

    short: ClassVar[str] = "brier"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        return (prediction - target).square().flatten(1).mean(dim=1)
