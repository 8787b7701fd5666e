"""Recalibration: the map that is right in scale, q = sigmoid(a logit(p) + b) per class, with a and b from validation cases.

Two candidates that differ in calibration before it and not after it differed in scale alone. Where p = 0, q = 0.
Maps are [1 K *S]: K classes, *S space. A case's evidence is a histogram over logit(p), in which all cases weigh the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit

from softseg_dist.numerics.metrics import Map, neighbourhood

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
