"""Predictions that other programs wrote: which file is of which case and class, and the soft maps in it.

A file belongs to a case by its name: that of the case or of its image's file, alone (`sub-01.nii.gz`, `sub-01.npz`: as nnU-Net
writes them) or with a class (`sub-01_T2w_label-GM_softseg.nii.gz`: as `softseg predict` does). A pattern says it otherwise.

Legend: K classes, X Y Z canonical (RAS+) voxels of the image of a case; an .npz has [K+1 Z Y X] of the axes as they are stored.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softseg_dist.data.cases import NOT_IN_A_NAME, ROUNDING, Case, LabelledCase, within_0_1
from softseg_dist.data.geometry import Float32, Geometry
from softseg_dist.data.source_files import check_regular
from softseg_dist.data.volume import read_volume, stem_of
from softseg_dist.errors import UserError
from softseg_dist.words import dimensions, listed

SUFFIXES = (".nii", ".nii.gz", ".npz")
NOT_READ = ("_entropy.nii", "_entropy.nii.gz")  # `softseg predict` writes them beside its maps
FORMS = {  # of names
    "npz": "{case}.npz",
    "softseg": "{case}_label-{class}_softseg.nii",
    "whole": "{case}.nii",
    "mask": "{case}_label-{class}_mask.nii",
}
CUT_FROM = {"mask": "softseg", "whole": "npz"}  # a mask is not read where the soft map that it was cut from lies beside it
KEYS = ("probabilities", "softmax")  # of nnU-Net 2 and 1
Values = Mapping[str, tuple[int, ...]]  # class -> its values in a map of integers
Match = tuple[str, str, Path]  # a file of a case: the form of its name, its class ("" for all), where it is


class Found(NamedTuple):
    """What a folder has: the files of each case (one for all classes, or one per class), problems as lines, files of no case."""

    files: Mapping[str, tuple[Path, ...]]
    problems: tuple[str, ...]
    surplus: tuple[Path, ...]


def find_predictions(folder: Path, cases: Sequence[Case], classes: Sequence[str], pattern: str = "") -> Found:
    """Match the files of a folder to cases and classes.

    Args:
        folder: its files, and with a `pattern` those of its subfolders too.
        pattern: such as "{case}_{class}.nii.gz", or "{case}/{class}.nii.gz" for a folder per case; "" for the forms of `FORMS`.

    Raises UserError if there is no such folder, or the pattern has no {case}.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of predictions {folder}")
    if pattern and "{case}" not in pattern:
        raise UserError(f'a pattern has {{case}}, and {{class}} where a class has its own file, got "{pattern}"')
    owners = Counter(name for case in cases for name in _names_of(case))  # a name such as flair.nii.gz may be that of every case
    case_of = {name: case.name for case in cases for name in _names_of(case) if owners[name] == 1}
    case_of |= {case.name: case.name for case in cases}
    class_of = {name: label for label in classes for name in (NOT_IN_A_NAME.sub("-", label), label)}
    forms = {form: _compiled(text, case_of, class_of) for form, text in ({"": pattern} if pattern else FORMS).items()}
    found = defaultdict[str, list[Match]](list)
    surplus: list[Path] = []
    for path in sorted(folder.rglob("*") if pattern else folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(SUFFIXES) or path.name.endswith(NOT_READ):
            continue
        name = path.relative_to(folder).as_posix()
        for form, match in ((form, match) for form, rule in forms.items() if (match := rule.fullmatch(name))):
            label = match.groupdict().get("label")
            found[case_of[match["case"]]].append((form, class_of[label] if label else "", path))
            break
        else:
            surplus.append(path)
    return _of_cases(found, classes, folder, surplus)


def _names_of(case: Case) -> set[str]:
    stems = [stem_of(path) for path in case.images] if isinstance(case, LabelledCase) else []
    return {case.name, *stems, *(stem.removesuffix("_0000") for stem in stems)}


def _compiled(form: str, case_of: Mapping[str, str], class_of: Mapping[str, str]) -> re.Pattern[str]:
    """The form as a regular expression of the names that there are, the longest first; .nii.gz is as good as .nii."""
    text = re.escape(form)
    for place, group, names in ((r"\{case\}", "case", case_of), (r"\{class\}", "label", class_of)):
        any_of = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        text = text.replace(place, f"(?P<{group}>{any_of})", 1).replace(place, f"(?P={group})")
    return re.compile(re.sub(r"\\\.nii(\\\.gz)?$", r"\\.nii(\\.gz)?", text))


def _of_cases(found: Mapping[str, Sequence[Match]], classes: Sequence[str], folder: Path, surplus: Sequence[Path]) -> Found:
    files: dict[str, tuple[Path, ...]] = {}
    seen = {label for matches in found.values() for _, label, _ in matches}
    nowhere = [label for label in classes if found and "" not in seen and label not in seen]
    problems = [f"class {label} is in no file of {folder}; there are {listed(sorted(seen))}" for label in nowhere]
    for case, matches in sorted(found.items()):
        forms = {form for form, _, _ in matches}
        kept = [(label, path) for form, label, path in matches if CUT_FROM.get(form) not in forms]
        paths = dict(kept)
        if len(paths) < len(kept) or ("" in paths and len(paths) > 1):
            several = listed([path for _, path in kept])
            problems.append(f"case {case}: one file, or one per class, got {several}; remove what is not meant, or give a pattern")
        elif "" in paths:
            files[case] = (paths[""],)
        elif lacking := [label for label in classes if label not in (*paths, *nowhere)]:
            problems.append(f"case {case} has no file of class {', '.join(lacking)} in {folder}")
        elif not nowhere:
            files[case] = tuple(paths[label] for label in classes)
    return Found(files, tuple(problems), tuple(surplus))


def label_values(classes: Sequence[str], cases: Sequence[Case]) -> Values:
    """Class -> its values in maps of integers: those that its masks are taken by, or else 1 to K.

    >>> from softseg_dist import LabelledCase, MaskFile
    >>> masks = {"GM": MaskFile(Path("map.nii"), (1,)), "cord": MaskFile(Path("map.nii"), (1, 2))}
    >>> label_values(("GM", "cord"), [LabelledCase("a", [Path("a.nii")], "a", "", {"anna": masks})])
    {'GM': (1,), 'cord': (1, 2)}
    """
    masks = [masks for case in cases if isinstance(case, LabelledCase) for masks in case.labels.values()]
    named = [{by_class[label].values for by_class in masks} for label in classes]
    values = [of_one.pop() for of_one in named if len(of_one) == 1]
    if () in values or len(set(values)) < len(classes):
        values = [(number,) for number in range(1, len(classes) + 1)]
    return dict(zip(classes, values, strict=True))


def read_maps(files: Sequence[Path], grid: Geometry, values: Values) -> Float32:
    """The soft map of every class [K X Y Z], float32 in [0, 1].

    Args:
        files: one for all classes (a map of integers by value, nnU-Net's .npz, or of one class its map), or one per class.
        grid: of the image; another axis order with the voxels at the same places is put into this one.
        values: class -> its values in a map of integers.

    Raises UserError that names rule, value and file if it lies on another grid, is NaN or outside [0, 1], or has unknown values.
    """
    if files[0].suffix == ".npz":
        maps = _probabilities(files[0], grid, len(values))
        if all(len(of_one) == 1 for of_one in values.values()):
            maps = maps[np.argsort(np.argsort([value for (value,) in values.values()]))]  # they come in the order of the values
        return _soft(maps, files[0])  # regions come in the order of the classes
    if len(files) > 1:
        return np.stack([_soft(_voxels(path, grid), path) for path in files])
    whole = _voxels(files[0], grid)
    if len(values) == 1 and (whole.max() <= 1 + ROUNDING or (whole != np.rint(whole)).any()):
        return _soft(whole[None], files[0])
    maps = np.stack([np.isin(whole, np.asarray(of_one, np.float32)) for of_one in values.values()])
    if (unknown := whole[~maps.any(axis=0) & (whole != 0)]).size:
        meant = ", ".join(f"{'+'.join(map(str, of_one))} ({label})" for label, of_one in values.items())
        got = f"{unknown[0]:g} in one of {unknown.size} other voxels of {files[0]}"
        raise UserError(f"a map of all classes has the integers 0, {meant}, got {got}; soft maps have a file for each class")
    return maps.astype(np.float32)


def _voxels(path: Path, grid: Geometry) -> Float32:
    volume = read_volume(path)
    if difference := grid.difference(volume.geometry):
        raise UserError(f"a prediction lies on the grid of its image: {difference} in {path}; resample it to the image first")
    return volume.data


def _probabilities(path: Path, grid: Geometry, num_classes: int) -> Float32:
    """The maps in an .npz of nnU-Net, which says nothing of its grid but the shape."""
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            stored = next((arrays[key].astype(np.float32) for key in KEYS if key in names), None)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path}, or it is cut off: {error}") from error
    if stored is None:
        raise UserError(f"an .npz of nnU-Net has {' or '.join(KEYS)}, got {listed(names) or 'nothing'} in {path}")
    wanted = [(num, *reversed(grid.shape)) for num in (num_classes + 1, num_classes)]  # the second without background: regions
    if stored.shape not in wanted:
        shapes = f"{dimensions(wanted[0])}, got {dimensions(stored.shape)}"
        raise UserError(f"probabilities are [classes + 1, Z, Y, X] of the image as stored, {shapes} in {path}")
    return np.ascontiguousarray(grid.to_canonical(stored[-num_classes:].transpose(0, 3, 2, 1)))


def _soft(maps: Float32, path: Path) -> Float32:
    return within_0_1(maps, "a prediction", f"{path}; scale it")
