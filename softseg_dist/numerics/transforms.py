"""What an augmentation is: random numbers drawn for one sample in one place, applied to a whole batch in another.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes. Positions are in mm from the image's centre.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from softseg_dist.frozen import Frozen


@dataclass(frozen=True)
class Frame:
    """The voxel grid that all samples of a batch share: channels of the image, size *S, spacing in mm, device."""

    channels: int
    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    device: torch.device

    @property
    def extent_mm(self) -> tuple[float, ...]:
        """Length of the field of view along every axis, from outer edge to outer edge."""
        return tuple(n * step for n, step in zip(self.size, self.spacing_mm, strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """The position [1 *S D] of every voxel centre in mm from the image's centre."""
        axes = [
            (torch.arange(n, device=self.device) - (n - 1) / 2) * step
            for n, step in zip(self.size, self.spacing_mm, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]

    def sample(self, maps: Tensor, positions: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
        """The values of `maps` [B C *S] at `positions` [B *S D]; `mode` and `padding` as in torch's grid_sample."""
        # grid_sample counts from -1 to 1 between outer edges, and its last axis names the axes of space backwards.
        grid = (positions * (2 / positions.new_tensor(self.extent_mm))).flip(-1)
        grid = grid.to(maps.dtype).expand(len(maps), *grid.shape[1:])
        return grid_sample(maps, grid, mode=mode, padding_mode=padding, align_corners=False)


class Augmentation(Frozen, ABC):
    """A random change of an image, and of its label where it is spatial. Subclass `Spatial` or `Intensity`."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True if these settings change nothing, whatever is drawn; such a transform is left out."""

    @abstractmethod
    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The random parameters of one sample, on the CPU; their shape depends on `frame` and the settings only."""


class Spatial(Augmentation):
    """A transform of space: where does the value of each output voxel come from?"""

    @abstractmethod
    def move(self, positions: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """The input positions [B *S D] of output `positions` [B or 1, *S, D], both in mm from the image's centre.

        `parameters` [B ...] are stacked draws on the device of `positions`.
        """


class Intensity(Augmentation):
    """A change of image values; labels are not concerned."""

    @abstractmethod
    def change(self, image: Tensor, parameters: Tensor) -> Tensor:
        """The changed `image` [B C *S]; `parameters` [B ...] are stacked draws on its device."""
