"""A first study of a folder, as a study file that runs as it is: `softseg init`."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from softseg_dist.data.discovery import Contents
from softseg_dist.errors import UserError
from softseg_dist.words import command, count, dimensions, listed

THICK = 3.0  # slices so many times as thick as the pixels are wide are trained on one by one
FEW_SLICES = 8
LEVELS = 8  # sizes are multiples of it, as the network halves its images three times
WIDEST = {2: 320, 3: 64}  # voxels along an axis of what is trained on at once; larger images are trained on by patches
VOXELS_AT_ONCE = {2: 16 * 256 * 256, 3: 4 * 48**3}
QUOTES = str.maketrans("'\"", "\"'")  # double ones, as in the rest of the file
SAME = 0.01  # relative difference of voxel sizes that are called equal

TEMPLATE = '''"""{question}

Run:    softseg check {file}          # look at montage.png before anything else
        softseg run {file} --debug    # 2 splits, 2 epochs, few subjects
        softseg run {file}
Data:   {data_line}

Written by softseg init, as a start. Change what you know better.
"""

from softseg_dist import {imports}

BASE = Recipe(
    network=UNet(filters={filters}),
    loss=DiceSemimetric(),  # smallest where the prediction equals a soft label
    augment=(Affine(degrees=10, scale=0.1, shift=0.03),),{patch}
    optim=Optim(lr=3e-3, epochs=50, batch_size={batch}),
)

STUDY = Study(
    name="{name}",
    question="{question}",
    data={data},
    # {grid_line}
    preprocess={preprocess},
    # {splits_line}
    splits={splits},
    # {labels_line}
    candidates=factorial(BASE, label=("hard", "soft")),
    control="hard",
)
'''


def study_source(contents: Contents, file: Path) -> str:
    """The text of the study file `file` for what a folder holds. Raises UserError if it has fewer than three persons."""
    axes, grid_line = _item_axes(contents)
    dim = axes.shape[1]
    spacings, sizes = (np.take_along_axis(values, axes, 1) for values in (contents.spacings_mm, contents.sizes))
    spacing_mm = _spacing(spacings)
    largest = np.rint((sizes if spacing_mm is None else sizes * spacings / spacing_mm).max(axis=0)).tolist()
    crop = tuple(max(2 * LEVELS, LEVELS * math.ceil(n / LEVELS)) for n in largest)  # smaller images are padded, nothing is cut off
    patch = tuple(min(n, WIDEST[dim]) for n in crop)  # of whole images, of whatever size
    splits, splits_line = _splits(contents)
    used = {"Patch"} if patch != crop else set()
    given = [f"dim={dim}", *(['axis="auto"'] if dim == 2 and axes.max() == 2 else [])]
    given += [*([f"spacing_mm={spacing_mm}"] if spacing_mm else []), *([] if used else [f"crop={crop}"])]
    names = {"Affine", "DiceSemimetric", "Optim", "Preprocess", "Recipe", "Study", "UNet", "factorial", *used}
    names |= {type(contents.data).__name__, splits.partition("(")[0]}
    arguments = [f"        {name}={repr(value).translate(QUOTES)},\n" for name, value in contents.data.__repr_args__()]
    return TEMPLATE.format(
        question=f"Do soft labels beat hard ones on {Path(file).stem}?",
        file=command(file),
        data_line=f"{count(len(contents.cases), 'case')} of {count(contents.persons, 'person')}; {contents.layout}",
        imports=", ".join(sorted(names, key=lambda name: (name[0].islower(), name))),
        filters=(16, 32, 64, 128) if dim == 2 else (16, 32, 64),
        patch=f"\n    patch=Patch(size={patch}),  # images are larger than is trained on at once" if used else "",
        batch=max(2, min(16, VOXELS_AT_ONCE[dim] // math.prod(patch))),
        name=re.sub(r"\W+", "_", Path(file).stem),
        data=f"{type(contents.data).__name__}(\n{''.join(arguments)}    )",
        grid_line=grid_line,
        preprocess=f"Preprocess({', '.join(given)})",
        splits=splits,
        splits_line=splits_line,
        labels_line=_labels_line(contents, spacing_mm),
    )


def facts(contents: Contents) -> list[tuple[str, str]]:
    """What was found, as (what, value), for a person to check."""
    sites = {site or "unknown": num for site, num in contents.sites.items()}
    volumes = ", ".join(f"{name} {volume:.4g} mm3" for name, volume in contents.mean_volumes_mm3.items())
    measured = f"{count(len(contents.volumes_mm3), 'case')}: {listed(list(contents.volumes_mm3), 4)}"
    return [
        ("layout", f"{contents.layout}: {contents.why}"),
        ("cases", f"{len(contents.cases)} of {count(contents.persons, 'person')}"),
        ("sites", listed([f"{site} ({num})" for site, num in sorted(sites.items())])),
        ("raters", listed(list(contents.raters))),
        ("voxels (mm)", _range(contents.spacings_mm, "{:.3g}")),
        ("size (voxels)", _range(contents.sizes, "{:.0f}")),
        ("classes", f"{volumes} (means of {measured})"),
        ("masks", "soft" if contents.soft else "binary"),
    ]


def _range(values: np.ndarray, form: str) -> str:
    """`0.5 x 0.5 x 5`, or `0.25 to 0.5 x 0.25 to 0.5 x 5`: from the smallest to the largest along each axis."""
    ends = ([form.format(end) for end in (axis.min(), axis.max())] for axis in values.T)
    return " x ".join(low if low == high else f"{low} to {high}" for low, high in ends)


def _item_axes(contents: Contents) -> tuple[np.ndarray, str]:
    """The canonical axes of what is trained on, of each case [cases 2] or [cases 3], and why."""
    thickest = [grid.thickest for grid in contents.grids.values()]
    in_plane = np.array([[axis for axis in range(3) if axis != across] for across in thickest])
    thick = np.median([mm[across] for mm, across in zip(contents.spacings_mm, thickest, strict=True)])
    slices = int(np.median(contents.sizes[:, 2]))
    voxel = f"voxels of {dimensions(np.median(contents.spacings_mm, axis=0).tolist())} mm (median)"
    if thick >= THICK * np.median(np.take_along_axis(contents.spacings_mm, in_plane, 1), axis=0).max():
        others = sum(across != 2 for across in thickest)
        where = f" (in {count(others, 'case')} not across z)" if others else ""
        return in_plane, f"{voxel}: slices are thick{where}, so they are trained on one by one"
    every = np.tile(np.arange(3), (len(in_plane), 1))
    if slices < FEW_SLICES:
        return every[:, :2], f"{count(slices, 'slice')} per image: too few for three dimensions"
    return every, f"{voxel}: thin enough for three dimensions"


def _spacing(spacings: np.ndarray) -> tuple[float, ...] | None:
    """The median of [cases axes], of thick slices the 10th percentile; None if all images have it."""
    median = np.median(spacings, axis=0)
    if len(median) == 3 and median.max() >= THICK * median.min():
        median[median.argmax()] = np.percentile(spacings[:, median.argmax()], 10)
    if np.abs(spacings / median - 1).max() < SAME:
        return None
    return tuple(float(f"{size:.3g}") for size in median)


def _splits(contents: Contents) -> tuple[str, str]:
    """The call of a rule that the number of persons allows, and why."""
    persons, sites = contents.persons, [site for site in contents.sites if site]
    if persons < 3:
        raise UserError(f"a study needs at least 3 persons, to train, validate and test on; found {count(persons, 'person')}")
    by_site = f"; for a new site: LeaveOneSiteOut() ({count(len(sites), 'site')})" if len(sites) > 2 else ""
    if persons < 10:
        return f"KFold(folds={min(persons, 5)})", f"{persons} persons: each is tested once; too few to settle a question{by_site}"
    return "MonteCarlo(count=10)", f"{persons} persons in 10 random splits, all sessions of one person in the same part{by_site}"


def _labels_line(contents: Contents, spacing_mm: tuple[float, ...] | None) -> str:
    """What makes soft labels differ from hard ones here."""
    reasons = [f"{len(contents.raters)} raters ({listed(list(contents.raters), 4)})"] if len(contents.raters) > 1 else []
    reasons += ["masks with values between 0 and 1"] if contents.soft else []
    reasons += ["masks that are resampled"] if spacing_mm else []
    if reasons:
        return f"soft labels come from {' and '.join(reasons)}"
    return "binary masks of one rater on their own grid: labels are soft only where augmentation interpolates"
