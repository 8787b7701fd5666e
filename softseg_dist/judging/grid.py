"""Where the items of a case lie in space, so that its slices can be measured as the volume that they are.

Legend: N items (slices in 2D, 1 in 3D), *S axes of an item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Grid:
    """The grid of a case.

    In 2D the slices make a volume: surfaces and lesions go through it, and the distance of two slices is the volume of
    a voxel over its area. Slices that were left out (slices="labelled") count as empty, as no rater labelled them: the
    others keep their distances, and nothing reaches across the gap. A single slice has no next one: it stays a plane.

    Args:
        spacing_mm: size of a voxel along each axis of an item, in mm.
        voxel_mm3: volume of a voxel (in 2D with the distance of the slices), in mm3.
        slices: in 2D the place of each item along the slice axis, rising; None in 3D.
    """

    spacing_mm: tuple[float, ...]
    voxel_mm3: float
    slices: tuple[int, ...] | None = None

    @property
    def is_stack(self) -> bool:
        """Whether the items are several slices of one volume."""
        return self.slices is not None and len(self.slices) > 1

    @property
    def volume_spacing_mm(self) -> tuple[float, ...]:
        """The spacing of `volume`: of *S, and before it the distance of the slices if there are several."""
        if not self.is_stack:
            return self.spacing_mm
        return (self.voxel_mm3 / math.prod(self.spacing_mm), *self.spacing_mm)

    def volume(self, items: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Maps [N *S] as one volume: [*S], or [Z *S] with Z slices from the first to the last, 0 where one is left out."""
        if not self.is_stack or self.slices is None:
            return items[0]
        places = np.asarray(self.slices) - self.slices[0]
        if places[-1] + 1 == len(items):
            return items
        volume = np.zeros((places[-1] + 1, *items.shape[1:]), dtype=items.dtype)
        volume[places] = items
        return volume


def bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds all of `mask` [*S]; of no voxel if it is empty."""
    found = ndimage.find_objects(mask.view(np.uint8))
    return found[0] if found else (slice(0, 0),) * mask.ndim
