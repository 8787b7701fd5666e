"""Is one candidate better than another? Tests and intervals for paired differences of cross-validated scores.

Differences are a table [a b]: subject i in split j, NaN where subject i is not in the test set of split j. The
primary test is `crossed_test`; the others are reported beside it. Every test returns a result: where a p-value is undefined
it is NaN and `note` says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import stats

Table = npt.NDArray[np.float64]  # [a b], NaN where not tested
NAN = float("nan")
LEVEL = 0.95  # of all intervals
ROUNDING = 1e-12  # of float64, relative
ALL_EQUAL = "all differences are equal: there is no variance to test against"


@dataclass(frozen=True)
class _TTest:
    mean: float
    low: float = NAN
    high: float = NAN
    t: float = NAN
    df: float = NAN
    p: float = NAN
    num_subjects: int = 0
    note: str = ""

    @classmethod
    def of(cls, mean: float, error: float, df: float, **more: Any) -> Self:
        """The two-sided test of a mean of 0, given its standard error."""
        t, reach = mean / error, float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
        return cls(mean, mean - reach, mean + reach, t, df, float(2 * stats.t.sf(abs(t), df)), **more)


@dataclass(frozen=True)
class CrossedTest(_TTest):
    """The result of `crossed_test`. `low` and `high` bound the 95 % interval of `mean`; variances are per component."""

    var_subject: float = NAN
    var_split: float = NAN
    var_error: float = NAN
    num_splits: int = 0
    num_pairs: int = 0


@dataclass(frozen=True)
class SplitTest:
    """The result of a test on one mean difference per split. `statistic` is W of Wilcoxon or t."""

    mean: float
    statistic: float = NAN
    p: float = NAN
    num_splits: int = 0
    note: str = ""


@dataclass(frozen=True)
class SubjectTest(_TTest):
    """The result of `subject_test`. `low` and `high` bound the 95 % interval of `mean`."""


@dataclass(frozen=True)
class BootstrapInterval:
    """The result of `paired_bootstrap`: percentile interval of the mean difference."""

    mean: float
    low: float = NAN
    high: float = NAN
    draws: int = 0
    note: str = ""


@dataclass(frozen=True)
class BlandAltman:
    """The result of `bland_altman`: mean difference, the limits of agreement, and the number of pairs."""

    bias: float
    low: float
    high: float
    n: int


def crossed_test(differences: Table) -> CrossedTest:
    """Two-sided t-test of mean difference 0 under d_ij = mu + subject_i + split_j + error_ij, both effects random.

    Variance components by Henderson's method 1, negative ones set to 0. With S, F, E the components of subject, split (fit) and
    error, var(mean) = S k3/N + F k4/N + E/N, where k3 = sum n_i^2/N and k4 = sum m_j^2/N; degrees of freedom by Satterthwaite over
    the two levels, with half of the error in each. It generalises to new subjects and new training runs.

    Components that the design cannot separate are merged: the error into the subjects if each was tested once (k-fold), into the
    splits if each tested one subject, everything into the subjects if both hold: then it is the one-sample t-test.

    Args:
        differences: [a b], NaN where subject i was not tested in split j.

    Returns p = NaN and a note if there are fewer than two subjects or splits, or if all differences are equal.
    Source: Henderson 1953 (doi 10.2307/3001853); Satterthwaite 1946 (doi 10.2307/3002019).

    >>> table = np.array([[0.1, 0.2, np.nan], [0.3, np.nan, 0.2], [np.nan, 0.1, 0.1]])
    >>> round(crossed_test(table).p, 3)
    0.035
    """
    tested = ~np.isnan(differences)
    kept = differences[tested.any(axis=1)][:, tested.any(axis=0)]
    d = kept[~np.isnan(kept)]
    (a, b), num, mean = kept.shape, d.size, float(d.mean()) if d.size else NAN
    sizes = {"num_subjects": a, "num_splits": b, "num_pairs": num}
    if note := _why_untestable(d, a, b):
        return CrossedTest(mean, note=note, **sizes)
    k3, k4 = (float(((~np.isnan(kept)).sum(axis=axis) ** 2).sum()) / num for axis in (1, 0))
    s, f, e = (max(c, 0.0) for c in _components(kept - mean, k3, k4))
    by_subject = s * k3 / num + e / num / 2
    by_split = f * k4 / num + e / num / 2
    df = (by_subject + by_split) ** 2 / (by_subject**2 / (a - 1) + by_split**2 / (b - 1))
    variances = {"var_subject": s, "var_split": f, "var_error": e}
    return CrossedTest.of(mean, math.sqrt(by_subject + by_split), df, **variances, **sizes, note=MERGED[num == a, num == b])


MERGED = {  # by whether each subject was tested once, and each split tested one subject
    (True, True): "one subject per split and one split per subject: equal to the one-sample t-test",
    (True, False): "each subject was tested once: the error is part of the variation between subjects",
    (False, True): "each split tested one subject: the error is part of the variation between splits",
    (False, False): "",
}


def _why_untestable(d: npt.NDArray[np.float64], num_subjects: int, num_splits: int) -> str:
    if d.size == 0:
        return "no pair of scores to compare"
    if num_subjects == 1:
        return "only one subject: the variation between subjects is unknown"
    if num_splits == 1:
        return "only one split: the variation between training runs is unknown"
    return ALL_EQUAL if _constant(d) else ""


def _constant(d: npt.NDArray[np.float64]) -> bool:
    """True if all values are equal up to the rounding of float64."""
    return bool(np.ptp(d) <= ROUNDING * np.abs(d).max())


def _components(centred: Table, k3: float, k4: float) -> tuple[float, float, float]:
    """Variance components of subject, split and error of differences minus their mean.

    The equations are singular exactly if each subject was tested once, or each split tested one subject (with at least two of
    each): these cases come first. Centring makes Tm = 0 and changes nothing else.
    """
    tested, x = ~np.isnan(centred), np.nan_to_num(centred)
    (a, b), num = x.shape, int(tested.sum())
    t0 = float((x**2).sum())
    ts, tf = (float((x.sum(axis=axis) ** 2 / tested.sum(axis=axis)).sum()) for axis in (1, 0))
    if num == a == b:
        return t0 / (num - 1), 0.0, 0.0
    if num == a:
        s = (t0 - tf) / (num - b)
        return s, (t0 - (num - k3) * s) / (num - k4), 0.0
    if num == b:
        f = (t0 - ts) / (num - a)
        return (t0 - (num - k4) * f) / (num - k3), f, 0.0
    equations = [[num - k3, a - k4, a - 1], [b - k3, num - k4, b - 1], [num - k3, num - k4, num - 1]]
    s, f, e = np.linalg.solve(np.array(equations, dtype=np.float64), np.array([ts, tf, t0]))  # k1 = a and k2 = b
    return float(s), float(f), float(e)


def wilcoxon_test(differences: npt.NDArray[np.float64]) -> SplitTest:
    """Wilcoxon signed-rank test over splits, two-sided and exact: the test of the SoftSeg paper.

    Splits share subjects, so it rejects too often (14 % instead of 5 % with 15 random splits): reported, never primary.
    Differences of 0 are dropped, as in scipy; if all are 0, p = 1. Beyond 50 splits, or with equal differences among more
    than 13, scipy takes the normal approximation.

    Args:
        differences: [J], one mean difference per split; NaN is left out.
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
    if _constant(d):
        return SplitTest(mean, num_splits=d.size, note=ALL_EQUAL)
    t = mean / math.sqrt((1 / d.size + test_to_train) * float(d.var(ddof=1)))
    return SplitTest(mean, t, float(2 * stats.t.sf(abs(t), d.size - 1)), d.size)


def subject_test(differences: npt.NDArray[np.float64]) -> SubjectTest:
    """One-sample t-test over subjects, two-sided: t = mean d / sqrt(var d / a), df = a - 1.

    For candidates that were not tested in the same splits, which leaves one difference of means per subject. It generalises to
    new subjects, not to new training runs: without the variation between runs it rejects too often, as every test over subject
    means does. Never primary where `crossed_test` is defined.

    Args:
        differences: [a], one mean difference per subject; NaN is left out.

    >>> result = subject_test(np.array([0.02, 0.03, 0.01, 0.025, 0.015]))
    >>> round(result.t, 6), result.df
    (5.656854, 4.0)
    """
    d = differences[~np.isnan(differences)]
    mean = float(d.mean()) if d.size else NAN
    if d.size < 2:
        return SubjectTest(mean, num_subjects=d.size, note="fewer than two subjects: the variation is unknown")
    if _constant(d):
        return SubjectTest(mean, num_subjects=d.size, note=ALL_EQUAL)
    return SubjectTest.of(mean, math.sqrt(float(d.var(ddof=1)) / d.size), d.size - 1.0, num_subjects=d.size)


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


def paired_bootstrap(differences: Table, seed: int, draws: int = 2000) -> BootstrapInterval:
    """95 % percentile interval of the mean difference; each draw resamples the subjects and, separately, the splits.

    A check of the interval of `crossed_test`; somewhat wide, as the error is resampled twice. Draws without a pair are left
    out. Source: Owen 2007, The pigeonhole bootstrap (doi 10.1214/07-AOAS122).

    Args:
        differences: [a b], NaN where subject i was not tested in split j.
        seed: of the resampling; the same seed gives the same interval.
        draws: number of resamplings.
    """
    tested = ~np.isnan(differences)
    if not tested.any():
        return BootstrapInterval(NAN, note="no pair of scores to compare")
    d = differences[tested.any(axis=1)][:, tested.any(axis=0)]
    (a, b), x, mean = d.shape, np.nan_to_num(d), float(np.nanmean(d))
    if a == 1 or b == 1:
        return BootstrapInterval(mean, note="fewer than two subjects or splits: nothing to resample")
    generator = np.random.default_rng(seed)
    subjects = generator.multinomial(a, np.full(a, 1 / a), draws).astype(np.float64)  # the count of each subject
    splits = generator.multinomial(b, np.full(b, 1 / b), draws).astype(np.float64)
    counts = np.einsum("db,db->d", subjects @ (~np.isnan(d)).astype(np.float64), splits)
    means = np.einsum("db,db->d", subjects @ x, splits)[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return BootstrapInterval(mean, float(low), float(high), len(means))


def bland_altman(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> BlandAltman:
    """Bias and limits of agreement of paired measurements: mean and mean -+ 1.96 sd of `first` minus `second`.

    Args:
        first, second: [n], paired by index, n > 0; with a single pair the limits are NaN.

    Source: Bland and Altman 1986 (doi 10.1016/S0140-6736(86)90837-8).

    >>> bland_altman(np.array([3.0, 5.0]), np.array([2.0, 5.0])).bias
    0.5
    """
    d = first - second
    bias, reach = float(d.mean()), 1.96 * float(d.std(ddof=1)) if d.size > 1 else NAN
    return BlandAltman(bias, bias - reach, bias + reach, d.size)
