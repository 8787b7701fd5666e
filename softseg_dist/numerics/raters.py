"""Agreement of raters, and whether a soft prediction expresses how far they differ.

Legend: M masks, R raters, *S space, n voxels; all maps are of one class.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
    """`energy_distance` of a soft map [*S] in [0, 1] from raters [R *S]: its samples are the level sets {p >= tau} of `LEVELS`.

    >>> ged2(np.array([1.0, 0.0]), np.array([[True, False], [False, False]]))  # 2 * .5 - 0 - .5
    0.5
    """
    return energy_distance(np.stack([prediction >= level for level in LEVELS]), raters)


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


def volume_crps(prediction: Values, volumes: npt.NDArray[np.floating]) -> float:
    """Continuous ranked probability score of a volume: E |X - v| - E |X - X'| / 2, the mean over the raters' volumes v [R].

    X is the volume of {p >= tau} for tau uniform on (0, 1], so P(X >= i voxels) is the i-th largest p, and the score is
    sum p^2 + v - 2 (sum of the v largest p). In voxels, not negative; of a hard map it is |X - v|. It is not proper for maps.

    Args:
        prediction: of any shape, in [0, 1].
        volumes: sums of the raters' masks, in voxels.

    Source: Gneiting and Raftery 2007 (doi 10.1198/016214506000001437).
    """
    num = min(prediction.size, int(volumes.max()) + 1)
    falling = np.sort(np.partition(prediction, -num, axis=None)[-num:])[::-1]
    largest = np.concatenate([[0.0], falling.cumsum(dtype=np.float64)])
    of_raters = volumes - 2 * np.interp(volumes, np.arange(num + 1), largest)
    return float(np.square(prediction, dtype=np.float64).sum() + of_raters.mean())


def _common_voxels(masks: Masks) -> npt.NDArray[np.float64]:
    """The number of voxels that each pair of masks [M *S] shares: [M M], with the sizes of the masks on the diagonal."""
    inside = masks[:, masks.any(axis=0)].astype(np.float64)
    return inside @ inside.T
