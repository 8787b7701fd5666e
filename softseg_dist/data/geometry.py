"""Where a volume lies in the world: shape, affine, and the way between stored and canonical (RAS+) axis order."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from softseg_dist.words import dimensions

Shape3 = tuple[int, int, int]
Affine4 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SAME_GRID_TOLERANCE = 0.25  # of a voxel, at the worst corner: masks saved by other tools round their affine (0.15 seen)
SAME_LENGTH = 1.01  # ratio of voxel sizes that count as equal


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a file as it is stored.

    `shape`: voxels along the stored axes i, j, k. `affine` [4 4]: voxel index -> mm, x to the right, y to the front,
    z up. Canonical means: the axes permuted and flipped so that they run as near to right, front and up as they can
    (RAS+), as nibabel's `as_closest_canonical` does; nothing is rotated or resampled.
    """

    shape: Shape3
    affine: Affine4

    @cached_property
    def order(self) -> Shape3:
        """For each of right, front, up: the stored axis that runs along it."""
        directions = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)
        best = max(itertools.permutations(range(3)), key=lambda p: sum(abs(directions[w, p[w]]) for w in range(3)))
        return cast(Shape3, best)

    @cached_property
    def flips(self) -> tuple[bool, ...]:
        """For each canonical axis: True if the stored axis runs the other way."""
        return tuple(bool(self.affine[world, stored] < 0) for world, stored in enumerate(self.order))

    @property
    def canonical_shape(self) -> Shape3:
        """Voxels along the canonical axes [X Y Z]."""
        x, y, z = (self.shape[stored] for stored in self.order)
        return x, y, z

    @property
    def canonical_affine(self) -> Affine4:
        """Canonical voxel index -> mm [4 4]."""
        to_stored = np.zeros((4, 4))
        to_stored[3, 3] = 1.0
        for axis, (stored, flipped) in enumerate(zip(self.order, self.flips, strict=True)):
            to_stored[stored, axis] = -1.0 if flipped else 1.0
            to_stored[stored, 3] = self.shape[stored] - 1 if flipped else 0.0
        return self.affine @ to_stored

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        """Voxel size along the canonical axes."""
        return spacing_of(self.canonical_affine)

    @property
    def thickest(self) -> int:
        """The canonical axis along which voxels are longest, of equal ones the last; an axis of one voxel if there is one."""
        lengths = [math.inf if n == 1 else mm for n, mm in zip(self.canonical_shape, self.spacing_mm, strict=True)]
        return max(axis for axis, length in enumerate(lengths) if length * SAME_LENGTH >= max(lengths))

    @property
    def orientation(self) -> str:
        """The stored axes by where they run to, as in "LAS"."""
        ends = zip(self.order, ("RL", "AP", "SI"), self.flips, strict=True)
        letters = {stored: pair[flipped] for stored, pair, flipped in ends}
        return "".join(letters[axis] for axis in range(3))

    def to_canonical(self, stored: NDArray[Any]) -> NDArray[Any]:
        """A view [... X Y Z] of an array [... i j k]."""
        lead = stored.ndim - 3
        return self._flipped(stored.transpose(*range(lead), *(lead + axis for axis in self.order)))

    def from_canonical(self, canonical: NDArray[Any]) -> NDArray[Any]:
        """A view [... i j k] of an array [... X Y Z]: the inverse of `to_canonical`."""
        lead = canonical.ndim - 3
        return self._flipped(canonical).transpose(*range(lead), *(lead + self.order.index(axis) for axis in range(3)))

    def _flipped(self, volume: NDArray[Any]) -> NDArray[Any]:
        x, y, z = (slice(None, None, -1 if flipped else 1) for flipped in self.flips)
        return volume[..., x, y, z]

    def difference(self, other: Geometry) -> str:
        """How the two grids differ in canonical order, in words, or "" if they are the same within `SAME_GRID_TOLERANCE`."""
        if self.canonical_shape != other.canonical_shape:
            return f"shape {dimensions(other.canonical_shape)} against {dimensions(self.canonical_shape)}"
        if apart := corners_apart_mm(self.canonical_shape, self.canonical_affine, other.canonical_affine):
            return f"affines put one corner {apart:.3g} mm apart (voxel {dimensions(self.spacing_mm)} mm)"
        return ""


def spacing_of(affine: Affine4) -> tuple[float, ...]:
    """Voxel size in mm along each axis of `affine`."""
    return tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))


def corners_apart_mm(shape: Shape3, one: Affine4, other: Affine4) -> float:
    """The largest distance between a corner voxel's places under two affines; 0 within `SAME_GRID_TOLERANCE` of the first one's."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))], dtype=np.float64)
    apart = float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
    return apart if apart > SAME_GRID_TOLERANCE * min(spacing_of(one)) else 0.0
