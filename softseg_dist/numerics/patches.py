"""Patches: training on parts of an item that does not fit whole, and logits of the whole item from overlapping parts.

Legend: N items, C image channels, L logits, *S space (2 or 3 axes). Positions and sizes are in voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from softseg_dist.frozen import Frozen

MARGIN = 1 / 4  # of a patch, on each side: enough to rotate a square by any angle, a cube by 20 degrees about any axis
VOXELS_AT_ONCE = 2**20  # in patches at inference, one of 96 x 96 x 96 or 16 of 256 x 256: bounds memory

Index = tuple[EllipsisType | slice, ...]


@dataclass(frozen=True)
class Window:
    """A part of an item, from `start` to before `stop`; it may extend beyond the border of the image."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def around(cls, whole: Sequence[int], size: Sequence[int]) -> Window:
        """The window of `size` in whose middle an image of `whole` voxels lies, or which lies in the middle of it."""
        start = tuple((n - width) // 2 for n, width in zip(whole, size, strict=True))
        return cls(start, tuple(first + width for first, width in zip(start, size, strict=True)))

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels along every axis."""
        return tuple(last - first for first, last in zip(self.start, self.stop, strict=True))

    def grown(self, margin: Sequence[int]) -> Window:
        """The window with `margin` more voxels at both ends of every axis."""
        start = tuple(first - more for first, more in zip(self.start, margin, strict=True))
        return Window(start, tuple(last + more for last, more in zip(self.stop, margin, strict=True)))

    def of(self, maps: NDArray[Any], outside: NDArray[Any] | float = 0) -> NDArray[Any]:
        """`maps` [... *S] within the window; beyond the border `outside`, a number, or one for each channel of maps [C *S]."""
        ends = list(zip(self.start, self.stop, maps.shape[-len(self.start) :], strict=True))
        inside: Index = (..., *(slice(max(0, first), min(last, whole)) for first, last, whole in ends))
        part = maps[inside]
        if part.shape[-len(ends) :] == self.size:
            return part
        values = np.empty((*maps.shape[: -len(ends)], *self.size), maps.dtype)
        values[...] = np.reshape(outside, (*np.shape(outside), *[1] * len(ends)))
        values[self.place_of(maps.shape[-len(ends) :])] = part
        return values

    def place_of(self, whole: Sequence[int]) -> Index:
        """Where in the window the part of an image of `whole` voxels is that lies in it."""
        ends = zip(self.start, self.stop, whole, strict=True)
        return (..., *(slice(max(0, -first), min(last, n) - first) for first, last, n in ends))


class Patch(Frozen):
    """Train on patches of `size` voxels and predict from overlapping ones, where volumes or large slices do not fit whole.

    Training: an epoch takes `per_item` patches of each item, each with its own position and augmentation. A share `foreground`
    of them is centred, as far as the image's border allows, on a voxel that any rater has labelled, of a class drawn from those in
    the item. The others have uniform positions, as have all patches of an item without labels. If augmentation rotates, scales or
    bends, a quarter of a patch more is read on each side and cropped afterwards, so that corners hold image values; shares of
    the field of view (`Affine.shift`) refer to what is read. Later steps (smoothing, mixup) see the patch only.

    Inference: patches cover every item, neighbours overlap by a share `overlap` of the patch along each axis, and their logits are
    averaged with Gaussian weights (sd 1/8 of the patch), as predictions are worst at a patch's border. The activation then gets
    the logits of the whole case, as without patches: NormReLU's maximum runs over the case. In training it runs over patches, and
    NormReLU(over="sample") gives each a peak of 1, an empty one too; "running" does not. Monte Carlo dropout draws anew in each
    patch. Beyond its border an image is continued by its minimum, without labels. Where it is smaller than a patch it lies in
    the middle of it, also to be predicted.

    Source: nnU-Net, Isensee et al., Nature Methods 18 (2021), doi 10.1038/s41592-020-01008-z, whose code has the same defaults of
    `foreground` and `overlap`. MONAI averages the overlapping patches.
    """

    short: ClassVar[str] = "patch"
    size: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field((96, 96, 96), min_length=2, max_length=3)
    per_item: PositiveInt = 1
    foreground: float = Field(0.33, ge=0, le=1)
    overlap: float = Field(0.5, ge=0, lt=1)

    @property
    def margin(self) -> tuple[int, ...]:
        """The voxels that augmentation needs beyond the patch on each side."""
        return tuple(math.ceil(n * MARGIN) for n in self.size)

    def draw(self, generator: torch.Generator, size: Sequence[int], labelled: Sequence[NDArray[np.integer]]) -> Window:
        """A random patch of an item of `size`, whose labelled voxels of each class are given as flat indices."""
        middle = Window.around(size, self.size)
        ends = [(min(0, first), max(whole - n, first)) for first, n, whole in zip(middle.start, self.size, size, strict=True)]
        present = [voxels for voxels in labelled if len(voxels)]
        if torch.rand((), generator=generator).item() < self.foreground and present:
            voxels = present[_below(len(present), generator)]
            center = np.unravel_index(int(voxels[_below(len(voxels), generator)]), tuple(size))
            wanted = [int(at) - n // 2 for at, n in zip(center, self.size, strict=True)]
            start = [min(max(least, first), most) for first, (least, most) in zip(wanted, ends, strict=True)]
        else:
            start = [least + _below(most - least + 1, generator) for least, most in ends]
        return Window(tuple(start), tuple(first + n for first, n in zip(start, self.size, strict=True)))

    def middle(self, maps: Tensor) -> Tensor:
        """The patch at the centre of `maps` [B C *S], which were read with or without a margin."""
        firsts = [(whole - n) // 2 for whole, n in zip(maps.shape[2:], self.size, strict=True)]
        inside: Index = (..., *(slice(first, first + n) for first, n in zip(firsts, self.size, strict=True)))
        return maps[inside].contiguous()

    def stitch(self, network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Logits [N L *S] of items [N C *S], none smaller than a patch; `network` gets about `VOXELS_AT_ONCE` voxels at a time."""
        # Importing monai takes seconds, which a study file that only names a patch need not wait for.
        from monai.inferers.utils import sliding_window_inference

        at_once = max(1, VOXELS_AT_ONCE // math.prod(self.size))
        return sliding_window_inference(image, self.size, at_once, network, self.overlap, mode="gaussian", sigma_scale=1 / 8)


def filled_up(image: Tensor, size: Sequence[int]) -> tuple[Tensor, Index]:
    """Items [N C *S] in the middle of at least `size` voxels, with their minima around them, and where they are in the result."""
    window = Window.around(image.shape[2:], tuple(map(max, image.shape[2:], size)))
    place = window.place_of(image.shape[2:])
    if window.size == image.shape[2:]:
        return image, place
    lowest = image.amin(dim=tuple(range(2, image.ndim)), keepdim=True)
    filled = lowest.expand(*image.shape[:2], *window.size).clone()
    filled[place] = image
    return filled, place


def _below(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))
