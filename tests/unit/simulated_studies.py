"""Tables of paired differences with known components: subject, split and error. What tests of significance are tried on."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np


class Setting(NamedTuple):
    """Numbers of subjects and of splits, and standard deviations of subject, split and error.

    Splits are random, with a fifth of the subjects tested, or `folds` > 0 folds, drawn anew until there are `splits` of them.
    """

    subjects: int
    splits: int
    sd: tuple[float, float, float]
    folds: int = 0

    @property
    def tested(self) -> int:
        """Test subjects per split."""
        return self.subjects // (self.folds or 5)

    def table(self, generator: np.random.Generator, effect: float = 0.0) -> np.ndarray:
        """Differences [a b], NaN where a subject was not tested."""
        if not self.folds:
            return simulate(generator, self.subjects, self.splits, self.tested, self.sd, effect)
        of_subject, of_split, of_error = self.sd
        table = np.full((self.subjects, self.splits), np.nan)
        subject, split = generator.normal(0, of_subject, self.subjects), generator.normal(0, of_split, self.splits)
        for j in range(self.splits):
            if j % self.folds == 0:
                order = generator.permutation(self.subjects)
            rows = order[j % self.folds :: self.folds]
            table[rows, j] = effect + subject[rows] + split[j] + generator.normal(0, of_error, len(rows))
        return table


SDS = tuple(  # of the five sets of variances
    (float(np.sqrt(s)), float(np.sqrt(f)), float(np.sqrt(e)))
    for s, f, e in ((1, 0.05, 0.2), (1, 0.25, 0.25), (0.2, 0.2, 1), (1, 0, 1), (0.05, 1, 0.25))
)
DESIGNS = (  # (subjects, splits, folds)
    *((a, b, 0) for a, b in itertools.product((15, 30, 60), (2, 3, 5, 15, 40))),
    *((120, b, 0) for b in (5, 15, 40)),
    *((30, 3, 3), (30, 5, 5), (30, 15, 5)),
)
SETTINGS = tuple(Setting(a, b, sd, folds) for (a, b, folds), sd in itertools.product(DESIGNS, SDS))
SHORT = (Setting(40, 15, SDS[1]), Setting(15, 5, SDS[0]), Setting(30, 5, SDS[3], folds=5), Setting(30, 2, SDS[4]))


def simulate(
    generator: np.random.Generator,
    subjects: int = 40,
    splits: int = 15,
    tested: int = 8,
    sd: tuple[float, float, float] = (1.0, 0.5, 0.5),
    effect: float = 0.0,
) -> np.ndarray:
    """Differences [a b] of random splits, NaN where a subject was not tested."""
    of_subject, of_split, of_error = sd
    table = np.full((subjects, splits), np.nan)
    subject = generator.normal(0, of_subject, subjects)
    for j in range(splits):
        rows = generator.choice(subjects, tested, replace=False)
        error = generator.normal(0, of_error, tested)
        table[rows, j] = effect + subject[rows] + generator.normal(0, of_split) + error
    return table
