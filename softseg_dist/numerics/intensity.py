"""Intensity transforms: noise, gamma, contrast, bias field, blur and low resolution. They change the image only.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes, T terms of a polynomial, n voxels along an axis,
taps = 2 reach + 1. Blur and low resolution are weighted sums over neighbours, axis by axis, with weights for each sample.
These sums are taken neighbour by neighbour in a fixed order, so that a sample's result does not depend on its batch.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, field_validator
from torch import Tensor

from softseg_dist.numerics.transforms import Axes, Fields, Frame, Intensity, Range, log_uniform, per_sample


class Noise(Intensity):
    """Adds independent Gaussian noise; its standard deviation is uniform in [0, `std`] per sample.

    `std` is in units of the prepared image: with z-score normalisation, in standard deviations of the volume.
    """

    short: ClassVar[str] = "noise"
    inert: ClassVar[Fields] = {"std": 0}
    std: float = Field(0.1, ge=0)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The noise itself [C *S]."""
        std = torch.rand(1, generator=generator).item() * self.std
        return torch.randn(frame.channels, *frame.size, generator=generator) * std

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        return image + parameters


class Gamma(Intensity):
    """u -> u^g, with u the image scaled to [0, 1] by its minimum and maximum per sample and channel, then scaled back.

    ln g is uniform between the logarithms of `range`, per sample. A constant image does not change.
    """

    short: ClassVar[str] = "gamma"
    inert: ClassVar[Fields] = {"range": (1, 1)}
    range: Range = (0.7, 1.5)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The exponent g, a scalar."""
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        space = tuple(range(2, image.ndim))
        low, high = image.amin(space, keepdim=True), image.amax(space, keepdim=True)
        span = high - low
        unit = (image - low) / torch.where(span > 0, span, 1)
        return low + span * unit ** per_sample(parameters, image)


class Contrast(Intensity):
    """v -> m + f (v - m), with m the mean of the image per sample and channel: its standard deviation is multiplied by f.

    ln f is uniform between the logarithms of `range`, per sample. The mean does not change, nor does a constant image, both
    up to rounding. The centre is the mean, not 0, as the zero of a normalised image is arbitrary.
    """

    short: ClassVar[str] = "contrast"
    inert: ClassVar[Fields] = {"range": (1, 1)}
    range: Range = (0.75, 1.25)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The factor f, a scalar."""
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        # A sum in double precision does not depend on how torch splits the batch.
        mean = image.mean(tuple(range(2, image.ndim)), keepdim=True, dtype=torch.float64).to(image.dtype)
        return mean + per_sample(parameters, image) * (image - mean)


class BiasField(Intensity):
    """v -> low + b (v - low): multiplies the signal above the darkest voxel by a smooth field b, the same for all channels.

    ln b = a P(x) / max |P|, with P a polynomial of all terms of degree 1 to `order` in positions x that run from -1 to 1 along each
    axis; its coefficients are standard normal and a is uniform in [0, ln `strength`], per sample. So b lies in [1 / strength,
    strength] and reaches exp(a) or exp(-a) somewhere. A receive coil has such a field: the same tissue is brighter near it.

    A field multiplies signal, whose zero is lost in a normalised image: `low`, the minimum of the image per sample and
    channel, replaces it, as air and cortical bone give next to no signal. In a crop without them the effect of b is
    smaller. The darkest voxel does not change, nor does a constant image.

    Source: polynomials for ln b as in Van Leemput et al., IEEE TMI 18 (1999) 885, doi 10.1109/42.811268.
    """

    short: ClassVar[str] = "bias"
    inert: ClassVar[Fields] = {"strength": 1}
    order: int = Field(3, ge=1, le=5)
    strength: float = Field(1.5, ge=1)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The largest |ln b|, then the coefficients up to a common factor: [1 + T]."""
        largest = torch.rand(1, generator=generator) * math.log(self.strength)
        return torch.cat([largest, torch.randn(len(self._terms(frame)), generator=generator)])

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
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
        """The exponent of each coordinate in each term."""
        powers = itertools.product(range(self.order + 1), repeat=len(frame.size))
        return [term for term in powers if 1 <= sum(term) <= self.order]


TRUNCATE = 4.0  # sigmas at which a Gaussian is truncated; 6e-5 of it lies beyond


class Blur(Intensity):
    """Convolves with a Gaussian whose sigma is uniform in [0, `sigma_mm`] per sample, the same in mm along all axes.

    Outside its field of view an image has its border values. A constant image does not change, up to rounding.
    """

    short: ClassVar[str] = "blur"
    inert: ClassVar[Fields] = {"sigma_mm": 0}
    sigma_mm: NonNegativeFloat = 1.0

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """Sigma in mm, a scalar."""
        return torch.rand((), generator=generator) * self.sigma_mm

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
        for axis, (n, step_mm) in enumerate(zip(frame.size, frame.spacing_mm, strict=True)):
            reach = min(n - 1, math.ceil(TRUNCATE * self.sigma_mm / step_mm))
            image = _weighted_sum(image, 2 + axis, _gaussian(parameters.double() / step_mm, reach))
        return image


class LowResolution(Intensity):
    """Downsamples to voxels f times as large and upsamples to the original grid: the image as a coarser scan shows it.

    ln f is uniform between the logarithms of `range`, per sample; f is the same along all `axes` (None: every axis; (2,) in
    3D: thicker slices only). ceil(n / f) coarse voxels fill the field of view along n voxels, so that none is larger than f.
    Each is the mean over its extent; upsampling is linear between their centres and constant beyond the outermost. No value
    leaves the range of the image, and a constant image does not change, both up to rounding.
    """

    short: ClassVar[str] = "lowres"
    range: Range = (1.0, 2.0)
    axes: Axes | None = None

    @field_validator("range")
    @classmethod
    def _down(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] < 1:
            raise ValueError(f"range of LowResolution must begin at 1 or above, as it only downsamples, got {value}")
        return value

    @property
    def idle(self) -> bool:
        return self.range == (1, 1) or self.axes == ()

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The factor f, a scalar. Raises UserError if images lack one of `axes`."""
        frame.check_axes("LowResolution", self.axes or ())
        return log_uniform(self.range, generator)

    def change(self, image: Tensor, parameters: Tensor, frame: Frame) -> Tensor:
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
    # Below 1/100 of a voxel only the centre has a weight, as for a sigma of 0.
    weights = (-0.5 * (offset / sigma.clamp_min(0.01)[:, None]) ** 2).exp()
    return (weights / weights.sum(1, keepdim=True))[:, None]


def _coarse(factor: Tensor, n: int, reach: int) -> Tensor:
    """The weights of the neighbours of n voxels at low resolution [B n taps], for one `factor` [B] per sample."""
    count = (n / factor - 1e-6).ceil()[:, None, None]
    width = n / count
    voxel = torch.arange(n, device=factor.device)[:, None]
    neighbour = voxel + torch.arange(-reach, reach + 1, device=factor.device)
    position = ((voxel + 0.5) / width - 0.5).clamp_min(0).minimum(count - 1)  # in coarse voxels
    left = position.floor()
    right = (left + 1).minimum(count - 1)

    def share(coarse: Tensor) -> Tensor:
        """The share of a coarse voxel that lies in each neighbour."""
        overlap = (neighbour + 1).minimum((coarse + 1) * width) - neighbour.maximum(coarse * width)
        return overlap.clamp_min(0) / width

    return share(left) + (position - left) * (share(right) - share(left))
