"""The raters' own masks: as they were drawn, on the grid of the file, never resampled. Predictions are judged against them.

Packed: what lies outside the box around all masks of a case is left out; binary masks are bits, others float32.

Legend: R raters, K classes, X Y Z canonical (RAS+) voxels of the file, *box the voxels of the box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from softseg_dist.data.cases import CaseData
from softseg_dist.data.geometry import Float32, Geometry

Masks = NDArray[np.bool_] | Float32


@dataclass(frozen=True, eq=False)
class OwnMasks:
    """The masks of a case, unpacked on every access: bool if all that are asked for are binary, else float32 in [0, 1].

    In voxels to ignore they are NaN. `geometry` is the file's; `num_raters` R, `num_classes` K; `box` (start, stop) along X, Y
    and Z, which is (0, 0) three times if nobody drew anything; `binary` says it of each mask, the raters' first, each with its
    classes, then the truth's; `packed` [bytes] has them in this order.
    """

    geometry: Geometry
    num_raters: int
    num_classes: int
    box: tuple[tuple[int, int], ...]
    binary: tuple[bool, ...]
    packed: NDArray[np.uint8]

    @classmethod
    def of(cls, data: CaseData) -> Self:
        """Pack the raters' masks of a case, and its truth where that is known."""
        num_raters, num_classes = data.raters.shape[:2]
        masks = [*data.raters.reshape(-1, *data.raters.shape[2:]), *(() if data.truth is None else data.truth)]
        box = _box_of(masks, data.raters.shape[2:])
        inside = tuple(slice(*edges) for edges in box)
        parts = [mask[inside] for mask in masks]
        binary = tuple(bool(((part == 0) | (part == 1)).all()) for part in parts)
        pairs = zip(parts, binary, strict=True)
        flat = [np.packbits(part != 0) if bits else np.frombuffer(np.float32(part).tobytes(), np.uint8) for part, bits in pairs]
        packed = np.concatenate([*flat, np.empty(0, np.uint8)])  # an image to predict has no mask
        return cls(data.geometry, num_raters, num_classes, box, binary, packed)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], geometry: Geometry, packed: NDArray[np.uint8]) -> Self:
        """The inverse of `to_dict`."""
        box = tuple((start, stop) for start, stop in fields["box"])
        return cls(geometry, fields["num_raters"], fields["num_classes"], box, tuple(fields["binary"]), packed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what is neither the geometry nor packed."""
        return {name: getattr(self, name) for name in ("num_raters", "num_classes", "box", "binary")}

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel of the file."""
        return float(abs(np.linalg.det(self.geometry.affine[:3, :3])))

    @property
    def raters(self) -> Masks:
        """What each rater drew [R K *box]."""
        masks = self._unpacked(0, self.num_raters * self.num_classes)
        return masks.reshape(self.num_raters, self.num_classes, *masks.shape[1:])

    @property
    def truth(self) -> Masks | None:
        """The truth [K *box] where it is known, as that of a phantom is."""
        num_drawn = self.num_raters * self.num_classes
        return self._unpacked(num_drawn, len(self.binary)) if len(self.binary) > num_drawn else None

    @property
    def mean_volumes_mm3(self) -> tuple[float, ...]:
        """The mean over the raters of what they drew of each class [K]; 0 without raters."""
        sums = np.nan_to_num(self.raters).sum(axis=(2, 3, 4), dtype=np.float64).sum(axis=0)
        return tuple((sums * self.voxel_mm3 / max(self.num_raters, 1)).tolist())

    def _unpacked(self, first: int, end: int) -> Masks:
        extent = tuple(stop - start for start, stop in self.box)
        num_voxels = math.prod(extent)
        sizes = [math.ceil(num_voxels / 8) if is_binary else 4 * num_voxels for is_binary in self.binary]
        begins = [0, *itertools.accumulate(sizes)]
        masks = np.empty((end - first, num_voxels), bool if all(self.binary[first:end]) else np.float32)
        for mask, number in zip(masks, range(first, end), strict=True):
            data = self.packed[begins[number] : begins[number + 1]]
            mask[:] = np.unpackbits(data, count=num_voxels) if self.binary[number] else data.view(np.float32)
        return masks.reshape(end - first, *extent)


def _box_of(masks: Sequence[Float32], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) along each axis around all voxels that are not 0 in some mask."""
    union = np.zeros(shape, bool)
    for mask in masks:
        union |= mask != 0
    plane: NDArray[np.bool_] = np.logical_or.reduce(union, axis=0)
    profiles = map(np.flatnonzero, (union.reshape(len(union), -1).any(axis=1), plane.any(axis=1), plane.any(axis=0)))
    return tuple((int(found[0]), int(found[-1]) + 1) if found.size else (0, 0) for found in profiles)
