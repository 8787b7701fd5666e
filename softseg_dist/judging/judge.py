"""Judging: from a soft map on the grid of its file, and what each rater drew there, to lines of the results table.

Fits, held-out subjects, ensembles and the predictions of other programs are all judged here. No reference is resampled.

Legend: N items (slices in 2D, 1 in 3D; 1 for a whole case), R raters, K classes, *S axes of an item, X Y Z canonical voxels (RAS+).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from softseg_dist.data.geometry import Float32
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.judging.thresholds import CURVE, Recalibration, recalibrated
from softseg_dist.numerics import metrics as formulas
from softseg_dist.numerics.metrics import FORMULAS, NUM_BINS, RECALIBRATED, Map, Metric, Pair, PerClass, Scale, bounding_box
from softseg_dist.numerics.raters import ged2, pairwise_dice, volume_crps
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
        slices: in 2D the index of each item along the slice axis, increasing; () in 3D.
    """

    spacing_mm: tuple[float, ...]
    voxel_mm3: float
    slices: tuple[int, ...] = ()

    def case(self, maps: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Maps [N .. *S] of the items as [1 .. *S] of the case: of several slices [1 .. Z *S], 0 in one that is left out."""
        if len(self.slices) < 2:
            return maps
        places, dim = np.asarray(self.slices) - self.slices[0], len(self.spacing_mm)
        volume = np.zeros((*maps.shape[1:-dim], places[-1] + 1, *maps.shape[-dim:]), dtype=maps.dtype)
        np.moveaxis(volume, -dim - 1, 0)[places] = maps
        return volume[None]

    def scale(self, mean_volumes_mm3: Sequence[float]) -> Scale:
        """The scale of `case`, in a data set with these mean volumes of its classes."""
        between_slices = (self.voxel_mm3 / math.prod(self.spacing_mm),) if len(self.slices) > 1 else ()
        return Scale(self.voxel_mm3, tuple(mean_volumes_mm3), (*between_slices, *self.spacing_mm))


NOT_RATERS = ("mean", "truth")


class Measurement(NamedTuple):
    """One value measured on one case. `threshold` is None for soft metrics."""

    class_name: str
    reference: str
    threshold: float | None
    metric: str
    value: float


@dataclass(frozen=True)
class Yardstick:
    """What all maps of a data set are judged with.

    Args:
        classes: K names.
        mean_volumes_mm3: [K] the mean over all cases of the data set of the raters' mean volume.
        metrics: those of the user, beside the ones of the table.
        recalibration: that of each class which validation gave; {} for none.
    """

    classes: tuple[str, ...]
    mean_volumes_mm3: tuple[float, ...]
    metrics: tuple[Metric, ...] = ()
    recalibration: Mapping[str, Recalibration] = field(default_factory=dict)


def case_rows(
    prediction: Map, references: Mapping[str, Map], yardstick: Yardstick, thresholds: Sequence[float], scale: Scale
) -> list[Measurement]:
    """All measurements of one case, a prediction [1 K *S] in [0, 1]; a case is one volume (see `Grid.case`).

    A value that the reference does not allow is NaN, whatever the prediction. `references` are "mean", each rater by name, and
    "truth" where it is known: [1 K *S] each.

    Against every reference: soft metrics and, at each of the thresholds, overlap and volume error of the mask. Against "mean" also
    calibration, Dice at every threshold of `CURVE` (a threshold that is in both appears once), surfaces and lesions at each of
    the thresholds, the reliability table, whose threshold is the lower edge of the bin, "empty_map": the Brier skill of a map
    that is 0 everywhere, and metrics of the recalibrated map. Against "raters", all at once: the distances of distributions and, if
    there are two or more, their agreement with each other.
    """
    pairs = {name: Pair(prediction, reference, scale) for name, reference in references.items()}
    chosen = sorted(set(thresholds))
    rows: list[Measurement] = []
    for name, pair in pairs.items():
        lines = list(_overlap(pair, yardstick, chosen, against_mean=name == "mean"))
        for k, of in enumerate(yardstick.classes):
            rows += [Measurement(of, name, tau, metric, float(values[k])) for tau, metric, values in lines]
    raters = [reference for name, reference in references.items() if name not in NOT_RATERS] or [references["mean"]]
    mean = references["mean"]
    empty = FORMULAS["brier_skill"](Pair(np.broadcast_to(np.float32(0), mean.shape), mean, scale))
    for k, class_name in enumerate(yardstick.classes):
        p = prediction[0, k]
        found = [("mean", None, "empty_map", float(empty[k])), *(("mean", *line) for line in _shapes(p, mean[0, k], chosen, scale))]
        for of_bins, values in pairs["mean"].tables[k]._asdict().items():
            found += [("mean", b / NUM_BINS, f"reliability_{of_bins}", float(value)) for b, value in enumerate(values)]
        volumes = np.array([rater[:, k].sum(dtype=np.float64) for rater in raters])
        masks = np.stack([rater[0, k] >= 0.5 for rater in raters])
        found.append(("raters", None, "volume_crps_mm3", scale.voxel_mm3 * volume_crps(p, volumes)))
        found.append(("raters", None, "ged2", ged2(p, masks)))
        if len(raters) > 1:
            found += [("raters", None, "inter_rater_dice", pairwise_dice(masks))]
        rows += [Measurement(class_name, *line) for line in found]
    return rows + list(_recalibrated(pairs["mean"], yardstick))


def _recalibrated(pair: Pair, yardstick: Yardstick) -> Iterator[Measurement]:
    """Metrics of the recalibrated map, and the volume of the reference where the map is 0, which stays 0."""
    if not yardstick.recalibration:
        return
    p, mean = pair.maps
    again = Pair(recalibrated(p, [yardstick.recalibration[name] for name in yardstick.classes]), mean, pair.scale)
    again.near = pair.near
    values = {f"{name}_recalibrated": FORMULAS[name](again) for name in RECALIBRATED}
    for k, of in enumerate(yardstick.classes):
        missed_mm3 = pair.scale.voxel_mm3 * mean[:, k].sum(where=p[:, k] == 0, dtype=np.float64)
        for name, value in {**{name: each[k] for name, each in values.items()}, "volume_at_0_mm3": missed_mm3}.items():
            yield Measurement(of, "mean", None, name, float(value))


def _overlap(
    pair: Pair, yardstick: Yardstick, chosen: Sequence[float], *, against_mean: bool
) -> Iterator[tuple[float | None, str, PerClass]]:
    """Soft metrics, overlap and volume at the chosen thresholds, each with a value [K]; at those of `CURVE` the Dice."""
    for metric, values in formulas.soft_metrics(pair, against_mean=against_mean).items():
        yield None, metric, values
    for own in yardstick.metrics:
        yield None, own.row.name, formulas.measured(own, *pair.maps, pair.scale)
    if taus := [*chosen, *(tau for tau in CURVE if against_mean and tau not in chosen)]:
        counts = formulas.confusion(*pair.maps, taus, pair.voxels)
        volume_error = {"mask_volume_error": formulas.mask_volume_error(counts, pair.true)}
        for metric, scores in (formulas.hard_scores(counts) | volume_error).items():
            yield from ((tau, metric, scores[:, t]) for t, tau in enumerate(taus if metric == "dice" else chosen))


def _shapes(p: Map, y: Map, thresholds: Sequence[float], scale: Scale) -> Iterator[tuple[float | None, str, float]]:
    """Surfaces and lesions of {p >= tau} and {y >= 0.5}, [*S], at each of the increasing thresholds, in their bounding box."""
    if not thresholds:
        return
    true = y >= 0.5
    box = bounding_box((p >= thresholds[0]) | true)
    soft, true = p[box], true[box]
    lesions, diagonal_mm = components(true), scale.diagonal_mm(p[None, None])
    for tau in thresholds:
        mask = soft >= tau
        found = surface_metrics(mask, true, scale.spacing_mm, diagonal_mm) | lesion_metrics(components(mask), lesions)
        found["false_volume_mm3"] = np.count_nonzero(mask & ~true) * scale.voxel_mm3
        for metric, value in found.items():
            yield tau, metric, float(value)


Region = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class References:
    """What a case is judged against, in the `region` of the file's grid that holds all of it: maps are 0 outside, too.

    `maps`: "mean" of the raters, each rater by name if there are several, "truth" where it is known: [1 K *S] each, *S the axes of
    the file of more than one voxel. `raters` [1 R K *S]; `scale` is that of the file. In voxels to ignore all maps are 0.
    """

    region: Region
    maps: dict[str, npt.NDArray[Any]]
    raters: npt.NDArray[Any]
    scale: Scale

    def part(self, maps: Float32) -> Float32:
        """Maps [K X Y Z] of the file's grid in the region [1 K *S]."""
        inside = maps[(slice(None), *self.region)].reshape(1, len(maps), *self.raters.shape[3:])
        return inside if self.scale.ignored is None else np.where(self.scale.ignored, np.float32(0), inside)


def judge(
    maps: Float32, own: OwnMasks, rater_names: Sequence[str], yardstick: Yardstick, thresholds: Sequence[float]
) -> list[Measurement]:
    """All measurements of one case, as `case_rows` lists them: of soft maps or masks [K X Y Z] in [0, 1] on the grid of the file.

    `own` is what the raters, R names, drew; at each of the `thresholds` the maps are cut to masks.
    """
    references = references_of(own, rater_names, yardstick, maps)
    return case_rows(references.part(maps), references.maps, yardstick, thresholds, references.scale)


def references_of(own: OwnMasks, rater_names: Sequence[str], yardstick: Yardstick, maps: Float32) -> References:
    """What `maps` [K X Y Z] are judged against. A metric of the user sees the whole image, the others what is not empty."""
    whole_mm, whole = own.geometry.spacing_mm, own.geometry.canonical_shape
    axes = [axis for axis, n in enumerate(whole) if n > 1] or [0, 1]  # a single slice is a plane
    spacing_mm, shape = tuple(whole_mm[axis] for axis in axes), tuple(whole[axis] for axis in axes)
    region = tuple(slice(0, n) for n in whole) if yardstick.metrics else _region(maps, own)
    size = tuple(region[axis].stop - region[axis].start for axis in axes)

    def inside(masks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[... *box] -> [1 ... *S]."""
        placed = np.zeros((*masks.shape[:-3], *(part.stop - part.start for part in region)), masks.dtype)
        x, y, z = (slice(start - part.start, stop - part.start) for (start, stop), part in zip(own.box, region, strict=True))
        placed[..., x, y, z] = masks
        return placed.reshape(1, *masks.shape[:-3], *size)

    raters, truth, ignored = inside(own.raters), own.truth, None
    if raters.dtype != bool and (unknown := np.isnan(raters)).any():
        raters, ignored = np.nan_to_num(raters), unknown.any(axis=(1, 2))[:, None]
    references = {"mean": raters.mean(axis=1, dtype=np.float32)}
    if len(rater_names) > 1:
        references |= {name: raters[:, r] for r, name in enumerate(rater_names)}
    if truth is not None:
        references["truth"] = inside(truth)
    scale = Scale(own.voxel_mm3, yardstick.mean_volumes_mm3, spacing_mm, shape, ignored)
    return References(region, references, raters, scale)


def _region(maps: Float32, own: OwnMasks) -> Region:
    """The box around everything that is not 0 in a map or a mask, with the neighbourhood that counts for calibration."""
    shape = own.geometry.canonical_shape
    found = np.zeros(shape, dtype=np.bool_)
    found[tuple(slice(*edges) for edges in own.box)] = True
    for soft_map in maps:
        found |= soft_map > 0
    parts = zip(bounding_box(found), formulas.reach_of(own.geometry.spacing_mm), shape, strict=True)
    return tuple(slice(max(0, part.start - reach), min(n, part.stop + reach)) for part, reach, n in parts)
