"""Splits of people into train, validation and test: the same for every candidate, spread evenly over sites.

No random generator is used: people are ordered by a hash of (seed, split, person), so the splits are the same on every
machine and for every version of numpy.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from softseg_dist.errors import UserError
from softseg_dist.frozen import Frozen
from softseg_dist.words import listed

Share = Annotated[float, Field(gt=0, lt=1)]


class Split(Frozen):
    """Who trains, validates and tests. All sessions of one person are in one part.

    A split of a study has subjects in each part. One without validation and test trains a final model on all subjects.
    """

    index: int = Field(ge=0)
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`003`: the name of this split in files, ledger and messages."""
        return f"{self.index:03d}"

    @model_validator(mode="after")
    def _apart(self) -> Self:
        everyone = (*self.train, *self.validation, *self.test)
        if len(set(everyone)) < len(everyone):
            twice = sorted({s for s in everyone if everyone.count(s) > 1})
            raise ValueError(f"split {self.index}: a subject must be in one part only, got {', '.join(twice)} in two")
        if not self.train or bool(self.validation) != bool(self.test):
            raise ValueError(f"split {self.index}: train, validation and test must each have a subject")
        return self


class Splits(Frozen, ABC):
    """A rule that makes splits."""

    @abstractmethod
    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """The splits of `subjects` (person -> site, "" where unknown).

        They depend on the people, their sites and `seed` only, not on the order of the mapping. Raises UserError if
        there are too few people.
        """

    @abstractmethod
    def first(self, num_splits: int) -> Self:
        """The same rule, cut to its first `num_splits` splits, which stay what they were."""


class MonteCarlo(Splits):
    """Independent random splits; `fractions` are the shares of train, validation and test.

    Each part has at least one person; numbers are rounded, what remains trains. Split i depends on (seed, i) only, so a
    larger `count` extends a study.

    >>> [len(part) for split in MonteCarlo(count=1).make({f"p{i}": "" for i in range(10)}, seed=0)
    ...  for part in (split.train, split.validation, split.test)]
    [6, 2, 2]
    """

    count: int = Field(15, ge=1)
    fractions: tuple[Share, Share, Share] = (0.6, 0.2, 0.2)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must add up to 1, got {self.fractions}")
        return self

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """See `Splits.make`."""
        num_validation, num_test = (max(1, round(share * len(subjects))) for share in self.fractions[1:])
        if len(subjects) < num_validation + num_test + 1:
            raise UserError(
                f"{self} needs at least 3 subjects (train, validation, test), got {len(subjects)}: "
                f"{listed(sorted(subjects)) or 'none'}"
            )
        splits = []
        for index in range(self.count):
            order = _spread(subjects, f"{seed}/montecarlo/{index}")
            test, validation, train = _cut(order, num_test, num_validation)
            splits.append(Split(index=index, train=train, validation=validation, test=test))
        return tuple(splits)

    def first(self, num_splits: int) -> Self:
        """See `Splits.first`."""
        return self.replace(count=min(num_splits, self.count))


class KFold(Splits):
    """Every person is tested once; of the others the share `validation` validates. `count` keeps the first folds."""

    folds: int = Field(5, ge=2)
    validation: Share = 0.2
    count: int | None = Field(None, ge=1)

    def make(self, subjects: Mapping[str, str], seed: int) -> tuple[Split, ...]:
        """See `Splits.make`."""
        needed = max(self.folds, 3)
        if len(subjects) < needed:
            raise UserError(f"{self} needs at least {needed} subjects, got {len(subjects)}: {listed(sorted(subjects)) or 'none'}")
        order = _spread(subjects, f"{seed}/kfold")
        splits = []
        for index in range(min(self.count or self.folds, self.folds)):
            begin, end = (len(order) * k // self.folds for k in (index, index + 1))
            others = order[:begin] + order[end:]
            num_validation = min(max(1, round(self.validation * len(others))), len(others) - 1)
            if num_validation < 1:
                raise UserError(f"{self}: fold {index} leaves {len(others)} of {len(subjects)} subjects; use more folds")
            again = _spread({s: subjects[s] for s in others}, f"{seed}/kfold/{index}")
            validation, train = _cut(again, num_validation)
            splits.append(Split(index=index, train=train, validation=validation, test=tuple(sorted(order[begin:end]))))
        return tuple(splits)

    def first(self, num_splits: int) -> Self:
        """See `Splits.first`."""
        return self.replace(count=min(num_splits, self.count or self.folds))


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


def _spread(subjects: Mapping[str, str], key: str) -> list[str]:
    """People in random order such that every stretch of it holds each site in proportion (systematic sampling).

    The k-th of a site's m people, in random order, stands at (k + u) / m, with one random u per site.
    """
    by_site: dict[str, list[str]] = defaultdict(list)
    for subject in sorted(subjects, key=lambda s: (_uniform(key, "subject", s), s)):
        by_site[subjects[subject]].append(subject)
    place = {
        subject: (k + _uniform(key, "site", site)) / len(people)
        for site, people in by_site.items()
        for k, subject in enumerate(people)
    }
    return sorted(place, key=lambda s: (place[s], s))


def _cut(order: list[str], *sizes: int) -> list[tuple[str, ...]]:
    parts, begin = [], 0
    for size in (*sizes, len(order) - sum(sizes)):
        parts.append(tuple(sorted(order[begin : begin + size])))
        begin += size
    return parts


def _uniform(*parts: str) -> float:
    """A number in [0, 1) that depends on `parts` only."""
    hashed = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(hashed, "big") >> 11) / 2**53  # 53 bits: what a double holds exactly, so 1.0 cannot come out
