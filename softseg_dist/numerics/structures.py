"""Surfaces and lesions: the distance between the surfaces of two masks, and the lesions that one finds of the other.

Legend: *S space (2 or 3 axes), L lesions. The surface of a mask is made of its voxels that share a face with the background,
or with the end of the image. Edges and surface distances are MONAI's.

A lesion is a connected component of voxels that touch by faces, edges or corners. Lesions of two masks are matched one to one,
greedily by their overlap, so that one blob over everything finds one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]  # [*S], 2 or 3 axes

TOLERANCE_MM = 1.0
MOSTLY_SURFACE = 0.05  # share of surface voxels from which a distance transform is faster than a k-d tree
SURFACE_METRICS = ("hd95_mm", "asd_mm", "surface_dice_1mm")


def surface_metrics(
    prediction: Mask, reference: Mask, spacing_mm: Sequence[float], diagonal_mm: float | None = None
) -> dict[str, float]:
    """Distances between the surfaces of two masks [*S].

    With d(a, B) the distance of the surface voxel a of one mask to the nearest one of the other: `hd95_mm` is the larger of the two
    directed 95th percentiles of d, `asd_mm` the mean of d over the surface voxels of both (average symmetric surface distance),
    `surface_dice_1mm` the share of those with d <= 1 mm, in [0, 1]. Equal masks: 0, 0, 1. An empty reference has no surface: NaN.
    An empty prediction of one that is not empty gets the worst: both distances are the diagonal of the image, the Dice is 0.

    Args:
        prediction, reference: masks on one grid.
        spacing_mm: size of a voxel along each axis, in mm.
        diagonal_mm: of the image, if the masks are a part of it.

    Source: MONAI 1.6, `compute_hausdorff_distance`, `compute_average_surface_distance`, `compute_surface_dice`; the
    last one is by Nikolov et al. 2021 (doi 10.2196/26151), here with voxels of equal weight.
    """
    if not reference.any():
        return dict.fromkeys(SURFACE_METRICS, float("nan"))
    if not prediction.any():
        far = diagonal_mm or math.hypot(*(n * mm for n, mm in zip(reference.shape, spacing_mm, strict=True)))
        return dict(zip(SURFACE_METRICS, (far, far, 0.0), strict=True))
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
SIZES = {"lt20": (1, 19), "20to100": (20, 100), "gt100": (101, np.inf)}  # voxels of a lesion, both ends included


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

    Which lesions match is in docs/yardstick.md. `lesions_true` and `lesions_found` count those of the reference,
    `lesions_predicted` and `false_lesions` the predicted ones; each also by the size of the lesion. `lesion_sensitivity` is found /
    true, `lesion_fdr`, the false discovery rate, is false / predicted (0 without any), `lesion_f1` is 2 found / (true + predicted).
    All three are NaN without a lesion in the reference.
    """
    found, false = _matched(prediction, reference)
    counts = (
        _by_size("lesions_true", reference.sizes)
        | _by_size("lesions_found", reference.sizes[found])
        | _by_size("lesions_predicted", prediction.sizes)
        | _by_size("false_lesions", prediction.sizes[false])
    )
    true, predicted, num = len(found), len(false), int(np.count_nonzero(found))
    shares = num / max(true, 1), (predicted - num) / max(predicted, 1), 2 * num / max(true + predicted, 1)
    names = "lesion_sensitivity", "lesion_fdr", "lesion_f1"
    return counts | {name: share if true else float("nan") for name, share in zip(names, shares, strict=True)}


def _matched(prediction: Components, reference: Components) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which lesions of the reference are found, and which predicted ones are false."""
    both, width = prediction.mask & reference.mask, len(prediction.sizes) + 1
    shared, overlaps = np.unique(reference.labels[both].astype(np.int64) * width + prediction.labels[both], return_counts=True)
    true, predicted = shared // width - 1, shared % width - 1
    enough = overlaps >= np.minimum(np.minimum(reference.sizes[true], prediction.sizes[predicted]), ENOUGH_VOXELS)
    found, false = np.zeros(len(reference.sizes), dtype=np.bool_), np.ones(len(prediction.sizes), dtype=np.bool_)
    for at in np.lexsort((predicted, true, -overlaps)):
        i, j = true[at], predicted[at]
        if enough[at] and not found[i] and false[j]:
            found[i], false[j] = True, False
    return found, false


def _by_size(name: str, sizes: npt.NDArray[np.intp]) -> dict[str, float]:
    within = {f"{name}_{size}": (sizes >= low) & (sizes <= high) for size, (low, high) in SIZES.items()}
    return {name: float(len(sizes))} | {key: float(np.count_nonzero(inside)) for key, inside in within.items()}
