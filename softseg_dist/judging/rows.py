"""Everything that is recorded of one case, as lines of the results table.

Maps are [N K *S]: N items (slices in 2D, 1 in 3D), K classes, *S space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from softseg_dist.judging.grid import Grid, bounding_box
from softseg_dist.numerics.calibration import NUM_BINS, neighbourhood, reliability
from softseg_dist.numerics.lesions import components, lesion_metrics
from softseg_dist.numerics.metrics import Map, confusion, hard_scores, mask_volume_error, soft_metrics
from softseg_dist.numerics.raters import entropy_disagreement_correlation, ged2, pairwise_dice
from softseg_dist.numerics.surface import surface_metrics

NOT_RATERS = ("mean", "truth")


class Row(NamedTuple):
    """One line of the results table, as far as the numbers know it. `threshold` is None for soft metrics."""

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
) -> list[Row]:
    """Everything that is recorded of one case.

    Against every reference: soft metrics and, at each of `thresholds`, overlap and volume error of the mask. Against
    "mean" also Dice at every threshold of `curve` (a threshold that is in both appears once), surfaces and lesions at each
    of `thresholds`, and the reliability table, whose threshold is the lower edge of the bin. Against "raters", where there
    are two or more: how they agree with each other, and the prediction with their disagreement.

    Args:
        prediction: [N K *S] in [0, 1].
        references: "mean", each rater's name, "truth" where it is known: [N K *S] each.
        classes: K names.
        thresholds: those that the fit chose (see `numerics.thresholds`).
        curve: thresholds of the curve of Dice.
        grid: where the items lie.
    """
    chosen = sorted(set(thresholds))
    rows: list[Row] = []
    for name, reference in references.items():
        extra = [tau for tau in curve if tau not in chosen] if name == "mean" else []
        rows += _overlap_rows(prediction, name, reference, classes, chosen, extra, grid.voxel_mm3)
    mean = references["mean"]
    raters = [reference for name, reference in references.items() if name not in NOT_RATERS]
    near = neighbourhood(prediction, mean)
    for k, class_name in enumerate(classes):
        p, y, inside = prediction[:, k], mean[:, k], near[:, k]
        values = p[inside], y[inside]
        measured = [("mean", *line) for line in (*_shapes(p, y, chosen, grid), *_reliability(*values))]
        if len(raters) > 1:
            masks = np.stack([rater[:, k] >= 0.5 for rater in raters])
            measured += [
                ("raters", None, "inter_rater_dice", pairwise_dice(masks)),
                ("raters", None, "ged2", ged2(p, masks)),
                ("raters", None, "entropy_disagreement_correlation", entropy_disagreement_correlation(*values)),
            ]
        rows += [Row(class_name, *line) for line in measured]
    return rows


def _overlap_rows(
    prediction: Map,
    name: str,
    reference: Map,
    classes: Sequence[str],
    chosen: Sequence[float],
    extra: Sequence[float],
    voxel_mm3: float,
) -> Iterator[Row]:
    """Soft metrics, and overlap and volume at the `chosen` thresholds; at `extra` ones only Dice."""
    soft, hard = soft_metrics(prediction, reference, voxel_mm3), {}
    if chosen or extra:
        counts = confusion(prediction, reference, [*chosen, *extra])
        hard = hard_scores(counts) | {"volume_error": mask_volume_error(counts, reference)}
    for k, class_name in enumerate(classes):
        for metric, values in soft.items():
            yield Row(class_name, name, None, metric, float(values[k]))
        for metric, scores in hard.items():
            at = [*chosen, *extra] if metric == "dice" else chosen
            for tau, value in zip(at, scores[k], strict=False):
                yield Row(class_name, name, tau, metric, float(value))


def _shapes(p: Map, y: Map, thresholds: Sequence[float], grid: Grid) -> Iterator[tuple[float | None, str, float]]:
    """Surfaces and lesions of {p > tau} and {y >= 0.5}, [N *S], at each threshold (rising), within what they cover."""
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


def _reliability(p: Map, y: Map) -> Iterator[tuple[float | None, str, float]]:
    """The reliability table of voxels [n], line by line."""
    for name, values in reliability(p, y)._asdict().items():
        for number, value in enumerate(values):
            yield number / NUM_BINS, f"reliability_{name}", float(value)
