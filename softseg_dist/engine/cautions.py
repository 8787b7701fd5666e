"""Cautions: what the data of a study do to its candidates, found in one pass over its cases: for `check`, `plan` and `run`.

Each is a sentence with value, place and what would change it. Legend: N items of a case, R raters, K classes, *S space.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.cases import SESSIONS
from softseg_dist.data.check import ALIKE, Problem, check_cases, unread
from softseg_dist.data.preprocess import Sample
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.errors import UserError
from softseg_dist.frozen import grouped
from softseg_dist.numerics.activations import Softmax
from softseg_dist.numerics.augmentation import apply, draw_all
from softseg_dist.numerics.labels import LabelMode
from softseg_dist.numerics.sampling import TTA
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.spatial import Flip
from softseg_dist.numerics.transforms import Frame
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.study import Recipe, Study
from softseg_dist.training.batches import case_target
from softseg_dist.words import count, listed, percent

FIRST = 8  # cases that `plan` looks at: it answers soon, whatever the size of the data set
DRAWS = 2  # of augmentation, per case, in which targets are compared
CHANGED = 0.05  # relative change of a volume that is worth a line
FEW = 3  # subjects that must have a class
REFUSED = NOWHERE, NOBODY = "class in no case", "unknown rater"  # the rules that refuse a run
ROUNDING = 1e-4  # labels of a voxel may add up to so much more than 1
SOFT_AS = {"staple": "majority", "soft_staple": "mean"}  # soft in the same voxels, without STAPLE's cost
SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("lh", "rh"), ("LH", "RH"), ("L", "R"), ("l", "r"))

Cautions = Iterator[tuple[str, str]]  # rule and sentence


@dataclass(frozen=True)
class _Facts:
    """What is kept of a case. `soft`: fusion -> share of the labelled voxels that lie strictly between 0 and 1, NaN without any."""

    name: str
    subject: str
    image: str  # digest of its middle item
    soft: Mapping[str, float]
    volumes_mm3: tuple[tuple[float, float], ...]  # of each class, mean of the raters: in the file and prepared
    num_over: int  # voxels in which the classes of a rater add up to more than 1
    slice_axis: int  # see `Placement`


class Inspection:
    """One pass over the cases of a study: `look` at each, then ask for the `cautions`. Raises UserError if `propose` does."""

    def __init__(self, study: Study) -> None:
        self.study, self.classes = study, study.data.classes
        self.recipes = {**study.candidates, **sample_proposals(study)}
        self.softmax = [name for name, recipe in self.recipes.items() if isinstance(recipe.activation, Softmax)]
        self._facts: list[_Facts] = []
        plain = {name: recipe.replace(label="soft", fusion="mean") for name, recipe in study.candidates.items()}
        pairs = combinations(plain, 2)  # those that differ in label mode and fusion alone, and had identical targets so far
        self._alike = [(one, other) for one, other in pairs if plain[one] == plain[other]]
        self._lacking: dict[str, list[str]] = defaultdict(list)  # cases without the rater whom a fusion names

    def look(self, sample: Sample) -> None:
        """Take down what the cautions need of a prepared case. Raises UserError if a transform does not fit its images."""
        for fusion in {recipe.fusion for recipe in self.recipes.values() if not _has_rater(sample, recipe.fusion)}:
            self._lacking[fusion].append(sample.name)
        fusions = {SOFT_AS.get(recipe.fusion, recipe.fusion) for recipe in self.recipes.values() if recipe.label == "soft"}
        soft = {fusion: _soft_share(_target(sample, "soft", fusion)) for fusion in sorted(fusions) if _has_rater(sample, fusion)}
        image = hashlib.blake2b(np.ascontiguousarray(sample.image[len(sample.image) // 2]).data).hexdigest()
        but_classes = (0, 1, *range(3, sample.raters.ndim))
        prepared = np.nan_to_num(sample.raters).sum(axis=but_classes, dtype=np.float64) * sample.voxel_mm3 / len(sample.rater_names)
        volumes = tuple(zip(sample.own.mean_volumes_mm3, prepared.tolist(), strict=True))
        num_over = int((sample.raters.sum(axis=2) > 1 + ROUNDING).sum()) if self.softmax and len(self.classes) > 1 else 0
        self._facts.append(_Facts(sample.name, sample.subject, image, soft, volumes, num_over, sample.placement.slice_axis))
        same: dict[str, bool] = {}  # cells of a factorial share their targets
        self._alike = [pair for pair in self._alike if self._same_targets(sample, pair, same)]

    def cautions(self, splits: Sequence[Split] | None) -> list[Problem]:
        """A line for each caution, of level "error" if a run is to be refused; `splits` is None if not all cases were looked at."""
        of_cases = self._targets(), self._softness(), self._volumes(), self._sides(), self._overlaps(), self._twins()
        of_splits = () if splits is None else self._classes(splits)
        found = chain(self._raters(), self._sessions(), *of_cases, self._own_masks(), of_splits)
        return [Problem("", "error" if rule in REFUSED else "warning", rule, text) for rule, text in found]

    def _same_targets(self, sample: Sample, pair: tuple[str, str], same: dict[str, bool]) -> bool:
        """Whether two candidates make the same targets of a case: of all items before augmentation, of the fullest one after it."""
        one, other = (self.study.candidates[name] for name in pair)
        if not (_has_rater(sample, one.fusion) and _has_rater(sample, other.fusion)):
            return False  # one of them cannot be trained
        key = f"{one.label} {one.fusion} {other.label} {other.fusion} {one.augment}"
        if key not in same:
            item = int(np.nansum(sample.raters, axis=tuple(range(1, sample.raters.ndim))).argmax())
            seen = product((None, item), range(DRAWS))
            same[key] = all(torch.equal(_trained(sample, one, *each), _trained(sample, other, *each)) for each in seen)
        return same[key]

    def _sessions(self) -> Cautions:
        subjects = sorted({facts.subject for facts in self._facts})
        of_person = grouped((match[1], subject) for subject in subjects if (match := re.match(SESSIONS, subject)))
        if mixed := [sessions for _, sessions in sorted(of_person.items()) if len(sessions) > 1]:
            what = f"{listed(mixed[0])} may be sessions of one person ({count(len(mixed), 'such person')})"
            yield "sessions apart", f'{what}, whom splits would not keep together; person=r"{SESSIONS}" of the data set does.'

    def _raters(self) -> Cautions:
        for fusion, cases in sorted(self._lacking.items()):
            users = listed([name for name, recipe in self.recipes.items() if recipe.fusion == fusion])
            remedy = "name a rater of every case, or leave these cases out."
            yield NOBODY, f'fusion="{fusion}" ({users}) names no rater of {count(len(cases), "case")} ({listed(cases)}): {remedy}'

    def _targets(self) -> Cautions:
        if self._alike and any(prepared for facts in self._facts for _, prepared in facts.volumes_mm3):
            of = f"{count(len(self._facts), 'case')}, also augmented ({listed([' = '.join(pair) for pair in self._alike])})"
            what = f"Candidates that differ in label mode or fusion alone have identical targets in all of {of}"
            yield ALIKE, f"{what}; they differ if masks are resampled (spacing_mm), soft, of several raters, or moved by Affine."

    def _softness(self) -> Cautions:
        for fusion in dict.fromkeys(fusion for facts in self._facts for fusion in facts.soft):
            shares = {facts.name: facts.soft[fusion] for facts in self._facts if facts.soft.get(fusion, np.nan) >= 0}
            rest = [share for share in shares.values() if share > 0]
            if binary := [name for name, share in shares.items() if share == 0]:
                named = f" of {listed(binary)} ({percent(min(rest))} to {percent(max(rest))} of the others)" if rest else ""
                what = f'label="soft" with fusion="{fusion}" is binary before augmentation in {len(binary)} of'
                share = f"0 % of the labelled voxels{named} lie strictly between 0 and 1"
                remedy = "they would if masks were resampled to other voxels (spacing_mm), soft, or of several raters."
                yield "binary targets", f"{what} {count(len(shares), 'labelled case')}: {share}; {remedy}"

    def _volumes(self) -> Cautions:
        found = ((facts.name, zip(self.classes, facts.volumes_mm3, strict=True)) for facts in self._facts)
        labelled = ((case, name, old, new) for case, classes in found for name, (old, new) in classes if old)
        moved = ((abs(new / old - 1), case, name, old, new) for case, name, old, new in labelled)
        changed = [each for each in moved if each[0] > CHANGED]
        if cases := list(dict.fromkeys(case for _, case, *_ in sorted(changed, reverse=True))):
            _, case, name, old, new = max(changed)
            of = f"{len(cases)} of {count(len(self._facts), 'case')} ({listed(cases)})"
            what = f"Preparation changes a labelled volume by more than {percent(CHANGED, 0)} in {of}: class {name} of {case} has"
            remedy = 'a larger crop, a finer spacing_mm or label_resampling="area" keeps it.'
            yield "volume changed", f"{what} {old:.4g} mm3 in the file, {new:.4g} after it; {remedy}"

    def _classes(self, splits: Sequence[Split]) -> Cautions:
        subjects = {facts.subject for facts in self._facts}
        for k, name in enumerate(self.classes):
            having = {facts.subject for facts in self._facts if facts.volumes_mm3[k][1]}
            remedy = "add subjects who have it, or leave the class out."
            lacking = [split.name for split in splits if not having & {*split.train}]
            if not having:
                yield NOWHERE, f"No case has a label of class {name}, so it cannot be scored; check labels=... of the data set."
            elif len(having) < FEW:
                of = f"{len(having)} of {count(len(subjects), 'subject')} ({listed(sorted(having))})"
                yield "class of few subjects", f"Class {name} is labelled in {of}: scores of it stand on fewer than {FEW}; {remedy}"
            if having and lacking:
                of = f"{len(lacking)} of {count(len(splits), 'split')} ({listed(lacking)})"
                text = f"Class {name} is in no training case of {of}: fits there cannot learn it; {remedy}"
                yield "class absent in training", text

    def _sides(self) -> Cautions:
        flipped = {name: recipe.augment for name, recipe in self.recipes.items()}
        flipped |= {f"TTA of {method.short}": method.transforms for method in self.study.uncertainty if isinstance(method, TTA)}
        users = [n for n, each in flipped.items() if any(isinstance(t, Flip) and not t.idle and 0 in t.axes for t in each)]
        if users and {facts.slice_axis for facts in self._facts} != {0} and (pairs := list(_side_pairs(self.classes))):
            what = f"Flip of axis 0 mirrors left and right in {listed(users)}, but does not exchange the classes {listed(pairs)}"
            remedy = "mirrored images are trained with the wrong side; leave axis 0 out, as in Flip(axes=(1,))."
            yield "left and right mirrored", f"{what}: {remedy}"

    def _overlaps(self) -> Cautions:
        if over := {facts.name: facts.num_over for facts in self._facts if facts.num_over}:
            worst = max(over, key=over.__getitem__)
            of = f"{len(over)} of {count(len(self._facts), 'case')}, most in {worst} ({count(over[worst], 'voxel')})"
            what = f"Labels of several classes add up to more than 1 in {of}"
            yield "classes overlap", f"{what}: Softmax cannot predict that ({listed(self.softmax)}); use Sigmoid."

    def _twins(self) -> Cautions:
        same = grouped((facts.image, facts.name) for facts in self._facts)
        if twins := [" = ".join(names) for names in same.values() if len(names) > 1]:
            yield "equal images", f"Cases have equal images under several names: {listed(twins)}; keep one, or they count twice."

    def _own_masks(self) -> Cautions:
        for part in self.study.preprocess.mask_parts:
            what = f"The crop of every case, test cases included, is centred on its own mask {part!r}"
            yield "crop by a mask", f'{what}: a new image needs one too; center="foreground" or "image" needs none.'
        if (slices := self.study.preprocess.slices) != "all":
            what = f'slices="{slices}" leaves out slices without a label, in test cases too'
            yield "slices by labels", f'{what}: false positives there are never seen; slices="all" keeps them.'


def inspect_store(study: Study, store: Store, splits: Sequence[Split]) -> list[Problem]:
    """The cautions of a study whose data are prepared. Raises UserError if it cannot be run on them."""
    inspection = Inspection(study)
    for case in store.cases:
        inspection.look(store.sample(case.index))
    found = inspection.cautions(splits)
    if refused := [caution.detail for caution in found if caution.level == "error"]:
        raise UserError(refused[0])
    return found


def inspect_first(study: Study, data_root: Path | None) -> list[Problem]:
    """What a data set leaves unread, the errors in its first cases and the cautions about them: all before they are prepared."""
    cases, inspection = study.kept(study.data.cases(data_root)), Inspection(study)
    found = check_cases(cases[:FIRST], study.preprocess.resolved(cases), inspection.look, study.data.classes)
    errors = [problem for problem in found if problem.level == "error"]
    return [*unread(study.data, data_root), *errors, *inspection.cautions(None)]


def _has_rater(sample: Sample, fusion: str) -> bool:
    kind, _, rater = fusion.partition(":")
    return kind != "rater" or rater in sample.rater_names


def _target(sample: Sample, label: LabelMode, fusion: str, draw: int = 0) -> Tensor:
    """The targets [N K *S] of a case before augmentation and rounding."""
    return case_target(sample, label, fusion, seed_of("cautions", sample.name, draw)).nan_to_num()


def _trained(sample: Sample, recipe: Recipe, item: int | None, draw: int) -> Tensor:
    """What a recipe trains on: the targets of a whole case, not augmented, or that of an `item` after augmentation."""
    rows = slice(None) if item is None else slice(item, item + 1)
    target = _target(sample, recipe.label, recipe.fusion, draw)[rows]
    image = torch.from_numpy(np.array(sample.image[rows]))
    seeds = [seed_of("cautions", sample.name, "augment", draw)] * len(image)
    frame = Frame.of(image, sample.spacing_mm)
    return apply(image, target, draw_all(() if item is None else recipe.augment, seeds, frame), recipe.label, frame)[1]


def _soft_share(target: Tensor) -> float:
    labelled = target > 0
    return float((labelled & (target < 1)).sum() / labelled.sum())  # 0 / 0 is NaN in torch


def _side_pairs(classes: Sequence[str]) -> Iterator[str]:
    """Classes whose names differ in the side alone: `left` and `right`, `kidney_L` and `kidney_R`."""
    for name, (left, right) in product(classes, SIDES):
        pattern = left if len(left) > 1 or left.isupper() else rf"(?<![A-Za-z]){left}(?![A-Za-z])"
        for found in re.finditer(pattern, name):
            if (other := name[: found.start()] + right + name[found.end() :]) in classes:
                yield f"{name} and {other}"
