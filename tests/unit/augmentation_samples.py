"""What the tests of augmentation share: maps of random numbers, and the grids they lie on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from softseg_dist.numerics.augmentation import apply, draw_all
from softseg_dist.numerics.labels import LabelMode
from softseg_dist.numerics.transforms import Augmentation, Frame

SPACES = {(17, 24): (0.5, 0.7), (9, 12, 7): (1.0, 0.8, 3.0)}  # size: spacing in mm

every_space = pytest.mark.parametrize("size", SPACES, ids=str)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def augment(
    image: Tensor,
    target: Tensor,
    transforms: Sequence[Augmentation],
    seeds: Sequence[int],
    mode: LabelMode,
    spacing_mm: Sequence[float],
) -> tuple[Tensor, Tensor]:
    frame = Frame.of(image, spacing_mm)
    return apply(image, target, draw_all(transforms, seeds, frame), mode, frame)


def frame_of(size: tuple[int, ...], spacing_mm: tuple[float, ...], channels: int = 1) -> Frame:
    return Frame(channels, size, spacing_mm, torch.device("cpu"))


def ball(frame: Frame, radius_mm: float, border_mm: float) -> Tensor:
    """A ball about the centre whose border falls off linearly over `border_mm` [1 1 *S]."""
    return ((radius_mm - frame.positions.norm(dim=-1)) / border_mm + 0.5).clamp(0, 1)[:, None]
