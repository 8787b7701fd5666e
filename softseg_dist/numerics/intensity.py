"""Transforms of each voxel's value: noise, gamma, contrast. They change the image only.

Legend: B batch, C image channels, *S space (2 or 3 axes).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from softseg_dist.numerics.transforms import Frame, Intensity, Range, log_uniform, per_sample


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
