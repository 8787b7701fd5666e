"""Metrics of a prediction against a reference: soft overlap and errors, thresholded overlap, volume, calibration.

A case's maps are [N K *S]: N items (slices in 2D, 1 in 3D), K classes, *S space; T thresholds; n voxels of one class. Every metric
is taken over the whole case and per class, so results are arrays [K]. Sums run in float64. "Empty" means that a map sums to 0.

Where prediction and reference are both empty the overlap and volume ratios are undefined: NaN, to be left out of means and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating]

NUM_BINS = 10
NEIGHBOURHOOD_RADIUS = 3  # voxels along every spatial axis: the background around each object that counts


class Reliability(NamedTuple):
    """A reliability table: per bin [10] the number of voxels, the sum of p and the sum of y over them.

    Sums, not means, so that the tables of several cases add up to the table of all. Bin b holds b/10 <= p < (b+1)/10, the
    last one p = 1, too. A calibrated map has equal sums of p and y in every bin.
    """

    voxels: npt.NDArray[np.float64]
    prediction: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: sum over bins of (n_b / n) |mean p - mean y|, in [0, 1]; NaN without a voxel."""
        if not self.voxels.any():
            return float("nan")
        return float(np.abs(self.prediction - self.reference).sum() / self.voxels.sum())


def reliability(prediction: Values, reference: Values) -> Reliability:
    """The table of voxels [n] of one class: p in [0, 1], soft y in [0, 1]."""
    bins = np.minimum((prediction * NUM_BINS).astype(np.intp), NUM_BINS - 1)
    sums = (np.bincount(bins, of, NUM_BINS).astype(np.float64) for of in (None, prediction, reference))
    return Reliability(*sums)


def neighbourhood(prediction: Values, reference: Values) -> npt.NDArray[np.bool_]:
    """Voxels [N K *S] that lie within 3 voxels, along every spatial axis, of the union {p >= 0.5 or y > 0}.

    The easy background far away would dominate every mean. The neighbourhood does not cross from one item to the next.
    """
    mask = (prediction >= 0.5) | (reference > 0)
    for axis in range(2, mask.ndim):
        grown = mask.copy()
        source, target = np.moveaxis(mask, axis, 0), np.moveaxis(grown, axis, 0)
        for step in range(1, NEIGHBOURHOOD_RADIUS + 1):
            target[step:] |= source[:-step]
            target[:-step] |= source[step:]
        mask = grown
    return mask


Map = npt.NDArray[np.floating]  # [N K *S], in [0, 1]
PerClass = npt.NDArray[np.float64]  # [K]


@dataclass(frozen=True)
class Objective:
    """A soft metric that chooses the best epoch and guides the search. `sign` is -1 where a lower metric is better."""

    metric: str
    title: str
    sign: int
    compute: Callable[[Map, Map, float], PerClass]  # prediction and reference [N K *S], volume of a voxel in mm3 -> [K]


def dice_soft(prediction: Map, reference: Map) -> PerClass:
    """Soft Dice per class [K]: 2 sum p y / (sum p + sum y), in [0, 1].

    It is not largest at p = y: for y = 0.5 everywhere p = 0.5 gives 0.5 and p = 1 gives 2/3. Both empty: NaN.
    """
    return _ratio(2 * _sum(prediction * reference), _sum(prediction) + _sum(reference))


def dice_dml(prediction: Map, reference: Map) -> PerClass:
    """Soft Dice in the form of the Dice semimetric loss, per class [K]: (|p| + |y| - |p - y|) / (|p| + |y|), L1 norms.

    1 if and only if p = y; equal to the soft Dice where y is hard. Both empty: NaN.
    Source: Wang et al. 2023, Dice Semimetric Losses, arXiv 2303.16296.
    """
    total = _sum(prediction) + _sum(reference)
    return _ratio(total - _sum(np.abs(prediction - reference)), total)


def mse(prediction: Map, reference: Map) -> PerClass:
    """Mean squared error per class [K] over all voxels of the case, in [0, 1]."""
    return _sum(np.square(prediction - reference, dtype=np.float64)) / _num_voxels(prediction)


def mae(prediction: Map, reference: Map) -> PerClass:
    """Mean absolute error per class [K] over all voxels of the case, in [0, 1]."""
    return _sum(np.abs(prediction - reference)) / _num_voxels(prediction)


def brier(prediction: Map, reference: Map) -> PerClass:
    """Brier score per class [K]: mean (p - y)^2, a proper score: 0 is perfect.

    For binary raters y_r its mean over the raters is mean (p - y)^2 + mean y (1 - y), with y the mean of the raters: the
    second term is their disagreement, a lower bound for any prediction. Source: Brier 1950.
    """
    return mse(prediction, reference)


def volume_error(prediction: Map, reference: Map) -> PerClass:
    """Relative error of the soft volume per class [K]: (V_pred - V_true) / V_true; positive is too large.

    NaN where the reference is empty.
    """
    true = _sum(reference)
    return _ratio(_sum(prediction) - true, true)


def volume_error_abs(prediction: Map, reference: Map) -> PerClass:
    """Absolute value of `volume_error` per class [K]: over- and underestimation do not cancel in a mean over cases."""
    return np.abs(volume_error(prediction, reference))


def volume_difference_mm3(prediction: Map, reference: Map, voxel_mm3: float) -> PerClass:
    """|V_pred - V_true| of the soft maps per class [K], in mm3: defined where the reference is empty, too."""
    return np.abs(_sum(prediction) - _sum(reference)) * voxel_mm3


def ece(prediction: Map, reference: Map) -> PerClass:
    """Expected calibration error per class [K] against a soft reference: sum over bins of (n_b / n) |mean p - mean y|.

    10 equal-width bins of p; empty bins are skipped. Only voxels of the `neighbourhood` count; NaN without one.
    Source: Naeini et al. 2015 (doi 10.1609/aaai.v29i1.9602), with soft y.
    """
    near = neighbourhood(prediction, reference)
    masks = ((k, near[:, k]) for k in range(prediction.shape[1]))
    return np.array([reliability(prediction[:, k][mask], reference[:, k][mask]).error for k, mask in masks])


def soft_metrics(prediction: Map, reference: Map, voxel_mm3: float) -> dict[str, PerClass]:
    """All metrics that need no threshold, each an array [K].

    Args:
        prediction: [N K *S] in [0, 1].
        reference: [N K *S] in [0, 1].
        voxel_mm3: volume of a voxel in mm3 (area times slice distance in 2D).
    """
    relative = volume_error(prediction, reference)
    squared = mse(prediction, reference)
    return {
        "dice_soft": dice_soft(prediction, reference),
        "dice_dml": dice_dml(prediction, reference),
        "mse": squared,
        "mae": mae(prediction, reference),
        "brier": squared,
        "ece": ece(prediction, reference),
        "volume_pred_mm3": _sum(prediction) * voxel_mm3,  # a voxel counts by its value
        "volume_true_mm3": _sum(reference) * voxel_mm3,
        "volume_difference_mm3": volume_difference_mm3(prediction, reference, voxel_mm3),
        "volume_error": relative,
        "volume_error_abs": np.abs(relative),
    }


def dice_curve(prediction: Map, reference: Map, thresholds: Sequence[float]) -> npt.NDArray[np.float64]:
    """Dice of {prediction > tau} with {reference >= 0.5} per class and threshold: [K T]. NaN where both are empty."""
    return hard_scores(confusion(prediction, reference, thresholds))["dice"]


class Confusion(NamedTuple):
    """True and false positives and negatives in voxels, per class and threshold, each [K T] in float64."""

    tp: npt.NDArray[np.float64]
    fp: npt.NDArray[np.float64]
    fn: npt.NDArray[np.float64]
    tn: npt.NDArray[np.float64]


def confusion(prediction: Map, reference: Map, thresholds: Sequence[float]) -> Confusion:
    """Counts of {prediction > tau} against {reference >= 0.5} for all `thresholds` at once: one pass over the voxels.

    A voxel exactly at the threshold is background: then {m > D/2} is the Dice-optimal set (Lipton et al. 2014, Theorem 1).
    """
    taus = np.sort(np.asarray(thresholds, dtype=prediction.dtype))
    order = np.argsort(np.argsort(np.asarray(thresholds)))
    tp, fp, positives = [], [], []
    for k in range(prediction.shape[1]):
        p, y = prediction[:, k].ravel(), reference[:, k].ravel() >= 0.5
        above = np.flatnonzero(p > taus[0])  # the others are background at every threshold
        level = np.searchsorted(taus, p[above], side="left") - 1  # the highest threshold that the voxel exceeds
        counts = np.bincount(2 * level + y[above], minlength=2 * len(taus)).reshape(-1, 2)
        exceeding = counts[::-1].cumsum(axis=0)[::-1][order]
        tp.append(exceeding[:, 1])
        fp.append(exceeding[:, 0])
        positives.append(np.count_nonzero(y))
    hits, false = np.array(tp, dtype=np.float64), np.array(fp, dtype=np.float64)
    actual = np.array(positives, dtype=np.float64)[:, None]
    return Confusion(hits, false, actual - hits, _num_voxels(prediction) - actual - false)


def hard_scores(c: Confusion) -> dict[str, npt.NDArray[np.float64]]:
    """Overlap of {prediction > tau} with {reference >= 0.5}: Dice, IoU, precision, recall and specificity, each [K T].

    Both empty: NaN. Only one of them empty: Dice, IoU, precision and recall are 0, so that an empty prediction is not left
    out of means, which would reward it. Specificity is NaN where the reference covers everything.
    """
    nothing = c.tp + c.fp + c.fn == 0
    known = np.where(nothing, np.nan, 1.0)  # a 0/0 below is 0 where one of the two maps is not empty
    return {
        "dice": known * 2 * c.tp / np.maximum(2 * c.tp + c.fp + c.fn, 1),
        "iou": known * c.tp / np.maximum(c.tp + c.fp + c.fn, 1),
        "precision": known * c.tp / np.maximum(c.tp + c.fp, 1),
        "recall": known * c.tp / np.maximum(c.tp + c.fn, 1),
        "specificity": known * _ratio(c.tn, c.tn + c.fp),
    }


def mask_volume_error(c: Confusion, reference: Map) -> npt.NDArray[np.float64]:
    """Relative error of the volume of {prediction > tau} against that of the soft reference, per class and threshold [K T].

    NaN where the reference is empty. The best threshold for overlap is biased in volume by construction.
    """
    true = _sum(reference)[:, None]
    return _ratio(c.tp + c.fp - true, true)


def objective_score(name: str, prediction: Map, reference: Map, voxel_mm3: float) -> float:
    """The signed objective of one case, higher is better: the mean over classes with a value; NaN if none has one.

    `name` is a key of `OBJECTIVES`. It is cheap enough for all validation cases after every epoch.
    """
    values = OBJECTIVES[name].sign * OBJECTIVES[name].compute(prediction, reference, voxel_mm3)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _without_unit(metric: Callable[[Map, Map], PerClass]) -> Callable[[Map, Map, float], PerClass]:
    return lambda prediction, reference, _: metric(prediction, reference)


OBJECTIVES: dict[str, Objective] = {
    o.metric: o
    for o in (
        Objective("dice_dml", "soft Dice (DML form)", +1, _without_unit(dice_dml)),
        Objective("dice_soft", "soft Dice", +1, _without_unit(dice_soft)),
        Objective("brier", "Brier score", -1, _without_unit(brier)),
        Objective("mae", "mean absolute error", -1, _without_unit(mae)),
        Objective("ece", "expected calibration error", -1, _without_unit(ece)),
        Objective("volume_error_abs", "absolute relative volume error", -1, _without_unit(volume_error_abs)),
        Objective("volume_difference_mm3", "absolute volume difference (mm³)", -1, volume_difference_mm3),
    )
}


def _sum(maps: npt.NDArray[np.floating]) -> PerClass:
    """Sum over everything but the class axis, in float64."""
    items = np.ascontiguousarray(maps).reshape(maps.shape[0], maps.shape[1], -1)
    return items.sum(axis=2, dtype=np.float64).sum(axis=0)


def _num_voxels(maps: npt.NDArray[np.floating]) -> int:
    return maps.size // maps.shape[1]


def _ratio(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """over / under, NaN where `under` is 0."""
    return np.divide(over, under, out=np.full(np.broadcast_shapes(over.shape, under.shape), np.nan), where=under != 0)
