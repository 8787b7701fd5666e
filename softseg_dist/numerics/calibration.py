"""Are predictions right as often as they say? Reliability tables against soft references.

Maps are [N K *S]: N items (slices in 2D, 1 in 3D), K classes, *S space; n are the voxels that count, of one class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating]

NUM_BINS = 10
NEIGHBOURHOOD_RADIUS = 3  # voxels, along every spatial axis: a rim of background around each object


class Reliability(NamedTuple):
    """A reliability table: per bin [10] the number of voxels, the sum of p and the sum of y over them.

    Sums, not means, so that the tables of several cases add up to the table of all. In bin b, b/10 <= p < (b+1)/10; the
    last one holds p = 1, too. A calibrated map has equal sums in every bin.
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

    The easy background far away would hide everything. Items do not reach into one another.
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
