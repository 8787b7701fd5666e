"""Thresholds for a soft prediction: three rules, applied to validation cases only.

`fixed` is 0.5. `grid` is the threshold of `CURVE` with the best mean Dice. `dice_optimal` follows from the
predictions alone, as if they were calibrated. Maps are [N K *S]: N items, K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from softseg_dist.numerics.metrics import Map, confusion, hard_scores

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
