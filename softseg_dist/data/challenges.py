"""The layouts of nnU-Net, the Medical Segmentation Decathlon, SCGM, MSSEG and BraTS: `Files` with the names of their releases."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from softseg_dist.data.cases import SINGLE_RATER, Case, Folder, LabelledCase, selected
from softseg_dist.data.files import IGNORE, SUFFIXES, Files, contents
from softseg_dist.data.source_files import PICTURES, Spacing
from softseg_dist.data.volume import stem_of
from softseg_dist.errors import UserError
from softseg_dist.words import listed


class Layout(Folder):
    """A folder whose patterns are known. `labels`: the classes; `raters`: those of every case."""

    labels: tuple[str, ...] = Field(min_length=1)
    raters: ClassVar[tuple[str, ...]] = (SINGLE_RATER,)

    def __init__(self, folder: str, **fields: Any) -> None:
        super().__init__(folder=folder, **fields)

    @property
    def rater_names(self) -> tuple[str, ...]:
        return self.raters

    @abstractmethod
    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        """The fields of `Files` in each form that the folder may have. Raises UserError if it cannot be read."""

    def form(self, root: Path) -> Files:
        """The first form of which there is an image."""
        own = {"person": self.person, "ignore": self.ignore}
        try:
            forms = [Files(str(root), **(own | fields)) for fields in self.forms(root)]
        except ValidationError as error:  # of what dataset.json says
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{root / 'dataset.json'} names files or values that cannot be: {reason}") from error
        return next((form for form in forms if form.is_in(None)), forms[0])

    def warnings(self, data_root: Path | None) -> tuple[str, ...]:
        return self.form(self.root(data_root).absolute()).warnings(None)

    def scan(self, data_root: Path | None) -> tuple[Case, ...]:
        root = self.root(data_root).absolute()
        cases = self.form(root).scan(None)
        for case in cases:
            if case.images and (lacking := [rater for rater in self.raters if rater not in case.rater_names]):
                case.problems += (f"case {case.name} has no mask of rater {listed(lacking)}",)
        return selected(self.completed(root, cases), self.exclude)

    def completed(self, root: Path, cases: Sequence[LabelledCase]) -> Sequence[LabelledCase]:
        """The cases, and those that the folder names elsewhere."""
        return cases


class NnUNet(Layout):
    """A folder of nnU-Net, version 1 or 2: `imagesTr/CASE_0000.nii.gz` and so on per channel, `labelsTr/CASE.nii.gz`, dataset.json.

    Args:
        folder: its name below the data root, such as "Dataset004_Hippocampus".
        labels: the classes, by their names in dataset.json. A region there (a list of values) is a class like another; the label
            "ignore" is none, but what `ignore` is for `Files`.
        person, exclude, spacing_mm: as for `Files`. Several channels may be the colours of one PNG or TIFF.

    >>> NnUNet("Dataset004_Hippocampus", labels=("Anterior", "Posterior")).classes
    ('Anterior', 'Posterior')
    """

    spacing_mm: Spacing = ()

    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        path, facts = _described(root)
        ending = facts.get("file_ending", ".nii.gz")
        if ending not in (*SUFFIXES, *PICTURES):
            raise UserError(f"file_ending must be .nii.gz, .nii, .png or .tif, got {ending!r} in {path}")
        if "dataset" in facts:
            raise UserError(f'a list of files under "dataset" is not supported, found in {path}; put them in imagesTr and labelsTr')
        number, image, style = _num_channels(path, facts), f"imagesTr/{{case}}_{{channel}}{ending}", "{:04d}"
        if ending in PICTURES and number > 1 and not any(root.glob(f"imagesTr/*_0001{ending}")):  # the colours of one picture
            image, style = f"imagesTr/{{case}}_0000{ending}[{{channel}}]", "{}"
        form = {"image": image, "channels": tuple(map(style.format, range(number))), "spacing_mm": self.spacing_mm}
        pattern = f"labelsTr/{{case}}{ending}"
        ignore = f"{pattern}:{facts['labels'][IGNORE]}" if IGNORE in facts["labels"] else self.ignore
        return [form | {"labels": _values(path, facts, self.labels, pattern), "ignore": ignore}]


class Decathlon(Layout):
    """A task of the Medical Segmentation Decathlon: `imagesTr/CASE.nii.gz`, `labelsTr/CASE.nii.gz`, and their list in dataset.json.

    Args:
        folder, labels, person, exclude: as for `NnUNet`. Several channels are the volumes of a 4-D image.
    """

    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        path, facts = _described(root)
        form: dict[str, Any] = {"labels": _values(path, facts, self.labels, "labelsTr/{case}.nii.gz")}
        if (number := _num_channels(path, facts)) == 1:
            return [form | {"image": "imagesTr/{case}.nii.gz"}]
        return [form | {"image": "imagesTr/{case}.nii.gz[{channel}]", "channels": tuple(map(str, range(number)))}]

    def completed(self, root: Path, cases: Sequence[LabelledCase]) -> Sequence[LabelledCase]:
        """All that the list `training` names, and a problem for each that it does not."""
        path, facts = _described(root)
        try:
            named = {stem_of(Path(row["image"])) for row in facts["training"]}
        except (KeyError, TypeError) as error:
            raise UserError(f'{path} needs a list "training" of {{"image": ..., "label": ...}}') from error
        for case in cases:
            if case.name not in named:
                case.problems += (f"case {case.name} lies in {root}, but the list training of {path.name} does not name it",)
        lost = sorted(named - {case.name for case in cases})
        why = f"is in the list training of {path}, but has no image and no mask"
        return [*cases, *(LabelledCase(name, (), name, "", {}, [f"case {name} {why}"]) for name in lost)]


class SCGM(Layout):
    """The gray matter challenge: `site1-sc01-image.nii.gz`, `site1-sc01-mask-r1.nii.gz` to r4.

    Prados et al. 2017, https://doi.org/10.1016/j.neuroimage.2017.03.010

    Args:
        folder: its name below the data root, with the files of all sites.
        labels: gray matter, white matter, and the cord, which is both.
        person, exclude: as for `Files`.

    >>> SCGM("training-data-gm-sc-challenge-ismrm16-v20160302b", labels=("GM",)).rater_names
    ('r1', 'r2', 'r3', 'r4')
    """

    labels: tuple[Literal["GM", "WM", "cord"], ...] = ("GM", "WM", "cord")
    raters: ClassVar[tuple[str, ...]] = ("r1", "r2", "r3", "r4")

    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        values = {"GM": "1", "WM": "2", "cord": "1+2"}
        masks = {label: f"{{site}}-{{case}}-mask-{{rater}}.nii.gz:{values[label]}" for label in self.labels}
        return [{"image": "{site}-{case}-image.nii.gz", "labels": masks}]


class MSSEG(Layout):
    """The multiple sclerosis challenge of 2016: `Training/Center_01/Patient_01/Preprocessed_Data/FLAIR_preprocessed.nii.gz`.

    The raters are `Masks/ManualSegmentation_1.nii.gz` to 7 beside it, called "1" to "7"; the consensus is none. The folder may
    also be Training itself, and lie without centres. Commowick et al. 2018, https://doi.org/10.1038/s41598-018-31911-7

    Args:
        image: the channels: FLAIR, T1, T2, DP, GADO.
        folder, person, exclude: as for `Files`; a case is called "Training-01-Patient_03".
    """

    image: tuple[Literal["FLAIR", "T1", "T2", "DP", "GADO"], ...] = ("FLAIR",)
    labels: tuple[Literal["lesion"]] = ("lesion",)
    raters: ClassVar[tuple[str, ...]] = tuple("1234567")

    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        return [
            {
                "image": f"{at}/Preprocessed_Data/{{channel}}_preprocessed.nii.gz",
                "channels": self.image,
                "labels": {"lesion": f"{at}/Masks/ManualSegmentation_{{rater}}.nii.gz"},
                "site": "Center_{site}" if "{site}" in at else "",
            }
            for at in ("{split}/Center_{site}/{case}", "Center_{site}/{case}", "{split}/{case}", "{case}")
        ]


class BraTS(Layout):
    """The brain tumour challenge: to 2021 `ID/ID_flair.nii.gz` and `ID_seg.nii.gz`, from 2023 `ID/ID-t2f.nii.gz`, `ID-seg.nii.gz`.

    Enhancing tumour is 4 in the masks to 2021, 3 from 2023. A folder may hold HGG and LGG.
    Baid et al. 2021, https://doi.org/10.48550/arXiv.2107.02314

    Args:
        image: the channels, by their names to 2021.
        labels: whole tumour, tumour core, enhancing tumour.
        person: as for `Files`; None takes the ID from 2023 without its last number, which is the time of the scan.
        folder, exclude: as for `Files`.

    >>> BraTS("MICCAI_BraTS2020_TrainingData", labels=("core",)).classes
    ('core',)
    """

    image: tuple[Literal["flair", "t1", "t1ce", "t2"], ...] = ("flair", "t1", "t1ce", "t2")
    labels: tuple[Literal["whole", "core", "enhancing"], ...] = ("whole", "core", "enhancing")

    def forms(self, root: Path) -> Sequence[dict[str, Any]]:
        names = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
        old = {"whole": "1+2+4", "core": "1+4", "enhancing": "4"}
        new = {label: values.replace("4", "3") for label, values in old.items()}
        return [
            {
                "image": f"{at}{{case}}/{{case}}{mark}{{channel}}.nii.gz",
                "channels": tuple(names[name] if mark == "-" else name for name in self.image),
                "labels": {label: f"{at}{{case}}/{{case}}{mark}seg.nii.gz:{values[label]}" for label in self.labels},
                "person": self.person or (r"^(.+)-\d+$" if mark == "-" else None),
            }
            for at in ("", "*/")
            for mark, values in (("_", old), ("-", new))
        ]


def classes_of(root: Path) -> tuple[str, ...]:
    """The classes that dataset.json names, without background and "ignore". Raises UserError if it cannot be read, or has none."""
    path, facts = _described(root)
    if not (found := tuple(_by_class(facts))):
        raise UserError(f"{path} names no class but background")
    return found


def _by_class(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Class -> value. nnU-Net 2 says name -> value, or values; version 1 and the Decathlon say value -> name."""
    of = facts["labels"]
    if all(key.isdecimal() for key in of):
        of = {str(name): int(value) for value, name in of.items()}
    return {name: value for name, value in of.items() if name not in ("background", IGNORE)}


def _described(root: Path) -> tuple[Path, dict[str, Any]]:
    """The file dataset.json and what it says."""
    path = root / "dataset.json"
    if not path.is_file():
        raise UserError(f"there is no file {path}, which says what the files of this layout are; {contents(root)}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("labels"), dict):
        raise UserError(f'{path} needs "labels", such as {{"background": 0, "GM": 1}}')
    return path, facts


def _num_channels(path: Path, facts: Mapping[str, Any]) -> int:
    found = facts.get("channel_names", facts.get("modality"))
    if not found or not isinstance(found, dict):
        raise UserError(f'{path} needs "channel_names" (or "modality"), such as {{"0": "T2w"}}, got {found!r}')
    return len(found)


def _values(path: Path, facts: Mapping[str, Any], labels: Sequence[str], pattern: str) -> dict[str, str]:
    """Class -> pattern with its values."""
    known = {name: values if isinstance(values, list) else [values] for name, values in _by_class(facts).items()}
    if any(type(value) is not int for values in known.values() for value in values):
        raise UserError(f"the labels of {path} must be integers, or lists of them, got {facts['labels']}")
    if unknown := [label for label in labels if label not in known]:
        raise UserError(f"labels must name classes of {path}, got {listed(unknown)}; there are {listed([*known])}")
    return {label: f"{pattern}:{'+'.join(map(str, known[label]))}" for label in labels}
