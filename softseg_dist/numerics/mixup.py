"""Mixup: each sample becomes a mixture of itself and another training item.

Legend: B batch, C image channels, K classes, *S space.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from softseg_dist.numerics.transforms import Frame, Pairing, per_sample


class Mixup(Pairing):
    """x = l x1 + (1 - l) x2 and y = l y1 + (1 - l) y2, with l ~ Beta(alpha, alpha) per sample, voxel by voxel.

    Small `alpha` leaves most samples nearly unmixed (l near 0 or 1), 1 makes all mixtures equally likely, large `alpha`
    makes halves. Mixed after the label mode has rounded, so that targets are soft, whatever the mode: a study that
    compares label modes compares something else with it. A split with one item mixes it with itself: nothing changes.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.
    """

    short: ClassVar[str] = "mixup"
    alpha: NonNegativeFloat = 0.2

    @property
    def idle(self) -> bool:
        """True if `alpha` is 0, for which nothing is mixed."""
        return self.alpha == 0

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The sample's own share l, a scalar in [0, 1]."""
        seed = torch.randint(2**63 - 1, (), generator=generator).item()  # torch's own Beta takes no generator
        return torch.tensor(np.random.default_rng(int(seed)).beta(self.alpha, self.alpha), dtype=torch.float32)

    def mix(self, maps: Tensor, partners: Tensor, parameters: Tensor) -> Tensor:
        """The mixture; where both are equal it is exactly what they are."""
        return partners + per_sample(parameters, maps) * (maps - partners)
