"""Splits of people into train, validation and test: the same for every candidate, spread evenly over sites, or given by a file.

No random generator is used: people are ordered by a hash of (seed, split, person), so the splits are the same on every
machine and for every version of numpy.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen, grouped
from softseg_dist.sealed import ITEMS
from softseg_dist.words import listed

PARTS = ("train", "validation", "test")
Share = Annotated[float, Field(gt=0, lt=1)]
KEYS = ({"train", "val"}, {"train", "test"}, {"train", "val", "test"}, {"train", "validation", "test"})
"""What a split in a file may have. `val` beside `train` alone is nnU-Net's, which never trains on it: our test set."""


class Split(Frozen):
    """Who trains, validates and tests. All sessions of one person are in one part.

    A split of a study has subjects in each part. One without validation and test trains a final model on all subjects; one with
    test subjects alone judges predictions that exist already.
    """

    index: int = Field(ge=0)
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`003`: the name of this split in files, ledger and messages."""
        return f"{self.index:03d}"

    @model_validator(mode="after")
    def _apart(self) -> Self:
        times = Counter((*self.train, *self.validation, *self.test))
        if twice := sorted(subject for subject in times if times[subject] > 1):
            raise ValueError(f"split {self.index}: a subject must be in one part only, got {', '.join(twice)} in two")
        parts = [bool(part) for part in (self.train, self.validation, self.test)]
        if parts not in ([True, True, True], [True, False, False], [False, False, True]):
            raise ValueError(f"split {self.index}: train, validation and test must each have a subject")
        return self


class Splits(Frozen, ABC):
    """A rule that makes splits."""

    @abstractmethod
    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """The splits of `subjects` (person -> site, "" where unknown).

        They depend on the people, their sites and `seed` only, not on their order. Raises UserError if these are too few.
        """

    def of_cases(self, subjects: Mapping[str, str], cases: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """As `make`, for rules that know cases by name: `cases` maps each to its person."""
        return self.make(subjects, seed)

    def bound(self, folder: Path) -> Splits:
        """The same rule with the content of the files that it names, relative ones in `folder`. Raises UserError on bad ones."""
        return self

    def small(self) -> Splits:
        """Two splits, for --debug: it keeps a few subjects, which may be of one site, or not those that a file names."""
        return MonteCarlo(count=2)


class MonteCarlo(Splits):
    """Independent random splits; `fractions` are the shares of train, validation and test.

    Each part has at least one person; numbers are rounded, what remains trains. Split i depends on (seed, i) only, so a
    larger `count` extends a study.

    >>> [len(part) for split in MonteCarlo(count=1).make({f"p{i}": "" for i in range(10)}, seed=0)
    ...  for part in (split.train, split.validation, split.test)]
    [6, 2, 2]
    """

    count: int = Field(15, ge=1, le=10_000)
    fractions: tuple[Share, Share, Share] = (0.6, 0.2, 0.2)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must add up to 1, got {self.fractions}")
        return self

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        num_validation, num_test = (max(1, round(share * len(subjects))) for share in self.fractions[1:])
        if len(subjects) < num_validation + num_test + 1:
            raise UserError(f"{self} needs at least 3 subjects, got {len(subjects)}: {listed(sorted(subjects)) or 'none'}")
        orders = (_spread(subjects, f"{seed}/montecarlo/{index}") for index in range(self.count))
        parts = enumerate(_cut(order, num_test, num_validation) for order in orders)
        return tuple(Split(index=index, train=train, validation=val, test=test) for index, (test, val, train) in parts)

    def small(self) -> Splits:
        return self.replace(count=min(2, self.count))


class KFold(Splits):
    """Every person is tested once; of the others the share `validation` validates.

    `rounds` does it so many times, each with other folds; splits are numbered on, so a larger number extends a study.
    `count` keeps the first splits.
    """

    folds: int = Field(5, ge=2)
    validation: Share = 0.2
    rounds: int = Field(1, ge=1)
    count: int | None = Field(None, ge=1)

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        needed = max(self.folds, 3)
        if len(subjects) < needed:
            raise UserError(f"{self} needs at least {needed} subjects, got {len(subjects)}: {listed(sorted(subjects)) or 'none'}")
        splits = []
        for index in range(self.folds * self.rounds)[: self.count]:
            number, fold = divmod(index, self.folds)
            order = _spread(subjects, f"{seed}/kfold" + (f"/round/{number}" if number else ""))
            begin, end = (len(order) * k // self.folds for k in (fold, fold + 1))
            others = order[:begin] + order[end:]
            if len(others) < 2:
                raise UserError(f"{self}: fold {fold} leaves {len(others)} of {len(subjects)} subjects; use more folds")
            validation, train = _validating({s: subjects[s] for s in others}, self.validation, f"{seed}/kfold/{index}")
            splits.append(Split(index=index, train=train, validation=validation, test=tuple(sorted(order[begin:end]))))
        return tuple(splits)

    def small(self) -> Splits:
        return self.replace(count=min(2, self.count or 2))


class LeaveOneSiteOut(Splits):
    """Each site is the test set once, in the order of their names: the design for "does it hold at a new site?".

    Of the people of the other sites the share `validation` validates, spread over these sites. `count` keeps the first splits.

    >>> [split.test for split in LeaveOneSiteOut().make({f"p{i}": "ABC"[i % 3] for i in range(6)}, seed=0)]
    [('p0', 'p3'), ('p1', 'p4'), ('p2', 'p5')]
    """

    validation: Share = 0.2
    count: int | None = Field(None, ge=1)

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """See `Splits.make`. Raises UserError if somebody's site is unknown, or there are fewer than 3 sites."""
        if unknown := sorted(subject for subject, site in subjects.items() if not site):
            where = "the layout reads them (Bids: a column of participants.tsv; Files: {site} in a pattern)"
            raise UserError(f"{self} needs the site of every subject, got none for {listed(unknown)}; {where}")
        sites = sorted(set(subjects.values()))
        if len(sites) < 3:
            found = f"{len(sites)}: {listed(sites) or 'none'}"
            raise UserError(f"{self} needs at least 3 sites, got {found}; use MonteCarlo() or KFold(): each part has all sites")
        splits = []
        for index, site in enumerate(sites[: self.count]):
            others = {subject: at for subject, at in subjects.items() if at != site}
            validation, train = _validating(others, self.validation, f"{seed}/site/{site}")
            test = tuple(sorted(subjects.keys() - others.keys()))
            splits.append(Split(index=index, train=train, validation=validation, test=test))
        return tuple(splits)


class GivenSplit(Frozen):
    """One split as a file gives it: names of cases or of persons. Without `validation` it is drawn from `train`."""

    train: tuple[str, ...] = Field(min_length=1)
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = Field(min_length=1)


class GivenSplits(Splits):
    """The splits of a JSON or YAML file: a list of `{"train": [...], "validation": [...], "test": [...]}`.

    Names are those of cases or of persons; `validation` may be left out. nnU-Net's `splits_final.json` has `{"train", "val"}`: its
    `val` is the test set here. Where no validation set is given the share `validation` of `train` validates, drawn by the seed.
    A relative `file` lies beside the study file. Its content is part of the study (`given`): it is read when the study is loaded.
    """

    file: str
    validation: Share = 0.2
    given: tuple[GivenSplit, ...] = ()

    def __init__(self, file: str | Path, **fields: Any) -> None:
        super().__init__(file=str(file), **fields)  # type: ignore[call-arg]

    def bound(self, folder: Path) -> GivenSplits:
        return self if self.given else self.replace(given=read_splits(folder / self.file))

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """See `Splits.make`; names are those of persons."""
        return self.of_cases(subjects, {subject: subject for subject in subjects}, seed)

    def of_cases(self, subjects: Mapping[str, str], cases: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """See `Splits.of_cases`.

        Raises UserError with file, split and name: if one is unknown or missing, stands twice, or if sessions of a person cross.
        """
        splits = []
        for index, one in enumerate(self.bound(Path()).given):
            part_of = _parts_of(one, cases, f"{self.file}, split {index}")
            train, validation, test = (tuple(sorted(s for s in part_of if part_of[s] == part)) for part in PARTS)
            if not validation and len(train) < 2:
                raise UserError(f"{self.file}, split {index}: the validation set is drawn from train, got {listed(train)}")
            if not validation:
                validation, train = _validating({s: subjects[s] for s in train}, self.validation, f"{seed}/given/{index}")
            splits.append(Split(index=index, train=train, validation=validation, test=test))
        return tuple(splits)


def read_splits(path: Path) -> tuple[GivenSplit, ...]:
    """The splits in a JSON or YAML file. Raises UserError with file, split and what a split has instead."""
    import yaml  # few studies need it

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the splits {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not {'JSON' if path.suffix == '.json' else 'YAML'}: {str(error).splitlines()[0]}") from error
    if isinstance(content, dict) and ITEMS in content:  # splits.json of a run
        content = content[ITEMS]
    if not isinstance(content, list) or not content:
        raise UserError(f'{path}: it must be a list of splits such as [{{"train": [...], "test": [...]}}], got {content!r:.60}')
    return tuple(_given(one, f"{path}, split {index}") for index, one in enumerate(content))


def splits_final(splits: Sequence[Split], cases: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """nnU-Net's `splits_final.json`: train and validation together are its `train`, the test set is its `val`; names of cases."""
    parts = [{"train": {*split.train, *split.validation}, "val": {*split.test}} for split in splits]
    return [{part: sorted(case for case in cases if cases[case] in who) for part, who in of.items()} for of in parts]


def held_out(holdout: float | tuple[str, ...] | None, subjects: Mapping[str, str], seed: int) -> tuple[str, ...]:
    """Who of `subjects` (person -> site) is in no split: those named, or a share of them, at least one, spread over sites.

    The share depends on the people, their sites and `seed` only. Raises UserError if a named subject is not among them.

    >>> held_out(0.25, {f"p{i}": "AB"[i % 2] for i in range(8)}, seed=0)
    ('p3', 'p4')
    """
    if holdout is None:
        return ()
    if isinstance(holdout, tuple):
        if unknown := sorted(set(holdout) - subjects.keys()):
            raise UserError(f"holdout names {', '.join(unknown)}, but the subjects are {listed(sorted(subjects)) or 'none'}")
        return tuple(sorted(set(holdout)))
    return _cut(_spread(subjects, f"{seed}/holdout"), max(1, round(holdout * len(subjects))))[0]


def _given(one: Any, place: str) -> GivenSplit:
    """A split as read. `index` and `type`, which the splits of a run have, say nothing here."""
    keys = set(one) - {"index", "type"} if isinstance(one, dict) else set()
    if keys not in KEYS:
        allowed = " or ".join("/".join(sorted(keys, reverse=True)) for keys in KEYS)
        got = "/".join(map(str, one)) if isinstance(one, dict) else f"{one!r:.60}"
        raise UserError(f"{place}: a split has {allowed}, got {got}")
    for part in keys:
        wrong = [name for name in one[part] if not isinstance(name, str)] if isinstance(one[part], list) else [one[part]]
        if wrong or not one[part]:
            raise UserError(f"{place}: {part} is a list of at least one name, as text, got {listed(wrong) or 'none'}")
    test = one["test"] if "test" in keys else one["val"]
    validation = one.get("validation", one["val"] if keys >= {"val", "test"} else ())
    return GivenSplit(train=tuple(one["train"]), validation=tuple(validation), test=tuple(test))


def _parts_of(split: GivenSplit, cases: Mapping[str, str], place: str) -> dict[str, str]:
    """The part of each person. See `GivenSplits.of_cases` for what is refused."""
    of_person = grouped((person, case) for case, person in cases.items())
    part_of: dict[str, str] = {}  # of a case
    for part in PARTS:
        for name in getattr(split, part):
            found = of_person.get(name) or [case for case in (name,) if case in cases]
            if not found:
                known = listed(sorted(of_person), most=4)
                raise UserError(f"{place}: {part} names {name!r}, neither a case nor a subject in the splits, such as {known}")
            if twice := [case for case in found if case in part_of]:
                raise UserError(f"{place}: {name!r} is in {part_of[twice[0]]} and in {part}; a name stands once in a split")
            part_of |= dict.fromkeys(found, part)
    if missing := sorted(cases.keys() - part_of.keys()):
        to_do = "name them there, or give Study(holdout=(...)) their subjects"
        raise UserError(f"{place}: {listed(missing)} of the data set in no part; {to_do}")
    for person, own in of_person.items():
        if other := [case for case in own if part_of[case] != part_of[own[0]]]:
            where = f"{own[0]} in {part_of[own[0]]}, {other[0]} in {part_of[other[0]]}"
            raise UserError(f"{place}: sessions of one person never cross, got {where}, both of {person}; put them into one part")
    return {person: part_of[own[0]] for person, own in of_person.items()}


def _validating(subjects: Mapping[str, str], share: float, key: str) -> list[tuple[str, ...]]:
    """Who of `subjects`, two or more, validates, and who trains: a share of them, at least one and not all, spread over sites."""
    return _cut(_spread(subjects, key), min(max(1, round(share * len(subjects))), len(subjects) - 1))


def _spread(subjects: Mapping[str, str], key: str) -> list[str]:
    """People in random order such that every stretch of it holds each site in proportion (systematic sampling).

    The k-th of a site's m people, in random order, stands at (k + u) / m, with one random u per site.
    """
    by_site = grouped((subjects[s], s) for s in sorted(subjects, key=lambda s: (_uniform(key, "subject", s), s)))
    place = {s: (k + _uniform(key, "site", site)) / len(people) for site, people in by_site.items() for k, s in enumerate(people)}
    return sorted(place, key=lambda s: (place[s], s))


def _cut(order: list[str], *sizes: int) -> list[tuple[str, ...]]:
    edges = [0, *accumulate(sizes), len(order)]
    return [tuple(sorted(order[begin:end])) for begin, end in pairwise(edges)]


def _uniform(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` only."""
    hashed = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(hashed, "big") >> 11) / 2**53  # 53 bits: what a double holds exactly, so 1.0 cannot come out
