"""Base classes of augmentation: `draw` draws random parameters for one sample, a second method applies them to a batch.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes. Positions are in mm from the image's centre.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import AfterValidator, Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import grid_sample

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen


def _distinct(axes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(axes)) < len(axes):
        raise ValueError(f"axes must differ from each other, got {axes}")
    return axes


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"range must be (smallest, largest), got {value}")
    return value


Axes = Annotated[tuple[Annotated[int, Field(ge=0, le=2)], ...], AfterValidator(_distinct)]
Range = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ordered)]
Fields = Mapping[str, Any]  # values by the names of fields


def log_uniform(ends: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A scalar between `ends` whose logarithm is uniform, so that halving is as likely as doubling."""
    low, high = map(math.log, ends)
    return (low + torch.rand((), generator=generator) * (high - low)).exp()


def per_sample(values: Tensor, maps: Tensor) -> Tensor:
    """One value per sample [B], reshaped to broadcast with `maps` [B C *S], in their type."""
    return values.reshape(-1, *[1] * (maps.ndim - 1)).to(maps.dtype)


@dataclass(frozen=True)
class Frame:
    """The voxel grid that all samples of a batch share: channels of the image, size *S, spacing in mm, device."""

    channels: int
    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    device: torch.device

    @classmethod
    def of(cls, image: Tensor, spacing_mm: Sequence[float]) -> Self:
        """The grid of `image` [B C *S]."""
        return cls(image.shape[1], tuple(image.shape[2:]), tuple(spacing_mm), image.device)

    @cached_property
    def _kept(self) -> dict[Hashable, Tensor]:
        return {}

    def keep(self, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The tensor that `make` returns, on the device, made once: augmenting a batch copies nothing from the host."""
        if name not in self._kept:
            self._kept[name] = make().to(self.device)
        return self._kept[name]

    def constant(self, values: Sequence[float], like: Tensor) -> Tensor:
        """`values` as a tensor of the type of `like`, on the device."""
        return self.keep((tuple(values), like.dtype), lambda: torch.tensor(values, dtype=like.dtype))

    @property
    def extent_mm(self) -> tuple[float, ...]:
        """Length of the field of view along every axis, from outer edge to outer edge."""
        return tuple(n * step for n, step in zip(self.size, self.spacing_mm, strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """The position [1 *S D] of every voxel centre in mm from the image's centre; each coordinate is contiguous in memory."""
        return torch.stack(torch.broadcast_tensors(*self._axes))[None].movedim(1, -1)

    @cached_property
    def _axes(self) -> list[Tensor]:
        """The coordinate along each axis, of a shape that broadcasts with *S."""
        dim = len(self.size)
        return [
            ((torch.arange(n, device=self.device) - (n - 1) / 2) * step).view(*[-1 if a == axis else 1 for a in range(dim)])
            for axis, (n, step) in enumerate(zip(self.size, self.spacing_mm, strict=True))
        ]

    def affine(self, positions: Tensor, matrix: Tensor) -> Tensor:
        """The positions M x + t [B *S D] of `positions` x [B or 1, *S, D], with `matrix` [M t] [B or 1, D, D+1].

        Sums are taken coordinate by coordinate in a fixed order, so that a sample's result does not depend on its batch.
        """
        own = positions is self.positions  # each of its coordinates varies along one axis only: smaller products suffice
        coordinates = self._axes if own else [x[:, None] for x in positions.unbind(-1)]
        slopes, start = matrix[..., :-1], matrix[..., -1].reshape(*matrix.shape[:2], *[1] * len(self.size))
        moved = start
        for axis, x in enumerate(coordinates):
            moved = moved + slopes[..., axis].reshape(start.shape) * x
        return moved.movedim(1, -1)

    def check_axes(self, owner: str, axes: Sequence[int]) -> None:
        """Raises UserError in the name of `owner` if these images lack one of `axes`."""
        if axes and max(axes) >= len(self.size):
            rule = f"axes must lie in 0 to {len(self.size) - 1} for these images"
            raise UserError(f"{owner}'s {rule}, got {max(axes)}: leave it out")

    def grid(self, positions: Tensor, matrix: Tensor | None = None) -> Tensor:
        """`positions` [B *S D], transformed by `matrix` if given, in the convention of torch's grid_sample.

        There -1 and 1 are the outer edges, and the last axis has the axes of space in reverse order.
        """
        per_mm = 2 / self.constant(self.extent_mm, positions)
        if matrix is None:
            return (positions * per_mm).flip(-1)
        return self.affine(positions, (matrix * per_mm[:, None]).flip(-2))

    def look_up(self, maps: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
        """The values of `maps` [B C *S] at `grid`; `mode` and `padding` as in torch's grid_sample."""
        grid = grid.to(maps.dtype).expand(len(maps), *grid.shape[1:])
        return grid_sample(maps, grid, mode=mode, padding_mode=padding, align_corners=False)

    def sample(self, maps: Tensor, positions: Tensor) -> Tensor:
        """The values of `maps` [B C *S] at `positions` [B *S D], linearly interpolated; border values outside."""
        return self.look_up(maps, self.grid(positions), "bilinear", "border")


class Augmentation(Frozen, ABC):
    """A random change of training samples. Subclass `Spatial` (image and label), `Intensity` (image) or `Pairing` (both)."""

    inert: ClassVar[Fields] = {}  # values of fields with which it never changes anything

    @property
    def idle(self) -> bool:
        """True if these settings never change anything; such a transform is left out."""
        return bool(self.inert) and all(getattr(self, name) == value for name, value in self.inert.items())

    @abstractmethod
    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The random parameters of one sample, on the CPU; their shape depends on `frame` and the settings only."""


class Spatial(Augmentation):
    """A spatial transform: it maps each output position to the input position that its value comes from."""

    @abstractmethod
    def move(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """The input positions [B *S D] of output `positions` [B or 1, *S, D], both in mm from the image's centre.

        `parameters` [B ...] are stacked draws on the device of `positions`.
        """


class Invertible(Spatial):
    """A spatial transform with a known inverse, so that a prediction on a transformed image can be mapped back."""

    @abstractmethod
    def move_back(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """The output positions of input `positions`: the inverse of `move`."""


class AffineMap(Invertible):
    """An affine spatial transform: x = M x' + t. Several in a row are composed into one."""

    @abstractmethod
    def matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """[M t] [B D D+1]: the input position x of an output position x', both in mm from the image's centre."""

    @abstractmethod
    def inverse_matrix(self, parameters: Tensor, frame: Frame) -> Tensor:
        """The matrix of the inverse."""

    def move(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        return frame.affine(positions, self.matrix(parameters, frame))

    def move_back(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        return frame.affine(positions, self.inverse_matrix(parameters, frame))


class Intensity(Augmentation):
    """A transform of image values; labels do not change."""

    @abstractmethod
    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """The changed `image` [B C *S]; `parameters` [B ...] are stacked draws on its device."""


class Pairing(Augmentation):
    """Joins each sample with a partner, another training item, after both are augmented; image and label in the same way."""

    @abstractmethod
    def mix(self, maps: Tensor, partners: Tensor, parameters: Tensor) -> Tensor:
        """`maps` (images [B C *S] or targets [B K *S]) joined with those of `partners`; `parameters` [B ...] are stacked draws."""
