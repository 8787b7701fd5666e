"""Spatial transforms: affine, flip, elastic. All act in mm, so that voxels need not be isotropic.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes. Axes are those of a canonical (RAS) image: 0 is
left to right, 1 posterior to anterior, 2 inferior to superior. Slices have those two that they are not taken across, as 0 and 1.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from softseg_dist.numerics.transforms import AffineMap, Axes, Fields, Frame, Spatial

MEAN_SQUARE_WEIGHT = 151 / 315  # integral of the squared cubic B-spline


class Affine(AffineMap):
    """Rotation, scaling and shift about the image's centre: x' = R S x + t in mm, so that a rotation preserves shapes.

    The angle is uniform in +-`degrees`; in 3D about an axis of uniformly random direction. Every axis has its own
    scale, uniform in 1 +- `scale`, and its own shift, uniform in +- `shift` times the field of view along it.

    Source: the ranges are those of SoftSeg's published configuration (arXiv 2011.09041).
    """

    short: ClassVar[str] = "affine"
    inert: ClassVar[Fields] = {"degrees": 0, "scale": 0, "shift": 0}
    degrees: float = Field(20.0, ge=0, le=180)
    scale: float = Field(0.1, ge=0, lt=1)
    shift: float = Field(0.03, ge=0, le=1)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """Angle, scales and shifts [1 + 2D] uniform in [-1, 1]; in 3D then the normal deviates [3] of the axis."""
        dim = len(frame.size)
        uniform = torch.rand(1 + 2 * dim, generator=generator) * 2 - 1
        return uniform if dim == 2 else torch.cat([uniform, torch.randn(3, generator=generator)])

    def matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """x = S^-1 R^T (x' - t)."""
        rotation, scale, shift = self._parts(parameters, frame)
        matrix = rotation.mT / scale[:, :, None]
        return torch.cat([matrix, -matrix @ shift[:, :, None]], dim=-1)

    def inverse_matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """x' = R S x + t."""
        rotation, scale, shift = self._parts(parameters, frame)
        return torch.cat([rotation * scale[:, None, :], shift[:, :, None]], dim=-1)

    def _parts(self, parameters: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Rotation [B D D], scale [B D] and shift in mm [B D]."""
        dim = len(frame.size)
        angle = parameters[:, 0] * math.radians(self.degrees)
        scale = 1 + parameters[:, 1 : 1 + dim] * self.scale
        shift = parameters[:, 1 + dim : 1 + 2 * dim] * self.shift * frame.constant(frame.extent_mm, parameters)
        cos, sin = angle.cos(), angle.sin()
        if dim == 2:
            return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2), scale, shift
        # Rodrigues' formula I + sin K + (1 - cos) K^2 about a direction
        direction = parameters[:, -3:]
        x, y, z = (direction / direction.norm(dim=1, keepdim=True)).unbind(dim=1)
        zero = torch.zeros_like(x)
        K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=1).reshape(-1, 3, 3)
        identity = torch.eye(3, dtype=K.dtype, device=K.device)
        return identity + sin[:, None, None] * K + (1 - cos)[:, None, None] * (K @ K), scale, shift


class Flip(AffineMap):
    """Mirrors each of `axes` with probability `p`, independently; bit-exact where no other transform moves the sample.

    Along axis 0, left to right, anatomy is nearly symmetric. Slices across x have no such axis: there 0 is posterior to anterior.
    """

    short: ClassVar[str] = "flip"
    axes: Axes = (0,)
    p: float = Field(0.5, ge=0, le=1)

    @property
    def idle(self) -> bool:
        return not self.axes or self.p == 0

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """-1 for every axis of space that is mirrored, else 1 [D]. Raises UserError if images lack one of `axes`."""
        frame.check_axes("Flip", self.axes)
        signs = torch.ones(len(frame.size))
        signs[list(self.axes)] = 1.0 - 2.0 * (torch.rand(len(self.axes), generator=generator) < self.p)
        return signs

    def matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """x = +-x' along every axis."""
        return torch.nn.functional.pad(torch.diag_embed(parameters), (0, 1))

    def inverse_matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """A mirror is its own inverse."""
        return self.matrix(parameters, frame)

    def mirror(self, maps: Tensor, parameters: Tensor) -> Tensor:
        """`maps` [B C *S] mirrored by reversing indices: the values of `move`, without interpolation."""
        flags = (parameters < 0).reshape(*parameters.shape, *[1] * (maps.ndim - 1))  # [B D 1 1 ..]
        for axis in self.axes:
            maps = torch.where(flags[:, axis], maps.flip(2 + axis), maps)
        return maps


class Elastic(Spatial):
    """A smooth random displacement: a cubic B-spline over control points `spacing_mm` apart, with random displacements.

    `std_mm` is the root mean square of the displacement along every axis, in mm. Ratios std_mm / spacing_mm above
    1/4 are refused: the map would fold.

    Source: free-form deformation, Rueckert et al., IEEE TMI 18 (1999), doi 10.1109/42.796284.
    """

    short: ClassVar[str] = "elastic"
    inert: ClassVar[Fields] = {"std_mm": 0}
    spacing_mm: PositiveFloat = 8.0
    std_mm: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _does_not_fold(self) -> Self:
        if self.std_mm > self.spacing_mm / 4:
            got = f"std_mm={self.std_mm:g} for spacing_mm={self.spacing_mm:g}"
            raise ValueError(f"Elastic folds space if std_mm exceeds spacing_mm / 4, got {got}")
        return self

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The displacement of the control points in mm [D controls..]."""
        controls = [self._intervals(n, step) + 3 for n, step in zip(frame.size, frame.spacing_mm, strict=True)]
        # A spline averages its control points, which reduces the amplitude along each of the D axes.
        scale = self.std_mm * MEAN_SQUARE_WEIGHT ** (-len(frame.size) / 2)
        return torch.randn(len(frame.size), *controls, generator=generator) * scale

    def move(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`positions` plus the displacement there, which is exact at voxel centres and linear between them."""
        field = parameters
        for n, step in zip(frame.size, frame.spacing_mm, strict=True):
            weights = frame.keep((self, n, step, field.dtype), partial(self._weights, n, step, field.dtype))
            field = torch.tensordot(field, weights, dims=([2], [1]))  # contracts the first axis of space, appends the new one
        if positions is not frame.positions:
            field = frame.sample(field, positions)
        return (positions.movedim(-1, 1) + field).movedim(1, -1)

    def _intervals(self, voxels: int, step_mm: float) -> int:
        return max(1, math.ceil((voxels - 1) * step_mm / self.spacing_mm - 1e-9))

    def _weights(self, voxels: int, step_mm: float, dtype: torch.dtype) -> Tensor:
        """The cubic B-spline of every control point at every voxel along one axis [voxels controls], centred on the image."""
        intervals = self._intervals(voxels, step_mm)
        offsets = (torch.arange(voxels, dtype=torch.float64) - (voxels - 1) / 2) * step_mm / self.spacing_mm
        knots = torch.arange(-1, intervals + 2, dtype=torch.float64) - intervals / 2
        distance = (offsets[:, None] - knots).abs()
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = (2 - distance).clamp_min(0) ** 3 / 6
        return torch.where(distance < 1, near, far).to(dtype)
