"""Is a data set fit to be trained on? A table of problems, each case looked at, none of them stopping the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from softseg_dist.data.cases import Case, CaseData, DataSet
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.preprocess import Preprocess, Sample
from softseg_dist.errors import UserError
from softseg_dist.frozen import grouped
from softseg_dist.words import dimensions

SPACING_OUTLIER = 1.5  # a voxel size is unusual if it is this many times larger or smaller than the median
LOST = 0.001  # share of the labelled volume outside the crop that is worth a line
RATERS_DISAGREE = 0.3  # Dice of two raters below which one of them may have drawn on something else
ALIKE = "identical targets"  # the rule of a problem that a report shows above its answer


@dataclass(frozen=True)
class Problem:
    """A line of the table. An "error" stops `softseg prepare`, a "warning" should be looked at.

    `case` is the case's name, or "" for what concerns several. `rule` names the kind of problem, `detail` has value and place.
    """

    case: str
    level: Literal["error", "warning"]
    rule: str
    detail: str


def check_cases(
    cases: Sequence[Case], preprocess: Preprocess, look: Callable[[Sample], None] = lambda sample: None, classes: Sequence[str] = ()
) -> list[Problem]:
    """All problems of `cases` (those of `DataSet.scan`: incomplete ones count), one case in memory at a time.

    `look` gets the sample of each case without an error, `classes` are their names in words. Errors: something missing, unreadable
    or contradictory. Warnings: an empty mask, labels outside the crop, raters that hardly overlap, an orientation, slices or a
    voxel size unlike the others', a person at two sites.
    """
    problems: list[Problem] = []
    seen: list[tuple[str, Geometry]] = []  # name and grid, which are compared between cases
    for case in cases:
        if lacks := case.missing():
            problems += [Problem(case.name, "error", "incomplete", sentence) for sentence in lacks]
            continue
        try:
            data = case.load()
            sample = preprocess.transform(case, data)
        except UserError as error:
            problems.append(Problem(case.name, "error", "unusable", str(error)))
            continue
        problems += (found := [*_labels(case, data, classes), *_crop(case, data, sample)])
        if all(problem.level != "error" for problem in found):
            look(sample)
        seen.append((case.name, data.geometry))
    return [*problems, *_between(seen, preprocess), *_people(cases)]


def unread(data: DataSet, data_root: Path | None) -> list[Problem]:
    """What no case of a data set is made of, or is odd in its tables: warnings."""
    return [Problem("", "warning", "not read", text) for text in data.warnings(data_root)]


def _labels(case: Case, data: CaseData, classes: Sequence[str]) -> Iterator[Problem]:
    for c, channel in enumerate(data.image):
        if channel.min() == channel.max():
            yield Problem(case.name, "error", "constant image", f"channel {c} is {channel.min():g} everywhere")
    volumes = np.nan_to_num(data.raters).sum(axis=(2, 3, 4), dtype=np.float64)  # [R K]
    for rater, k in np.argwhere(volumes == 0):
        name = classes[k] if classes else k
        yield Problem(case.name, "warning", "empty mask", f"rater {case.rater_names[rater]}, class {name} labels no voxel")
    for (i, one), (j, other) in combinations(enumerate(case.rater_names), 2):
        overlap = np.nansum(np.minimum(data.raters[i], data.raters[j]), dtype=np.float64)
        if (total := volumes[i].sum() + volumes[j].sum()) > 0 and 2 * overlap / total < RATERS_DISAGREE:
            detail = f"Dice of {one} and {other} is {2 * overlap / total:.2f}"
            yield Problem(case.name, "warning", "raters hardly overlap", detail)


def _crop(case: Case, data: CaseData, sample: Sample) -> Iterator[Problem]:
    """How much of what is labelled lies outside the crop: compared by extent, so that interpolation does not count."""
    labelled = np.nan_to_num(data.raters.max(axis=(0, 1), initial=0))
    total = float(labelled.sum(dtype=np.float64))
    axes = sample.placement.axes
    window = tuple(slice(*(round(edge / axis.num_resampled * axis.num_in) for edge in axis.kept)) for axis in axes)
    if total > 0 and (lost := 1 - float(labelled[window].sum(dtype=np.float64)) / total) > LOST:
        yield Problem(case.name, "warning", "label outside the crop", f"{lost:.1%} of the labelled voxels are cut off")


def _between(seen: Sequence[tuple[str, Geometry]], preprocess: Preprocess) -> Iterator[Problem]:
    if not seen:
        return
    across = [f"cut across {'xyz'[preprocess.slice_axis(grid)]}" for _, grid in seen]
    unlike = [("orientation", [grid.orientation for _, grid in seen], "; it is turned when read"), ("slices", across, "")]
    for rule, kinds, what in unlike:
        usual, count = Counter(kinds).most_common(1)[0]
        for (name, _), kind in zip(seen, kinds, strict=True):
            if kind != usual:
                yield Problem(name, "warning", rule, f"{kind}, while {count} of {len(seen)} cases are {usual}{what}")
    median = np.median([grid.spacing_mm for _, grid in seen], axis=0)
    for name, grid in seen:
        if np.maximum(grid.spacing_mm / median, median / grid.spacing_mm).max() > SPACING_OUTLIER:
            detail = f"{dimensions(grid.spacing_mm)} mm, the median is {dimensions(median.tolist())} mm"
            yield Problem(name, "warning", "resolution", detail)


def _people(cases: Sequence[Case]) -> Iterator[Problem]:
    for subject, sites in sorted(grouped((case.subject, case.site) for case in cases).items()):
        if len(set(sites)) > 1:
            detail = f"{subject} was seen at {', '.join(sorted(set(sites)))}; splits count the person at one of them"
            yield Problem("", "warning", "person at several sites", detail)
