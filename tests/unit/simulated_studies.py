"""Tables of paired differences with known components: subject, split and error. What tests of significance are tried on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Setting(NamedTuple):
    """Numbers of subjects, of splits and of test subjects per split; standard deviations of subject, split and error."""

    subjects: int
    splits: int
    tested: int
    sd: tuple[float, float, float]


SETTINGS = (
    Setting(40, 15, 8, (1.0, 0.5, 0.5)),
    Setting(40, 15, 8, (0.5, 1.0, 0.5)),
    Setting(40, 15, 8, (0.2, 1.0, 0.5)),
    Setting(40, 15, 8, (2.0, 0.5, 0.5)),
    Setting(40, 40, 8, (1.0, 0.5, 0.5)),
    Setting(120, 15, 24, (1.0, 0.5, 0.5)),
    Setting(15, 15, 3, (1.0, 0.5, 0.5)),
    Setting(40, 6, 8, (1.0, 0.5, 0.5)),
)


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
