"""Losses that compare objects as a whole: the Dice family, a ratio of sums over the space of a sample and class.

Legend: B batch, K classes, *S space (2 or 3 axes). `prediction` and `target` are [B K *S] in [0, 1]. TP = sum p y,
FP = sum p (1-y), FN = sum (1-p) y; |.| of a map is its L1 norm.

A loss of products p y is a ratio of linear functions of p: on a soft target its minimum is a binary map, not p = y. The
forms with |p - y| in their place are equal to them on hard targets and have their minimum at p = y on soft ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from softseg_dist.numerics.loss import Loss

SMALLEST_SUM = 1e-7  # a denominator of less than this has nothing in it
SMALLEST_ERROR = 1e-7  # a power of less than this is a straight line: its slope at 0 would be infinite


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
        return _ratio(mismatch, prediction + target, self.smooth).mean(dim=1)


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
        return _ratio((prediction - target).abs(), prediction + target, self.smooth).mean(dim=1)


class JaccardMetric(Loss):
    """1 - (|p| + |y| - |p-y| + s) / (|p| + |y| + |p-y| + s), per sample and class, then averaged: IoU for soft targets.

    0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0). A metric: per sample
    and class it is 2 d / (1 + d) of `DiceSemimetric`'s d, with the same minimum and twice its slope there. `smooth` is s,
    in voxels, and an empty target costs 1 without gradient if it is 0, as in `DiceSemimetric`.

    Source: Wang, Ning, Blaschko, Jaccard Metric Losses, NeurIPS 2023 (arXiv 2302.05666).

    >>> import torch
    >>> JaccardMetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.1579)
    """

    short: ClassVar[str] = "jml"
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        mismatch = (prediction - target).abs()
        return _ratio(2 * mismatch, prediction + target + mismatch, self.smooth).mean(dim=1)


class Tversky(Loss):
    """1 - (TP + s) / (TP + alpha FP + beta FN + s), per sample and class, then averaged over classes.

    `alpha` is what a false voxel costs and `beta` what a missed one does: with 1/2 each it is `Dice` of twice the
    `smooth`, with 1 each the soft IoU loss; by default a miss weighs more. 0 for a perfect prediction of a hard target, and
    when both are empty; 1 at no overlap (nearly, if s > 0). Mis-specified on soft targets, like `Dice`: with y = 0.5
    everywhere, p = 0.5 costs 0.5 and p = 1 costs 0.231. Use `TverskySemimetric` there. `smooth` is s, in voxels: what an
    empty target teaches comes from it alone.

    Source: Salehi, Erdogmus, Gholipour, MLMI 2017 (doi 10.1007/978-3-319-67389-9_44).

    >>> import torch
    >>> Tversky(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    tensor(0.5213)
    """

    short: ClassVar[str] = "tversky"
    alpha: PositiveFloat = 0.3
    beta: PositiveFloat = 0.7
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        return _tversky(prediction, target, self.alpha, self.beta, self.smooth).mean(dim=1)


class TverskySemimetric(Loss):
    """`Tversky` for soft targets: TP = sum min(p, y), FP = sum max(p-y, 0), FN = sum max(y-p, 0).

    0 if and only if p = y, soft or hard, both empty included; 1 at no overlap (nearly, if s > 0). Equals `Tversky` of the
    same fields when y is hard. With alpha = beta = 1/2 it is `DiceSemimetric`, with 1 each `JaccardMetric`, of twice the
    `smooth`. With s = 0 an empty target costs 1 without gradient, as in `DiceSemimetric`.

    Source: the compatible Tversky loss of Wang et al., Dice Semimetric Losses, MICCAI 2023 (arXiv 2303.16296).

    >>> import torch
    >>> TverskySemimetric()(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.3, 0.5, 1.0, 0.1]]]))
    tensor(0.1160)
    """

    short: ClassVar[str] = "ctl"
    alpha: PositiveFloat = 0.3
    beta: PositiveFloat = 0.7
    smooth: float = Field(0.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        false, missed = (prediction - target).relu(), (target - prediction).relu()
        mismatch = self.alpha * false + self.beta * missed
        return _ratio(mismatch, prediction - false + mismatch, self.smooth).mean(dim=1)


class FocalTversky(Loss):
    """T^(1/gamma) with T the loss of `Tversky`, per sample and class, then averaged over classes.

    `gamma` = 1 is `Tversky`. A larger one steepens the end near a perfect prediction, so that an object that is nearly
    right is still worth improving; a smaller one flattens it and leaves the gradient to objects that are wrong. 0 where
    `Tversky` is, 1 at no overlap (nearly, if s > 0), and mis-specified on soft targets where it is. Below T = 1e-7 the power
    is a straight line, as its slope at 0 would be infinite. `alpha`, `beta` and `smooth` as in `Tversky`.

    Source: Abraham, Khan, ISBI 2019 (doi 10.1109/ISBI.2019.8759329), where alpha weighs the missed voxels.

    >>> import torch
    >>> FocalTversky(smooth=0)(torch.tensor([[[0.2, 0.5, 0.9, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    tensor(0.6135)
    """

    short: ClassVar[str] = "focaltversky"
    alpha: PositiveFloat = 0.3
    beta: PositiveFloat = 0.7
    gamma: PositiveFloat = 4 / 3
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        of_class = _tversky(prediction, target, self.alpha, self.beta, self.smooth)
        return (of_class * of_class.clamp_min(SMALLEST_ERROR).pow(1 / self.gamma - 1)).mean(dim=1)


class GeneralizedDice(Loss):
    """1 - (2 sum_k w_k sum p y + s) / (sum_k w_k (sum p + sum y) + s), w_k = (V / V_k)^2, per sample: small classes count, too.

    V_k is the volume sum y of class k in the sample, at least one voxel, and V that of the smallest class which the
    sample has, so that its weight is 1; a class which it does not have weighs 1, too. With one class it is `Dice`.
    0 for a perfect prediction of a hard target, and when all is empty; 1 at no overlap (nearly, if s > 0).
    Mis-specified on soft targets, like `Dice`. `smooth` is s, in voxels of the smallest class.

    Source: Sudre et al., DLMIA 2017 (doi 10.1007/978-3-319-67558-9_28), w_k = 1 / V_k^2: the same ratio for s = 0. There is
    no background class here.

    >>> import torch
    >>> GeneralizedDice(smooth=0)(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), torch.tensor([[[1.0, 0, 0], [0, 1, 1]]]))
    tensor(0.0909)
    """

    short: ClassVar[str] = "gdl"
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of `prediction` and `target` [B K *S] in [0, 1]."""
        volume = target.flatten(2).sum(dim=2)
        inverse = (volume > 0) / volume.clamp_min(1)
        weight = torch.where(volume > 0, inverse / inverse.amax(dim=1, keepdim=True), 1).square()
        mismatch, both = _mismatch_and_both(prediction, target)
        return (weight * mismatch).sum(dim=1) / ((weight * both).sum(dim=1) + self.smooth).clamp_min(SMALLEST_SUM)


class BatchDice(Loss):
    """1 - (2 P + s) / (Q + s), P and Q the means over the batch of sum p y and sum p + sum y, per class, then averaged.

    `Dice` of all samples laid side by side: a sample without foreground, or with little, weighs as much as its voxels, where
    in `Dice` it weighs as much as any other. `smooth` is s, in voxels per sample, so that a batch of equal samples costs
    what `Dice` costs. 0 for a perfect prediction of a hard target, and when the batch is empty; 1 at no overlap (nearly, if
    s > 0). Mis-specified on soft targets, like `Dice`. What a sample costs depends on its batch: the means run over
    the samples of all workers, and `Optim.batch_size` is part of the loss.

    Source: the option `batch_dice` of nnU-Net (Isensee et al., Nature Methods 18 (2021), doi 10.1038/s41592-020-01008-z).

    >>> import torch
    >>> target = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])
    >>> BatchDice(smooth=0)(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]]]), target)
    tensor(0.2000)
    """

    short: ClassVar[str] = "batchdice"
    smooth: float = Field(1.0, ge=0)

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of each sample of `prediction` and `target` [B K *S] if it were a batch of its own."""
        return self.of_averages(self.averaged(prediction, target), prediction.shape[1])

    def averaged(self, prediction: Tensor, target: Tensor) -> Tensor:
        """sum p + sum y - 2 sum p y of every class, then sum p + sum y of every class [B 2K]."""
        return torch.cat(_mismatch_and_both(prediction, target), dim=1)

    def num_averaged(self, classes: int) -> int:
        """2K, for `classes` classes."""
        return 2 * classes

    def of_averages(self, averages: Tensor, classes: int) -> Tensor:
        """The loss [...] of batches, given the means [... 2K] of both sums."""
        mismatch, both = averages.split(classes, dim=-1)
        return (mismatch / (both + self.smooth).clamp_min(SMALLEST_SUM)).mean(dim=-1)


def _mismatch_and_both(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """FP + FN and sum p + sum y, per sample and class [B K]."""
    mismatch = prediction + target - 2 * prediction * target
    return mismatch.flatten(2).sum(dim=2), (prediction + target).flatten(2).sum(dim=2)


def _tversky(prediction: Tensor, target: Tensor, alpha: float, beta: float, smooth: float) -> Tensor:
    """The loss of `Tversky` per sample and class [B K]."""
    overlap = prediction * target
    mismatch = alpha * (prediction - overlap) + beta * (target - overlap)
    return _ratio(mismatch, overlap + mismatch, smooth)


def _ratio(mismatch: Tensor, whole: Tensor, smooth: float) -> Tensor:
    """sum mismatch / (sum whole + s) per sample and class [B K], of voxels [B K *S]; 0 where nothing is in it."""
    both = whole.flatten(2).sum(dim=2) + smooth
    return mismatch.flatten(2).sum(dim=2) / both.clamp_min(SMALLEST_SUM)
