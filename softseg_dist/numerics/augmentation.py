"""Augmentation of a batch: one spatial transform, shared by image and label, then the intensity of the image, then mixup.

Random parameters are drawn first, on the CPU, and applied afterwards, on any device, which then waits for nothing.

Legend: B batch, N items of a case, C image channels, K classes, *S space (2 or 3 axes). The augmentation of a sample depends on
its seed only: not on its batch, the worker or the order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from softseg_dist.numerics.labels import LabelMode, harden
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.spatial import Flip
from softseg_dist.numerics.transforms import AffineMap, Augmentation, Frame, Intensity, Invertible, Pairing, Spatial, per_sample


class Mixup(Pairing):
    """x = l x1 + (1 - l) x2 and y = l y1 + (1 - l) y2, with l ~ Beta(alpha, alpha) per sample, voxel by voxel.

    Small `alpha` leaves most samples nearly unmixed (l near 0 or 1), 1 makes all l equally likely, large `alpha` brings l
    near 1/2. Samples are mixed after the label mode has rounded, so that targets are soft in every mode: with mixup a study
    does not compare label modes alone. A split with one item mixes it with itself: nothing changes.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.
    """

    short: ClassVar[str] = "mixup"
    inert = {"alpha": 0}
    alpha: NonNegativeFloat = 0.2

    def draw(self, generator: torch.Generator, frame: Frame) -> Tensor:
        """The weight l of the sample itself, a scalar in [0, 1]."""
        seed = torch.randint(2**63 - 1, (), generator=generator).item()  # torch's Beta takes no generator
        return torch.tensor(np.random.default_rng(int(seed)).beta(self.alpha, self.alpha), dtype=torch.float32)

    def mix(self, maps: Tensor, partners: Tensor, parameters: Tensor) -> Tensor:
        """The mixture; exact where both are equal."""
        return partners + per_sample(parameters, maps) * (maps - partners)


Drawn = Sequence[tuple[Augmentation, Tensor]]
"""Transforms in their order, each with the random parameters of all samples, stacked [B ...]."""


def draw_all(
    transforms: Sequence[Augmentation], seeds: Sequence[int], frame: Frame, kinds: tuple[type, ...] = (Spatial, Intensity)
) -> Drawn:
    """The `transforms` of `kinds`, by default those of single samples, with the parameters of all samples, on the frame's device.

    Each has its own seed, so that none changes the draws of another. Raises UserError if one needs an axis that the images lack.
    """
    generator, drawn = torch.Generator(), []
    for index, transform in enumerate(transforms):
        if isinstance(transform, kinds) and not transform.idle:
            own = (seed_of(seed, index, type(transform).__name__) for seed in seeds)
            draws = [transform.draw(generator.manual_seed(seed), frame) for seed in own]
            drawn.append((transform, torch.stack(draws).to(frame.device)))
    return drawn


def apply(image: Tensor, target: Tensor, drawn: Drawn, mode: LabelMode, frame: Frame) -> tuple[Tensor, Tensor]:
    """The augmented image [B C *S] and the final target [B K *S], given the parameters that `draw_all` has drawn.

    All spatial transforms, in their order, are composed into one map and interpolated once, linearly; intensity transforms
    follow, in their order. Outside its field of view an image has its border values, and a label is 0. The target depends on
    `mode`: "soft" is never rounded, and bit-exact unless something interpolates; "hard" is rounded here, once, last; "nearest"
    takes the nearest voxel; "hard_each" is resampled and rounded transform by transform.

    Args:
        image, target: prepared images, and what `labels.prepare_target` makes: in [0, 1]; 0 or 1 for "nearest" and "hard_each".
        drawn: a `Pairing` in it is left to `join`.
        frame: that of `image`, for all samples: call once per spacing.
    """
    steps = [(transform, parameters) for transform, parameters in drawn if isinstance(transform, Spatial)]
    if steps:
        move = _move(steps, frame)
        image = move(image, "bilinear", "border")
        if mode == "hard_each":
            for step in steps:
                target = harden(_move([step], frame)(target, "bilinear", "zeros"))
        elif mode == "nearest":
            target = move(target, "nearest", "zeros")
        else:
            # The weights of an interpolation add up to 1 only up to rounding, which must not raise a label above 1.
            target = move(target, "bilinear", "zeros").clamp(0, 1)
    for transform, parameters in drawn:
        if isinstance(transform, Intensity):
            image = transform.change(image, parameters, frame)
    return image, harden(target) if mode == "hard" else target


def moves(transforms: Sequence[Augmentation]) -> bool:
    """True if any spatial transform does more than mirror: then values from around a sample move into it."""
    return any(isinstance(t, Spatial) and not isinstance(t, Flip) and not t.idle for t in transforms)


def pairs(transforms: Sequence[Augmentation]) -> bool:
    """True if any of `transforms` joins samples with partners, which must then be augmented, too."""
    return any(isinstance(transform, Pairing) and not transform.idle for transform in transforms)


def join(image: Tensor, target: Tensor, partner_image: Tensor, partner_target: Tensor, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Augmented samples joined with their partners, given what `draw_all` has drawn for each `Pairing`; targets are soft then."""
    for transform, parameters in drawn:
        assert isinstance(transform, Pairing), transform
        image = transform.mix(image, partner_image, parameters)
        target = transform.mix(target, partner_target, parameters)
    return image, target


def augment_case(
    image: Tensor, transforms: Sequence[Augmentation], seed: int, spacing_mm: Sequence[float]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A transformed case [N C *S], and the function that maps its predictions [N K *S] back to the grid of the case.

    All items share one draw, as all slices of a head have one pose. If spatial transforms only flip, the inverse is a mirror,
    bit-exact; otherwise it interpolates linearly with the inverse map. A voxel that was moved out of the field of view gets the
    value of the nearest one within it. `transforms` are `Invertible` and `Intensity` ones.

    Raises UserError if a transform needs an axis that the images lack.
    """
    frame = Frame.of(image, spacing_mm)
    drawn = [(transform, p.expand(len(image), *p.shape[1:])) for transform, p in draw_all(transforms, [seed], frame)]
    changed, _ = apply(image, image[:, :0], drawn, "soft", frame)  # there is no label
    return changed, _move_back([(transform, p) for transform, p in drawn if isinstance(transform, Invertible)], frame)


def _move(steps: Sequence[tuple[Spatial, Tensor]], frame: Frame) -> Callable[[Tensor, str, str], Tensor]:
    """A function that applies all `steps` to maps [B C *S]: one interpolation, or none if all steps mirror."""
    mirrors = [(transform, parameters) for transform, parameters in steps if isinstance(transform, Flip)]
    if len(mirrors) == len(steps):
        return lambda maps, mode, padding: reduce(lambda m, step: step[0].mirror(m, step[1]), mirrors, maps)
    positions, matrix = (frame.positions, None)  # the matrix composes affine maps that are still to be applied to the positions
    for transform, parameters in reversed(steps):  # from the output back to the input
        if isinstance(transform, AffineMap):
            then = transform.matrix(parameters, frame)
            if matrix is not None:  # `then` after `matrix`: M2 (M1 x + t1) + t2
                both = then[..., :-1] @ matrix
                then = torch.cat([both[..., :-1], both[..., -1:] + then[..., -1:]], dim=-1)
            matrix = then
        else:
            here = positions if matrix is None else frame.affine(positions, matrix)
            positions, matrix = transform.move(here, parameters, frame), None
    grid = frame.grid(positions, matrix)
    return lambda maps, mode, padding: frame.look_up(maps, grid, mode, padding)


def _move_back(steps: Sequence[tuple[Invertible, Tensor]], frame: Frame) -> Callable[[Tensor], Tensor]:
    """The inverse of `_move`, for soft maps [B K *S]."""
    mirrors = [(transform, parameters) for transform, parameters in steps if isinstance(transform, Flip)]
    if len(mirrors) == len(steps):
        return lambda maps: reduce(lambda m, step: step[0].mirror(m, step[1]), mirrors, maps)
    positions = frame.positions
    for transform, parameters in steps:  # from the input on to the output
        positions = transform.move_back(positions, parameters, frame)
    return lambda maps: frame.sample(maps, positions).clamp(0, 1)
