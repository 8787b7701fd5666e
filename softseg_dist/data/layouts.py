"""The layout of BIDS-like folders: images in `sub-*/[ses-*/]<kind>/`, masks below `derivatives/*/` in a folder of the same name.

A file's name is a set of words joined by "_": entities (`sub-01`, `run-1`), the contrast (`T2w`), and for a mask its
part (`label-GM_mask`, `gmseg-manual`). Their order does not matter. A mask belongs to an image if its words are the
image's plus those of the part; the contrast may be left out, as official BIDS derivatives do.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from softseg_dist.data.cases import SINGLE_RATER, Case, DataSet, LabelledCase, MaskFile
from softseg_dist.data.volume import stem_of
from softseg_dist.errors import UserError
from softseg_dist.words import listed

RATER = "{rater}"
SUFFIXES = (".nii.gz", ".nii")


class Bids(DataSet):
    """A BIDS-like folder.

    Args:
        folder: its name below the data root (or an absolute path).
        image: contrast of the image (`"T2starw"`), or several, which become channels.
        labels: class -> part of the mask's name, that is what it has more than the image: `"gmseg-manual"`,
            `"label-GM_mask"`. `part:value` takes one value of an integer map: `"label-hippocampus_dseg:1"`.
            `{rater}` stands for a rater's name: `"label-GM_desc-{rater}_mask"`; a case need not have all raters.
        person: regular expression searched in `sub-...`; its first group (or the whole match) names the person, so
            that sessions with names of their own stay together. None takes `sub-...` as it is.
        site: column of participants.tsv, upper or lower case; the site is "" where it is absent.
        derivatives: which folders of `derivatives/` have the masks; "*" looks in all.
        exclude: cases or subjects that are left out, by name.

    >>> Bids("spine", image="T2w", labels={"GM": "label-GM_desc-{rater}_mask"}).classes
    ('GM',)
    """

    folder: str
    image: str | tuple[str, ...]
    labels: dict[str, str]
    person: str | None = None
    site: str = "site"
    derivatives: str = "*"
    exclude: tuple[str, ...] = ()

    def __init__(self, folder: str, **fields: Any) -> None:
        super().__init__(folder=folder, **fields)  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.labels or not self.contrasts or "" in (*self.labels, *self.labels.values(), *self.contrasts):
            raise ValueError("image and labels must name at least one contrast and one class, none of them empty")
        with_rater = [name for name, part in self.labels.items() if RATER in part]
        if with_rater and len(with_rater) < len(self.labels):
            raise ValueError(f"either all parts have {RATER} or none has, got it for {', '.join(with_rater)} only")
        for part in self.labels.values():
            _part(part)
        if twice := [part for part in self.labels.values() if part.count(RATER) > 1]:
            raise ValueError(f"a part may have {RATER} once, got {twice[0]!r}")
        try:
            re.compile(self.person or "")
        except re.error as error:
            raise ValueError(f"person must be a regular expression, got {self.person!r}: {error}") from error
        return self

    @property
    def contrasts(self) -> tuple[str, ...]:
        """One per image channel."""
        return (self.image,) if isinstance(self.image, str) else self.image

    @property
    def classes(self) -> tuple[str, ...]:
        """See `DataSet.classes`: the keys of `labels`."""
        return tuple(self.labels)

    @property
    def rater_names(self) -> tuple[str, ...] | None:
        """See `DataSet.rater_names`: None with `{rater}`, which only the files can tell."""
        return None if any(RATER in part for part in self.labels.values()) else (SINGLE_RATER,)

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        """See `DataSet.scan`. Reads names and participants.tsv only."""
        root = self._root(data_root)
        images = _names(root, root.glob("sub-*"))
        first = self.contrasts[0]
        ends = {image: image.stem.rpartition("_")[2] for image in images}
        anchors = [image for image in images if _words(first) <= image.words and ends[image] == first.rpartition("_")[2]]
        if not anchors:
            others = sorted(set(ends.values()))
            raise UserError(f"no image sub-*_{first}.nii.gz in {root}; there are {listed(others) or 'no images'}")
        below = [folder for folder in sorted(root.glob(f"derivatives/{self.derivatives}")) if folder.is_dir()]
        masks = [name for folder in below for name in _names(folder, folder.glob("sub-*"))]
        sites = _sites(root, self.site)
        images_in, masks_in = _by_folder(images), _by_folder(masks)
        cases = [self._case(root, anchor, images_in[anchor.folder], masks_in.get(anchor.folder, ()), sites) for anchor in anchors]
        if unknown := set(self.exclude) - {name for case in cases for name in (case.name, case.subject)}:
            raise UserError(f"exclude names {listed(sorted(unknown))}, but the cases are {listed([case.name for case in cases])}")
        cases = [case for case in cases if {case.name, case.subject}.isdisjoint(self.exclude)]
        self._check_parts(root, cases, masks)
        by_name: dict[str, LabelledCase] = {}
        for case in cases:
            if (other := by_name.setdefault(case.name, case)) is not case:
                raise UserError(f"two images make the case {case.name}: {case.images[0]} and {other.images[0]}")
        return tuple(sorted(cases, key=lambda case: case.name))

    def _root(self, data_root: Path | None) -> Path:
        if data_root is None and not Path(self.folder).is_absolute():
            raise UserError(f"{self.folder!r} is a folder below the data root: say where that is with --data-root")
        root = (data_root or Path()) / self.folder
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; is --data-root right?")
        return root

    def _case(
        self, root: Path, anchor: _Name, images: Sequence[_Name], masks: Sequence[_Name], sites: Mapping[str, str]
    ) -> LabelledCase:
        entities = anchor.words - _words(self.contrasts[0])
        name = "_".join(word for word in anchor.stem.split("_") if word in entities)
        channels, problems = [], []
        for contrast in self.contrasts:
            wanted = entities | _words(contrast)
            found = [image.path for image in images if image.words == wanted]
            if len(found) != 1:
                looked = f"{anchor.folder}/{name}_{contrast}.nii.gz"
                problems.append(f"case {name} needs one image {looked} in {root}, found {listed(found) or 'none'}")
            channels += found[:1]
        bases = [*(entities | _words(contrast) for contrast in self.contrasts), entities]
        own = _Masks(root, name, anchor, bases, masks)
        labels: dict[str, dict[str, MaskFile]] = defaultdict(dict)
        for label, part in self.labels.items():
            found_masks, more = own.find(part)
            problems += more
            for rater, mask in found_masks.items():
                labels[rater][label] = mask
        for rater, by_class in labels.items():
            if lacking := [label for label in self.labels if label not in by_class]:
                problems.append(f"case {name}: rater {rater} has no mask of {', '.join(lacking)}")
        participant = anchor.folder.split("/")[0]
        ordered = {rater: labels[rater] for rater in sorted(labels)}
        return LabelledCase(name, channels, self._person(participant), sites.get(participant, ""), ordered, problems, own.only)

    def _person(self, participant: str) -> str:
        if self.person is None:
            return participant
        if (match := re.search(self.person, participant)) is None:
            raise UserError(f"person={self.person!r} does not match {participant!r}")
        return match[1] if match.re.groups else match[0]

    def _check_parts(self, root: Path, cases: Sequence[LabelledCase], masks: Sequence[_Name]) -> None:
        """A part that no case has is a mistake of the study file, not of the data."""
        for label, part in self.labels.items():
            if not any(label in by_class for case in cases for by_class in case.labels.values()):
                image_words = {word for case in cases for path in case.images for word in stem_of(path).split("_")}
                parts = {"_".join(w for w in mask.stem.split("_") if w not in image_words) for mask in masks}
                known = listed(sorted(parts)) or "no masks"
                raise UserError(f"class {label}: no mask in {root}/derivatives/{self.derivatives} has {part!r}; there are {known}")


@dataclass(frozen=True)
class _Name:
    """A file by the words of its name, and the folder (`sub-01/ses-1/anat`) that image and mask share."""

    path: Path
    folder: str
    stem: str
    words: frozenset[str]


@dataclass(frozen=True)
class _Masks:
    """The masks in the folder of one image. `bases`: words it may share with the image, the first match counts."""

    root: Path
    name: str
    anchor: _Name
    bases: Sequence[frozenset[str]]
    masks: Sequence[_Name]

    def find(self, part: str) -> tuple[dict[str, MaskFile], list[str]]:
        """Rater -> file, and what is wrong, in sentences."""
        words, value = _part(part)
        for base in self.bases:
            found: dict[str, list[Path]] = defaultdict(list)
            for mask in self.masks:
                if base <= mask.words and (rater := _rater(mask.words - base, words)) is not None:
                    found[rater].append(mask.path)
            if found:
                several = [f"{len(paths)} masks fit {part!r}: {listed(paths)}" for paths in found.values() if len(paths) > 1]
                problems = [f"case {self.name}: {fit}; say derivatives=..." for fit in several]
                return {rater: MaskFile(paths[0], value) for rater, paths in found.items()}, problems
        looked = f"derivatives/*/{self.anchor.folder}/{self.anchor.stem}_{'_'.join(words)}.nii.gz"
        return {}, [f"case {self.name} has no mask {part!r}: looked for {looked} in {self.root}"]

    def only(self, part: str) -> MaskFile:
        """The one mask of this part; of several raters the first. Raises UserError if there is none."""
        found, problems = self.find(part)
        if problems:
            raise UserError(problems[0])
        return found[min(found)]


def _part(part: str) -> tuple[tuple[str, ...], int | None]:
    text, colon, value = part.partition(":")
    if colon and not re.fullmatch(r"-?\d+", value):
        raise UserError(f'the value in "part:value" must be an integer, got {part!r}')
    return tuple(word for word in text.split("_") if word), int(value) if colon else None


def _rater(rest: frozenset[str], words: Sequence[str]) -> str | None:
    """The rater's name if `rest` are the words of the part, else None."""
    fixed = {word for word in words if RATER not in word}
    if len(fixed) == len(words):
        return SINGLE_RATER if rest == fixed else None
    (pattern,) = (word for word in words if RATER in word)
    before, after = map(re.escape, pattern.split(RATER))
    left = rest - fixed
    if not fixed <= rest or len(left) != 1:
        return None
    match = re.fullmatch(f"{before}(.+){after}", next(iter(left)))
    return match[1] if match else None


def _names(root: Path, folders: Iterable[Path]) -> list[_Name]:
    paths = (path for folder in sorted(folders) for path in sorted(folder.rglob("*")) if path.name.endswith(SUFFIXES))
    return [
        _Name(path, path.parent.relative_to(root).as_posix(), stem := stem_of(path), _words(stem))
        for path in paths
        if not path.name.startswith(".")
    ]


def _by_folder(names: Iterable[_Name]) -> dict[str, list[_Name]]:
    grouped: dict[str, list[_Name]] = defaultdict(list)
    for name in names:
        grouped[name.folder].append(name)
    return grouped


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in text.split("_") if word)


def _sites(root: Path, column: str) -> dict[str, str]:
    """`sub-...` -> site, from participants.tsv if there is one with such a column."""
    path = root / "participants.tsv"
    if not path.is_file():
        return {}
    rows = csv.DictReader(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), delimiter="\t")
    titles = {title.strip().lower(): title for title in rows.fieldnames or ()}
    if "participant_id" not in titles or column.lower() not in titles:
        return {}
    sites = {row[titles["participant_id"]]: (row[titles[column.lower()]] or "").strip() for row in rows}
    return {subject: "" if site.lower() in ("n/a", "nan") else site for subject, site in sites.items()}
