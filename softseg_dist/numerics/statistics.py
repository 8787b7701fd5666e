"""Is one candidate better than another? Tests and intervals for paired differences of cross-validated scores.

The primary test is `crossed_test.crossed_test`; these are reported beside it. Every test returns a result: where a p-value is
undefined it is NaN and `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

NAN = float("nan")
LEVEL = 0.95  # of all intervals
ROUNDING = 1e-12  # of float64, relative
ALL_EQUAL = "all differences are equal: there is no variance to test against"


@dataclass(frozen=True)
class TTest:
    """A two-sided t-test of a mean of 0; `low` and `high` bound its 95 % interval. `warnings` say what weakens p."""

    mean: float
    low: float = NAN
    high: float = NAN
    t: float = NAN
    df: float = NAN
    p: float = NAN
    num_subjects: int = 0
    note: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Why there is no p, or what weakens it."""
        return (self.note, *self.warnings) if self.note else self.warnings

    @classmethod
    def of(cls, mean: float, error: float, df: float, **more: Any) -> Self:
        """The two-sided test of a mean of 0, given its standard error."""
        t, reach = mean / error, float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
        return cls(mean, mean - reach, mean + reach, t, df, float(2 * stats.t.sf(abs(t), df)), **more)


@dataclass(frozen=True)
class SplitTest:
    """The result of a test on one mean difference per split. `statistic` is W of Wilcoxon or t."""

    mean: float
    statistic: float = NAN
    p: float = NAN
    num_splits: int = 0
    note: str = ""


@dataclass(frozen=True)
class BlandAltman:
    """The result of `bland_altman`: mean difference, the limits of agreement, and the number of pairs."""

    bias: float
    low: float
    high: float
    n: int


def constant(d: npt.NDArray[np.float64]) -> bool:
    """True if all values are equal up to the rounding of float64."""
    return bool(np.ptp(d) <= ROUNDING * np.abs(d).max())


def wilcoxon_test(differences: npt.NDArray[np.float64]) -> SplitTest:
    """Wilcoxon signed-rank test over splits, two-sided and exact, of `differences` [J], NaN left out: the SoftSeg paper's test.

    Splits share subjects, so it rejects too often: reported, never primary. Differences of 0 are dropped, as in scipy; if all are
    0, p = 1. Beyond 50 splits, or with equal differences among more than 13, scipy takes the normal approximation.
    """
    d = differences[~np.isnan(differences)]
    mean = float(d.mean()) if d.size else NAN
    if not d.size:
        return SplitTest(mean, note="no split to compare")
    note = f"the smallest p that {d.size} splits can give is 2^(1-{d.size}) = {2.0 ** (1 - d.size):.2g}"
    if not d.any():
        return SplitTest(mean, 0.0, 1.0, d.size, note)
    result = stats.wilcoxon(d[d != 0], alternative="two-sided")
    return SplitTest(mean, float(result.statistic), float(result.pvalue), d.size, note)


def corrected_t_test(differences: npt.NDArray[np.float64], test_to_train: float) -> SplitTest:
    """Corrected resampled t-test, two-sided: t = mean d / sqrt((1/J + n_test/n_train) var d), df = J - 1.

    Args:
        differences: [J], one mean difference per split; NaN is left out.
        test_to_train: number of test subjects over number of training subjects, > 0.

    Source: Nadeau and Bengio 2003 (doi 10.1023/A:1024068626366).

    >>> result = corrected_t_test(np.array([0.02, 0.03, 0.01, 0.025, 0.015]), 1 / 3)
    >>> round(result.statistic, 6), round(result.p, 6)
    (3.464102, 0.025721)
    """
    d = differences[~np.isnan(differences)]
    mean = float(d.mean()) if d.size else NAN
    if d.size < 2:
        return SplitTest(mean, num_splits=d.size, note="fewer than two splits: the variation between splits is unknown")
    if constant(d):
        return SplitTest(mean, num_splits=d.size, note=ALL_EQUAL)
    t = mean / math.sqrt((1 / d.size + test_to_train) * float(d.var(ddof=1)))
    return SplitTest(mean, t, float(2 * stats.t.sf(abs(t), d.size - 1)), d.size)


def subject_test(differences: npt.NDArray[np.float64]) -> TTest:
    """One-sample t-test over subjects of `differences` [a], two-sided: t = mean d / sqrt(var d / a), df = a - 1; NaN is left out.

    For candidates that were not tested in the same splits. It generalises to new subjects for these trained models, not to new
    training runs: read as that it rejects too often. Over the mean differences of sites it speaks about new sites.

    >>> result = subject_test(np.array([0.02, 0.03, 0.01, 0.025, 0.015]))
    >>> round(result.t, 6), result.df
    (5.656854, 4.0)
    """
    d = differences[~np.isnan(differences)]
    mean = float(d.mean()) if d.size else NAN
    if d.size < 2:
        return TTest(mean, num_subjects=d.size, note="fewer than two subjects: the variation is unknown")
    if constant(d):
        return TTest(mean, num_subjects=d.size, note=ALL_EQUAL)
    return TTest.of(mean, math.sqrt(float(d.var(ddof=1)) / d.size), d.size - 1.0, num_subjects=d.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down method; NaN stays NaN and is not counted.

    Source: Holm 1979 (doi 10.2307/4615733).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [NAN] * len(p_values), 0.0
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def paired_bootstrap(differences: npt.NDArray[np.float64], seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of `differences` [a b]; each draw resamples the subjects and, separately, the splits.

    A check of the interval of `crossed_test`; somewhat wide, as the error is resampled twice. Draws without a pair are left
    out; NaN for fewer than two subjects or splits. Source: Owen 2007, The pigeonhole bootstrap (doi 10.1214/07-AOAS122).
    """
    tested = ~np.isnan(differences)
    d = differences[tested.any(axis=1)][:, tested.any(axis=0)]
    if min(d.shape) < 2:
        return NAN, NAN
    generator = np.random.default_rng(seed)
    subjects, splits = (generator.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64) for n in d.shape)  # how often each
    counts, sums = (np.einsum("db,db->d", subjects @ of, splits) for of in (np.isfinite(d).astype(np.float64), np.nan_to_num(d)))
    low, high = np.quantile(sums[counts > 0] / counts[counts > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bland_altman(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> BlandAltman:
    """Bias and limits of agreement of n > 0 pairs: mean and mean -+ 1.96 sd of `first` minus `second` [n]; NaN limits for one.

    Source: Bland and Altman 1986 (doi 10.1016/S0140-6736(86)90837-8).

    >>> bland_altman(np.array([3.0, 5.0]), np.array([2.0, 5.0])).bias
    0.5
    """
    d = first - second
    bias, reach = float(d.mean()), 1.96 * float(d.std(ddof=1)) if d.size > 1 else NAN
    return BlandAltman(bias, bias - reach, bias + reach, d.size)
