"""Mixup: each sample becomes a mixture of itself and another training item.

Legend: B batch, C image channels, K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from softseg_dist.numerics.intensity import BiasField, Blur, Contrast, Gamma, LowResolution, Noise
from softseg_dist.numerics.labels import LabelMode, harden
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.spatial import Affine, Elastic, Flip
from softseg_dist.numerics.transforms import (
    Augmentation,
    Frame,
    Intensity,
    Invertible,
    Pairing,
    Spatial,
    Straight,
    in_a_row,
    per_sample,
)


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


__all__ = [
    "Affine",
    "Augmentation",
    "BiasField",
    "Blur",
    "Contrast",
    "Elastic",
    "Flip",
    "Frame",
    "Gamma",
    "Intensity",
    "Invertible",
    "LowResolution",
    "Mixup",
    "Noise",
    "Pairing",
    "Spatial",
    "apply",
    "augment",
    "augment_case",
    "draw_all",
    "draw_pairs",
    "join",
    "mix",
    "moves",
    "pairs",
]

Step = tuple[Spatial, Tensor]  # a transform and the parameters of all samples
Drawn = Sequence[tuple[Augmentation, Tensor]]
"""Transforms, in their order, and what was drawn for each: the parameters of all samples, stacked [B ...]."""


def augment(
    image: Tensor,
    target: Tensor,
    transforms: Sequence[Augmentation],
    seeds: Sequence[int],
    mode: LabelMode,
    spacing_mm: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The augmented image [B C *S] and the final target [B K *S].

    It is `apply` of what `draw_all` draws.

    Args:
        image: prepared images.
        target: what `labels.prepare_target` gave, in [0, 1]; 0 or 1 for "nearest" and "hard_each".
        transforms: those of a recipe; may be empty. A `Pairing` is left to `mix`.
        seeds: one per sample, of this sample in this epoch.
        mode: the label mode.
        spacing_mm: distance of voxels along each axis of *S, the same for all samples; call once per spacing.

    Raises:
        UserError: if a transform needs an axis that the images lack.
    """
    assert len(image) == len(target) == len(seeds), f"{len(image)} images, {len(target)} targets, {len(seeds)} seeds"
    assert image.shape[2:] == target.shape[2:], f"image {tuple(image.shape)}, target {tuple(target.shape)}"
    assert image.ndim == 2 + len(spacing_mm), f"image {tuple(image.shape)}, spacing {tuple(spacing_mm)} mm"
    frame = Frame(image.shape[1], tuple(image.shape[2:]), tuple(spacing_mm), image.device)
    return apply(image, target, draw_all(transforms, seeds, frame), mode, frame)


def draw_all(transforms: Sequence[Augmentation], seeds: Sequence[int], frame: Frame) -> Drawn:
    """Those of `transforms` that change samples one by one, with the parameters of all samples, on the frame's device.

    Raises UserError if a transform needs an axis that the images lack.
    """
    active = [(i, t) for i, t in enumerate(transforms) if not (t.idle or isinstance(t, Pairing))]
    return [(transform, _draw(transform, index, seeds, frame)) for index, transform in active]


def draw_pairs(transforms: Sequence[Augmentation], seeds: Sequence[int], frame: Frame) -> Drawn:
    """Those of `transforms` that join samples with partners, as `draw_all` gives the others."""
    active = [(i, t) for i, t in enumerate(transforms) if isinstance(t, Pairing) and not t.idle]
    return [(transform, _draw(transform, index, seeds, frame)) for index, transform in active]


def apply(image: Tensor, target: Tensor, drawn: Drawn, mode: LabelMode, frame: Frame) -> tuple[Tensor, Tensor]:
    """The augmented image [B C *S] and the final target [B K *S], by what `draw_all` has drawn for them.

    All spatial transforms, in their order, are composed into one map and interpolated once, linearly; intensity
    transforms follow, in their order. Outside its field of view an image goes on as at its border, and a label is
    0. What happens to the target depends on `mode` (see `labels`): "soft" is never rounded, and bit-exact unless
    something interpolates; "hard" is rounded here, once, last; "nearest" takes the nearest voxel; "hard_each" is
    resampled and rounded transform by transform.
    """
    steps = [(transform, parameters) for transform, parameters in drawn if isinstance(transform, Spatial)]
    if steps:
        image, target = _moved(image, target, steps, mode, frame)
    for transform, parameters in drawn:
        if isinstance(transform, Intensity):
            image = transform.change(image, parameters, frame)
    return image, harden(target) if mode == "hard" else target


def moves(transforms: Sequence[Augmentation]) -> bool:
    """Whether `transforms` do more to space than mirror it, and so show what lies around a sample."""
    return any(isinstance(t, Spatial) and not isinstance(t, Flip) and not t.idle for t in transforms)


def pairs(transforms: Sequence[Augmentation]) -> bool:
    """Whether `transforms` join samples with partners, which must then be augmented too."""
    return any(isinstance(transform, Pairing) and not transform.idle for transform in transforms)


def mix(
    image: Tensor,
    target: Tensor,
    partner_image: Tensor,
    partner_target: Tensor,
    transforms: Sequence[Augmentation],
    seeds: Sequence[int],
    spacing_mm: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Samples joined with their partners by every `Pairing` of `transforms`, in order; targets are soft then.

    Args:
        image, target: what `augment` gave for the samples, [B C *S] and [B K *S].
        partner_image, partner_target: what it gave for their partners, each with its own seed and spacing.
        transforms, seeds, spacing_mm: as in `augment`, of the samples.
    """
    frame = Frame(image.shape[1], tuple(image.shape[2:]), tuple(spacing_mm), image.device)
    return join(image, target, partner_image, partner_target, draw_pairs(transforms, seeds, frame))


def join(
    image: Tensor, target: Tensor, partner_image: Tensor, partner_target: Tensor, drawn: Drawn
) -> tuple[Tensor, Tensor]:
    """`mix`, by what `draw_pairs` has drawn."""
    for transform, parameters in drawn:
        assert isinstance(transform, Pairing), transform
        image = transform.mix(image, partner_image, parameters)
        target = transform.mix(target, partner_target, parameters)
    return image, target


def augment_case(
    image: Tensor, transforms: Sequence[Augmentation], seed: int, spacing_mm: Sequence[float]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A case [N C *S] as another acquisition might show it, and what takes maps [N K *S] of that back to the case's own grid.

    One draw for all items: a head is tilted once, not slice by slice. The way back is a mirror, bit-exact, where
    transforms of space only flip; else linear interpolation with the inverse map. A voxel that was moved out of the field
    of view was not seen, and gets the value of the nearest one that was.

    Args:
        image: a prepared case.
        transforms: `Invertible` and `Intensity` ones.
        seed: of the draw.
        spacing_mm: distance of voxels along each axis of *S.

    Raises:
        UserError: if a transform needs an axis that the images lack.
    """
    frame = Frame(image.shape[1], tuple(image.shape[2:]), tuple(spacing_mm), image.device)
    drawn = [
        (transform, parameters.expand(len(image), *parameters.shape[1:]))
        for transform, parameters in draw_all(transforms, [seed], frame)
    ]
    steps = [(transform, parameters) for transform, parameters in drawn if isinstance(transform, Invertible)]
    if steps:
        image = _mover(steps, frame)(image, "bilinear", "border")
    for transform, parameters in drawn:
        if isinstance(transform, Intensity):
            image = transform.change(image, parameters, frame)
    return image, _unmover(steps, frame)


def _draw(transform: Augmentation, index: int, seeds: Sequence[int], frame: Frame) -> Tensor:
    """The parameters of all samples [B ...]. Each transform has its own seed, so that none shifts another's draws."""
    generator = torch.Generator()
    name = type(transform).__name__
    draws = [transform.draw(generator.manual_seed(seed_of(seed, index, name)), frame) for seed in seeds]
    return torch.stack(draws).to(frame.device)


def _moved(
    image: Tensor, target: Tensor, steps: Sequence[Step], mode: LabelMode, frame: Frame
) -> tuple[Tensor, Tensor]:
    """Image and label after all `steps`, both by the one map that the steps compose into."""
    move = _mover(steps, frame)
    if mode == "hard_each":
        for step in steps:
            target = harden(_mover([step], frame)(target, "bilinear", "zeros"))
    elif mode == "nearest":
        target = move(target, "nearest", "zeros")
    else:
        # The weights of an interpolation add up to 1 only up to rounding, which must not lift a label above 1.
        target = move(target, "bilinear", "zeros").clamp(0, 1)
    return move(image, "bilinear", "border"), target


def _mover(steps: Sequence[Step], frame: Frame) -> Callable[[Tensor, str, str], Tensor]:
    """What gives maps [B C *S] after all `steps`, interpolated once, or not at all if the steps only mirror."""
    mirrors = [(transform, parameters) for transform, parameters in steps if isinstance(transform, Flip)]
    if len(mirrors) == len(steps):
        return lambda maps, mode, padding: reduce(lambda m, step: step[0].mirror(m, step[1]), mirrors, maps)
    positions, line = frame.positions, None  # and what straight transforms in a row still do to them
    for transform, parameters in reversed(steps):  # from the output back to the input
        if isinstance(transform, Straight):
            more = transform.line(parameters, frame)
            line = more if line is None else in_a_row(line, more)
        else:
            here = positions if line is None else frame.straight(positions, line)
            positions, line = transform.move(here, parameters, frame), None
    grid = frame.grid(positions, line)
    return lambda maps, mode, padding: frame.look_up(maps, grid, mode, padding)


def _unmover(steps: Sequence[tuple[Invertible, Tensor]], frame: Frame) -> Callable[[Tensor], Tensor]:
    """What undoes `_mover` on soft maps [B K *S]."""
    mirrors = [(transform, parameters) for transform, parameters in steps if isinstance(transform, Flip)]
    if len(mirrors) == len(steps):
        return lambda maps: reduce(lambda m, step: step[0].mirror(m, step[1]), mirrors, maps)
    positions = frame.positions
    for transform, parameters in steps:  # from the input on to the output
        positions = transform.unmove(positions, parameters, frame)
    return lambda maps: frame.sample(maps, positions).clamp(0, 1)
