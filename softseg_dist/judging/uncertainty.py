"""Uncertainty of a prediction: the statistics of several soft maps of one case, per voxel and per object.

Legend: T samples (soft maps of one case), N items, R raters, K classes, *S space (2 or 3 axes). Samples come from T runs of one
model (see `numerics.sampling`), or from T models. Sums run in float64. Measures of objects threshold samples at 0.5.

Rows of the results table, `<method>` being "mc_dropout", "tta" or "ensemble". Against "mean", the raters' mean: `<method>_entropy`,
`_expected_entropy`, `_mutual_information`, `_variance` (means over the calibration neighbourhood), `_volume_cv`, `_pairwise_dice`,
`_samples_iou`, and of the mean map as a prediction `_dice_dml`, `_brier`, `_ece`.
Against "raters", if a case has two or more: `_ged2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from softseg_dist.judging.judge import Measurement
from softseg_dist.numerics.metrics import FORMULAS, Map, Pair, PerClass, Scale, ratio
from softseg_dist.numerics.raters import energy_distance, pairwise_dice

CUT = 0.5  # a sample's object is where it is at least this, as with the fixed threshold
VOXEL_MEASURES = ("entropy", "expected_entropy", "mutual_information", "variance")
Bits = npt.NDArray[np.uint8]  # [.. K bytes]: masks, eight voxels in a byte


def entropy(soft_map: Map) -> npt.NDArray[np.float64]:
    """Binary entropy per voxel in bits: -p log2 p - (1 - p) log2 (1 - p), in [0, 1].

    1 at p = 1/2, 0 at p = 0 and 1. That of the raters' mean measures their disagreement.

    >>> entropy(np.array([0.0, 0.5, 0.75, 1.0])).round(4)
    array([0.    , 1.    , 0.8113, 0.    ])
    """
    p = soft_map.astype(np.float64)
    return (entr(p) + entr(1 - p)) / np.log(2)


@dataclass(frozen=True, eq=False)
class Spread:
    """Statistics of T soft maps [N K *S] of one case, in the memory of a few maps for any T.

    `mean`, `expected_entropy` (the mean of the samples' entropies, in bits) and `mean_square` are [N K *S] float64; `volumes`
    [T K] are sums over voxels; `masks` [T K bytes] are the samples cut at 0.5.
    """

    mean: npt.NDArray[np.float64]
    expected_entropy: npt.NDArray[np.float64]
    mean_square: npt.NDArray[np.float64]
    volumes: npt.NDArray[np.float64]
    masks: Bits

    @classmethod
    def of(cls, samples: Iterable[Map]) -> Spread:
        """The statistics of soft maps [N K *S] in [0, 1], taken one after the other; at least one."""
        sums: npt.NDArray[np.float64] | None = None
        volumes, masks = [], []
        for sample in samples:
            exact = sample.astype(np.float64)
            parts = np.stack([exact, entropy(exact), np.square(exact)])
            sums = parts if sums is None else np.add(sums, parts, out=sums)
            volumes.append(np.moveaxis(exact, 1, 0).reshape(exact.shape[1], -1).sum(axis=1))
            masks.append(_packed(exact >= CUT))
        assert sums is not None, "a spread is that of at least one soft map"
        mean, expected, square = sums / len(volumes)
        return cls(mean, expected, square, np.stack(volumes), np.stack(masks))

    @property
    def num_samples(self) -> int:
        """T. Every comparison of samples with each other is NaN if there is only one."""
        return len(self.volumes)

    @property
    def entropy(self) -> npt.NDArray[np.float64]:
        """Predictive entropy [N K *S] in bits: that of the mean. Total uncertainty, of data and model."""
        return entropy(self.mean)

    @property
    def mutual_information(self) -> npt.NDArray[np.float64]:
        """Entropy of the mean minus the mean entropy [N K *S], in bits: 0 where samples agree, 1 where half are 0 and half 1.

        The uncertainty that more training data could remove, if samples are draws of the weights.
        Source: Houlsby et al. 2011, arXiv 1112.5745.
        """
        return self._of_several(np.maximum(self.entropy - self.expected_entropy, 0))

    @property
    def variance(self) -> npt.NDArray[np.float64]:
        """Mean squared distance of the samples from their mean [N K *S], in [0, 1/4]."""
        return self._of_several(np.maximum(self.mean_square - np.square(self.mean), 0))

    @property
    def volume_cv(self) -> PerClass:
        """Coefficient of variation of the soft volume per class [K]: standard deviation (T - 1) over mean; NaN if all are empty.

        Source: Roy et al., NeuroImage 195 (2019), doi 10.1016/j.neuroimage.2019.03.042, as the two measures below.
        """
        if self.num_samples == 1:
            return np.full(self.volumes.shape[1], np.nan)
        return ratio(self.volumes.std(axis=0, ddof=1), self.volumes.mean(axis=0))

    @property
    def pairwise_dice(self) -> PerClass:
        """Mean Dice of the pairs of samples per class [K], without pairs of empty ones: 1 if all are equal; NaN without a pair."""
        return np.array([pairwise_dice(_unpacked(of_class)) for of_class in np.moveaxis(self.masks, 1, 0)])

    @property
    def samples_iou(self) -> PerClass:
        """Voxels in every sample over voxels in any sample, per class [K]; NaN if all are empty."""
        bits = (np.bitwise_count(of.reduce(self.masks, axis=0)) for of in (np.bitwise_and, np.bitwise_or))
        everywhere, anywhere = (voxels.sum(axis=1, dtype=np.float64) for voxels in bits)
        return self._of_several(ratio(everywhere, anywhere))

    def ged2(self, raters: Map) -> PerClass:
        """Squared generalised energy distance of the samples from the raters [N R K *S], per class [K] (see `energy_distance`)."""
        theirs = np.stack([_packed(raters[:, r] >= CUT) for r in range(raters.shape[1])])
        both = np.moveaxis(np.concatenate([self.masks, theirs]), 1, 0)
        pairs = [np.split(_unpacked(of_class), [self.num_samples]) for of_class in both]
        return np.array([energy_distance(ours, others) for ours, others in pairs])

    def _of_several(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return values if self.num_samples > 1 else np.full_like(values, np.nan)


def uncertainty_rows(method: str, spread: Spread, raters: Map, classes: Sequence[str], scale: Scale) -> list[Measurement]:
    """All measurements of one case's samples, as listed at the top of this file, against the raters [N R K *S] in [0, 1].

    `method` begins the metrics' names; `scale` is that of the maps, `classes` are K names.
    """
    pair = Pair(spread.mean, raters.mean(axis=1), scale)
    space = (0, *range(2, pair.near.ndim))
    voxels = pair.near.sum(axis=space, dtype=np.float64)
    against_mean = {
        **{name: ratio(np.where(pair.near, getattr(spread, name), 0).sum(axis=space), voxels) for name in VOXEL_MEASURES},
        "volume_cv": spread.volume_cv,
        "pairwise_dice": spread.pairwise_dice,
        "samples_iou": spread.samples_iou,
        **{name: FORMULAS[name](pair) for name in ("dice_dml", "brier", "ece")},
    }
    against_raters = {"ged2": spread.ged2(raters)} if raters.shape[1] > 1 else {}
    return [
        Measurement(class_name, name, None, f"{method}_{metric}", float(values[k]))
        for name, found in (("mean", against_mean), ("raters", against_raters))
        for k, class_name in enumerate(classes)
        for metric, values in found.items()
    ]


def _packed(mask: npt.NDArray[np.bool_]) -> Bits:
    """[N K *S] -> [K bytes]."""
    return np.packbits(np.moveaxis(mask, 1, 0).reshape(mask.shape[1], -1), axis=1)


def _unpacked(masks: Bits) -> npt.NDArray[np.bool_]:
    """Masks [T bytes] as [T n], without bytes that are empty in all of them."""
    return np.unpackbits(masks[:, masks.any(axis=0)], axis=1).view(np.bool_)
