"""Surfaces and lesions: the distance between the surfaces of two masks, and the lesions that one finds of the other.

Legend: *S space (2 or 3 axes), L lesions. The surface of a mask is made of its voxels that share a face with the background,
or with the end of the image. Edges and surface distances are MONAI's.

A lesion is a connected component of voxels that touch by faces, edges or corners: 26 neighbours in a volume, 8 in a plane.
It counts as found if at least 3 of its voxels, or all of a smaller one, lie in the other mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]  # [*S], 2 or 3 axes

TOLERANCE_MM = 1.0
MOSTLY_SURFACE = 0.05  # share of surface voxels from which a distance transform is faster than a k-d tree
SURFACE_METRICS = ("hd95_mm", "asd_mm", "surface_dice_1mm")


def surface_metrics(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Distances between the surfaces of two masks [*S]; all are NaN if a mask is empty, as it has no surface.

    With d(a, B) the distance of the surface voxel a of one mask to the nearest one of the other: `hd95_mm` is the larger of the two
    directed 95th percentiles of d, `asd_mm` the mean of d over the surface voxels of both (average symmetric surface distance),
    `surface_dice_1mm` the share of those with d <= 1 mm, in [0, 1]. Equal masks: 0, 0, 1.

    Args:
        prediction, reference: masks on one grid.
        spacing_mm: size of a voxel along each axis, in mm.

    Source: MONAI 1.6, `compute_hausdorff_distance`, `compute_average_surface_distance`, `compute_surface_dice`; the
    last one is by Nikolov et al. 2021 (doi 10.2196/26151), here with voxels of equal weight.
    """
    if not (prediction.any() and reference.any()):
        return dict.fromkeys(SURFACE_METRICS, float("nan"))
    # Importing monai takes seconds, which code that only reads the names of metrics need not wait for.
    from monai.metrics.utils import get_mask_edges

    predicted, true = get_mask_edges(prediction, reference, crop=False)
    directed = [_distances_mm(a, b, spacing_mm) for a, b in ((predicted, true), (true, predicted))]
    both = np.concatenate(directed)
    return {
        "hd95_mm": float(max(np.percentile(distances, 95) for distances in directed)),
        "asd_mm": float(both.mean(dtype=np.float64)),
        "surface_dice_1mm": float((both <= TOLERANCE_MM).mean()),
    }


def _distances_mm(surface: Mask, other: Mask, spacing_mm: Sequence[float]) -> npt.NDArray[np.float32]:
    """The distance from each voxel of `surface` to the nearest one of `other`.

    MONAI uses a k-d tree, which takes minutes for a volume full of noise; a distance transform takes the same time for all. The
    tree is built with the next float after a coordinate. After 0 that is denormal, and crashes a fit, whose process flushes
    denormals to 0. So voxel coordinates start at 1.
    """
    from monai.metrics.utils import get_surface_distance

    if np.count_nonzero(surface) > MOSTLY_SURFACE * surface.size:
        return ndimage.distance_transform_edt(~other, sampling=spacing_mm)[surface].astype(np.float32)
    from_one = [np.pad(mask, [(1, 0)] * mask.ndim) for mask in (surface, other)]
    return get_surface_distance(*from_one, spacing=spacing_mm)


ENOUGH_VOXELS = 3
SIZES = {"lt20": (1, 19), "20to100": (20, 100), "gt100": (101, np.inf)}  # voxels of the true lesion, both ends included


class Components(NamedTuple):
    """The connected components of a mask: `mask` and `labels` [*S], 0 outside and 1 to L inside; `sizes` [L] in voxels."""

    mask: Mask
    labels: npt.NDArray[np.integer]
    sizes: npt.NDArray[np.intp]


def components(mask: Mask) -> Components:
    """The components of `mask`, to be compared with those of any number of other masks."""
    labels, number = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
    return Components(mask, labels, np.bincount(labels[mask], minlength=number + 1)[1:])


def lesion_metrics(prediction: Components, reference: Components) -> dict[str, float]:
    """How many lesions were found, and how many of the predicted ones are false.

    `lesions_true` and `lesions_found` count components of the reference, in total and by size (fewer than 20, 20 to 100, more than
    100 voxels). `lesions_predicted` and `lesions_false` count those of the prediction; one is false if the reference does not find
    it by the same rule. `lesion_sensitivity` is found / true, NaN without a true lesion; `lesion_fdr`, the false discovery rate, is
    false / predicted, NaN without a predicted one. One predicted component may find several lesions.
    """
    found = _found(reference, prediction)
    false = int(np.count_nonzero(~_found(prediction, reference)))
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


def _found(lesions: Components, other: Components) -> npt.NDArray[np.bool_]:
    """Which of `lesions` the mask of `other` finds [L]."""
    common = np.bincount(lesions.labels[lesions.mask & other.mask], minlength=len(lesions.sizes) + 1)[1:]
    found: npt.NDArray[np.bool_] = common >= np.minimum(ENOUGH_VOXELS, lesions.sizes)
    return found


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
