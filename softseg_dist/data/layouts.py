"""The layout of BIDS-like folders: images in `sub-*/[ses-*/]<kind>/`, masks below `derivatives/*/` in a folder of the same name.

A file's name is a set of words joined by "_": entities (`sub-01`, `run-1`), the contrast (`T2w`), and for a mask its
part (`label-GM_mask`, `gmseg-manual`). Their order does not matter. A mask belongs to an image if its words are the
image's plus those of the part; the contrast may be left out, as official BIDS derivatives do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from softseg_dist.data.cases import IGNORED, RATER, SINGLE_RATER, Folder, LabelledCase, MaskFile, named_values, person_in, selected
from softseg_dist.data.files import SUFFIXES, by_rater
from softseg_dist.data.participants import read_participants
from softseg_dist.data.source_files import nfc
from softseg_dist.data.volume import stem_of
from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen, grouped
from softseg_dist.words import listed


class Each(Frozen):
    """Contrasts each of which makes a case of its own, as for a model that is to work on any of them.

    >>> Bids("spine", image=Each("T1w", "T2w"), labels={"cord": "label-cord_mask"}).contrasts
    ('T1w', 'T2w')
    """

    contrasts: tuple[str, ...] = Field(min_length=1)

    def __init__(self, *contrasts: str, **fields: Any) -> None:
        super().__init__(**({"contrasts": contrasts} if contrasts else {}), **fields)


class Bids(Folder):
    """A BIDS-like folder.

    Args:
        folder: its name below the data root (or an absolute path).
        image: contrast of the image (`"T2starw"`), or several, which become channels. `Each("T1w", "T2w")` makes each a case
            of its own (`sub-01_T1w`) of the same person, who need not have all of them.
        labels: class -> part of the mask's name, that is what it has more than the image: `"gmseg-manual"`,
            `"label-GM_mask"`. `part:value` takes one value of an integer map: `"label-hippocampus_dseg:1"`,
            `part:1+2` the voxels of either.
            `{rater}` stands for a rater's name: `"label-GM_desc-{rater}_mask"`; a case need not have all raters. The mask of
            a class without it counts for each of them.
        ignore: part of the mask of the voxels that nobody labelled, as in "dseg:255"; see `Files`.
        person: regular expression searched in `sub-...`; its first group (or the whole match) names the person, so
            that sessions with names of their own stay together. None takes `sub-...` as it is.
        site: column of participants.tsv, upper or lower case; the site is "" where it is absent. `softseg check` says for how
            many persons it was found.
        derivatives: which folders of `derivatives/` have the masks; "*" looks in all.
        exclude: cases or subjects that are left out, by name.

    >>> Bids("spine", image="T2w", labels={"GM": "label-GM_desc-{rater}_mask"}).classes
    ('GM',)
    """

    image: str | tuple[str, ...] | Each
    labels: dict[str, str]
    site: str = "site"
    derivatives: str = "*"

    def __init__(self, folder: str, **fields: Any) -> None:
        super().__init__(folder=folder, **fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.labels or not self.contrasts or "" in (*self.labels, *self.labels.values(), *self.contrasts):
            raise ValueError("image and labels must name at least one contrast and one class, none of them empty")
        for part in self.parts.values():
            named_values(part)
        if twice := [part for part in self.parts.values() if part.count(RATER) > 1]:
            raise ValueError(f"a part may have {RATER} once, got {twice[0]!r}")
        return self

    @property
    def contrasts(self) -> tuple[str, ...]:
        """One per image channel; those of `Each`."""
        image = self.image.contrasts if isinstance(self.image, Each) else self.image
        return (image,) if isinstance(image, str) else image

    @property
    def channel_names(self) -> tuple[tuple[str, ...], ...]:
        return (self.contrasts,) if isinstance(self.image, Each) else tuple((name,) for name in self.contrasts)

    def scan(self, data_root: Path | None) -> tuple[LabelledCase, ...]:
        return self._survey(data_root)[0]

    def warnings(self, data_root: Path | None) -> tuple[str, ...]:
        """See `DataSet.warnings`: folders without an image, and what is odd in participants.tsv."""
        return self._survey(data_root)[1]

    def _survey(self, data_root: Path | None) -> tuple[tuple[LabelledCase, ...], tuple[str, ...]]:
        """The cases, and the warnings: nobody who is on disk or in the table is in neither."""
        root = self.root(data_root)
        folders = sorted(root.glob("sub-*"))
        images = names_in(root, folders)
        below = [folder for folder in sorted(root.glob(f"derivatives/{self.derivatives}")) if folder.is_dir()]
        masks = [name for folder in below for name in names_in(folder, sorted(folder.glob("sub-*")))]
        keys = self._keys(root, images)
        keys |= self._keys_without_image(masks, keys)
        persons = [nfc(folder.name) for folder in folders]
        sites, odd = read_participants(root / "participants.tsv", self.site, persons, expected=self.site != "site")
        tree = _Tree(root, by_folder(images), by_folder(masks), sites)
        by_name = grouped((of_case, key) for key, name in keys.items() for of_case in self._cases_of(key, name, tree))
        used = {folder.split("/")[0] for folder, _ in keys}
        lonely = {person: folder for person, folder in zip(persons, folders, strict=True) if person not in used}
        exclude = {nfc(name) for name in self.exclude}
        found = (self._case(tree, name, contrasts, same) for (name, contrasts), same in by_name.items())
        cases = selected(found, exclude - lonely.keys())
        self._check_parts(root, cases, masks)
        apart = {person: folder for person, folder in lonely.items() if person not in exclude}
        broken = {person for person, folder in apart.items() if folder.is_symlink() and not folder.exists()}
        left = [person + " (a link that leads nowhere)" * (person in broken) for person in apart]
        without = [f"there is no image {' or '.join(self.contrasts)} in {listed(left)}: not in the study"] if left else []
        return cases, (*without, *odd)

    def _keys(self, root: Path, images: Sequence[Name]) -> dict[_Key, str]:
        """The cases that have an image, of whatever contrast, and their names. Raises UserError if none has the first one."""
        keys: dict[_Key, str] = {}
        seen: set[str] = set()
        for image in images:
            fits = [each for each in self.contrasts if _words(each) <= image.words and image.last == nfc(each).rpartition("_")[2]]
            if fits:
                contrast = max(fits, key=lambda each: len(_words(each)))
                seen.add(contrast)
                entities = image.words - _words(contrast)
                keys.setdefault((image.folder, entities), image.name_of(entities))
        needed = self.contrasts if isinstance(self.image, Each) else self.contrasts[:1]
        if lacking := [each for each in needed if each not in seen]:
            others = sorted({image.last for image in images})
            raise UserError(f"no image sub-*_{lacking[0]}.nii.gz in {root}; there are {listed(others) or 'no images'}")
        return keys

    def _cases_of(self, key: _Key, name: str, tree: _Tree) -> list[tuple[str, tuple[str, ...]]]:
        """Names, and the contrasts of their channels: with `Each` one for each contrast of which there is an image or a mask."""
        if not isinstance(self.image, Each):
            return [(name, self.contrasts)]
        found = {image.words for image in tree.images.get(key[0], ())}.union(*map(self._bases_of, tree.masks.get(key[0], ())))
        there = [each for each in self.contrasts if key[1] | _words(each) in found]
        return [(f"{name}_{each}", (each,)) for each in there] or [(name, self.contrasts[:1])]

    def _keys_without_image(self, masks: Sequence[Name], keys: Mapping[_Key, str]) -> dict[_Key, str]:
        """The cases that have a mask alone: its name has the words of a part, and else words such as images have."""
        known = {entities for _, entities in keys}
        kinds = {word.partition("-")[0] for entities in known for word in entities}
        found: dict[_Key, str] = {}
        for mask in masks:
            owners = {base - word for base in self._bases_of(mask) for word in map(_words, (*self.contrasts, "")) if word <= base}
            if owners.isdisjoint(known):
                of_kinds = [each for each in owners if all("-" in word and word.partition("-")[0] in kinds for word in each)]
                if entities := min((each for each in of_kinds if mask.folder.split("/")[0] in each), key=sorted, default=None):
                    found[mask.folder, entities] = mask.name_of(entities)
        return found

    def _bases_of(self, mask: Name) -> set[frozenset[str]]:
        """What the name of a mask may have more than the words of a part."""
        found: set[frozenset[str]] = set()
        for words in (_words(named_values(part)[0]) for part in self.labels.values()):
            fixed = frozenset(word for word in words if RATER not in word)
            rests = [fixed] if fixed == words else [fixed | {word} for word in mask.words - fixed]
            found |= {mask.words - rest for rest in rests if rest <= mask.words and _rater(rest, words) is not None}
        return found

    def _case(self, tree: _Tree, name: str, contrasts: Sequence[str], keys: Sequence[_Key]) -> LabelledCase:
        (folder, entities), stem = keys[0], name.removesuffix(f"_{contrasts[0]}")
        images, channels = tree.images.get(folder, ()), list[Path]()
        problems = [f"case {name} is in several folders: {listed([each for each, _ in keys])}"] if len(keys) > 1 else []
        none = f'none; exclude=("{name}",) leaves it out'
        for contrast in contrasts:
            wanted = entities | _words(contrast)
            found = [image.path for image in images if image.words == wanted]
            if len(found) != 1:
                looked = f"{folder}/{stem}_{contrast}.nii.gz"
                problems.append(f"case {name} needs one image {looked} in {tree.root}, found {listed(found) or none}")
            channels += found[:1]
        bases = [*(entities | _words(contrast) for contrast in contrasts), entities]
        own = _Masks(tree.root, name, f"{folder}/{stem}_{contrasts[0]}", bases, tree.masks.get(folder, ()), self.labels)
        drawn: dict[str, dict[str, MaskFile]] = {}
        for label, part in self.parts.items():
            drawn[label], more = own.find(nfc(part))
            problems += more
        ignore = next(iter(drawn.pop(IGNORED, {}).values()), None)
        labels, lacking = by_rater(drawn, {label for label, part in self.labels.items() if RATER in part})
        participant = folder.split("/")[0]
        subject, unlike = person_in(participant, self.person)
        problems += [f"case {name} {sentence}" for sentence in (*lacking, *unlike)]
        files = dict.fromkeys([*channels, *(mask.path for of_one in drawn.values() for mask in of_one.values())])
        odd = [path for path in files if not path.name.endswith(SUFFIXES)]
        problems += [f"case {name}: names end in .nii or .nii.gz, in small letters; rename {path}" for path in odd]
        site = tree.sites.get(participant, "")
        return LabelledCase(name, channels, subject, site, labels, problems, own.only, ignore=ignore)

    def _check_parts(self, root: Path, cases: Sequence[LabelledCase], masks: Sequence[Name]) -> None:
        """A part that no case has is a mistake of the study file, not of the data."""
        for label, part in self.labels.items():
            if not any(label in by_class for case in cases for by_class in case.labels.values()):
                image_words = {word for case in cases for path in case.images for word in stem_of(path).split("_")}
                parts = {"_".join(w for w in mask.stem.split("_") if w not in image_words) for mask in masks}
                known = listed(sorted(parts)) or "no masks"
                raise UserError(f"class {label}: no mask in {root}/derivatives/{self.derivatives} has {part!r}; there are {known}")


_Key = tuple[str, frozenset[str]]  # a case: its folder (`sub-01/ses-1/anat`), and the words of its name


@dataclass(frozen=True)
class Name:
    """A file by the words of its name, and the folder (`sub-01/ses-1/anat`) that image and mask share."""

    path: Path
    folder: str
    stem: str
    words: frozenset[str]

    @property
    def last(self) -> str:
        """The last word: the contrast of an image."""
        return self.stem.rpartition("_")[2]

    def name_of(self, entities: frozenset[str]) -> str:
        """These words, as they follow each other here."""
        return "_".join(word for word in self.stem.split("_") if word in entities)


@dataclass(frozen=True)
class _Tree:
    """What is on disk: images and masks by folder, and the sites of persons."""

    root: Path
    images: Mapping[str, Sequence[Name]]
    masks: Mapping[str, Sequence[Name]]
    sites: Mapping[str, str]


@dataclass(frozen=True)
class _Masks:
    """The masks of one case. `stem`: of its image, with the folder; `bases`: words it may share with it, the first match counts."""

    root: Path
    name: str
    stem: str
    bases: Sequence[frozenset[str]]
    masks: Sequence[Name]
    labels: Mapping[str, str]

    def find(self, part: str) -> tuple[dict[str, MaskFile], list[str]]:
        """Rater -> file, and what is wrong, in sentences."""
        text, values = named_values(part)
        words = [word for word in text.split("_") if word]
        for base in self.bases:
            found: dict[str, list[Path]] = defaultdict(list)
            for mask in self.masks:
                if base <= mask.words and (rater := _rater(mask.words - base, words)) is not None:
                    found[rater].append(mask.path)
            if found:
                several = [f"{len(paths)} masks fit {part!r}: {listed(paths)}" for paths in found.values() if len(paths) > 1]
                problems = [f"case {self.name}: {fit}; say derivatives=..." for fit in several]
                return {rater: MaskFile(paths[0], values) for rater, paths in found.items()}, problems
        looked = f"derivatives/*/{self.stem}_{'_'.join(words)}.nii.gz"
        return {}, [f"case {self.name} has no mask {part!r}: looked for {looked} in {self.root}"]

    def only(self, part: str) -> MaskFile:
        """The one mask of this part, or else of this class; of several raters the first. Raises UserError if there is none."""
        found, problems = self.find(nfc(part))
        if not found and part in self.labels:
            found, problems = self.find(nfc(self.labels[part]))
        if problems:
            raise UserError(problems[0])
        return found[min(found)]


def _rater(rest: frozenset[str], words: Collection[str]) -> str | None:
    """The rater's name if `rest` are the words of the part, else None."""
    fixed = {word for word in words if RATER not in word}
    if len(fixed) == len(words):
        return SINGLE_RATER if rest == fixed else None
    (pattern,) = (re.escape(word).replace(re.escape(RATER), "(.+)") for word in words if RATER in word)
    matches = [re.fullmatch(pattern, word) for word in rest - fixed]
    return matches[0][1] if fixed <= rest and len(matches) == 1 and matches[0] else None


def names_in(root: Path, folders: Sequence[Path]) -> list[Name]:
    """The NIfTI files below the `folders` of subjects; `root` is above them."""
    names = []
    for path in (path for folder in folders for path in _files(folder)):
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."):
            stem = nfc(re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE))
            names.append(Name(path, nfc(path.parent.relative_to(root).as_posix()), stem, _words(stem)))
    return names


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, by name; links are followed, but for those that lead above themselves."""
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for path in paths:
        if not path.is_dir():
            yield path
        elif not (path.is_symlink() and folder.resolve().is_relative_to(path.resolve())):
            yield from _files(path)


def by_folder(names: Iterable[Name]) -> dict[str, list[Name]]:
    """The names in each folder."""
    return grouped((name.folder, name) for name in names)


def _words(text: str) -> frozenset[str]:
    return frozenset(word for word in nfc(text).split("_") if word)
