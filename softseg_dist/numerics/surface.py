"""How far the surfaces of two masks are apart, in mm: MONAI's edges and distances, wrapped once.

The surface of a mask is made of its voxels that touch the background, or the end of the image, with a face.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]  # [*S], 2 or 3 axes

TOLERANCE_MM = 1.0
MOSTLY_SURFACE = 0.05  # share of the voxels from which a distance transform is faster than a tree of points
SURFACE_METRICS = ("hd95_mm", "asd_mm", "surface_dice_1mm")


def surface_metrics(prediction: Mask, reference: Mask, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Distances between the surfaces of two masks [*S]; NaN, all of them, where a mask is empty: it has no surface.

    With d(a, B) the distance of the surface voxel a of one mask to the nearest one of the other:
    `hd95_mm` is the larger of the two directed 95th percentiles of d, `asd_mm` the mean of d over the surface voxels of
    both (average symmetric surface distance), `surface_dice_1mm` the share of those with d <= 1 mm, in [0, 1]. Equal
    masks: 0, 0, 1.

    Args:
        prediction, reference: masks on one grid.
        spacing_mm: size of a voxel along each axis, in mm.

    Source: MONAI 1.6, `compute_hausdorff_distance`, `compute_average_surface_distance`, `compute_surface_dice`; the
    last one is by Nikolov et al. 2021 (doi 10.2196/26151), here with voxels of equal weight.
    """
    if not (prediction.any() and reference.any()):
        return dict.fromkeys(SURFACE_METRICS, float("nan"))
    # Importing monai takes seconds, and reading the names of metrics should not pay them.
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
    """From each voxel of `surface` to the nearest one of `other`.

    MONAI asks a tree of points, which takes minutes for a volume full of noise; a distance transform does not mind. It is built
    by the next float after a coordinate: after 0 that is denormal, and a fit, whose process takes those for 0, would die of it.
    So all voxels are counted from 1.
    """
    from monai.metrics.utils import get_surface_distance

    if np.count_nonzero(surface) > MOSTLY_SURFACE * surface.size:
        return ndimage.distance_transform_edt(~other, sampling=spacing_mm)[surface].astype(np.float32)
    from_one = [np.pad(mask, [(1, 0)] * mask.ndim) for mask in (surface, other)]
    return get_surface_distance(*from_one, spacing=spacing_mm)
