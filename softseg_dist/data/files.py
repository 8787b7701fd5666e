"""Files whose names follow patterns: one reader for any layout, and what a folder has where nothing fits. It reads names."""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from softseg_dist.data.cases import IGNORED, RATER, SINGLE_RATER, Folder, LabelledCase, MaskFile, named_values, person_in, selected
from softseg_dist.data.source_files import PICTURES, Spacing, nfc, split_part
from softseg_dist.errors import UserError
from softseg_dist.words import count, listed

PIECE = re.compile(r"\{(?P<name>[a-z]\w*)\}|(?P<star>\*)|(?P<text>[^{}*]+)", re.ASCII)  # of a pattern
CHANNEL = "{channel}"
IGNORE = "ignore"  # what nnU-Net's label and a table's column of the voxels to ignore are called
SUFFIXES = (".nii", ".nii.gz")
# Files of releases, and the names that they should have.
MISNAMED = {"BraTS20_Training_355/W39_1998.09.19_Segm.nii": "BraTS20_Training_355/BraTS20_Training_355_seg.nii"}
MOST_LISTED = 20_000  # files that are looked at to say what a folder has
READERS = {  # of names of images
    "Bids": r"sub-[^/]+/(?:ses-[^/]+/)?[^/]+/sub-[^/]+_[A-Za-z0-9]+",
    "NnUNet": r"imagesTr/[^/]+_\d{4}",
    "Decathlon": r"imagesTr/(?![^/]*_\d{4}\.)[^/]+",
    "SCGM": r"site\d-sc\d+-image",
    "MSSEG": r"(?:Train\w*/|Test\w*/)?(?:Center_[^/]+/)?[^/]+/Preprocessed_Data/[A-Z0-9]+_preprocessed",
    "BraTS": r"([^/]+)/\2(?:_flair|-t2f)",
}

Key = frozenset[tuple[str, str]]  # placeholders, and what they stand for
Groups = Mapping[Key, Mapping[str, Sequence[Path]]]  # -> rater -> files
Drawn = Mapping[str, Mapping[str, MaskFile]]  # class -> rater -> file


class Files(Folder):
    """Images and masks whose paths follow patterns.

    A pattern is a path below the folder. It ends in `.nii.gz`, which finds `.nii`, too, in `.nii`, `.png`, `.tif` or `.tiff`. In it

    - `{name}`, a placeholder, stands for one or more characters but "/", from left to right for as many as it can. Where
      it is written again, also in the pattern of a mask, it stands for the same text. Names are yours, but for
      `{subject}`, `{site}`, `{rater}` and `{channel}`, which have the meanings below;
    - `*` stands for any characters but "/", or none;
    - everything else stands for itself.

    A file that fits several patterns belongs to the one with the most text outside of placeholders: `a_seg.nii.gz` to
    `{case}_seg.nii.gz`, not to `{case}.nii.gz`. Files and folders whose names begin with a dot are left out.

    What the placeholders of the image stand for makes a case: joined by "-" it is its name. A mask belongs to the cases that
    agree with it in all its placeholders.

    Args:
        folder: its name below the data root (or an absolute path).
        image: pattern of the image, or of each channel; or one with `{channel}`, which stands for each of `channels`.
        labels: class -> pattern of its mask, which shares placeholders with the image and may have `{rater}`. After it, `:1`
            takes one value of an integer map, and `:1+2+4` the voxels that have one of these. A case need not have all
            raters; the mask of a class without `{rater}` counts for each of them.
            `[0]` after the pattern of an image or mask takes the first volume of a 4-D file, or the red of a picture; `[1]:2`
            takes the value 2 in the second. `"{case}.nii.gz[{channel}]"` with `channels=("0", "1")` are two channels.
        channels: the names of the channels, in their order.
        ignore: pattern like those of `labels`, without `{rater}`: the voxels that nobody labelled, "{case}_seg.nii.gz:255". They
            have no loss, and are left out in judging, as what lies outside of the image is.
        person: regular expression searched in `{subject}`, or in the name of the case where the image has no such
            placeholder; its first group (or the whole match) names the person. None takes the text as it is.
        site: text with placeholders of the image, such as "{site}". None takes `{site}` where the image has it, else "".
        exclude: cases or subjects that are left out, by name.
        spacing_mm: of PNG and TIFF files along columns, rows and, in a stack, pages, whatever they say; () takes what they say.

    `Preprocess(center=...)` names a class, or has a pattern like those of `labels`, without `{rater}`.

    >>> Files("scans", image="{case}/{channel}.nii.gz", channels=("t1", "t2"), labels={"lesion": "{case}/{rater}.nii.gz:1"}).images
    ('{case}/t1.nii.gz', '{case}/t2.nii.gz')
    """

    image: str | tuple[str, ...]
    labels: dict[str, str]
    channels: tuple[str, ...] = ()
    site: str | None = None
    spacing_mm: Spacing = ()

    def __init__(self, folder: str, **fields: Any) -> None:
        super().__init__(folder=folder, **fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [self.image] if isinstance(self.image, str) else [*self.image]
        if not given or not self.labels or "" in (*self.labels, *self.channels):
            raise ValueError("image and labels must name at least one pattern and one class, none of them empty")
        if {bool(self.channels)} != {CHANNEL in text for text in given}:
            raise ValueError(f"channels must be the names that {CHANNEL} stands for, got {self.channels} with {listed(given)}")
        first, *others = [_Pattern.of(text) for text in self.images]
        if different := [other.text for other in others if set(other.names) != set(first.names)]:
            raise ValueError(f"all channels must have the same placeholders, got {first.text} and {different[0]}")
        if not first.names or "rater" in first.names:
            raise ValueError(f"the image must have a placeholder such as {{case}}, but not {RATER}, got {first.text}")
        for mask in (_Pattern.of(named_values(text)[0]) for text in self.parts.values()):
            if not set() < {*mask.names} - {"rater"} <= {*first.names}:
                raise ValueError(f"a mask must have placeholders of its image {first.text}, and * for other text, got {mask.text}")
        if self.spacing_mm and not any(_Pattern.of(text).text.endswith(PICTURES) for text in self.images):
            raise ValueError(f"spacing_mm is of PNG and TIFF files, got {self.spacing_mm} with the image {first.text}")
        if unknown := {name for name, _, _ in PIECE.findall(self.site or "")} - {"", *first.names}:
            raise ValueError(f"site may have placeholders of the image {first.text}, got {listed(sorted(unknown))}")
        return self

    @property
    def images(self) -> tuple[str, ...]:
        """The pattern of each channel."""
        given = (self.image,) if isinstance(self.image, str) else self.image
        return tuple(text.replace(CHANNEL, name) for text in given for name in self.channels or ("",))

    @property
    def channel_names(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name,) for name in self.channels)

    def scan(self, data_root: Path | None) -> tuple[LabelledCase, ...]:
        index = _Index(self, self.root(data_root))
        return selected(map(index.case, index.keys()), self.exclude)

    def warnings(self, data_root: Path | None) -> tuple[str, ...]:
        """See `DataSet.warnings`: the files in the folders of the patterns that fit none."""
        index = _Index(self, self.root(data_root))
        number = count(len(index.unread), "file")
        return (f"no pattern fits {number} in {index.root}: {listed(index.unread)}",) if index.unread else ()

    def is_in(self, data_root: Path | None) -> bool:
        """Is there an image of this kind?"""
        images = [_Pattern.of(text) for text in self.images]
        return any(_grouped(_walk(self.root(data_root), images), images).values())


@dataclass(frozen=True)
class _Pattern:
    """`text` without the values of an integer map, and without `part`, "[2]" or ""; `names` are its placeholders, each once."""

    text: str
    names: tuple[str, ...]
    part: str = field(default="", compare=False)

    @classmethod
    def of(cls, text: str) -> Self:
        """Raises ValueError that names the rule and the text if that is no pattern."""
        text, part = split_part(text)
        pieces = list(PIECE.finditer(text))
        if "".join(piece[0] for piece in pieces) != text:
            raise ValueError(f"a placeholder is a name in small letters within {{}}, got {text!r}")
        if not text.endswith((*SUFFIXES, *PICTURES)) or {"", ".", ".."} & set(text.split("/")):
            raise ValueError(f"a pattern must be a path below the folder that ends in .nii.gz, .png or .tif, got {text!r}")
        if "**" in text or any(one["name"] and other["name"] for one, other in pairwise(pieces)):
            raise ValueError(f"a pattern must have text or / between two placeholders, and no **, got {text!r}")
        return cls(nfc(text), tuple(dict.fromkeys(piece["name"] for piece in pieces if piece["name"])), part)

    def rule(self, num_parts: int | None = None) -> re.Pattern[str]:
        """For whole paths, or their first parts."""
        stem = "/".join(self.text.split("/")[:num_parts])
        suffix = "" if num_parts else next(each for each in (".nii.gz", ".nii", *PICTURES) if stem.endswith(each))
        end = r"\.nii(?:\.gz)?" if suffix == ".nii.gz" else re.escape(suffix)
        texts, seen = [], set()
        for piece in PIECE.finditer(stem.removesuffix(suffix)):
            if name := piece["name"]:
                texts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)")
                seen.add(name)
            else:
                texts.append("[^/]*" if piece["star"] else re.escape(piece["text"]))
        return re.compile(f"{''.join(texts)}(?i:{end})")

    def of_case(self, key: Key) -> Key:
        """The part of a case's key that its files of this pattern have."""
        return frozenset((name, text) for name, text in key if name in self.names)


class _Index:
    """What lies in the folder `root`: `groups` by the text of a pattern, `unread` the other files; `masks`: pattern and values."""

    def __init__(self, data: Files, root: Path) -> None:
        """Raises UserError if a pattern fits no file."""
        self.data, self.root = data, root
        self.images = [_Pattern.of(text) for text in data.images]
        parts = {label: named_values(text) for label, text in data.parts.items()}
        self.masks = {label: (_Pattern.of(text), values) for label, (text, values) in parts.items()}
        patterns = [*self.images, *(pattern for pattern, _ in self.masks.values())]
        files = _walk(root, patterns)
        self.groups = _grouped(files, patterns)
        kinds = ["image"] * len(self.images) + [f"mask of {label}" for label in self.masks]
        for what, pattern in zip(kinds, patterns, strict=True):
            if not self.groups[pattern.text]:
                raise UserError(f"no {what} {pattern.text} in {root}: {contents(root)}")
        fitting = {path for of in self.groups.values() for of_key in of.values() for paths in of_key.values() for path in paths}
        self.unread = [name for name, path in files if path not in fitting]

    def keys(self) -> list[Key]:
        """Those of the images, and those of masks without one."""
        known = dict.fromkeys(key for image in self.images for key in self.groups[image.text])
        lost: dict[Key, None] = {}
        for pattern, _ in self.masks.values():
            seen = {pattern.of_case(key) for key in known}
            lost |= dict.fromkeys(key for key in self.groups[pattern.text] if key not in seen)
        return [*known, *lost]

    def case(self, key: Key) -> LabelledCase:
        """The case whose placeholders stand for the texts of `key`, and what it lacks; that of a mask alone has not all of them."""
        texts = {name: dict(key)[name] for name in self.images[0].names if name in dict(key)}
        name, images, problems = "-".join(texts.values()), list[Path](), list[str]()
        for pattern in self.images:
            found = self.groups[pattern.text].get(key, {}).get(SINGLE_RATER, [])
            images += [Path(f"{path}{pattern.part}") for path in found[:1]]
            problems += self._problems(f"image {_filled(pattern.text, texts)}", found)
        drawn: dict[str, dict[str, MaskFile]] = {}
        for label, (pattern, values) in self.masks.items():
            of_raters = self.groups[pattern.text].get(pattern.of_case(key), {})
            for found in of_raters.values() or ([],):
                problems += self._problems(f"mask {_filled(pattern.text, texts)} of {label}", found)
            drawn[label] = {rater: MaskFile(Path(f"{found[0]}{pattern.part}"), values) for rater, found in of_raters.items()}
        if not images:
            masks = listed(sorted({str(mask.path) for of_one in drawn.values() for mask in of_one.values()}), most=2)
            problems = [f"has no image {_filled(self.data.images[0], texts)} in {self.root}, but a mask: {masks}"]
        ignore = next(iter(drawn.pop(IGNORED, {}).values()), None)
        labels, lacking = by_rater(drawn, {label for label, text in self.data.labels.items() if RATER in text})
        subject, unlike = person_in(texts.get("subject", name), self.data.person)
        wrong = [f"case {name} {problem}" for problem in (*problems, *(lacking if images else ()), *unlike)]
        center = partial(center_mask, self.root, texts, drawn)
        site = "" if "{" in (site := _filled("{site}" if self.data.site is None else self.data.site, texts)) else site
        return LabelledCase(name, images, subject, site, labels, wrong, center, self.data.spacing_mm, ignore)

    def _problems(self, what: str, found: Sequence[Path]) -> list[str]:
        """What is wrong with the files of which there should be one."""
        if len(found) != 1:
            return [f"has {len(found)} files for its {what}: {listed(found)}" if found else f"has no {what} in {self.root}"]
        if not found[0].name.endswith(SUFFIXES) and not found[0].name.lower().endswith(PICTURES):
            return [f"has a file whose name must end in small letters, .nii or .nii.gz, to be read: rename {found[0]}"]
        return []


def by_rater(drawn: Drawn, named: Collection[str]) -> tuple[dict[str, dict[str, MaskFile]], list[str]]:
    """Rater -> class -> file, and what is lacking, in words; a class that is not in `named` counts for each rater."""
    raters = sorted({rater for label in named for rater in drawn[label]}) or [SINGLE_RATER]
    masks = [(rater, label, of.get(rater if label in named else SINGLE_RATER)) for rater in raters for label, of in drawn.items()]
    labels = {rater: {label: mask for one, label, mask in masks if one == rater and mask} for rater in raters}
    return labels, [f"has no mask of {label} by rater {rater}" for rater, label, mask in masks if not mask and drawn[label]]


def _filled(text: str, texts: Mapping[str, str]) -> str:
    """The text with what its placeholders stand for, where that is known."""
    return PIECE.sub(lambda piece: texts.get(piece["name"] or "", piece[0]), text)


def center_mask(root: Path, texts: Mapping[str, str], drawn: Drawn, part: str) -> MaskFile:
    """The mask that centres the crop: that of a class, of several raters the first, or the only one that fits a pattern."""
    if of_class := drawn.get(part):
        return of_class[min(of_class)]
    text, numbers = named_values(part)
    text, volume = split_part(text)
    looked = _filled(text, {name: glob.escape(value) for name, value in texts.items()})
    if "{" in looked or not looked.endswith((*SUFFIXES, *PICTURES)) or looked.startswith("/"):
        raise UserError(f"center must be a class ({listed([*drawn])}) or a pattern like that of a mask, got {part!r} in {root}")
    if len(found := sorted(root.glob(looked)) or sorted(root.glob(looked.removesuffix(".gz")))) != 1:
        raise UserError(f"one mask {looked} in {root} must centre the crop, got {listed(found) or 'none'}")
    return MaskFile(Path(f"{found[0]}{volume}"), numbers)


def _walk(root: Path, patterns: Sequence[_Pattern]) -> list[tuple[str, Path]]:
    """The files of a kind that patterns name, in their folders, links followed, with their paths below `root` (in NFC)."""
    suffixes = (*SUFFIXES, *PICTURES) if any(pattern.text.endswith(PICTURES) for pattern in patterns) else SUFFIXES
    folders: dict[int, set[re.Pattern[str]]] = defaultdict(set)
    for pattern in patterns:
        for depth in range(1, pattern.text.count("/") + 1):
            folders[depth].add(pattern.rule(depth))
    found, todo = [], [("", 0)]
    while todo:
        above, depth = todo.pop()
        try:
            entries = [entry for entry in os.scandir(root / above) if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"cannot read the folder {root / above}: {error.strerror or error}") from error
        for entry in entries:
            name = f"{above}/{entry.name}".lstrip("/")
            text = nfc(name)
            if Path(entry).is_dir() if entry.is_symlink() else entry.is_dir():  # a link that leads nowhere is a file
                if any(rule.fullmatch(text) for rule in folders[depth + 1]):
                    todo.append((name, depth + 1))
            elif name.lower().endswith(suffixes):
                found.append((MISNAMED.get(text, text), root / name))
    return sorted(found)


def _grouped(files: Sequence[tuple[str, Path]], patterns: Sequence[_Pattern]) -> dict[str, Groups]:
    """The files of each pattern; one that fits several belongs to those with the most fixed text."""
    fixed = {pattern: sum(len(piece["text"] or "") for piece in PIECE.finditer(pattern.text)) for pattern in patterns}
    rules = {pattern: pattern.rule() for pattern in fixed}
    found: dict[str, dict[Key, dict[str, list[Path]]]] = {each.text: defaultdict(lambda: defaultdict(list)) for each in fixed}
    for name, path in files:
        fits = {pattern: match.groupdict() for pattern, rule in rules.items() if (match := rule.fullmatch(name))}
        for pattern, texts in fits.items():
            if fixed[pattern] == max(fixed[each] for each in fits):
                rater = texts.pop("rater", SINGLE_RATER)
                found[pattern.text][frozenset(texts.items())][rater].append(path)
    return dict(found)


def contents(root: Path) -> str:
    """What a folder has, in words: a path of each kind, NIfTI files first, and which readers look for such names."""
    names: list[str] = []
    for folder, below, files in os.walk(root):  # without links: they may lead in a circle
        below[:] = sorted(name for name in below if not name.startswith("."))
        names += [(Path(folder) / name).relative_to(root).as_posix() for name in sorted(files) if not name.startswith(".")]
        if len(names) > MOST_LISTED:
            break
    names.sort(key=lambda name: not name.lower().endswith(SUFFIXES))
    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    rules = [(reader, re.compile(rf"((?:.*?/)??){rule}\.nii(?:\.gz)?")) for reader, rule in READERS.items()]
    fits = [(reader, match[1]) for name in names for reader, rule in rules if (match := rule.fullmatch(name))]
    nearest = {reader: min((at for one, at in fits if one == reader), key=len) for reader, _ in fits}
    readers = listed([f'{reader}("{(root / at).as_posix()}")' for reader, at in nearest.items()], most=3)
    held = f"there are {listed([*kinds.values()][::-1], most=5)}" if names else "nothing lies there"
    return f"{held}; such names are read by {readers}" if readers else held
