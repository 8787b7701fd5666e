"""What the validation cases of a fit choose: thresholds for a soft prediction by three rules, and a recalibration of it.

`fixed` is 0.5. `grid` is the threshold of `CURVE` with the best mean Dice. `dice_optimal` follows from the
predictions alone, as if they were calibrated. Maps are [N K *S]: N items, K classes, *S space.

The recalibrated map is right in scale: q = sigmoid(a logit(p) + b) per class, and 0 where p = 0. Candidates that differ in
calibration before it and not after it differed in scale alone. A case's evidence is a histogram over logit(p); all weigh the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

from softseg_dist.numerics.metrics import Map, confusion, hard_scores, neighbourhood

FIXED = 0.5
CURVE: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))  # 0.05 to 0.95


class Evidence(NamedTuple):
    """What one validation case says about thresholds: Dice at those of `CURVE` [K T], and D* of each class [K]."""

    dice: npt.NDArray[np.float64]
    optimal: npt.NDArray[np.float64]


def evidence(prediction: Map, reference: Map) -> Evidence:
    """That of a map [N K *S] in [0, 1]; the reference is the mean of the raters."""
    optimal = [optimal_dice(prediction[:, k]) for k in range(prediction.shape[1])]
    return Evidence(hard_scores(confusion(prediction, reference, CURVE))["dice"], np.array(optimal))


def choose_thresholds(cases: Sequence[Evidence]) -> dict[str, float]:
    """The threshold of each rule, one for all classes, from the validation cases: {"fixed", "grid", "dice_optimal"}."""
    return {"fixed": FIXED, "grid": grid_threshold(cases), "dice_optimal": dice_optimal_threshold(cases)}


def grid_threshold(cases: Sequence[Evidence]) -> float:
    """The threshold of `CURVE` with the highest mean Dice over cases and classes; among ties the nearest to 0.5.

    Pairs of case and class without a voxel of {reference >= 0.5} are left out. 0.5 if none is left.
    """
    curves = np.concatenate([case.dice for case in cases])
    curves = curves[~np.isnan(curves).any(axis=1)]
    if not len(curves):
        return FIXED
    means = curves.mean(axis=0)
    tied = [tau for tau, mean in zip(CURVE, means, strict=True) if mean >= means.max() - 1e-12]
    return min(tied, key=lambda tau: (abs(tau - FIXED), tau))


def dice_optimal_threshold(cases: Sequence[Evidence]) -> float:
    """The mean over cases and classes of D*/2 (see `optimal_dice`); predictions that are 0 everywhere are left out.

    It is best for a calibrated map, never above 0.5 and never 0. 0.5 if every prediction is 0.
    """
    best = np.concatenate([case.optimal for case in cases])
    known = best[~np.isnan(best)]
    return float(known.mean() / 2) if known.size else FIXED


def optimal_dice(probability: npt.NDArray[np.floating]) -> float:
    """D* = sup over sets s of 2 sum s m / (sum s + sum m), for a map m of any shape; attained by {m >= D*/2}.

    Found by the fixed-point iteration D <- D({m >= D/2}) from D = 1, which increases to D* after its first step. A voxel exactly at
    D/2 leaves D unchanged. NaN for a map of zeros.

    Source: Lipton et al. 2014 (doi 10.1007/978-3-662-44851-9_15); Nordstroem et al. 2023.

    >>> round(optimal_dice(np.arange(11) / 10), 3)
    0.784
    """
    m = np.asarray(probability, dtype=np.float64)
    m = m[m > 0]
    if not m.size:
        return float("nan")

    def dice_from(threshold: float) -> float:
        inside = m[m >= threshold]
        return float(2 * inside.sum() / (inside.size + m.sum()))

    best = dice_from(0.5)
    while (higher := dice_from(best / 2)) > best:
        best = higher
    return best


Recalibration = tuple[float, float]  # (a, b)
TINY = 1e-6  # logit is that of p in [TINY, 1 - TINY]
SLOPES = (0.05, 20.0)  # of a
FEWEST_VALUES = 20  # strictly between 0 and 1, in all validation maps of a fit: fewer are levels, not probabilities
EDGES = np.linspace(-14, 14, 2001)  # of the bins of logit(p), of which each counts with its mean


class Histogram(NamedTuple):
    """What a validation case says: in `bins` [K 3 B] the shares of n, sum logit(p) and sum y; `values`, up to 20, of its maps."""

    bins: npt.NDArray[np.float32]
    values: npt.NDArray[np.floating]


def histogram(prediction: Map, reference: Map, spacing_mm: Sequence[float]) -> Histogram:
    """That of maps [1 K *S] over the voxels with p > 0 of the calibration neighbourhood; the reference is the raters' mean."""
    used = neighbourhood(reference, spacing_mm) & (prediction > 0)
    bins = np.zeros((prediction.shape[1], 3, len(EDGES) - 1), dtype=np.float32)
    for k, found in enumerate(bins):
        x, y = _logit(prediction[:, k][used[:, k]]), reference[:, k][used[:, k]]
        at = np.searchsorted(EDGES, x) - 1
        found[:] = [np.bincount(at, of, found.shape[1]) / max(len(x), 1) for of in (None, x, y)]
    soft = prediction[(prediction > 0) & (prediction < 1)]
    few = np.unique(soft[:: len(soft) // 1000 + 1])
    return Histogram(bins, (few if len(few) >= FEWEST_VALUES else np.unique(soft))[:FEWEST_VALUES])


def fit_recalibration(cases: Sequence[Histogram], classes: Sequence[str]) -> dict[str, Recalibration]:
    """a and b of every class, (1, 0) of one without evidence; {} if the maps hold fewer than 20 different values inside (0, 1)."""
    if not cases or len(np.unique(np.concatenate([case.values for case in cases]))) < FEWEST_VALUES:
        return {}
    by_class = np.stack([case.bins for case in cases]).sum(axis=0, dtype=np.float64)
    return {name: least_log_loss(*bins) for name, bins in zip(classes, by_class, strict=True)}


def least_log_loss(weight: npt.NDArray[np.float64], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Recalibration:
    """The (a, b) of the least sum of -w (y log q + (1 - y) log(1 - q)), from [n] w, w logit(p) and w y of voxels or bins."""
    weight, x, y = (values[weight > 0] for values in (weight, x, y))
    if not weight.size:
        return 1.0, 0.0
    weight, x, y = weight / weight.sum(), x / weight, y / weight.sum()

    def loss(ab: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        at = ab[0] * x + ab[1]
        error = weight * expit(at) - y
        return float(weight @ np.logaddexp(0, at) - y @ at), np.array([error @ x, error.sum()])

    a, b = minimize(loss, (1.0, 0.0), jac=True, bounds=(SLOPES, (None, None)), options={"ftol": 1e-15, "gtol": 1e-9}).x
    return float(a), float(b)


def recalibrated(prediction: Map, by_class: Sequence[Recalibration]) -> Map:
    """q of a map p [1 K *S]."""
    q = _logit(prediction)
    for k, (a, b) in enumerate(by_class):
        q[:, k] *= a
        q[:, k] += b
    expit(q, out=q)
    q *= prediction > 0
    return q


def _logit(prediction: Map) -> Map:
    x = prediction.clip(TINY, 1 - TINY)
    np.divide(x, 1 - x, out=x)
    return np.log(x, out=x)
