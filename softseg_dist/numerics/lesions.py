"""Lesions found and missed: connected components of one mask that the other mask hits.

A lesion is a component of voxels that touch by faces, edges or corners: 26 neighbours in a volume, 8 in a plane. It
counts as found if at least 3 of its voxels, or all of a smaller one, lie in the other mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]  # [*S], 2 or 3 axes

ENOUGH_VOXELS = 3
SIZES = {"lt20": (1, 19), "20to100": (20, 100), "gt100": (101, np.inf)}  # voxels of the true lesion, both ends included


class Components(NamedTuple):
    """The connected components of a mask: `mask` and `labels` [*S], 0 outside and 1 to L inside; `sizes` [L] in voxels."""

    mask: Mask
    labels: npt.NDArray[np.integer]
    sizes: npt.NDArray[np.intp]


def components(mask: Mask) -> Components:
    """The components of `mask`; labelled once, they can be compared with those of many others."""
    labels, number = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return Components(mask, labels, np.bincount(labels[mask], minlength=number + 1)[1:])


def lesion_metrics(prediction: Components, reference: Components) -> dict[str, float]:
    """How many lesions were found, and how many of the predicted ones are none.

    `lesions_true` and `lesions_found` count components of the reference, in all and by their size (fewer than 20, 20 to
    100, more than 100 voxels); `lesions_predicted` and `lesions_false` those of the prediction, false if the reference
    does not hit them by the same rule. `lesion_sensitivity` is found / true, NaN without a true lesion; `lesion_fdr`, the
    false discovery rate, is false / predicted, NaN without a predicted one. One prediction may find several lesions.
    """
    found = _hit(reference, prediction)
    false = int(np.count_nonzero(~_hit(prediction, reference)))
    counts = {
        "lesions_true": len(found),
        "lesions_found": int(np.count_nonzero(found)),
        "lesions_predicted": len(prediction.sizes),
        "lesions_false": false,
    }
    for name, (smallest, largest) in SIZES.items():
        of_size = (reference.sizes >= smallest) & (reference.sizes <= largest)
        counts[f"lesions_true_{name}"] = int(np.count_nonzero(of_size))
        counts[f"lesions_found_{name}"] = int(np.count_nonzero(of_size & found))
    return {
        **counts,
        "lesion_sensitivity": _share(counts["lesions_found"], counts["lesions_true"]),
        "lesion_fdr": _share(counts["lesions_false"], counts["lesions_predicted"]),
    }


def _hit(lesions: Components, other: Components) -> npt.NDArray[np.bool_]:
    """Which of `lesions` [L] the mask of `other` hits."""
    common = np.bincount(lesions.labels[lesions.mask & other.mask], minlength=len(lesions.sizes) + 1)[1:]
    hit: npt.NDArray[np.bool_] = common >= np.minimum(ENOUGH_VOXELS, lesions.sizes)
    return hit


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
