"""The measurements of one case, as lines of the results table, and the grid that its slices form in space.

Maps are [N K *S]: N items (slices in 2D, 1 in 3D), K classes, *S axes of an item; n voxels of one class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from softseg_dist.numerics.metrics import (
    NUM_BINS,
    Map,
    PerClass,
    confusion,
    hard_scores,
    mask_volume_error,
    neighbourhood,
    reliability,
    soft_metrics,
)
from softseg_dist.numerics.raters import entropy_disagreement_correlation, ged2, pairwise_dice
from softseg_dist.numerics.structures import components, lesion_metrics, surface_metrics

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Grid:
    """The grid of a case, with which the slices of a 2D case are measured as one volume.

    Surfaces and lesions extend over slices; the distance of two slices is the volume of a voxel over its area. Slices that
    were left out (slices="labelled") count as empty, as no rater labelled them: the others keep their distances, and no
    lesion crosses the gap. A single slice remains a plane.

    Args:
        spacing_mm: size of a voxel along each axis of an item, in mm.
        voxel_mm3: volume of a voxel (in 2D with the distance of the slices), in mm3.
        slices: in 2D the index of each item along the slice axis, increasing; None in 3D.
    """

    spacing_mm: tuple[float, ...]
    voxel_mm3: float
    slices: tuple[int, ...] | None = None

    @property
    def is_stack(self) -> bool:
        """True if the items are several slices of one volume."""
        return self.slices is not None and len(self.slices) > 1

    @property
    def volume_spacing_mm(self) -> tuple[float, ...]:
        """The spacing of `volume`: the distance of the slices, if there are several, then the spacing of *S."""
        if not self.is_stack:
            return self.spacing_mm
        return (self.voxel_mm3 / math.prod(self.spacing_mm), *self.spacing_mm)

    def volume(self, items: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Maps [N *S] as one volume: [*S], or [Z *S] with Z slices from the first to the last, 0 where one is left out."""
        if not self.is_stack or self.slices is None:
            return items[0]
        places = np.asarray(self.slices) - self.slices[0]
        if places[-1] + 1 == len(items):
            return items
        volume = np.zeros((places[-1] + 1, *items.shape[1:]), dtype=items.dtype)
        volume[places] = items
        return volume


def bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around `mask` [*S]; without a voxel if it is empty."""
    found = ndimage.find_objects(mask.view(np.uint8))
    return found[0] if found else (slice(0, 0),) * mask.ndim


NOT_RATERS = ("mean", "truth")


class Measurement(NamedTuple):
    """One value measured on one case. `threshold` is None for soft metrics."""

    class_name: str
    reference: str
    threshold: float | None
    metric: str
    value: float


def case_rows(
    prediction: Map,
    references: Mapping[str, Map],
    classes: Sequence[str],
    thresholds: Sequence[float],
    curve: Sequence[float],
    grid: Grid,
) -> list[Measurement]:
    """All measurements of one case.

    Against every reference: soft metrics and, at each of `thresholds`, overlap and volume error of the mask. Against
    "mean" also Dice at every threshold of `curve` (a threshold that is in both appears once), surfaces and lesions at each
    of `thresholds`, and the reliability table, whose threshold is the lower edge of the bin. Against "raters", if there
    are two or more: their agreement with each other, and that of the prediction with their disagreement.

    Args:
        prediction: [N K *S] in [0, 1].
        references: "mean", each rater's name, "truth" where it is known: [N K *S] each.
        classes: K names.
        thresholds: those that the fit chose (see `judging.thresholds`).
        curve: thresholds of the curve of Dice.
        grid: the grid of the case.
    """
    chosen = sorted(set(thresholds))
    rows: list[Measurement] = []
    for name, reference in references.items():
        only_dice = [tau for tau in curve if tau not in chosen] if name == "mean" else []
        lines = list(_overlap(prediction, reference, chosen, only_dice, grid.voxel_mm3))
        rows += [
            Measurement(of, name, tau, metric, float(values[k])) for k, of in enumerate(classes) for tau, metric, values in lines
        ]
    mean = references["mean"]
    raters = [reference for name, reference in references.items() if name not in NOT_RATERS]
    near = neighbourhood(prediction, mean)
    for k, class_name in enumerate(classes):
        p, y, inside = prediction[:, k], mean[:, k], near[:, k]
        values = p[inside], y[inside]
        measured = [("mean", *line) for line in _shapes(p, y, chosen, grid)]
        for of_bins, sums in reliability(*values)._asdict().items():
            measured += [("mean", b / NUM_BINS, f"reliability_{of_bins}", float(value)) for b, value in enumerate(sums)]
        if len(raters) > 1:
            masks = np.stack([rater[:, k] >= 0.5 for rater in raters])
            measured += [
                ("raters", None, "inter_rater_dice", pairwise_dice(masks)),
                ("raters", None, "ged2", ged2(p, masks)),
                ("raters", None, "entropy_disagreement_correlation", entropy_disagreement_correlation(*values)),
            ]
        rows += [Measurement(class_name, *line) for line in measured]
    return rows


def _overlap(
    prediction: Map, reference: Map, chosen: Sequence[float], only_dice: Sequence[float], voxel_mm3: float
) -> Iterator[tuple[float | None, str, PerClass]]:
    """Soft metrics, and overlap and volume at the `chosen` thresholds, each with a value [K]; at those of `only_dice` the Dice."""
    for metric, values in soft_metrics(prediction, reference, voxel_mm3).items():
        yield None, metric, values
    if taus := [*chosen, *only_dice]:
        counts = confusion(prediction, reference, taus)
        for metric, scores in (hard_scores(counts) | {"volume_error": mask_volume_error(counts, reference)}).items():
            yield from ((tau, metric, scores[:, t]) for t, tau in enumerate(taus if metric == "dice" else chosen))


def _shapes(p: Map, y: Map, thresholds: Sequence[float], grid: Grid) -> Iterator[tuple[float | None, str, float]]:
    """Surfaces and lesions of {p > tau} and {y >= 0.5}, [N *S], at each of the increasing thresholds, in their bounding box."""
    if not thresholds:
        return
    soft, true = grid.volume(p), grid.volume(y) >= 0.5
    box = bounding_box((soft > thresholds[0]) | true)
    soft, true = soft[box], true[box]
    lesions = components(true)
    for tau in thresholds:
        mask = soft > tau
        found = surface_metrics(mask, true, grid.volume_spacing_mm) | lesion_metrics(components(mask), lesions)
        for metric, value in found.items():
            yield tau, metric, float(value)
