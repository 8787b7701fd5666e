"""Transforms of each voxel's value: noise, gamma, contrast. They change the image only.

Legend: B batch, C image channels, *S space (2 or 3 axes).
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from softseg_dist.numerics.transforms import Axes, Frame, Intensity, Range, log_uniform, per_sample


class Noise(Intensity):
    """Adds independent Gaussian noise; its standard deviation is uniform in [0, `std`] per sample.

    `std` is in units of the prepared image: with z-score normalisation, in standard deviations of the volume.
    """

    short: ClassVar[str] = "noise"
    std: float = Field(0.1, ge=0)

    @property
    def idle(self) -> bool:
        """True if the noise is 0."""
        return self.std == 0

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The noise itself [C *S]."""
        std = torch.rand(1, generator=generator).item() * self.std
        return torch.randn(frame.channels, *frame.size, generator=generator) * std

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S] plus the noise."""
        return image + parameters


class Gamma(Intensity):
    """u -> u^g, with u the image scaled to [0, 1] by its own extremes per sample and channel, then scaled back.

    ln g is uniform between the logarithms of `range`, per sample. A constant image stays as it is.
    """

    short: ClassVar[str] = "gamma"
    range: Range = (0.7, 1.5)

    @property
    def idle(self) -> bool:
        """True if g is always 1."""
        return self.range == (1, 1)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The exponent g, a scalar."""
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S] with changed contrast and the same extremes."""
        space = tuple(range(2, image.ndim))
        low, high = image.amin(space, keepdim=True), image.amax(space, keepdim=True)
        span = high - low
        unit = (image - low) / torch.where(span > 0, span, 1)
        return low + span * unit ** per_sample(parameters, image)


class Contrast(Intensity):
    """v -> m + f (v - m), with m the mean of the image per sample and channel: its spread becomes f times as large.

    ln f is uniform between the logarithms of `range`, per sample. The mean stays, and so does a constant image, both up to
    rounding. About the mean, and not about 0, since the zero of a normalised image means nothing.
    """

    short: ClassVar[str] = "contrast"
    range: Range = (0.75, 1.25)

    @property
    def idle(self) -> bool:
        """True if f is always 1."""
        return self.range == (1, 1)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The factor f, a scalar."""
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S] with a spread f times as large about the same mean."""
        # Summed in double precision, a mean does not depend on how the batch was cut up for summing.
        mean = image.mean(tuple(range(2, image.ndim)), keepdim=True, dtype=torch.float64).to(image.dtype)
        return mean + per_sample(parameters, image) * (image - mean)


class BiasField(Intensity):
    """v -> low + b (v - low): multiplies the signal above the darkest voxel by a smooth field b, the same for all channels.

    ln b = a P(x) / max |P|, with P a polynomial of all terms of degree 1 to `order` in positions x that run from -1 to 1
    along each axis; its coefficients are standard normal and a is uniform in [0, ln `strength`], per sample. So b lies in
    [1 / strength, strength] and reaches exp(a) or exp(-a) somewhere.

    A field multiplies signal, whose zero a normalised image has lost: `low`, the minimum of the image per sample and
    channel, stands for it, as air and cortical bone give next to none. Where a crop holds neither, b acts less than
    it says; what is darkest stays as it is, and so does a constant image.

    Source: polynomials for ln b as in Van Leemput et al., IEEE TMI 18 (1999) 885, doi 10.1109/42.811268.
    """

    short: ClassVar[str] = "bias"
    order: int = Field(3, ge=1, le=5)
    strength: float = Field(1.5, ge=1)

    @property
    def idle(self) -> bool:
        """True if the field is 1 everywhere."""
        return self.strength == 1

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The largest |ln b|, then the coefficients, up to a common factor [1 + T]."""
        largest = torch.rand(1, generator=generator) * math.log(self.strength)
        return torch.cat([largest, torch.randn(len(self._terms(frame)), generator=generator)])

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        """`image` [B C *S] under the field."""
        low = image.amin(tuple(range(2, image.ndim)), keepdim=True)
        return low + (image - low) * self.field(parameters, frame)

    def field(self, parameters: Tensor, frame: Frame) -> Tensor:
        """The field b [B 1 *S] of stacked draws [B 1 + T]."""
        largest, *coefficients = (values.reshape(-1, *[1] * len(frame.size)) for values in parameters.unbind(1))
        unit = frame.positions * (2 / frame.constant(frame.extent_mm, frame.positions))
        polynomial = torch.zeros_like(unit[..., 0])
        for powers, coefficient in zip(self._terms(frame), coefficients, strict=True):
            polynomial = polynomial + coefficient * (unit ** frame.constant(powers, unit)).prod(-1)
        peak = polynomial.abs().amax(tuple(range(1, polynomial.ndim)), keepdim=True)
        return (polynomial * (largest / torch.where(peak > 0, peak, 1))).exp()[:, None]

    def _terms(self, frame: Frame) -> list[tuple[int, ...]]:
        """The power of each coordinate in each term."""
        powers = itertools.product(range(self.order + 1), repeat=len(frame.size))
        return [term for term in powers if 1 <= sum(term) <= self.order]


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
