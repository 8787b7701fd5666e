"""The bias field: a coil does not see all places equally well, so that the same tissue is brighter here than there.

Legend: B batch, C image channels, *S space, D = 2 or 3 its number of axes, T terms of the polynomial.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from softseg_dist.numerics.transforms import Frame, Intensity


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
