"""Cautions: what the data of a study do to its candidates, found in one pass over its cases: for `check`, `plan` and `run`.

Each is a sentence with value, place and what would change it. Legend: N items of a case, R raters, K classes, *S space.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softseg_dist.data.check import ALIKE, Problem, check_cases
from softseg_dist.data.preprocess import Sample
from softseg_dist.data.splits import Split
from softseg_dist.data.store import Store
from softseg_dist.errors import UserError
from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.activations import Softmax
from softseg_dist.numerics.augmentation import augment
from softseg_dist.numerics.labels import LabelMode, prepare_target
from softseg_dist.numerics.sampling import TTA
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.spatial import Flip
from softseg_dist.search.optuna_study import sample_proposals
from softseg_dist.study import Recipe, Study
from softseg_dist.words import count, listed, percent

FIRST = 24  # cases that `plan` looks at: it answers soon, whatever the size of the data set
DRAWS = 2  # of augmentation, per case, in which targets are compared
FEW = 3  # subjects that must have a class
ROUNDING = 1e-4  # labels of a voxel may add up to so much more than 1
SOFT_AS = {"staple": "majority", "soft_staple": "mean"}  # soft in the same voxels, without STAPLE's cost
SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"), ("lh", "rh"), ("LH", "RH"), ("L", "R"), ("l", "r"))


@dataclass(frozen=True)
class _Facts:
    """What is kept of a case. `soft`: fusion -> share of the labelled voxels that lie strictly between 0 and 1, NaN without any."""

    name: str
    subject: str
    image: str  # digest of its middle item
    soft: Mapping[str, float]
    labelled: tuple[bool, ...]  # does any rater label this class?
    num_overlapping: int  # voxels in which the classes of a rater add up to more than 1


class Inspection:
    """One pass over the cases of a study: `look` at each of them, then ask for the `cautions`.

    Raises UserError if `propose` of the study's search does.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.recipes = {**study.candidates, **sample_proposals(study)}
        self._facts: list[_Facts] = []
        self._alike = list(_pairs(study.candidates))  # their targets were identical in every case so far

    def look(self, sample: Sample) -> None:
        """Take down what the cautions need of a prepared case. Raises UserError if a transform does not fit its images."""
        fusions = {SOFT_AS.get(recipe.fusion, recipe.fusion) for recipe in self.recipes.values() if recipe.label == "soft"}
        soft = {fusion: _soft_share(_target(sample, "soft", fusion)) for fusion in sorted(fusions) if _has_rater(sample, fusion)}
        raters = sample.raters  # [N R K *S]
        middle = np.ascontiguousarray(sample.image[len(sample.image) // 2])
        self._facts.append(
            _Facts(
                name=sample.name,
                subject=sample.subject,
                image=hashlib.blake2b(middle.data, digest_size=16).hexdigest(),
                soft=soft,
                labelled=tuple(bool(raters[:, :, k].any()) for k in range(raters.shape[2])),
                num_overlapping=int((raters.sum(axis=2) > 1 + ROUNDING).sum()) if self._softmax else 0,
            )
        )
        compared: dict[str, bool] = {}  # cells of a factorial share their targets
        self._alike = [pair for pair in self._alike if self._same_targets(sample, pair, compared)]

    def cautions(self, splits: Sequence[Split] | None) -> list[Problem]:
        """A line for each caution, of level "error" if a run is to be refused; `splits` is None if not all cases were looked at."""
        found = [self._targets(), self._softness(), self._sides(), self._overlaps(), self._twins(), self._own_masks()]
        found += [] if splits is None else [self._classes(), self._absent(splits)]
        return [problem for each in found for problem in each]

    @property
    def _all(self) -> str:
        return f"all {count(len(self._facts), 'case')} that were looked at"

    @property
    def _softmax(self) -> list[str]:
        several = len(self.study.data.classes) > 1
        return [name for name, recipe in self.recipes.items() if several and isinstance(recipe.activation, Softmax)]

    def _same_targets(self, sample: Sample, pair: tuple[str, str], compared: dict[str, bool]) -> bool:
        """Whether two candidates make the same targets of a case: before augmentation, and of its fullest item after it."""
        one, other = (self.study.candidates[name] for name in pair)
        if not (_has_rater(sample, one.fusion) and _has_rater(sample, other.fusion)):
            return False  # one of them cannot be trained
        key = canonical_json([one.label, one.fusion, other.label, other.fusion, [t.model_dump(mode="json") for t in one.augment]])
        if key not in compared:
            item = int(sample.raters.sum(axis=tuple(range(1, sample.raters.ndim))).argmax())
            compared[key] = all(
                torch.equal(*(_trained(sample, recipe, where, draw) for recipe in (one, other)))
                for where, draw in product((None, item), range(DRAWS))
            )
        return compared[key]

    def _targets(self) -> Iterator[Problem]:
        if self._alike and any(any(facts.labelled) for facts in self._facts):
            pairs = listed([" = ".join(pair) for pair in self._alike])
            yield _warning(
                ALIKE,
                f"The targets of these candidates are identical in {self._all}, augmentation included, and nothing else "
                f"differs between them: {pairs}; they differ if masks are resampled (spacing_mm), moved by an augmentation that "
                "interpolates (Affine, Elastic), soft, or of several raters.",
            )

    def _softness(self) -> Iterator[Problem]:
        for fusion in dict.fromkeys(fusion for facts in self._facts for fusion in facts.soft):
            shares = {facts.name: facts.soft[fusion] for facts in self._facts if facts.soft.get(fusion, np.nan) >= 0}
            rest = [share for share in shares.values() if share > 0]
            if binary := [name for name, share in shares.items() if share == 0]:
                named = f" of {listed(binary)} ({percent(min(rest))} to {percent(max(rest))} of the others)" if rest else ""
                yield _warning(
                    "binary targets",
                    f'label="soft" with fusion="{fusion}" is binary before augmentation in {len(binary)} of '
                    f"{count(len(shares), 'labelled case')}: 0 % of the labelled voxels{named} lie strictly between 0 and 1; they "
                    "would if masks were resampled (spacing_mm), soft, or of several raters.",
                )

    def _classes(self) -> Iterator[Problem]:
        subjects = {facts.subject for facts in self._facts}
        for k, name in enumerate(self.study.data.classes if subjects else ()):
            having = sorted({facts.subject for facts in self._facts if facts.labelled[k]})
            if not having:
                text = f"No rater labels class {name} in {self._all}: its mean volume is 0, so that nothing can be scored; "
                yield Problem("", "error", "class in no case", f"{text}check labels=... of the data set, or leave the class out.")
            elif len(having) < FEW:
                yield _warning(
                    "class of few subjects",
                    f"Class {name} is labelled in {len(having)} of {count(len(subjects), 'subject')} ({listed(having)}): its "
                    f"scores stand on fewer than {FEW} people; add subjects who have it, or leave the class out.",
                )

    def _absent(self, splits: Sequence[Split]) -> Iterator[Problem]:
        for k, name in enumerate(self.study.data.classes):
            having = {facts.subject for facts in self._facts if facts.labelled[k]}
            if having and (lacking := [split.name for split in splits if not having & {*split.train}]):
                yield _warning(
                    "class absent in training",
                    f"No training case labels class {name} in {len(lacking)} of {count(len(splits), 'split')} ({listed(lacking)}): "
                    "fits there cannot learn it; add subjects who have it, or use other splits.",
                )

    def _sides(self) -> Iterator[Problem]:
        flipped = {name: recipe.augment for name, recipe in self.recipes.items()}
        flipped |= {f"TTA of {method.short}": method.transforms for method in self.study.uncertainty if isinstance(method, TTA)}
        users = [name for name, transforms in flipped.items() if any(_mirrors_sides(each) for each in transforms)]
        if users and (pairs := list(_side_pairs(self.study.data.classes))):
            yield _warning(
                "left and right mirrored",
                f"Flip of axis 0 mirrors left and right in {listed(users)}, but does not exchange the classes {listed(pairs)}: "
                "mirrored images are trained with the wrong side; leave axis 0 out, as in Flip(axes=(1,)).",
            )

    def _overlaps(self) -> Iterator[Problem]:
        voxels = {facts.name: facts.num_overlapping for facts in self._facts if facts.num_overlapping}
        if voxels:
            worst = max(voxels, key=lambda name: voxels[name])
            yield _warning(
                "classes overlap",
                f"Labels of several classes add up to more than 1 in {len(voxels)} of {count(len(self._facts), 'case')}, most in "
                f"{worst} ({count(voxels[worst], 'voxel')}), which Softmax cannot predict ({listed(self._softmax)}); use Sigmoid, "
                "or labels that exclude each other.",
            )

    def _twins(self) -> Iterator[Problem]:
        same: dict[str, list[str]] = defaultdict(list)
        for facts in self._facts:
            same[facts.image].append(facts.name)
        if twins := [" = ".join(names) for names in same.values() if len(names) > 1]:
            yield _warning(
                "equal images", f"Cases have equal images under several names: {listed(twins)}; keep one, or they count twice."
            )

    def _own_masks(self) -> Iterator[Problem]:
        preprocess, labels = self.study.preprocess, getattr(self.study.data, "labels", {})
        for part in preprocess.mask_parts:
            drawn = any(_is_label(part, label) for label in labels.values())
            what = f"the raters' own label {part!r}, which is what is to be found" if drawn else f"its own mask {part!r}"
            yield _warning(
                "crop by a mask",
                f"The crop of every case, test cases included, is centred on {what}: a new image needs such a mask too; "
                'center="foreground" or "image" needs none.',
            )
        if preprocess.slices == "labelled":
            yield _warning(
                "slices by labels",
                'slices="labelled" keeps the slices that a rater labelled, in test cases too: false positives in other slices are '
                'never seen; slices="all" shows them.',
            )


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
    """The cautions about the first cases of a data set, with the errors in these: what can be said before they are prepared."""
    cases, inspection = study.data.cases(data_root)[:FIRST], Inspection(study)
    found = check_cases(cases, study.preprocess, inspection.look)
    return [*(problem for problem in found if problem.level == "error"), *inspection.cautions(None)]


def _warning(rule: str, text: str) -> Problem:
    return Problem("", "warning", rule, text)


def _pairs(candidates: Mapping[str, Recipe]) -> Iterator[tuple[str, str]]:
    """Candidates that differ in nothing but label mode and fusion."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, recipe in candidates.items():
        groups[canonical_json(recipe.replace(label="soft", fusion="mean").model_dump(mode="json"))].append(name)
    return (pair for names in groups.values() for pair in combinations(names, 2))


def _has_rater(sample: Sample, fusion: str) -> bool:
    kind, _, rater = fusion.partition(":")
    return kind != "rater" or rater in sample.rater_names


def _target(sample: Sample, label: LabelMode, fusion: str, draw: int = 0) -> Tensor:
    """The targets [N K *S] of a case before augmentation and rounding."""
    raters = torch.from_numpy(np.array(sample.raters))
    nearest = None if sample.nearest is None else torch.from_numpy(np.array(sample.nearest))
    return prepare_target(raters, nearest, label, fusion, sample.rater_names, seed_of("cautions", sample.name, draw), axis=1)


def _trained(sample: Sample, recipe: Recipe, item: int | None, draw: int) -> Tensor:
    """What a recipe trains on: the targets of a whole case, not augmented, or that of an `item` after augmentation."""
    rows = slice(None) if item is None else slice(item, item + 1)
    target = _target(sample, recipe.label, recipe.fusion, draw)[rows]
    image = torch.from_numpy(np.array(sample.image[rows]))
    seeds = [seed_of("cautions", sample.name, "augment", draw)] * len(image)
    return augment(image, target, () if item is None else recipe.augment, seeds, recipe.label, sample.spacing_mm)[1]


def _soft_share(target: Tensor) -> float:
    labelled = target > 0
    return float((labelled & (target < 1)).sum() / labelled.sum())  # 0 / 0 is NaN in torch


def _mirrors_sides(transform: object) -> bool:
    return isinstance(transform, Flip) and not transform.idle and 0 in transform.axes


def _side_pairs(classes: Sequence[str]) -> Iterator[str]:
    """Classes whose names differ in the side alone: `left` and `right`, `kidney_L` and `kidney_R`."""
    for name, (left, right) in product(classes, SIDES):
        pattern = left if len(left) > 1 or left.isupper() else rf"(?<![A-Za-z]){left}(?![A-Za-z])"
        for found in re.finditer(pattern, name):
            if (other := name[: found.start()] + right + name[found.end() :]) in classes:
                yield f"{name} and {other}"


def _is_label(part: str, label: str) -> bool:
    """Whether a mask's part of the file name is that of a label, of any rater and value."""
    wanted = re.escape(label.partition(":")[0]).replace(re.escape("{rater}"), ".+")
    return re.fullmatch(wanted, part.partition(":")[0]) is not None
