"""Resampling one axis at a time, by weights: linear, area or nearest, never a spline (splines leave [0, 1]).

"area" and "average" weigh by the share of a new voxel that each old one covers, on axes that get coarser. At the border "area"
counts what lies outside the old grid as 0, and "average" leaves it out, so that an image does not get darker. On axes that get
finer "average" is linear, and "area" the mean of that over each new voxel: it keeps the sum of value x voxel size on every axis.

Both grids share their centre, and the new one covers the field of view of the old one: num_out = ceil(num_in * r_in / r_out).
So new voxel j is centred at old index x_j = (j - (num_out - 1) / 2) * step + (num_in - 1) / 2, with step = r_out / r_in, and x_j
never leaves [-1/2, num_in - 1/2].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softseg_dist.data.geometry import Float32, Float64

Method = Literal["linear", "area", "average", "nearest"]

SAME_STEP = 0.05  # voxels: grids that drift apart by less than this from the centre to the edge are taken as one


@dataclass(frozen=True)
class Axis:
    """One axis of a grid, resampled and then cropped or padded.

    `num_in` voxels of `spacing_in_mm` become `num_resampled` of `spacing_mm`, of which the window of `size` voxels
    from index `start` on is kept; `start` may be negative and the window may reach beyond the end.
    """

    num_in: int
    spacing_in_mm: float
    num_resampled: int
    spacing_mm: float
    start: int
    size: int

    @classmethod
    def whole(cls, num_in: int, spacing_in_mm: float, spacing_mm: float | None = None) -> Axis:
        """The axis resampled to `spacing_mm` (None: as it is) and kept whole."""
        if spacing_mm is None or abs(spacing_mm / spacing_in_mm - 1) * num_in / 2 < SAME_STEP:
            return cls(num_in, spacing_in_mm, num_in, spacing_in_mm, 0, num_in)
        num = max(1, math.ceil(num_in * spacing_in_mm / spacing_mm - 1e-6))  # 1e-6: 35 * 1.0 / 0.7 is 50, not 51
        return cls(num_in, spacing_in_mm, num, spacing_mm, 0, num)

    def window(self, size: int, center: float) -> Axis:
        """The axis cropped or padded to `size` voxels around `center`, an index of the old grid (may be fractional)."""
        assert 0 <= center <= self.num_in - 1, "a window around a place outside the grid would be empty"
        middle = (center - (self.num_in - 1) / 2) / self.step + (self.num_resampled - 1) / 2
        return replace(self, start=math.floor(middle - (size - 1) / 2 + 0.5), size=size)

    @property
    def is_resampled(self) -> bool:
        """False if voxels are only copied."""
        return self.num_in != self.num_resampled or self.spacing_in_mm != self.spacing_mm

    @property
    def step(self) -> float:
        """Old voxels per new voxel."""
        return self.spacing_mm / self.spacing_in_mm

    @property
    def kept(self) -> tuple[int, int]:
        """First and one past the last resampled voxel that lies in the window."""
        return max(self.start, 0), min(self.start + self.size, self.num_resampled)

    @property
    def inside(self) -> slice:
        """The part of the window that is not padding."""
        begin, end = self.kept
        return slice(begin - self.start, end - self.start)

    def centers(self) -> Float64:
        """Where the resampled voxels lie in the old grid, as old indices [num_resampled]."""
        return (np.arange(self.num_resampled, dtype=np.float64) - (self.num_resampled - 1) / 2) * self.step + (self.num_in - 1) / 2

    def centers_back(self) -> Float64:
        """Where the old voxels lie in the resampled grid, as resampled indices [num_in]."""
        return (np.arange(self.num_in, dtype=np.float64) - (self.num_in - 1) / 2) / self.step + (self.num_resampled - 1) / 2


def linear_weights(centers: Float64, num_in: int) -> Float64:
    """[len(centers) num_in]: interpolation between the two nearest centres; constant beyond the outermost centres."""
    return np.maximum(0, 1 - np.abs(np.clip(centers, 0, num_in - 1)[:, None] - np.arange(num_in)))


def area_weights(centers: Float64, num_in: int, step: float) -> Float64:
    """[len(centers) num_in]: the share of each new voxel that each old voxel covers; nothing lies outside the old grid.

    The sum of value x voxel size is kept: rows add up to 1 inside the grid, columns to 1 / step.
    """
    begin, end = (centers + side * step / 2 for side in (-1, 1))
    edges = np.arange(num_in) - 0.5
    overlap = np.minimum(end[:, None], edges + 1) - np.maximum(begin[:, None], edges)
    return np.maximum(overlap, 0) / step


def interpolated_area_weights(centers: Float64, num_in: int, step: float) -> Float64:
    """The same for step <= 1: the mean over each new voxel of `linear_weights`; nothing lies outside the old grid."""
    begin, end = (np.clip(centers + side * step / 2, -0.5, num_in - 0.5) for side in (-1, 1))
    kink = np.clip(np.ceil(begin), begin, end)  # of the interpolation: a new voxel has one old centre at most
    first, middle, last = (linear_weights(place, num_in) for place in (begin, kink, end))
    return ((kink - begin)[:, None] * (first + middle) + (end - kink)[:, None] * (middle + last)) / (2 * step)


def resample(volume: NDArray[Any], axes: Sequence[Axis], method: Method) -> Float32:
    """`volume` [... *S], its last len(axes) axes resampled and cropped, without the padding; float32.

    An axis that is not resampled is copied, so values stay bit-exact there; else they stay within the range of the input.
    """
    lead = volume.ndim - len(axes)
    if method == "nearest":
        for number, axis in enumerate(axes, start=lead):
            nearest = np.floor(axis.centers()[slice(*axis.kept)] + 0.5).clip(0, axis.num_in - 1)  # the upper of two equally near
            volume = volume.take(nearest.astype(np.int64), number)
        return volume.astype(np.float32)
    matrices = [_weights(axis, method) if axis.is_resampled else None for axis in axes]
    cropped = volume[(..., *(slice(*axis.kept) if m is None else slice(None) for axis, m in zip(axes, matrices, strict=True)))]
    if all(m is None for m in matrices):
        return np.ascontiguousarray(cropped, dtype=np.float32)
    result = np.empty((*volume.shape[:lead], *(axis.kept[1] - axis.kept[0] for axis in axes)), dtype=np.float32)
    for index in np.ndindex(volume.shape[:lead]):  # one channel at a time: the sums are made in float64
        result[index] = _apply(cropped[index], matrices)
    return result


def restore(cropped: Float32, axes: Sequence[Axis]) -> Float32:
    """The way back of `resample` and padding: [... *sizes] -> [... *num_in], in float32.

    Linear along axes where the old voxels are smaller: a value is interpolated within the window, and 0 where its centre lies
    outside. Area-weighted where they are larger: the part of a voxel that lies outside counts as 0, so that value x voxel size
    adds up to the same. Exact where the axis was only cropped or padded.
    """
    lead = cropped.shape[: cropped.ndim - len(axes)]
    reached, matrices = zip(*map(_way_back, axes), strict=True)
    window = tuple(axis.inside for axis in axes)
    result = np.zeros((*lead, *(axis.num_in for axis in axes)), dtype=np.float32)
    for index in np.ndindex(lead):
        result[index][reached] = _apply(cropped[index][window], matrices)
    return result


def _way_back(axis: Axis) -> tuple[slice, Float32 | None]:
    """The old voxels that the window reaches, and their weights [old kept]; None if values are copied."""
    begin, end = axis.kept
    if not axis.is_resampled:
        return slice(begin, end), None
    centers = axis.centers_back() - begin
    if axis.step > 1:
        weights = linear_weights(centers, end - begin)
        reached = np.flatnonzero((centers > -0.5 - 1e-6) & (centers < end - begin - 0.5 + 1e-6))
    else:
        weights = area_weights(centers, end - begin, 1 / axis.step)
        reached = np.flatnonzero(weights.any(axis=1))
    there = slice(int(reached[0]), int(reached[-1]) + 1)
    return there, weights[there].astype(np.float32)


def _weights(axis: Axis, method: Literal["linear", "area", "average"]) -> Float64:
    centers = axis.centers()[slice(*axis.kept)]
    if method == "linear" or (method == "average" and axis.step <= 1):
        return linear_weights(centers, axis.num_in)
    weights = (area_weights if axis.step > 1 else interpolated_area_weights)(centers, axis.num_in, axis.step)
    return weights if method == "area" else weights / weights.sum(axis=1, keepdims=True)


def _apply(volume: NDArray[Any], matrices: Sequence[Float64 | None] | Sequence[Float32 | None]) -> NDArray[Any]:
    for axis, weights in enumerate(matrices):
        if weights is not None:
            volume = np.moveaxis(np.tensordot(weights, volume, (1, axis)), 0, axis)
    return volume
