"""Judging: from a soft map on the grid of its file, and what each rater drew there, to rows of the results table.

Fits, held-out subjects, ensembles and the predictions of other programs are all judged here. No reference is resampled.

Legend: R raters, K classes, X Y Z canonical (RAS+) voxels of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softseg_dist.data.geometry import Float32
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.judging.rows import Measurement, Yardstick, case_rows
from softseg_dist.numerics.metrics import Scale, bounding_box, reach_of

Region = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class References:
    """What a case is judged against, in the `region` of the file's grid that holds all of it: maps are 0 outside, too.

    `maps`: "mean" of the raters, each rater by name if there are several, "truth" where it is known: [1 K *S] each, *S the axes of
    the file of more than one voxel. `raters` [1 R K *S]; `scale` is that of the file.
    """

    region: Region
    maps: dict[str, NDArray[Any]]
    raters: NDArray[Any]
    scale: Scale

    def part(self, maps: Float32) -> Float32:
        """Maps [K X Y Z] of the file's grid in the region [1 K *S]."""
        return maps[(slice(None), *self.region)].reshape(1, len(maps), *self.raters.shape[3:])


def judge(
    maps: Float32, own: OwnMasks, rater_names: Sequence[str], yardstick: Yardstick, thresholds: Sequence[float]
) -> list[Measurement]:
    """All measurements of one case, as `case_rows` lists them.

    Args:
        maps: soft maps or masks [K X Y Z] in [0, 1] on the grid of the file, in canonical axes.
        own: what the raters drew.
        rater_names: R names.
        yardstick: classes, volumes and metrics.
        thresholds: those of the masks.
    """
    references = references_of(own, rater_names, yardstick, maps)
    return case_rows(references.part(maps), references.maps, yardstick, thresholds, references.scale)


def references_of(own: OwnMasks, rater_names: Sequence[str], yardstick: Yardstick, maps: Float32) -> References:
    """What `maps` [K X Y Z] are judged against. A metric of the user sees the whole image, the others what is not empty."""
    whole_mm, whole = own.geometry.spacing_mm, own.geometry.canonical_shape
    axes = [axis for axis, n in enumerate(whole) if n > 1] or [0, 1]  # a single slice is a plane
    spacing_mm, shape = tuple(whole_mm[axis] for axis in axes), tuple(whole[axis] for axis in axes)
    scale = Scale(own.voxel_mm3, yardstick.mean_volumes_mm3, spacing_mm, shape)
    region = tuple(slice(0, n) for n in whole) if yardstick.metrics else _region(maps, own)
    size = tuple(region[axis].stop - region[axis].start for axis in axes)

    def inside(masks: NDArray[Any]) -> NDArray[Any]:
        """[... *box] -> [1 ... *S]."""
        placed = np.zeros((*masks.shape[:-3], *(part.stop - part.start for part in region)), masks.dtype)
        x, y, z = (slice(start - part.start, stop - part.start) for (start, stop), part in zip(own.box, region, strict=True))
        placed[..., x, y, z] = masks
        return placed.reshape(1, *masks.shape[:-3], *size)

    raters, truth = inside(own.raters), own.truth
    references = {"mean": raters.mean(axis=1, dtype=np.float32)}
    if len(rater_names) > 1:
        references |= {name: raters[:, r] for r, name in enumerate(rater_names)}
    if truth is not None:
        references["truth"] = inside(truth)
    return References(region, references, raters, scale)


def _region(maps: Float32, own: OwnMasks) -> Region:
    """The box around everything that is not 0 in a map or a mask, with the neighbourhood that counts for calibration."""
    shape = own.geometry.canonical_shape
    found = np.zeros(shape, dtype=np.bool_)
    found[tuple(slice(*edges) for edges in own.box)] = True
    for soft_map in maps:
        found |= soft_map > 0
    parts = zip(bounding_box(found), reach_of(own.geometry.spacing_mm), shape, strict=True)
    return tuple(slice(max(0, part.start - reach), min(n, part.stop + reach)) for part, reach, n in parts)
