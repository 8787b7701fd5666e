"""Bodies with an analytic boundary and volume, and their exact partial volume in voxels.

A body is star-shaped around its centre (or centre line): a point q, in coordinates scaled by the body's half axes,
lies inside if |q| < radius(direction of q). A `Wobble` moves the boundary by a smooth random distance; that is what a
rater does.

Legend: P points, 3 coordinates x y z in mm; X Y Z voxels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Vector3 = tuple[float, float, float]

TRUTH_POINTS = (8, 8, 4)  # sample points per voxel and axis for the exact partial volume (volumes are right to 0.5 %)
RATER_POINTS = (4, 4, 2)  # where less will do: a rater's mask asks only whether the partial volume reaches 1/2
FAR = 3.0  # half axes: no rater draws an ellipsoid that large


@dataclass(frozen=True, eq=False)
class Wobble:
    """A smooth random function of direction: bias + sd sqrt(2/M) sum_m cos(waves_m . n + phases_m), in mm."""

    bias_mm: float
    sd_mm: float
    waves: Float64  # [M 3]
    phases: Float64  # [M]

    @classmethod
    def draw(cls, generator: np.random.Generator, bias_mm: float, sd_mm: float, num_waves: int = 6) -> Wobble:
        """Waves of about two periods around the body."""
        return cls(
            bias_mm, sd_mm, generator.normal(0, 2.0, (num_waves, 3)), generator.uniform(0, 2 * math.pi, num_waves)
        )

    def __call__(self, directions: Float64) -> Float64:
        """[P 3] -> [P]"""
        waves = np.cos(directions @ self.waves.T + self.phases).sum(axis=1)
        return self.bias_mm + self.sd_mm * math.sqrt(2 / len(self.phases)) * waves


class Body(Protocol):
    """A shape in space."""

    @property
    def volume_mm3(self) -> float:
        """The analytic volume (without a wobble)."""

    def inside(self, points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
        """[P 3] -> [P]"""


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """A lesion."""

    center_mm: Vector3
    half_axes_mm: Vector3

    @property
    def volume_mm3(self) -> float:
        """4/3 pi a b c."""
        return 4 / 3 * math.pi * math.prod(self.half_axes_mm)

    def inside(self, points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
        """See `Body.inside`. The direction of a wobble is that from the centre, plus the centre: lesions differ."""
        scaled = (points - self.center_mm) / self.half_axes_mm
        distance = np.linalg.norm(scaled, axis=1)
        inside = distance < 1
        if wobble is not None:
            near = np.flatnonzero(distance < FAR)
            directions = scaled[near] / np.maximum(distance[near], 1e-9)[:, None] + self.center_mm
            inside[near] = distance[near] < 1 + wobble(directions) / math.prod(self.half_axes_mm) ** (1 / 3)
        return inside


@dataclass(frozen=True, eq=False)
class Column:
    """A body along z: spinal cord or gray matter. Its section has radius sum_k a_k cos(k t) + b_k sin(k t) at angle t.

    The section is scaled by `half_axes_mm`, by (1 + taper z / height) along z, and its centre drifts by `drift` mm
    per mm of z.
    """

    height_mm: float
    center_mm: tuple[float, float]
    drift: tuple[float, float]
    half_axes_mm: tuple[float, float]
    taper: float
    cosines: Float64  # a_0, a_1, ...
    sines: Float64  # b_0 (unused), b_1, ...

    @property
    def volume_mm3(self) -> float:
        """Area pi (a_0^2 + sum_k (a_k^2 + b_k^2) / 2) of the section, times the integral of its scale squared."""
        section = math.pi * (self.cosines[0] ** 2 + ((self.cosines[1:] ** 2).sum() + (self.sines[1:] ** 2).sum()) / 2)
        return float(math.prod(self.half_axes_mm) * section * self.height_mm * (1 + self.taper**2 / 12))

    def inside(self, points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
        """See `Body.inside`."""
        z = points[:, 2]
        scale = 1 + self.taper * z / self.height_mm
        u, v = (
            (points[:, axis] - self.center_mm[axis] - self.drift[axis] * z) / (self.half_axes_mm[axis] * scale)
            for axis in (0, 1)
        )
        distance = np.hypot(u, v)
        turn = (u + 1j * v) / np.maximum(distance, 1e-9)  # e^(i t), so that its k-th power holds cos(k t) and sin(k t)
        radius = np.full(len(points), self.cosines[0])
        power = np.ones_like(turn)
        for a, b in zip(self.cosines[1:], self.sines[1:], strict=True):
            power *= turn
            radius += a * power.real + b * power.imag
        if wobble is not None:
            directions = np.stack([turn.real, turn.imag, 2 * z / self.height_mm], axis=1)
            radius += wobble(directions) / math.sqrt(math.prod(self.half_axes_mm))
        return distance < radius


def partial_volume(
    bodies: Sequence[Body],
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    points: Sequence[int] = TRUTH_POINTS,
    wobble: Wobble | None = None,
) -> Float32:
    """The share of each voxel that lies in the union of `bodies` [X Y Z], of a grid that is centred on the origin.

    Voxels that agree with their 26 neighbours (thick voxels are looked at in several places) are taken as pure; the
    others are sampled at `points` regular places per axis.
    """
    centers = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    grid = np.stack(np.meshgrid(*centers, indexing="ij"), axis=-1).reshape(-1, 3)
    coarse = [max(1, round(s / min(spacing_mm) / 2)) for s in spacing_mm]
    looks = [_union(bodies, grid + offset, wobble) for offset in _offsets(coarse, spacing_mm)]
    some, every = (combine(looks, axis=0).reshape(shape) for combine in (np.any, np.all))
    mixed = np.flatnonzero(ndimage.grey_dilation(some, (3, 3, 3)) != ndimage.grey_erosion(every, (3, 3, 3)))
    hits = np.zeros(len(mixed))
    for offset in _offsets(points, spacing_mm):
        hits += _union(bodies, grid[mixed] + offset, wobble)
    share = every.astype(np.float32).reshape(-1)
    share[mixed] = hits / math.prod(points)
    return share.reshape(shape)


def _offsets(points: Sequence[int], spacing_mm: Sequence[float]) -> Float64:
    """Regular places within a voxel, from its centre [prod(points) 3]."""
    places = [((np.arange(n) + 0.5) / n - 0.5) * s for n, s in zip(points, spacing_mm, strict=True)]
    return np.array(list(itertools.product(*places)))


def _union(bodies: Sequence[Body], points: Float64, wobble: Wobble | None) -> NDArray[np.bool_]:
    inside = np.zeros(len(points), dtype=bool)
    for body in bodies:
        inside |= body.inside(points, wobble)
    return inside
