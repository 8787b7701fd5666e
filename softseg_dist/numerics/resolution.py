"""Transforms that take detail away: blur and low resolution. They change the image only.

Both are weighted sums over neighbours along one axis after the other, with weights of each sample's own. The sums are taken
voxel by voxel in a fixed order, so that a sample's result does not depend on its batch.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes, n voxels along an axis, taps = 2 reach + 1.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, field_validator
from torch import Tensor

from softseg_dist.numerics.transforms import Axes, Frame, Intensity, Range, log_uniform

TRUNCATE = 4.0  # sigmas after which a Gaussian is cut off; beyond lies 6e-5 of it


class Blur(Intensity):
    """Convolves with a Gaussian whose sigma is uniform in [0, `sigma_mm`] per sample, the same in mm along all axes.

    An image goes on outside its field of view as at its border. A constant image stays as it is, up to rounding.
    """

    short: ClassVar[str] = "blur"
    sigma_mm: NonNegativeFloat = 1.0

    @property
    def idle(self) -> bool:
        """True if sigma is always 0."""
        return self.sigma_mm == 0

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """Sigma in mm, a scalar."""
        return torch.rand((), generator=generator) * self.sigma_mm

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S], blurred."""
        for axis, (n, step_mm) in enumerate(zip(frame.size, frame.spacing_mm, strict=True)):
            reach = min(n - 1, math.ceil(TRUNCATE * self.sigma_mm / step_mm))
            image = _weighted_sum(image, 2 + axis, _gaussian(parameters.double() / step_mm, reach))
        return image


class LowResolution(Intensity):
    """Down-samples to voxels f times as large and back to the grid it came from: the image as a coarser scan would show it.

    ln f is uniform between the logarithms of `range`, per sample; f is the same along all `axes` (None: every axis; (2,) in
    3D: thicker slices only). Along n voxels ceil(n / f) larger ones are laid, which fill the field of view, so that none is
    larger than f. Each takes the mean over its extent; between their centres the way back is linear, and constant
    beyond the outermost. No value leaves the range of the image, and a constant image stays as it is, both up to
    rounding.
    """

    short: ClassVar[str] = "lowres"
    range: Range = (1.0, 2.0)
    axes: Axes | None = None

    @field_validator("range")
    @classmethod
    def _down(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] < 1:
            raise ValueError(f"range of LowResolution must begin at 1 or above, as it only down-samples, got {value}")
        return value

    @property
    def idle(self) -> bool:
        """True if the resolution never changes."""
        return self.range == (1, 1) or self.axes == ()

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The factor f, a scalar. Raises UserError if images lack one of `axes`."""
        frame.check_axes("LowResolution", self.axes or ())
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S] at a lower resolution, on the same grid."""
        for axis in range(len(frame.size)) if self.axes is None else self.axes:
            n = frame.size[axis]
            reach = min(n - 1, math.ceil(1.5 * self.range[1] + 0.5))  # to the far edge of the second-nearest voxel
            image = _weighted_sum(image, 2 + axis, _coarse(parameters.double(), n, reach))
        return image


def _weighted_sum(image: Tensor, axis: int, weights: Tensor) -> Tensor:
    """sum_k weights[.., i, k] image[i + k - reach] along `axis`; `weights` [B n taps], or [B 1 taps] if equal for all i."""
    n, taps = image.shape[axis], weights.shape[2]
    reach = taps // 2
    padded = image.index_select(axis, torch.arange(-reach, n + reach, device=image.device).clamp(0, n - 1))
    total = torch.zeros_like(image)
    for k, weight in enumerate(weights.to(image.dtype).unbind(2)):
        along = [-1 if a == axis else 1 for a in range(1, image.ndim)]
        total = total + padded.narrow(axis, k, n) * weight.reshape(len(weight), *along)
    return total


def _gaussian(sigma: Tensor, reach: int) -> Tensor:
    """Gaussians of `sigma` [B] in voxels, sampled at voxel centres, of sum 1 [B 1 taps]."""
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    # Below 1/100 of a voxel nothing is left beside the centre, as for a sigma of 0.
    weights = (-0.5 * (offset / sigma.clamp_min(0.01)[:, None]) ** 2).exp()
    return (weights / weights.sum(1, keepdim=True))[:, None]


def _coarse(factor: Tensor, n: int, reach: int) -> Tensor:
    """The weights of n voxels in their low-resolution versions, one `factor` [B] per sample [B n taps]."""
    count = (n / factor - 1e-6).ceil()[:, None, None]
    width = n / count
    voxel = torch.arange(n, device=factor.device)[:, None]
    neighbour = voxel + torch.arange(-reach, reach + 1, device=factor.device)
    where = ((voxel + 0.5) / width - 0.5).clamp_min(0).minimum(count - 1)  # counted in coarse voxels
    left = where.floor()
    right = (left + 1).minimum(count - 1)

    def share(coarse: Tensor) -> Tensor:
        """The share of a coarse voxel that lies in each neighbour."""
        overlap = (neighbour + 1).minimum((coarse + 1) * width) - neighbour.maximum(coarse * width)
        return overlap.clamp_min(0) / width

    return share(left) + (where - left) * (share(right) - share(left))
