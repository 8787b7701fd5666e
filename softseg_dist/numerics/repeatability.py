"""Repeatability of a measurement over the sessions of one person: ICC, within-subject variation, Bland-Altman.

Measurements are a table [subjects sessions], NaN where there was no session. Every function returns a result: where a value is
undefined it is NaN and `note` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from softseg_dist.numerics.statistics import LEVEL, NAN, ROUNDING, Table, constant

LIMITS = 1.96  # standard deviations: 95 % of normal differences lie between the limits of agreement
NO_ERROR = "the sessions of a subject do not vary about the model: without an error there is no interval"
NOTHING_REPEATED = "no subject has two sessions: no measurement was repeated"


@dataclass(frozen=True)
class Icc:
    """The result of `icc`: `form` is "ICC(2,1)" or "ICC(1,1)"; `low` and `high` bound the 95 % interval of `value`."""

    value: float
    form: str
    low: float = NAN
    high: float = NAN
    num_subjects: int = 0
    num_sessions: int = 0
    note: str = ""


@dataclass(frozen=True)
class WithinSubject:
    """The result of `coefficient_of_variation`: a ratio, so .02 is 2 %; `num_subjects` have two sessions or more."""

    value: float
    num_subjects: int = 0
    note: str = ""


@dataclass(frozen=True)
class BlandAltman:
    """The result of `bland_altman`: mean difference, the limits of agreement, and the number of pairs."""

    bias: float
    low: float = NAN
    high: float = NAN
    n: int = 0
    note: str = ""


def icc(table: Table) -> Icc:
    """Intraclass correlation of single measurements: the share of the variance that lies between subjects.

    1: sessions agree exactly; 0: two sessions of one subject differ as much as those of two subjects (estimates can be
    below 0). If every subject has every session it is ICC(2,1), absolute agreement under two-way random effects: a bias of
    one session lowers it. Otherwise it is ICC(1,1) of the one-way model, with n0 = (N - sum n_i^2 / N) / (a - 1) sessions per
    subject, which does not depend on the order of sessions; its interval needs equal numbers of sessions.

    Args:
        table: [subjects sessions], NaN where there was no session.

    Returns NaN and a note if there are fewer than two subjects, none with two sessions, or all values are equal.
    Source: Shrout and Fleiss 1979 (doi 10.1037/0033-2909.86.2.420); n0: Donner 1986, International Statistical Review 54.

    >>> round(icc(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).value, 4)  # (8 - 0) / (8 + 0 + 2 (1.5 - 0) / 3)
    0.8889
    """
    measured = ~np.isnan(table)
    kept = table[measured.any(axis=1)][:, measured.any(axis=0)]
    x = kept[~np.isnan(kept)]
    complete = x.size == kept.size
    form = "ICC(2,1)" if complete else "ICC(1,1)"
    sizes = {"num_subjects": len(kept), "num_sessions": x.size}
    if len(kept) < 2:
        return Icc(NAN, form, note="fewer than two subjects: the variation between subjects is unknown", **sizes)
    if x.size == len(kept):
        return Icc(NAN, form, note=NOTHING_REPEATED, **sizes)
    if constant(x):
        return Icc(NAN, form, note="all measurements are equal: there is no variance to share", **sizes)
    value, low, high, note = _two_way(kept) if complete else _one_way(kept)
    return Icc(value, form, low, high, note=note, **sizes)


def _two_way(x: Table) -> tuple[float, float, float, str]:
    """ICC(2,1) of a complete table, its interval and a note."""
    (n, k), centred = x.shape, x - x.mean()
    rows, columns = centred.mean(axis=1), centred.mean(axis=0)
    between = k * float((rows**2).sum()) / (n - 1)
    sessions = n * float((columns**2).sum()) / (k - 1)
    error = float(((centred - rows[:, None] - columns) ** 2).sum()) / ((n - 1) * (k - 1))
    total = between + (k - 1) * error + k * (sessions - error) / n
    if total <= ROUNDING * error:  # possible for two subjects with two sessions
        return NAN, NAN, NAN, "neither subjects nor sessions differ on average: the share has no denominator"
    value = (between - error) / total
    if error <= ROUNDING * max(between, sessions):
        return value, NAN, NAN, NO_ERROR
    ratio = sessions / error
    scale = n * (1 + (k - 1) * value) - k * value
    df = (k - 1) * (n - 1) * (k * value * ratio + scale) ** 2 / ((n - 1) * (k * value * ratio) ** 2 + scale**2)
    upper, lower = float(stats.f.ppf((1 + LEVEL) / 2, n - 1, df)), float(stats.f.ppf((1 + LEVEL) / 2, df, n - 1))
    rest = k * sessions + (k * n - k - n) * error
    low = n * (between - upper * error) / (upper * rest + n * between)
    high = n * (lower * between - error) / (rest + n * lower * between)
    return value, low, high, ""


def _one_way(x: Table) -> tuple[float, float, float, str]:
    """ICC(1,1) of a table with gaps, its interval and a note."""
    counts = (~np.isnan(x)).sum(axis=1)
    num, a = int(counts.sum()), len(x)
    means = np.nanmean(x, axis=1)
    between = float((counts * (means - np.nanmean(x)) ** 2).sum()) / (a - 1)
    within = float(np.nansum((x - means[:, None]) ** 2)) / (num - a)
    n0 = (num - float((counts**2).sum()) / num) / (a - 1)
    value = (between - within) / (between + (n0 - 1) * within)
    if np.ptp(counts):
        return value, NAN, NAN, "subjects have unequal numbers of sessions: one-way model, without an interval"
    if within <= ROUNDING * between:
        return value, NAN, NAN, NO_ERROR
    low = between / within / float(stats.f.ppf((1 + LEVEL) / 2, a - 1, num - a))
    high = between / within * float(stats.f.ppf((1 + LEVEL) / 2, num - a, a - 1))
    note = "sessions are not the same for all subjects: one-way model"
    return value, (low - 1) / (low + n0 - 1), (high - 1) / (high + n0 - 1), note


def coefficient_of_variation(table: Table) -> WithinSubject:
    """Within-subject coefficient of variation: sqrt(sum (n_i - 1) (s_i / m_i)^2 / sum (n_i - 1)).

    s_i, m_i: standard deviation and mean of the n_i sessions of subject i; 0 if sessions agree exactly. With two sessions
    each, (s/m)^2 = 2 (x1 - x2)^2 / (x1 + x2)^2. Subjects with one session are left out, as are those whose mean is not
    above 0, with a note.

    Args:
        table: [subjects sessions] of positive measurements, NaN where there was no session.

    Source: Hyslop and White 2009 (doi 10.3155/1047-3289.59.9.1032), its root mean square for duplicates.

    >>> round(coefficient_of_variation(np.array([[9.0, 11.0], [20.0, 20.0]])).value, 4)  # sqrt((2 / 10^2 + 0) / 2)
    0.1
    """
    repeated = table[(~np.isnan(table)).sum(axis=1) > 1]
    if not len(repeated):
        return WithinSubject(NAN, note=NOTHING_REPEATED)
    means = np.nanmean(repeated, axis=1)
    kept, m = repeated[means > 0], means[means > 0]
    left_out = len(repeated) - len(kept)
    note = f"{left_out} left out, as the mean of their sessions is not above 0" if left_out else ""
    if not len(kept):
        return WithinSubject(NAN, note=note)
    freedom = (~np.isnan(kept)).sum(axis=1) - 1
    squares = np.nansum((kept - m[:, None]) ** 2, axis=1) / m**2
    return WithinSubject(math.sqrt(float(squares.sum()) / int(freedom.sum())), len(kept), note)


def bland_altman(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> BlandAltman:
    """Bias and limits of agreement of paired measurements: mean and mean -+ 1.96 sd of `first` minus `second`.

    Args:
        first, second: [n], paired by index; a pair with a NaN is left out.

    Returns NaN and a note without a pair; with a single one the limits are NaN.
    Source: Bland and Altman 1986 (doi 10.1016/S0140-6736(86)90837-8).

    >>> bland_altman(np.array([3.0, 5.0]), np.array([2.0, 5.0])).bias
    0.5
    """
    difference = first - second
    d = difference[~np.isnan(difference)]
    if not d.size:
        return BlandAltman(NAN, note="no pair of measurements to compare")
    bias = float(d.mean())
    if d.size == 1:
        return BlandAltman(bias, n=1, note="only one pair: the variation of the differences is unknown")
    reach = LIMITS * float(d.std(ddof=1))
    return BlandAltman(bias, bias - reach, bias + reach, d.size)
