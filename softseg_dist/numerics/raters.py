"""Agreement of raters, and whether a soft prediction expresses their disagreement.

Legend: M masks, R raters, *S space, n voxels; all maps are of one class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

Masks = npt.NDArray[np.bool_]  # [M *S] or [R *S]
Values = npt.NDArray[np.floating]

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the level sets of a soft map at these values are its equally likely samples


def pairwise_dice(masks: Masks) -> float:
    """Mean Dice over the pairs of masks [M *S], in [0, 1]: the agreement of raters.

    Pairs of empty masks are left out; NaN if no pair is left. The Dice of an empty and another mask is 0.
    """
    common = _common_voxels(masks)
    pairs = np.triu_indices(len(masks), k=1)
    sizes = np.add.outer(common.diagonal(), common.diagonal())[pairs]
    dice = 2 * common[pairs][sizes > 0] / sizes[sizes > 0]
    return float(dice.mean()) if dice.size else float("nan")


def ged2(prediction: Values, raters: Masks) -> float:
    """`energy_distance` of a soft map [*S] in [0, 1] from raters [R *S]: its samples are the level sets {p > tau}.

    tau = .1, .3, .5, .7, .9.

    >>> ged2(np.array([1.0, 0.0]), np.array([[True, False], [False, False]]))  # 2 * .5 - 0 - .5
    0.5
    """
    return energy_distance(np.stack([prediction > level for level in LEVELS]), raters)


def energy_distance(samples: Masks, raters: Masks) -> float:
    """Squared generalised energy distance: 2 E d(S, Y) - E d(S, S') - E d(Y, Y'), with d = 1 - IoU.

    S are `samples` [M *S] of a prediction, Y the masks of the `raters` [R *S]. Expectations are over independent draws with
    replacement, so that pairs of a mask with itself count. In [0, 2]: 0 if both have the same distribution, 2 if all raters
    agree, all samples agree, and the two do not overlap. Two empty masks: d = 0.

    Source: Szekely and Rizzo 2013 (doi 10.1016/j.jspi.2013.03.018); Kohl et al. 2018, arXiv 1806.05034.
    """
    common = _common_voxels(np.concatenate([samples, raters]))
    union = np.add.outer(common.diagonal(), common.diagonal()) - common
    distance = 1 - np.divide(common, union, out=np.ones_like(common), where=union > 0)
    s, y = slice(len(samples)), slice(len(samples), None)
    return float(2 * distance[s, y].mean() - distance[s, s].mean() - distance[y, y].mean())


def entropy_disagreement_correlation(prediction: Values, rater_mean: Values) -> float:
    """Spearman's correlation of the entropy of p with that of the raters' mean y, over voxels; in [-1, 1].

    1: the map is least certain exactly where raters differ most. NaN where either entropy is constant. The entropy of a
    binary event rises with min(p, 1 - p), whose ranks are therefore the same and need no logarithm.

    Args:
        prediction: [n] in [0, 1].
        rater_mean: [n] in [0, 1].
    """
    uncertainty, disagreement = (np.minimum(values, 1 - values) for values in (prediction, rater_mean))
    disagreement = disagreement.round(6)  # 1/3 and 1 - 2/3 tie, although their last digits differ
    if not uncertainty.size or np.ptp(uncertainty) == 0 or np.ptp(disagreement) == 0:
        return float("nan")
    return float(stats.spearmanr(uncertainty, disagreement).statistic)


def _common_voxels(masks: Masks) -> npt.NDArray[np.float64]:
    """The number of voxels that each pair of masks [M *S] shares: [M M], with the sizes of the masks on the diagonal."""
    inside = masks[:, masks.any(axis=0)].astype(np.float64)
    return inside @ inside.T
