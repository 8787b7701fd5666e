"""What lies in a folder: its layout, cases, grids and classes. `softseg init` prints it and writes a study from it.

Names and headers of all cases are read, voxels of a few masks only (`MASKS_READ`, spread over the sites).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from softseg_dist.data.case_table import Table, read_table
from softseg_dist.data.cases import RATER, SESSIONS, Case, DataSet, LabelledCase
from softseg_dist.data.challenges import MSSEG, SCGM, BraTS, Decathlon, Layout, NnUNet, classes_of
from softseg_dist.data.files import IGNORE, contents
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.layouts import Bids, Name, by_folder, names_in
from softseg_dist.data.volume import read_geometry, read_volume
from softseg_dist.errors import UserError
from softseg_dist.frozen import grouped
from softseg_dist.words import count, listed

MASKS_READ = 12
MOST_VALUES = 30  # of an integer map: more are no classes
HALF = 0.5  # of the cases must have a mask that becomes a class
RATER_WORDS = ("desc", "rater")  # entities whose value may be a rater's name
Names = Mapping[str, Sequence[Name]]  # files by the folder below the data set, or below a folder of derivatives


@dataclass(frozen=True)
class Contents:
    """What a data set holds.

    `data` reads it; `layout` is that of the folder, `why` says what it was recognised by and what is not used.
    `cases` are complete; `problems` are sentences about the others, which `data` excludes, and about what is in no case.
    `grids` are those of the images, by case. `volumes_mm3` has, of a few cases, the mean volume of each class over the raters;
    `soft` is whether one of their masks has a value between 0 and 1.
    """

    layout: str
    data: DataSet
    why: str
    cases: tuple[Case, ...]
    problems: tuple[str, ...]
    grids: Mapping[str, Geometry]
    volumes_mm3: Mapping[str, tuple[float, ...]]
    soft: bool

    @property
    def persons(self) -> int:
        """How many there are."""
        return len({case.subject for case in self.cases})

    @property
    def sites(self) -> dict[str, int]:
        """Cases of each site, those without one under ""."""
        return dict(Counter(case.site for case in self.cases))

    @property
    def raters(self) -> tuple[str, ...]:
        """All raters, by name."""
        return tuple(sorted({rater for case in self.cases for rater in case.rater_names}))

    @property
    def mean_volumes_mm3(self) -> dict[str, float]:
        """Of each class, over the cases in `volumes_mm3`."""
        return dict(zip(self.data.classes, np.mean([*self.volumes_mm3.values()], axis=0).tolist(), strict=True))

    @property
    def spacings_mm(self) -> np.ndarray:
        """Voxel sizes [cases 3] along the canonical axes."""
        return np.array([grid.spacing_mm for grid in self.grids.values()])

    @property
    def sizes(self) -> np.ndarray:
        """Voxels [cases 3] along the canonical axes."""
        return np.array([grid.canonical_shape for grid in self.grids.values()])


def look_at(folder: Path) -> Contents:
    """Recognise the layout of `folder`, read names, headers, a few masks. Raises UserError if none fits, or no case is complete."""
    layout, data, why = recognise(folder.absolute())
    scanned = sorted(data.scan(None), key=lambda case: case.name)
    problems = [*data.warnings(None), *(sentence for case in scanned for sentence in case.missing())]
    grids: dict[str, Geometry] = {}
    for case in (case for case in scanned if isinstance(case, LabelledCase) and not case.missing()):
        try:
            grids[case.name] = read_geometry(case.images[0], case.spacing_mm)
        except UserError as error:
            problems.append(str(error))
    cases = tuple(case for case in scanned if case.name in grids)
    if not cases:
        raise UserError(f"{folder}: no case is complete: {listed(problems, 3, '; ')}")
    volumes: dict[str, tuple[float, ...]] = {}
    soft = False
    for one in _spread(cases):
        try:
            raters = np.nan_to_num(one.load().raters)
        except UserError as error:
            problems.append(str(error))
            del grids[one.name]
            continue
        voxel_mm3 = float(np.prod(grids[one.name].spacing_mm))
        volumes[one.name] = tuple((raters.sum(axis=(2, 3, 4), dtype=np.float64).mean(axis=0) * voxel_mm3).tolist())
        soft = soft or bool(((raters > 0) & (raters < 1)).any())
    if not volumes:
        raise UserError(f"{folder}: no mask can be read: {listed(problems, 3, '; ')}")
    if left := tuple(case.name for case in scanned if case.name not in grids):
        data = data.replace(exclude=left)  # every layout has it
    return Contents(layout, data, why, tuple(case for case in cases if case.name in grids), tuple(problems), grids, volumes, soft)


def _spread(cases: Sequence[Case]) -> list[Case]:
    """`MASKS_READ` of the cases, in turn from each site."""
    turns = chain.from_iterable(zip_longest(*grouped((case.site, case) for case in cases).values()))
    return [case for case in turns if case is not None][:MASKS_READ]


def recognise(folder: Path) -> tuple[str, DataSet, str]:
    """The first layout that fits: its name, what reads it, and why. Raises UserError that lists what there is if none does."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    for name, reader in LAYOUTS.items():
        if found := reader(folder):
            return name, *found
    others = 'names of your own are read by Files("...", image="{case}_image.nii.gz", ...), see docs/extending.md'
    raise UserError(f"{folder} has none of the layouts {', '.join(LAYOUTS)}: {contents(folder)}; {others}")


def bids_in(folder: Path) -> tuple[DataSet, str] | None:
    """The images of a BIDS-like folder of the contrast that has most masks, with every part that half of them have."""
    derivatives = sorted(folder.glob("derivatives/*"))
    images = by_folder(names_in(folder, sorted(folder.glob("sub-*"))))
    if not images:
        return None
    contrasts = Counter(name.last for names in images.values() for name in names)
    masks = by_folder(chain.from_iterable(names_in(below, sorted(below.glob("sub-*"))) for below in derivatives))
    parts = {contrast: _parts(contrast, contrasts, images, masks) for contrast in contrasts}
    chosen = max(contrasts, key=lambda contrast: (max(map(len, parts[contrast].values()), default=0), contrasts[contrast]))
    labels = dict(_labels(parts[chosen], contrasts[chosen]))
    if not labels:
        found = f"images {listed(sorted(contrasts))}, masks of {listed(sorted(parts[chosen])) or 'none'}"
        raise UserError(f"{folder}: no mask below derivatives/ belongs to half of the images of one contrast; there are {found}")
    subjects = [path.name for path in folder.glob("sub-*") if path.is_dir()]
    sessions = any(match[1] != match[0] for match in (re.match(SESSIONS, name) for name in subjects) if match)
    others = [contrast for contrast in contrasts if contrast != chosen]
    why = f"{count(len(subjects), 'folder')} sub-*, {count(len(derivatives), 'folder')} below derivatives/"
    why += f"; not used: {listed(sorted(others))}" if others else ""
    return Bids(str(folder), image=chosen, labels=labels, person=SESSIONS if sessions else None), why


def _parts(contrast: str, contrasts: Iterable[str], images: Names, masks: Names) -> dict[str, list[Path]]:
    """What masks of the images of one contrast have more in their names: the part, and its files."""
    found = defaultdict[str, list[Path]](list)
    for folder, names in images.items():
        of_contrast = [name.words for name in names if name.last == contrast]
        for mask in masks.get(folder, ()):
            for image in of_contrast:
                rest = [word for word in mask.stem.split("_") if word not in image]
                if image - {contrast} <= mask.words and rest and set(rest).isdisjoint(contrasts):
                    found["_".join(rest)].append(mask.path)
    return found


def _labels(parts: Mapping[str, Sequence[Path]], num_images: int) -> Iterator[tuple[str, str]]:
    """Class and part of every mask that half of the images have, raters joined; a class for every value of an integer map."""
    for part, paths in grouped((_of_raters(one, parts), path) for one, found in parts.items() for path in found).items():
        if len({path.parent for path in paths}) < HALF * num_images:
            continue
        values = _values(paths)
        words = dict(word.partition("-")[::2] for word in part.split("_"))
        name = words.get("label") or next(iter(words))  # GM of label-GM_desc-{rater}_mask, gmseg of gmseg-manual
        if values == {1} or values is None:
            yield name, part
        else:
            yield from ((f"{name}-{value}", f"{part}:{value}") for value in sorted(values))


def _of_raters(part: str, parts: Iterable[str]) -> str:
    """The part with `{rater}` in place of a word whose value other parts have differently: `label-GM_desc-{rater}_mask`."""
    words = part.split("_")
    for at, word in enumerate(words):
        key, _, value = word.partition("-")
        if key in RATER_WORDS and value:
            general = [*words[:at], f"{key}-{RATER}", *words[at + 1 :]]
            rule = re.compile("_".join(map(re.escape, general)).replace(re.escape(RATER), "[^_]+"))
            if sum(bool(rule.fullmatch(other)) for other in parts) > 1:
                return "_".join(general)
    return part


def _values(paths: Sequence[Path]) -> set[int] | None:
    """The values of an integer map, over a few files, but 0; None for masks with values between 0 and 1."""
    found: set[float] = set()
    for path in paths[:: max(1, len(paths) // MASKS_READ)][:MASKS_READ]:
        with suppress(UserError):  # what cannot be read is said of its case
            found |= set(np.unique(read_volume(path).data)[: MOST_VALUES + 1].tolist())
    if max(found, default=1) <= 1 or len(found) > MOST_VALUES or any(v != round(v) or v >= 1e7 for v in found):
        return None if max(found, default=1) > 1 or found - {0, 1} else {1}
    return {int(value) for value in found if value > 0}


def released_in(kind: type[Layout], folder: Path) -> tuple[DataSet, str] | None:
    """The images of a challenge, by the names of its release, or as dataset.json describes them, with all its classes."""
    labels, why = dict[str, tuple[str, ...]](), "names as in its release"
    if issubclass(kind, NnUNet | Decathlon):
        if not (folder / "dataset.json").is_file() or not (folder / "imagesTr").is_dir():
            return None
        labels, why = {"labels": classes_of(folder)}, "dataset.json and imagesTr/"
    data = kind(str(folder), **labels)
    return (data, why) if data.form(folder).is_in(None) else None


def table_in(folder: Path) -> tuple[DataSet, str] | None:
    """The first table with columns for case and image; a class is what further columns that name NIfTI files are called."""
    for path in sorted(folder.glob("*.csv")):
        titles, rows = read_table(path)
        masks = [title for title in titles if title.partition(":")[0] not in ("case", "image", IGNORE)]
        labels = dict.fromkeys(title.partition(":")[0] for title in masks if any(".nii" in row[title] for row in rows))
        if "case" in titles and any(title.partition(":")[0] == "image" for title in titles) and labels:
            return Table(str(path), labels=tuple(labels)), f"{path.name}, {count(len(rows), 'row')}"
    return None


RELEASES: dict[str, type[Layout]] = {"nnU-Net": NnUNet, "Decathlon": Decathlon, "SCGM": SCGM, "MSSEG": MSSEG, "BraTS": BraTS}
Reader = Callable[[Path], tuple[DataSet, str] | None]
LAYOUTS: Mapping[str, Reader] = {
    "BIDS": bids_in,
    **{name: partial(released_in, kind) for name, kind in RELEASES.items()},
    "table": table_in,
}
