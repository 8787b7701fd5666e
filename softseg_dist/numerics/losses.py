"""Losses: a prediction and a target become a number to minimise. The activation is never part of a loss.

Legend: B batch, K classes, *S space (2 or 3 axes), M numbers to average. `prediction` p and `target` y are [B K *S] in
[0, 1]; |.| of a map is its L1 norm. TP = sum p y, FP = sum p (1-y), FN = sum (1-p) y. Random raters: the target of a voxel
is 1 in a share m of the draws, else 0; a loss elicits the prediction with the smallest expected loss.

Every loss follows from means over the samples of a batch, which workers may share (see `Loss`). None waits for the device.

Voxel-wise losses (AdaptiveWing, BCE, Focal, Brier, L1, Huber) are the mean of a distance between p and y. Overlap losses
(the Dice family) are ratios of sums over the space of a sample and class. A ratio with the product p y has its minimum on a
soft target at a binary map, not at p = y. The forms with |p - y| in its place are equal to it on hard targets and have
their minimum at p = y on soft ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen


class Loss(Frozen, ABC):
    """A number to minimise. A subclass implements `per_sample`, and the loss is its mean; plain torch, no `.item()`.

    A loss whose sums run over all samples of a batch, such as `BatchDice`, also gives `averaged`, `num_averaged` and `of_averages`:
    then its value is the same for any number of workers. Every `per_sample` and `averaged`, those of a subclass too, raises
    UserError if the shapes of prediction and target differ: broadcasting would hide the mistake.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in {"per_sample", "averaged"} & vars(cls).keys():
            setattr(cls, name, _of_equal_shapes(vars(cls)[name]))

    @abstractmethod
    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of each sample of `prediction` and `target` [B K *S] in [0, 1], independent of the others."""

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        """M numbers [B M] of each sample, independent of the others; their means over the batch give the loss."""
        return self.per_sample(prediction, target).unsqueeze(1)

    def num_averaged(self, classes: int) -> int:
        """M, for `classes` classes."""
        return 1

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        """The loss [...] of batches, given the means [... M] of what `averaged` returns over so many `samples`, of all workers."""
        return averages[..., 0]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of the batch, a scalar."""
        return self.of_averages(self.averaged(prediction, target).mean(dim=0), prediction.shape[1], len(prediction))


Method = Callable[[Loss, Tensor, Tensor], Tensor]


def _of_equal_shapes(method: Method) -> Method:
    """`method`, which refuses a prediction and a target of different shapes. Shapes are known without waiting for a device."""

    @wraps(method)
    def checked(self: Loss, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.shape != target.shape:
            rule = f"needs a prediction of the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}"
            to_do = "the network must return one tensor [B logits *S] in training, too (without deep supervision)"
            raise UserError(f"{type(self).__name__} {rule}: {to_do}")
        return method(self, prediction, target)

    return checked


class Sum(Loss):
    """sum_i w_i L_i: several losses at once, the first weight for the first term.

    Its minimum on soft targets is at p = y if that of every term is; otherwise it is a compromise that depends on the
    weights, which need not add up to 1. Raises ValueError if there are not as many weights as terms.

    >>> from softseg_dist import BCE, Dice
    >>> Sum(terms=(Dice(smooth=0), BCE()), weights=(1, 0.5))(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.6799)
    """

    short: ClassVar[str] = "sum"
    terms: tuple[Loss, ...] = Field(min_length=1)
    weights: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.weights) != len(self.terms):
            raise ValueError(f"a sum needs one weight for each of {len(self.terms)} terms, got {len(self.weights)}")
        return self

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.of_averages(self.averaged(prediction, target), prediction.shape[1], 1)

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.cat([term.averaged(prediction, target) for term in self.terms], dim=1)

    def num_averaged(self, classes: int) -> int:
        return sum(term.num_averaged(classes) for term in self.terms)

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        of_terms = averages.split([term.num_averaged(classes) for term in self.terms], dim=-1)
        parts = zip(self.weights, self.terms, of_terms, strict=True)
        return torch.stack([weight * term.of_averages(m, classes, samples) for weight, term, m in parts]).sum(dim=0)


SMALLEST_PROBABILITY = 1e-7  # logarithms are clipped here: no voxel costs more than 16.1


class AdaptiveWing(Loss):
    """A regression loss that is steeper near y = 1 than near y = 0: SoftSeg's.

        d = |y - p|;  L = omega ln(1 + (d/epsilon)^(alpha-y)) if d < theta, else A d - C,

    averaged over voxels and classes. A and C make value and slope continuous at theta. 0 if and only if p = y. The
    largest value, at (p, y) = (0, 1), is 10.26 for the defaults. It does not elicit the mean of random raters: for
    m = 0.25 its minimiser is 0.138, and at m = 0.509 the minimiser jumps from 0.44 to 0.97. With `reduction="sum"` it is the
    sum over voxels, classes and samples, as in ivadomed: images and batches of another size have another loss.

    Source: Wang, Bo, Fuxin, Adaptive Wing Loss, ICCV 2019; omega = 14, and 8 for MS lesions, as in Gros et al. 2021
    (doi 10.1016/j.media.2021.102038).

    >>> AdaptiveWing()(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor(10.2594)
    """

    short: ClassVar[str] = "wing"
    omega: PositiveFloat = 14.0
    theta: PositiveFloat = 0.5
    alpha: float = Field(2.1, gt=2)  # at 2 or less the exponent at y = 1 is at most 1, and the gradient at p = y jumps
    epsilon: PositiveFloat = 1.0
    reduction: Literal["mean", "sum"] = "mean"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        distance = (target - prediction).abs()
        exponent = self.alpha - target
        # A d - C is the curve at theta plus the slope A beyond it. Clipping d at theta, instead of torch.where on two
        # formulas, computes one logarithm and has no unused branch that could put NaN into the gradient.
        curve = self.omega * (distance.clamp(max=self.theta) / self.epsilon).pow(exponent).log1p()
        at_theta = (exponent * math.log(self.theta / self.epsilon)).exp()
        slope = self.omega * exponent * at_theta / ((1 + at_theta) * self.theta)
        of_voxel = (curve + slope * (distance - self.theta).relu()).flatten(1)
        return of_voxel.sum(dim=1) if self.reduction == "sum" else of_voxel.mean(dim=1)

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        """The mean or the sum [...] over the samples of batches, given the means [... 1] over them."""
        return averages[..., 0] * (samples if self.reduction == "sum" else 1)


class BCE(Loss):
    """-(y ln p + (1-y) ln(1-p)), the mean over voxels and classes. Elicits the mean of random raters.

    0 for a perfect prediction of a hard target; for a soft target the perfect prediction costs the entropy of y.
    Logarithms are clipped at 1e-7: p = 0 at y = 1 costs 16.1 and has gradient 0, not an infinite one.

    >>> BCE()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.6931)
    """

    short: ClassVar[str] = "bce"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _cross_entropy(prediction, target).flatten(1).mean(dim=1)


class Focal(Loss):
    """-|y-p|^gamma (y ln p + (1-y) ln(1-p)), the mean over voxels and classes: `BCE` with less weight on easy voxels.

    For hard y it is the focal loss -(1-p)^gamma ln p, or -p^gamma ln(1-p) at y = 0. With |y-p| in place of 1-p it is 0
    if and only if p = y, also for soft y, where `BCE` costs the entropy of y. A larger `gamma` (at least 1) takes more
    weight from voxels that are nearly right. It does not elicit the mean of random raters but a value nearer to 1/2:
    0.399 for m = 0.25 and gamma = 2. Logarithms are clipped as in `BCE`.

    Source: Lin et al., Focal Loss, ICCV 2017 (doi 10.1109/ICCV.2017.324); |y-p| for soft y: Li et al., Generalized
    Focal Loss, NeurIPS 2020 (arXiv 2006.04388), where it is called quality focal loss.

    >>> Focal()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.1733)
    """

    short: ClassVar[str] = "focal"
    gamma: float = Field(2.0, ge=1)  # below 1 the gradient at p = y is infinite

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        weight = (target - prediction).abs().pow(self.gamma)
        return (weight * _cross_entropy(prediction, target)).flatten(1).mean(dim=1)


def _cross_entropy(prediction: Tensor, target: Tensor) -> Tensor:
    """-(y ln p + (1-y) ln(1-p)) of every voxel [B K *S], its logarithms clipped."""
    log_p = prediction.clamp_min(SMALLEST_PROBABILITY).log()
    log_q = (1 - prediction).clamp_min(SMALLEST_PROBABILITY).log()
    return -(target * log_p + (1 - target) * log_q)


class Brier(Loss):
    """(p - y)^2, the mean over voxels and classes. 0 if and only if p = y; elicits the mean of random raters.

    Source: Brier, Monthly Weather Review 78 (1950), doi 10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.

    >>> Brier()(torch.full((1, 1, 2, 2), 0.5), torch.ones(1, 1, 2, 2))
    tensor(0.2500)
    """

    short: ClassVar[str] = "brier"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().flatten(1).mean(dim=1)


class L1(Loss):
    """|p - y|, the mean over voxels and classes. 0 if and only if p = y.

    Its slope does not depend on the error: a small error on many voxels has as much gradient as a large one on few.
    Elicits the median of random raters, which is a binary map: 0 for m < 1/2, 1 for m > 1/2. No gradient at p = y.

    >>> L1()(torch.full((1, 1, 2, 2), 0.2), torch.ones(1, 1, 2, 2))
    tensor(0.8000)
    """

    short: ClassVar[str] = "l1"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).abs().flatten(1).mean(dim=1)


class Huber(Loss):
    """d^2 / 2 if d = |p - y| <= delta, else delta (d - delta/2), the mean over voxels and classes. 0 if and only if p = y.

    Beyond `delta` the slope is constant: 1 is half of `Brier`, a small one is nearly delta times `L1`. Elicits neither
    mean nor median of random raters but delta m / (1-m), for m <= 1/2 and delta <= 1/2.

    Source: Huber, Annals of Mathematical Statistics 35 (1964), doi 10.1214/aoms/1177703732.

    >>> Huber(delta=0.5)(torch.full((1, 1, 2, 2), 0.2), torch.ones(1, 1, 2, 2))
    tensor(0.2750)
    """

    short: ClassVar[str] = "huber"
    delta: float = Field(0.5, gt=0, le=1)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        distance = (prediction - target).abs()
        near = distance.clamp(max=self.delta)
        return (near * (distance - near / 2)).flatten(1).mean(dim=1)


SMALLEST_SUM = 1e-7  # a smaller denominator counts as empty
SMALLEST_ERROR = 1e-7  # below this a power is replaced by a line: its slope at 0 would be infinite


class Dice(Loss):
    """1 - (2 sum p y + s) / (sum p + sum y + s), per sample and class, then averaged over classes. SoftSeg's control.

    0 for a perfect prediction of a hard target, and when both are empty; 1 at no overlap (nearly, if s > 0).
    Mis-specified on soft targets: with y = 0.5 everywhere, p = 0.5 costs 0.5 and p = 1 costs 0.333. Use
    `DiceSemimetric` there. `smooth` is s, in voxels; an empty target has a gradient only through it.

    Source: Milletari, Navab, Ahmadi, 3DV 2016 (doi 10.1109/3DV.2016.79), with a linear denominator.

    >>> Dice(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.3086)
    """

    short: ClassVar[str] = "dice"
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        # The same number as 1 - ratio, without the cancellation, and 0 instead of 0/0 when both are empty.
        mismatch = prediction + target - 2 * prediction * target
        return _ratio(mismatch, prediction + target, self.smooth).mean(dim=1)


class DiceSemimetric(Loss):
    """1 - (|p| + |y| - |p-y| + s) / (|p| + |y| + s), per sample and class, then averaged: Dice for soft targets.

    |.| are L1 norms. 0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0).
    Equals `Dice` of the same `smooth` when y is hard. With s = 0, the published form, an empty target costs 1 for any
    p > 0, without gradient: where many samples are empty choose `smooth` > 0, in voxels.

    Source: Wang et al., Dice Semimetric Losses, MICCAI 2023 (arXiv 2303.16296), DML_1.

    >>> DiceSemimetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.0857)
    """

    short: ClassVar[str] = "dml"
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return _ratio((prediction - target).abs(), prediction + target, self.smooth).mean(dim=1)


class JaccardMetric(Loss):
    """1 - (|p| + |y| - |p-y| + s) / (|p| + |y| + |p-y| + s), per sample and class, then averaged: IoU for soft targets.

    0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0). A metric: per sample
    and class it is 2 d / (1 + d) of `DiceSemimetric`'s d, with the same minimum and twice its slope there. `smooth` is s,
    in voxels, and an empty target costs 1 without gradient if it is 0, as in `DiceSemimetric`.

    Source: Wang, Ning, Blaschko, Jaccard Metric Losses, NeurIPS 2023 (arXiv 2302.05666).

    >>> JaccardMetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.1579)
    """

    short: ClassVar[str] = "jml"
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        mismatch = (prediction - target).abs()
        return _ratio(2 * mismatch, prediction + target + mismatch, self.smooth).mean(dim=1)


class Tversky(Loss):
    """1 - (TP + s) / (TP + alpha FP + beta FN + s), per sample and class, then averaged over classes.

    `alpha` weighs false positives, `beta` false negatives, which by default weigh more. With 1/2 each it is `Dice` of twice the
    `smooth`, with 1 each the soft IoU loss. 0 for a perfect prediction of a hard target, and when both are empty; 1 at no overlap
    (nearly, if s > 0). Mis-specified on soft targets, like `Dice`: with y = 0.5 everywhere, p = 0.5 costs 0.5 and p = 1 costs
    0.231. Use `TverskySemimetric` there. `smooth` is s, in voxels; an empty target has a gradient only through it.

    Source: Salehi, Erdogmus, Gholipour, MLMI 2017 (doi 10.1007/978-3-319-67389-9_44).

    >>> Tversky(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    tensor(0.5213)
    """

    short: ClassVar[str] = "tversky"
    alpha: PositiveFloat = 0.3
    beta: PositiveFloat = 0.7
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self._per_class(prediction, target).mean(dim=1)

    def _per_class(self, prediction: Tensor, target: Tensor) -> Tensor:
        overlap = prediction * target
        mismatch = self.alpha * (prediction - overlap) + self.beta * (target - overlap)
        return _ratio(mismatch, overlap + mismatch, self.smooth)


class TverskySemimetric(Loss):
    """`Tversky` for soft targets: TP = sum min(p, y), FP = sum max(p-y, 0), FN = sum max(y-p, 0).

    0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0). Equals `Tversky` of the
    same fields when y is hard. With alpha = beta = 1/2 it is `DiceSemimetric`, with 1 each `JaccardMetric`, of twice the
    `smooth`. With s = 0 an empty target costs 1 without gradient, as in `DiceSemimetric`.

    Source: the compatible Tversky loss of Wang et al., Dice Semimetric Losses, MICCAI 2023 (arXiv 2303.16296).

    >>> TverskySemimetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.1160)
    """

    short: ClassVar[str] = "ctl"
    alpha: PositiveFloat = 0.3
    beta: PositiveFloat = 0.7
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        false, missed = (prediction - target).relu(), (target - prediction).relu()
        mismatch = self.alpha * false + self.beta * missed
        return _ratio(mismatch, prediction - false + mismatch, self.smooth).mean(dim=1)


class FocalTversky(Tversky):
    """T^(1/gamma) with T the loss of `Tversky`, per sample and class, then averaged over classes.

    `gamma` = 1 is `Tversky`. A larger one raises the slope near a perfect prediction, so that an object that is nearly
    right still has a gradient; a smaller one lowers it and leaves the gradient to objects that are wrong. 0 where `Tversky`
    is, 1 at no overlap (nearly, if s > 0), and mis-specified on soft targets as `Tversky` is. Below T = 1e-7 a line
    replaces the power, whose slope at 0 would be infinite. `alpha`, `beta` and `smooth` as in `Tversky`.

    Source: Abraham, Khan, ISBI 2019 (doi 10.1109/ISBI.2019.8759329), where alpha weighs the missed voxels.

    >>> FocalTversky(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    tensor(0.6135)
    """

    short: ClassVar[str] = "focaltversky"
    gamma: PositiveFloat = 4 / 3

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        of_class = self._per_class(prediction, target)
        return (of_class * of_class.clamp_min(SMALLEST_ERROR).pow(1 / self.gamma - 1)).mean(dim=1)


class GeneralizedDice(Loss):
    """1 - (2 sum_k w_k sum p y + s) / (sum_k w_k (sum p + sum y) + s), w_k = (V / V_k)^2, per sample: small classes count as much.

    V_k is the volume sum y of class k in the sample, at least one voxel. V is that of the smallest class in the sample,
    whose weight is therefore 1; an absent class has weight 1, too. With one class it is `Dice`.
    0 for a perfect prediction of a hard target, and when all is empty; 1 at no overlap (nearly, if s > 0).
    Mis-specified on soft targets, like `Dice`. `smooth` is s, in voxels of the smallest class.

    Source: Sudre et al., DLMIA 2017 (doi 10.1007/978-3-319-67558-9_28), w_k = 1 / V_k^2: equal for s = 0, without a background.

    >>> GeneralizedDice(smooth=0)(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), torch.tensor([[[1.0, 0, 0], [0, 1, 1]]]))
    tensor(0.0909)
    """

    short: ClassVar[str] = "gdl"
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        volume = target.flatten(2).sum(dim=2)
        inverse = (volume > 0) / volume.clamp_min(1)
        weight = torch.where(volume > 0, inverse / inverse.amax(dim=1, keepdim=True), 1).square()
        mismatch, both = _mismatch_and_both(prediction, target)
        return (weight * mismatch).sum(dim=1) / ((weight * both).sum(dim=1) + self.smooth).clamp_min(SMALLEST_SUM)


class BatchDice(Loss):
    """1 - (2 P + s) / (Q + s), P and Q the means over the batch of sum p y and sum p + sum y, per class, then averaged.

    `Dice` of all samples of the batch as one image: a sample with little or no foreground counts by its voxels, while in
    `Dice` every sample counts the same. `smooth` is s, in voxels per sample, so that a batch of equal samples costs what
    `Dice` costs. 0 for a perfect prediction of a hard target, and when the batch is empty; 1 at no overlap (nearly, if
    s > 0). Mis-specified on soft targets, like `Dice`. The loss of a sample depends on its batch: the means run over the
    samples of all workers, and `Optim.batch_size` is part of the loss.

    With `over="batch and classes"` the classes, too, are one image, and `smooth` is in voxels of the whole batch: 1 - (2 sum p y
    + s) / (sum p + sum y + s), as SoftSeg's control had it.

    Source: the option `batch_dice` of nnU-Net (Isensee et al., Nature Methods 18 (2021), doi 10.1038/s41592-020-01008-z).

    >>> target = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])
    >>> BatchDice(smooth=0)(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]), target)
    tensor(0.2000)
    """

    short: ClassVar[str] = "batchdice"
    smooth: float = Field(1.0, ge=0)
    over: Literal["batch", "batch and classes"] = "batch"

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of each sample of `prediction` and `target` [B K *S] if it were a batch of its own."""
        return self.of_averages(self.averaged(prediction, target), prediction.shape[1], 1)

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        """sum p + sum y - 2 sum p y of every class, then sum p + sum y of every class [B 2K]."""
        return torch.cat(_mismatch_and_both(prediction, target), dim=1)

    def num_averaged(self, classes: int) -> int:
        return 2 * classes

    def of_averages(self, averages: Tensor, classes: int, samples: int) -> Tensor:
        mismatch, both = averages.split(classes, dim=-1)
        smooth = self.smooth
        if self.over == "batch and classes":
            mismatch, both, smooth = mismatch.sum(dim=-1, keepdim=True), both.sum(dim=-1, keepdim=True), smooth / samples
        return (mismatch / (both + smooth).clamp_min(SMALLEST_SUM)).mean(dim=-1)


def _mismatch_and_both(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """FP + FN and sum p + sum y, per sample and class [B K]."""
    mismatch = prediction + target - 2 * prediction * target
    return mismatch.flatten(2).sum(dim=2), (prediction + target).flatten(2).sum(dim=2)


def _ratio(mismatch: Tensor, whole: Tensor, smooth: float) -> Tensor:
    """sum mismatch / (sum whole + s) per sample and class [B K], of voxels [B K *S]; 0 where both sums are 0."""
    both = whole.flatten(2).sum(dim=2) + smooth
    return mismatch.flatten(2).sum(dim=2) / both.clamp_min(SMALLEST_SUM)
