"""Losses that compare voxel with voxel: the mean of a distance between a prediction and a target that may be soft.

Legend: B batch, K classes, *S space (2 or 3 axes). `prediction` and `target` are [B K *S] in [0, 1]. Random raters: the
target of a voxel is 1 in a share m of the draws, else 0; what a loss elicits is the prediction that it then costs least.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from softseg_dist.numerics.loss import Loss

SMALLEST_PROBABILITY = 1e-7  # a logarithm is cut here: no voxel costs more than 16.1


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
        return _cross_entropy(prediction, target).flatten(1).mean(dim=1)


class Focal(Loss):
    """-|y-p|^gamma (y ln p + (1-y) ln(1-p)), the mean over voxels and classes: `BCE` that cares less for easy voxels.

    For hard y it is the focal loss -(1-p)^gamma ln p, or -p^gamma ln(1-p) at y = 0; with |y-p| in place of 1-p it is 0
    if and only if p = y for soft y, too, where `BCE` costs the entropy of y. `gamma` = 1 is the mildest, more forgets
    more of what is nearly right. It does not elicit the mean of random raters but a value nearer to 1/2: 0.399 for
    m = 0.25 and gamma = 2. Logarithms are cut as in `BCE`.

    Source: Lin et al., Focal Loss, ICCV 2017 (doi 10.1109/ICCV.2017.324); |y-p| for soft y: Li et al., Generalized
    Focal Loss, NeurIPS 2020 (arXiv 2006.04388), where it is called quality focal loss.

    >>> import torch
    >>> Focal()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.1733)
    """

    short: ClassVar[str] = "focal"
    gamma: float = Field(2.0, ge=1)  # below 1 the gradient at p = y is infinite

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        weight = (target - prediction).abs().pow(self.gamma)
        return (weight * _cross_entropy(prediction, target)).flatten(1).mean(dim=1)


def _cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """-(y ln p + (1-y) ln(1-p)) of every voxel [B K *S], its logarithms cut."""
    log_p = prediction.clamp_min(SMALLEST_PROBABILITY).log()
    log_q = (1 - prediction).clamp_min(SMALLEST_PROBABILITY).log()
    return -(target * log_p + (1 - target) * log_q)


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


class L1(Loss):
    """|p - y|, the mean over voxels and classes. 0 if and only if p = y.

    Its slope is the same near and far: a small error on many voxels pulls as much as a large one on few. Elicits the
    median of random raters, which is a binary map: 0 for m < 1/2, 1 for m > 1/2. No gradient at p = y.

    >>> import torch
    >>> L1()(torch.full((1, 1, 2, 2), 0.2), torch.ones(1, 1, 2, 2))
    tensor(0.8000)
    """

    short: ClassVar[str] = "l1"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        return (prediction - target).abs().flatten(1).mean(dim=1)


class Huber(Loss):
    """d^2 / 2 if d = |p - y| <= delta, else delta (d - delta/2), the mean over voxels and classes. 0 if and only if p = y.

    `delta` is where an error stops to pull harder: 1 is half of `Brier`, a small one is delta times `L1`, nearly. Elicits
    neither mean nor median of random raters: delta m / (1-m) for m <= 1/2 and delta <= 1/2.

    Source: Huber, Annals of Mathematical Statistics 35 (1964), doi 10.1214/aoms/1177703732.

    >>> import torch
    >>> Huber(delta=0.5)(torch.full((1, 1, 2, 2), 0.2), torch.ones(1, 1, 2, 2))
    tensor(0.2750)
    """

    short: ClassVar[str] = "huber"
    delta: float = Field(0.5, gt=0, le=1)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        distance = (prediction - target).abs()
        near = distance.clamp(max=self.delta)
        return (near * (distance - near / 2)).flatten(1).mean(dim=1)
