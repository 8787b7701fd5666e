"""Intensity transforms: noise and gamma. They change the image only.

Legend: B batch, C image channels, *S space (2 or 3 axes).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor

from softseg_dist.numerics.transforms import Frame, Intensity


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

    def change(self, image: Tensor, parameters: Tensor) -> Tensor:
        """`image` [B C *S] plus the noise."""
        return image + parameters


class Gamma(Intensity):
    """u -> u^g, with u the image scaled to [0, 1] by its own extremes per sample and channel, then scaled back.

    ln g is uniform between the logarithms of `range`, per sample. A constant image stays as it is.
    """

    short: ClassVar[str] = "gamma"
    range: tuple[PositiveFloat, PositiveFloat] = (0.7, 1.5)

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"range must be (smallest, largest) gamma, got {value}")
        return value

    @property
    def idle(self) -> bool:
        """True if g is always 1."""
        return self.range == (1, 1)

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The exponent g, a scalar."""
        low, high = map(math.log, self.range)
        return (low + torch.rand((), generator=generator) * (high - low)).exp()

    def change(self, image: Tensor, parameters: Tensor) -> Tensor:
        """`image` [B C *S] with changed contrast and the same extremes."""
        space = tuple(range(2, image.ndim))
        low, high = image.amin(space, keepdim=True), image.amax(space, keepdim=True)
        span = high - low
        unit = (image - low) / torch.where(span > 0, span, 1)
        return low + span * unit ** parameters.reshape(-1, *[1] * (image.ndim - 1))
