"""Cases and data sets: a data set is a number of cases, a case is one image with its raters' masks.

`Case` and `DataSet` are what a new layout implements. `LabelledCase` and `ImageCase` read cases from image files, check that all
files of a case share one grid, and turn voxels into labels in [0, 1].

Legend: C image channels, R raters, K classes, X Y Z canonical (RAS+) voxel axes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from softseg_dist.data.geometry import Affine4, Float32, Geometry, spacing_of
from softseg_dist.data.source_files import Digest, Spacing, nfc, part_of, sha256_of
from softseg_dist.data.volume import Volume, is_picture, read_geometry, read_volumes
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.words import count, dimensions, listed

SINGLE_RATER = "rater"  # the name of the only rater where the data name none
RATER = "{rater}"  # stands for the name of a rater in the pattern of a mask
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.+-]+")  # of a class, in the name of a file
IGNORED = "voxels to ignore"  # that have a mask like a class: nobody labelled them
OfCase = TypeVar("OfCase", bound="Case")
ROUNDING = 1e-6  # values this far outside [0, 1] are clipped
MAP_ROUNDING = 0.02  # maps of integers that were stored with a scale come back this near to them


@dataclass(frozen=True, eq=False)
class CaseData:
    """The voxels of a case, as on disk apart from the axis order.

    `image` [C X Y Z]; `raters` [R K X Y Z] in [0, 1], NaN in voxels to ignore; `truth` [K X Y Z] in [0, 1] where it is known
    (phantoms), else None; `affine` [4 4] canonical index -> mm; `geometry` of the image file as stored.
    """

    image: Float32
    raters: Float32
    truth: Float32 | None
    affine: Affine4
    geometry: Geometry


class Case(ABC):
    """One image with its raters' masks; nothing is read before `load`.

    `name` is unique in the data set, `subject` is the person (several cases may share it), `site` may be "".
    """

    name: str
    subject: str
    site: str
    rater_names: tuple[str, ...]

    @abstractmethod
    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        """One line per source that determines the content, such as "name sha256"; equal lines mean equal voxels.

        `parts` names further masks that are used, `sha256` gives the digest of a file. Raises UserError if a source cannot be read.
        """

    @abstractmethod
    def load(self) -> CaseData:
        """The voxels. Raises UserError naming the file that is missing, broken or does not fit the others."""

    @abstractmethod
    def mask(self, part: str) -> Float32:
        """The mask [X Y Z] named `part`, on the grid of the image: it centres the crop. Raises UserError if none is."""

    def missing(self) -> tuple[str, ...]:
        """What this case lacks, one sentence each; () if it is complete. Nothing is read."""
        return ()


class DataSet(Frozen, ABC):
    """Where cases come from, and what is labelled in them."""

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The K labelled classes, in the order of the label axis."""

    @property
    @abstractmethod
    def rater_names(self) -> tuple[str, ...] | None:
        """The raters, or None if only the files can tell, or cases have different ones."""

    @property
    def channel_names(self) -> tuple[tuple[str, ...], ...]:
        """For each channel the words that names of its files may end in, such as "T2w"; () if names do not say which is which."""
        return ()

    @abstractmethod
    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """All cases, incomplete ones too; no two have one name.

        Raises UserError if the folder is missing, empty, or has nothing of what is asked for.
        """

    def warnings(self, data_root: Path | None) -> tuple[str, ...]:
        """What should be looked at though the cases can be read, one sentence each: files or rows that no case is made of."""
        return ()

    def cases(self, data_root: Path | None) -> tuple[Case, ...]:
        """All cases, sorted by name. Raises UserError as `scan` does, and at the first case that lacks something."""
        cases = tuple(sorted(self.scan(data_root), key=lambda case: case.name))
        for case in cases:
            if lacks := case.missing():
                raise UserError(lacks[0])
        return cases


def folder_of(folder: str, data_root: Path | None) -> Path:
    """A folder below the data root, or an absolute one. Raises UserError if there is none, or no data root for it."""
    if data_root is None and not Path(folder).is_absolute():
        raise UserError(f"{folder!r} is a folder below the data root: say where that is with --data-root")
    root = (data_root or Path()) / folder
    others = () if root.is_dir() else (each for each in root.parent.glob("*") if nfc(each.name) == nfc(root.name))
    if (found := next((each for each in (root, *others) if each.is_dir()), None)) is None:
        raise UserError(f"there is no folder {root}; is --data-root right?")
    return found


def selected(cases: Iterable[OfCase], exclude: Collection[str]) -> tuple[OfCase, ...]:
    """The cases by name, without those whose name or subject is in `exclude`.

    Raises UserError if two cases have one name, or a name in `exclude` is that of none.
    """
    by_name = sorted(cases, key=lambda case: case.name)
    if twice := [one.name for one, other in pairwise(by_name) if one.name == other.name]:
        raise UserError(f"each case must have a name of its own, got {listed(twice)} more than once")
    if unknown := set(exclude) - {name for case in by_name for name in (case.name, case.subject)}:
        raise UserError(f"exclude names {listed(sorted(unknown))}, but the cases are {listed([case.name for case in by_name])}")
    return tuple(case for case in by_name if {case.name, case.subject}.isdisjoint(exclude))


def person_in(text: str, person: str | None) -> tuple[str, list[str]]:
    """The first group (or the whole match) of the regular expression `person`, and what is wrong, in words; the text for None."""
    match = re.search(person or "(.*)", text)
    if match is None:
        return text, [f"has {text!r}, which person={person!r} does not match"]
    return match[1] if match.re.groups else match[0], []


def _regular(person: str | None) -> str | None:
    try:
        re.compile(person or "")
    except re.error as error:
        raise ValueError(f"person must be a regular expression, got {person!r}: {error}") from error
    return person


def _of_nobody(ignore: str | None) -> str | None:
    if ignore is not None and (not ignore or RATER in ignore):
        raise ValueError(f"ignore must be the pattern of one mask of a case, without {RATER}, got {ignore!r}")
    return ignore


SESSIONS = r"(.+?)(?:[-_]?[Ss]es(?:sion)?[-_]?\d+)?$"  # a person in the name of a subject that may be a session of one
Person = Annotated[str | None, AfterValidator(_regular)]  # a regular expression, see `person_in`


class Folder(DataSet):
    """A folder of image files. `labels`: the classes, with the pattern of their masks where a study says it; see `Files`."""

    folder: str
    labels: Mapping[str, str] | tuple[str, ...]
    ignore: Annotated[str | None, AfterValidator(_of_nobody)] = None
    person: Person = None
    exclude: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.labels)

    @property
    def parts(self) -> dict[str, str]:
        """The patterns of all masks: of the classes where a study says them, and of the voxels to ignore."""
        labels = self.labels if isinstance(self.labels, Mapping) else {}
        return {**labels, **({IGNORED: self.ignore} if self.ignore else {})}

    @property
    def rater_names(self) -> tuple[str, ...] | None:
        """See `DataSet.rater_names`: None if a pattern has `{rater}`, which only the files can tell."""
        return None if any(RATER in pattern for pattern in self.parts.values()) else (SINGLE_RATER,)

    def root(self, data_root: Path | None) -> Path:
        """Where the folder is, see `folder_of`."""
        return folder_of(self.folder, data_root)


@dataclass(frozen=True)
class MaskFile:
    """A mask on disk: its voxels are the label, in [0, 1]; with `values`, it is 1 where they have one of these integers."""

    path: Path
    values: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Of the file, and the values if there are any: `sub-01_dseg.nii.gz:1+2`."""
        return f"{self.path.name}:{'+'.join(map(str, self.values))}" if self.values else self.path.name


def named_values(text: str) -> tuple[str, tuple[int, ...]]:
    """What a text says before its colon, and the values of an integer map after it; () without a colon.

    Raises UserError if these are no integers, or one stands twice.

    >>> named_values("dseg:1+2"), named_values("mask")
    (('dseg', (1, 2)), ('mask', ()))
    """
    name, colon, after = text.partition(":")
    if colon and not re.fullmatch(r"-?\d{1,7}(\+-?\d{1,7})*", after):  # float32 tells larger ones not apart
        raise UserError(f'what follows ":" must be an integer of at most 7 digits, or several as in "1+2+4", got {text!r}')
    values = tuple(map(int, after.split("+"))) if colon else ()
    if len(set(values)) < len(values):
        raise UserError(f'the values after ":" must differ, got {text!r}')
    return name, values


def _no_mask(part: str) -> MaskFile:
    raise UserError(f"this data set names no mask {part!r} to centre the crop on; use center='image' or 'foreground'")


class LabelledCase(Case):
    """An image with masks. `images` are its channels, all on one grid; `labels`: rater -> class -> file.

    The name of a channel may end in [2], one volume of a 4-D file or one colour of a picture. `spacing_mm` is that of pictures
    along columns, rows and pages; () takes what the file says.
    `problems` says what is missing, one sentence each. `find_mask` finds the file of a mask of this case by its part, or raises
    UserError; it is used to centre the crop. `ignore` is above 0 in the voxels that nobody labelled.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Path],
        subject: str,
        site: str,
        labels: Mapping[str, Mapping[str, MaskFile]],
        problems: Sequence[str] = (),
        find_mask: Callable[[str], MaskFile] = _no_mask,
        spacing_mm: tuple[float, ...] = (),
        ignore: MaskFile | None = None,
    ) -> None:
        self.name, self.subject, self.site = name, subject, site
        self.images = tuple(images)
        self.rater_names = tuple(labels)
        self.labels, self.spacing_mm, self.ignore = labels, spacing_mm, ignore
        classes, place = [*next(iter(labels.values()), {})], f"case {name}"
        others = {r: ", ".join(masks) for r, masks in labels.items() if [*masks] != classes}
        wrong = [f"{place}: {r} has masks of {drawn}, not {', '.join(classes)}" for r, drawn in others.items()]
        wrong += [f"{place}: a rater cannot be called {r}, as a reference is" for r in labels if r in ("mean", "truth")]
        self.problems = (*problems, *wrong, *([] if subject else [f"{place} has no subject: its subject is an empty text"]))
        self.find_mask = find_mask

    def missing(self) -> tuple[str, ...]:
        return self.problems

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        """See `Case.sources`: every file as often as it is used, so that the order says what each is used for."""
        labels = [mask for masks in self.labels.values() for mask in masks.values()]
        ignored = [self.ignore] if self.ignore else []
        known = {mask.path for mask in labels}
        centers = dict.fromkeys(self.find_mask(part).path for part in parts)
        used = (*map(MaskFile, self.images), *labels, *(MaskFile(path) for path in centers if path not in known), *ignored)
        digests = {path: sha256(path) for path in dict.fromkeys(part_of(file.path)[0] for file in used)}
        lines = [f"{file.name} {digests[part_of(file.path)[0]]}" for file in used]
        lines += [f"ignore {file.name}" for file in ignored]
        return (*lines, *([f"spacing_mm {dimensions(self.spacing_mm)}"] if self.spacing_mm else ()))

    def load(self) -> CaseData:
        """See `Case.load`. A file that several classes share is read once, and no two masks are held beside the result."""
        if self.problems:
            raise UserError(self.problems[0])
        image, geometry = self._read_images()
        uses: dict[Path, list[tuple[int, int, MaskFile, str]]] = defaultdict(list)
        for r, (rater, masks) in enumerate(self.labels.items()):
            for k, (name, mask) in enumerate(masks.items()):
                uses[mask.path].append((r, k, mask, f"rater {rater}, class {name}"))
        num_classes = max(map(len, self.labels.values()), default=0)
        raters = np.empty((len(self.labels), num_classes, *image.shape[1:]), dtype=np.float32)
        for path, values in self._on_grid(uses, geometry):
            for r, k, mask, what in uses[path]:
                raters[r, k] = _label(values, mask, what)
        if self.ignore:
            raters[:, :, self._read_mask(self.ignore, IGNORED) > 0] = np.nan
        return CaseData(image, raters, None, geometry.canonical_affine, geometry)

    def mask(self, part: str) -> Float32:
        return self._read_mask(self.find_mask(part), part)

    def _read_mask(self, mask: MaskFile, what: str) -> Float32:
        ((_, values),) = self._on_grid([mask.path], read_geometry(self.images[0], self.spacing_mm))
        return _label(values, mask, what)

    def _read_images(self) -> tuple[Float32, Geometry]:
        if len(self.images) == 1:
            ((_, only),) = read_volumes(self.images, self.spacing_mm)
            return only.data[None], only.geometry
        geometry = read_geometry(self.images[0], self.spacing_mm)
        image = np.empty((len(self.images), *geometry.canonical_shape), dtype=np.float32)
        for path, values in self._on_grid(self.images, geometry):
            image[[each == path for each in self.images]] = values
        return image, geometry

    def _on_grid(self, paths: Iterable[Path], geometry: Geometry) -> Iterator[tuple[Path, Float32]]:
        """The voxels of each path. A picture lies pixel on pixel on the first image, whatever size it says."""
        for path, volume in read_volumes(paths, spacing_of(geometry.affine)):
            _check_grid(volume.geometry, path, geometry, self.images[0])
            yield path, volume.data


class ImageCase(LabelledCase):
    """An image without labels, as one has it for prediction; its `raters` are [0 0 X Y Z].

    `center_mask` is the mask that centres the crop, whatever its file is called, where the preprocessing wants one.
    """

    def __init__(self, name: str, images: Sequence[Path], center_mask: MaskFile | None = None, spacing_mm: Spacing = ()) -> None:
        super().__init__(name, images, name, "", {}, find_mask=self._center_mask, spacing_mm=spacing_mm)
        self.center_mask = center_mask

    def check_headers(self) -> None:
        """Raises UserError if a file is missing or no NIfTI, or on another grid; reads no voxels."""
        reference = read_geometry(self.images[0], self.spacing_mm)
        for path in (*self.images[1:], *([self.center_mask.path] if self.center_mask else [])):
            _check_grid(read_geometry(path, spacing_of(reference.affine)), path, reference, self.images[0])

    def _center_mask(self, part: str) -> MaskFile:
        if self.center_mask is None:
            raise UserError(f"{self.name}: an image alone has no mask {part!r} to centre the crop on")
        return self.center_mask


class VolumeCase(ImageCase):
    """An image in memory: its channels `volumes` and the mask `center` that centres the crop. Raises UserError if grids differ."""

    def __init__(self, name: str, volumes: Sequence[Volume], center: Volume | None = None) -> None:
        super().__init__(name, ())
        self.volumes, self.center = tuple(volumes), center
        for volume in (*self.volumes[1:], *([] if center is None else [center])):
            if difference := self.volumes[0].geometry.difference(volume.geometry):
                raise UserError(f"all channels and the mask of {name} must lie on one grid, got {difference}")

    def _read_images(self) -> tuple[Float32, Geometry]:
        return np.stack([volume.data for volume in self.volumes]), self.volumes[0].geometry

    def mask(self, part: str) -> Float32:
        """See `Case.mask`: the mask given, or its voxels of the values that `part` names after a colon."""
        if self.center is None:
            raise UserError(f"{self.name}: the crop is centred on the mask {part!r}; give it as center_mask")
        _, values = named_values(part)
        return _label(self.center.data, MaskFile(Path("center_mask"), values), part)


class PooledCase(LabelledCase):
    """A case by its name in a pool: `of_set` is its set, `order` where the set has the classes of the pool."""

    def __init__(self, case: Case, of_set: str, site: str, person: Person, order: Sequence[int]) -> None:
        subject, unlike = (case.subject, []) if person is None else person_in(f"{case.subject}@{of_set}", person)
        problems = (*case.missing(), *(f"case {case.name} {sentence}" for sentence in unlike))
        super().__init__(f"{of_set}-{case.name}", (), subject, site, {}, [f"{of_set}: {problem}" for problem in problems])
        self.case, self.of_set, self.rater_names = case, of_set, case.rater_names
        self.order = slice(None) if [*order] == sorted(order) else [*order]
        if isinstance(case, LabelledCase):
            self.images, self.labels, self.spacing_mm = case.images, case.labels, case.spacing_mm

    def sources(self, parts: Sequence[str] = (), sha256: Digest = sha256_of) -> tuple[str, ...]:
        """See `Case.sources`: those of the case, and the order of its classes if that changes."""
        lines = self.case.sources(parts, sha256)
        return (*lines, f"classes {self.order}") if isinstance(self.order, list) else lines

    def load(self) -> CaseData:
        """See `Case.load`; the classes come in the order of the pool."""
        data = self.case.load()
        return replace(data, raters=data.raters[:, self.order], truth=None if data.truth is None else data.truth[self.order])

    def mask(self, part: str) -> Float32:
        return self.case.mask(part)


class Pool(DataSet):
    """Several data sets as one. A case is called after its set: `1-sub-01`, with names `lausanne-sub-01`.

    Args:
        sets: the data sets. All have the same classes, of which the first says the order, and as many channels. Raters may differ.
        names: of the sets, from letters, digits, "_", "." and "-"; () calls them "1", "2" and so on.
        person: regular expression searched in subject and set, as in `sub-01@lausanne`; its first group (or the whole match)
            names the person. `r"[^@]+"` takes equal subjects of two sets as one person, `r".+"` as two. With None a person
            is the subject, and equal ones of two sets, which may be either, are refused.
        site: of a case, the "own" one in its set, its "set", or "both".
        exclude: cases or persons that are left out, by their names in the pool. Each set has an `exclude` of its own.

    >>> from softseg_dist import Phantom
    >>> Pool(Phantom(subjects=1), Phantom(subjects=1, seed=7), names=("a", "b"), person=".+").cases(None)[1].name
    'b-sub-001'
    """

    sets: tuple[DataSet, ...] = Field(min_length=2)
    names: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")], ...] = ()
    person: Person = None
    site: Literal["own", "set", "both"] = "own"
    exclude: tuple[str, ...] = ()

    def __init__(self, *sets: DataSet, **fields: Any) -> None:
        super().__init__(**({"sets": sets} if sets else {}), **fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.names and not len(self.sets) == len(self.names) == len(set(self.names)):
            raise ValueError(f"names must be one for each of {len(self.sets)} sets, all different, got {listed(self.names)}")
        if len({tuple(sorted(data.classes)) for data in self.sets}) > 1:
            got = "; ".join(f"{listed(data.classes)} in {name}" for name, data in self.by_name.items())
            raise ValueError(f"all sets must have the same classes, got {got}")
        return self

    @property
    def by_name(self) -> dict[str, DataSet]:
        """The sets, by what they are called."""
        return dict(zip(self.names or map(str, range(1, len(self.sets) + 1)), self.sets, strict=True))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.sets[0].classes

    @property
    def channel_names(self) -> tuple[tuple[str, ...], ...]:
        of_channels = zip(*(data.channel_names for data in self.sets), strict=False)
        return tuple(tuple(dict.fromkeys(chain(*names))) for names in of_channels)

    @property
    def rater_names(self) -> tuple[str, ...] | None:
        return self.sets[0].rater_names if len({data.rater_names for data in self.sets}) == 1 else None

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """See `DataSet.scan`. Raises UserError if a subject of two sets may be one person or two, or numbers of channels differ."""
        cases = selected(self._cases(data_root), self.exclude)
        if self.person is None and (twice := _in_several((case.subject, case.of_set) for case in cases)):
            rule = 'say person=r"[^@]+" if that is one person, person=r".+" if these are several'
            raise UserError(f"several sets have a subject {listed(twice)}: {rule}")
        channels = {case.of_set: len(case.images) for case in cases if case.images and not case.problems}
        if len(set(channels.values())) > 1:
            got = listed([f"{count(number, 'channel')} in {of_set}" for of_set, number in channels.items()])
            raise UserError(f"the images of all sets must have as many channels, got {got}")
        return cases

    def warnings(self, data_root: Path | None) -> tuple[str, ...]:
        """See `DataSet.warnings`: those of all sets, and sites of one name."""
        found = [f"{of_set}: {text}" for of_set, data in self.by_name.items() for text in data.warnings(data_root)]
        if twice := _in_several((case.site, case.of_set) for case in self._cases(data_root) if case.site):
            found.append(f'several sets have a site {listed(twice)}, which counts as one; site="both" keeps them apart')
        return tuple(found)

    def _cases(self, data_root: Path | None) -> Iterator[PooledCase]:
        for of_set, data in self.by_name.items():
            for case in data.scan(data_root):
                sites = {"own": case.site, "set": of_set, "both": f"{of_set}-{case.site}".rstrip("-")}
                yield PooledCase(case, of_set, sites[self.site], self.person, [*map(data.classes.index, self.classes)])


def _in_several(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The names that stand with several sets, of (name, set)."""
    return sorted(name for name, number in Counter(name for name, _ in set(pairs)).items() if number > 1)


def check_apart(cases: Sequence[Case], sources: Sequence[Sequence[str]]) -> None:
    """Raise UserError if the images of two subjects are equal, since they could cross a split; `sources` as `Case.sources`."""
    known: dict[tuple[tuple[str, int], ...], Case] = {}
    for case, lines in zip(cases, sources, strict=True):
        if not (isinstance(case, LabelledCase) and case.images):
            continue
        content = tuple((line.rpartition(" ")[2], part_of(path)[1] or 0) for path, line in zip(case.images, lines, strict=False))
        first = known.setdefault(content, case)
        if first.subject != case.subject:
            equal = f"the images of {first.name} ({first.subject}) and {case.name} ({case.subject}) are equal"
            raise UserError(f"{equal}: one would train what the other tests; remove one, or give both one person")


def _label(values: Float32, mask: MaskFile, what: str) -> Float32:
    if mask.values:
        if (fractions := values[np.abs(values - np.rint(values)) > MAP_ROUNDING]).size > 0:
            wanted = f"value {'+'.join(map(str, mask.values))} needs a map of integers"
            raise UserError(f"{what}: {wanted}, got {fractions.size} other voxels, such as {fractions[0]:g}, in {mask.path}")
        return np.isin(np.rint(values), np.asarray(mask.values, np.float32)).astype(np.float32)
    if is_picture(mask.path) and np.isin(values, (0, 255)).all():  # white is 1
        return (values > 0).astype(np.float32)
    remedy = 'scale it, or name one value of an integer map in the study file as "part:value"'
    return within_0_1(values, f"{what}: labels", f"{mask.path}; {remedy}")


def within_0_1(values: Float32, what: str, place: str) -> Float32:
    """The values, without rounding errors of the tool that wrote them. Raises UserError if one is NaN or lies outside [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        raise UserError(f"{what} must lie in [0, 1], got {high if high > 1 + ROUNDING else low:g} in {place}")
    return values.clip(0, 1)


def _check_grid(geometry: Geometry, path: Path, reference: Geometry, reference_path: Path) -> None:
    if difference := reference.difference(geometry):
        raise UserError(f"{path} is on another grid than {reference_path}: {difference}; resample it to the image first")
