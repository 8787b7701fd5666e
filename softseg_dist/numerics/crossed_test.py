"""The primary test: is the mean difference 0, for new subjects and new training runs? Split-robust REML, and what weakens it.

Differences are a table [a b] of n values: subject i in split j, NaN where subject i is not in the test set of split j. The model is
d_ij = mu + subject_i + split_j + error_ij, all three random, with variances S, F and E. Formulas: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy import stats

from softseg_dist.numerics.statistics import ALL_EQUAL, NAN, TTest, constant

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
STARTS = ((0.4, 0.2, 0.4), (0.05, 0.6, 0.35))  # shares of S, F and E: the likelihood can have two peaks
LEAST_ERROR = 1e-4  # of E, as a share of the variance of all differences
MOST_STEPS, MOST_HALVINGS = 200, 20
FEW_SPLITS = 3  # up to here a test keeps its level and decides nothing
FEW_SUBJECTS = 60  # below, skewed subjects make p too small
SKEWED = 1.0  # skewness of subject means from which on it counts, or twice its standard error; by simulation (docs/statistics.md)
FAR = 6.0  # of one subject from the mean of the others, in their standard deviations; likewise


@dataclass(frozen=True)
class CrossedTest(TTest):
    """The result of `crossed_test`: `mean` is weighted by the model; `low` and `high` bound its 95 % interval.

    Variances are per component, `var_split` may be 0. `warnings` say what weakens p: few splits, one subject that carries the
    variance, or skewed subjects, then with the p of Wilcoxon's test over subject means.
    """

    var_subject: float = NAN
    var_split: float = NAN
    var_error: float = NAN
    num_splits: int = 0
    num_pairs: int = 0


def crossed_test(differences: Matrix, subjects: Sequence[str] = ()) -> CrossedTest:
    """Two-sided t-test of mean difference 0 under d_ij = mu + subject_i + split_j + error_ij, all effects random.

    The mean is weighted by the components S, F and E that restricted maximum likelihood (REML) finds. Its variance is not the
    model's, which is too small where F was found to be 0 (docs/statistics.md). It generalises to new subjects of the same sites and
    to new training runs. With each subject tested once and equal folds it is the t-test on the means of the folds.

    Args:
        differences: [a b], NaN where subject i was not tested in split j.
        subjects: [a] names of the rows, for the warnings; without, rows are numbered from 0.

    Returns p = NaN and a note for fewer than two subjects or splits, or if all differences, or all split totals, are equal.
    Source: derived and simulated for this package; Satterthwaite 1946 (doi 10.2307/3002019).

    >>> table = np.array([[0.1, np.nan], [0.3, 0.2], [np.nan, 0.4], [0.2, np.nan]])
    >>> test = crossed_test(table)
    >>> round(test.mean, 6), round(test.df, 6), round(test.p, 6)
    (0.238265, 1.0, 0.182452)
    """
    tested = ~np.isnan(differences)
    rows = np.flatnonzero(tested.any(axis=1))
    kept = differences[rows][:, tested.any(axis=0)]
    known = ~np.isnan(kept)
    d, (a, b) = kept[known], kept.shape
    mean = float(d.mean()) if d.size else NAN
    sizes = {"num_subjects": a, "num_splits": b, "num_pairs": d.size}
    if note := _why_untestable(d, a, b):
        return CrossedTest(mean, note=note, **sizes)
    unit = float(d.std(ddof=1))
    model = _Model(known.astype(np.float64), np.where(known, (kept - mean) / unit, 0.0))
    found = min((_fitted(model, np.array(start)) for start in STARTS), key=lambda point: point.deviance)
    estimate, (variance, df) = mean + unit * found.mu, _variance_and_df(model, found)
    if variance <= 1e-24:
        return CrossedTest(estimate, note="the split totals are all equal: there is no variance to test against", **sizes)
    s, f, e = (float(component) for component in unit**2 * found.theta)
    parts = {"var_subject": s, "var_split": f, "var_error": e}
    result = CrossedTest.of(estimate, unit * math.sqrt(variance), df, **parts, **sizes)
    names = [subjects[i] if subjects else f"row {i}" for i in rows.tolist()]
    return replace(result, warnings=_warnings(b, np.nanmean(kept, axis=1), names))


def _why_untestable(d: Vector, num_subjects: int, num_splits: int) -> str:
    if d.size == 0:
        return "no pair of scores to compare"
    if num_subjects == 1:
        return "only one subject: the variation between subjects is unknown"
    if num_splits == 1:
        return "only one split: the variation between training runs is unknown"
    return ALL_EQUAL if constant(d) else ""


@dataclass(frozen=True)
class _Model:
    """Differences of mean 0 and variance 1 as `y` [a b], 0 where not `tested` [a b]. Indices: 0 subject, 1 split, 2 error.

    With V = S A + F B + E I, where A and B [n n] mark the pairs of cells of one subject and of one split, everything needed of
    V^-1 and P = V^-1 - V^-1 1 1'V^-1 / 1'V^-1 1 follows from matrices [a a], [a b] and [b b].
    """

    tested: Matrix
    y: Matrix

    @cached_property
    def sums(self) -> tuple[Vector, Vector, Vector, Vector, float]:
        """Tests per subject and per split, sums of y by subject and by split, sum of squares."""
        n, y = self.tested, self.y
        return n.sum(1), n.sum(0), y.sum(1), y.sum(0), float((y**2).sum())

    @cached_property
    def num(self) -> int:
        return int(self.tested.sum())

    @cached_property
    def free(self) -> npt.NDArray[np.bool_]:
        """S is part of E where each subject was tested once, F where each split tested one subject."""
        return np.array([self.num != len(self.tested), self.num != self.tested.shape[1], True])

    def at(self, theta: Vector) -> _Point:
        """The likelihood at `theta` = (S, F, E), by Woodbury's identity over subjects, then over splits."""
        (n_i, m_j, y_i, y_j, squares), n, error = self.sums, self.tested, float(theta[2])
        g = 1 / (1 + theta[0] / error * n_i)
        c = theta[0] / error * g
        m = np.diag(m_j) - (n.T * c) @ n
        h = np.eye(len(m)) + theta[1] / error * m
        k = theta[1] / error * np.linalg.inv(h)
        w, u = g @ n, y_j - (c * y_i) @ n
        x = float(g @ n_i - w @ k @ w)
        mu = float(g @ y_i - w @ k @ u) / x
        rss = float(squares - c @ y_i**2 - u @ k @ u) - mu**2 * x
        log_det = float(np.linalg.slogdet(h)[1] - np.log(g).sum())
        deviance = (self.num - 1) * math.log(error) + log_det + math.log(x) + rss / error
        return _Point(theta, deviance, mu, rss, x, g, m, k)


@dataclass(frozen=True)
class _Point:
    """What `_Model.at` finds: -2 log REML up to a constant; at E = 1 y'Py, 1'V^-1 1 and the pieces of Woodbury's identity."""

    theta: Vector
    deviance: float
    mu: float
    rss: float
    x: float
    g: Vector
    m: Matrix
    k: Matrix

    @property
    def ratios(self) -> Vector:
        """S and F in units of E."""
        return self.theta[:2] / self.theta[2]


def _score_and_information(model: _Model, at: _Point) -> tuple[Vector, Matrix]:
    """First derivatives [3] of the log likelihood, and its expected information [3 3]. Those of E follow, as P V P = P."""
    (n_i, _, y_i, y_j, _), g, m, k = model.sums, at.g, at.m, at.k
    gn, w = g[:, None] * model.tested, g @ model.tested
    u = y_j - (at.ratios[0] * g * y_i) @ model.tested
    ones = g * n_i - gn @ (k @ w), w - m @ (k @ w)  # Z'V^-1 1, for subjects and splits
    residual = g * y_i - gn @ (k @ u) - at.mu * ones[0], u - m @ (k @ u) - at.mu * ones[1]  # Z'Py
    by_subject = np.diag(g * n_i) - gn @ k @ gn.T - np.outer(ones[0], ones[0]) / at.x
    crossed = gn - gn @ k @ m - np.outer(ones[0], ones[1]) / at.x
    by_split = m - m @ k @ m - np.outer(ones[1], ones[1]) / at.x
    trace, square, info = np.zeros(3), np.zeros(3), np.zeros((3, 3))
    trace[:2] = np.trace(by_subject), np.trace(by_split)
    square[:2] = residual[0] @ residual[0], residual[1] @ residual[1]
    info[0, 0], info[1, 1] = (by_subject**2).sum(), (by_split**2).sum()
    info[0, 1] = info[1, 0] = (crossed**2).sum()
    trace[2], square[2] = model.num - 1 - at.ratios @ trace[:2], at.rss - at.ratios @ square[:2]
    info[:2, 2] = info[2, :2] = trace[:2] - at.ratios @ info[:2, :2]
    info[2, 2] = trace[2] - at.ratios @ info[:2, 2]
    error = at.theta[2]
    return (square / error - trace) / (2 * error), info / (2 * error**2)


def _fitted(model: _Model, shares: Vector) -> _Point:
    """Fisher scoring from `shares` of the variance; what is not free starts, and stays, in the error."""
    theta = np.where(model.free, shares, 0.0)
    theta[2] += 1 - theta.sum()
    point, bounds = model.at(theta), np.array([0, 0, LEAST_ERROR])
    for _ in range(MOST_STEPS):
        score, info = _score_and_information(model, point)
        moving = model.free & ~((point.theta <= bounds) & (score < 0))  # a component at its bound that points outwards rests
        if not moving.any():
            break
        part = info[np.ix_(moving, moving)]
        step = np.zeros(3)
        step[moving] = np.linalg.solve(part + 1e-10 * np.diag(np.diag(part)), score[moving])
        new = _lower(model, point, step)
        if new is None:
            break
        moved, gain = np.abs(new.theta - point.theta).max(), point.deviance - new.deviance
        point = new
        if moved < 1e-9 or gain < 1e-13:
            break
    return point


def _lower(model: _Model, point: _Point, step: Vector) -> _Point | None:
    """The first point along `step`, halved again and again, whose deviance is not above that of `point`."""
    least = np.array([0, 0, max(LEAST_ERROR, point.theta[2] / 10)])
    for halvings in range(MOST_HALVINGS):
        new = model.at(np.where(model.free, np.maximum(point.theta + step / 2**halvings, least), 0.0))
        if new.deviance <= point.deviance + 1e-12:
            return new
    return None


def _variance_and_df(model: _Model, at: _Point) -> tuple[float, float]:
    """Variance of the weighted mean from the split totals of the weighted residuals, and its degrees of freedom.

    With the weights x_ij of the cells and u_j = sum_i x_ij (y_ij - mu), Q = sum u_j^2 has E[Q] = q'theta, the mean a variance of
    v'theta. The factor k = v_F / q_F makes k Q hold all of F; r'theta adds what k Q lacks of S and E.
    """
    free, kw = model.free, at.k @ (at.g @ model.tested)
    weights = (at.g[:, None] - kw + (at.ratios[0] * at.g * (model.tested @ kw))[:, None]) * model.tested
    weights /= weights.sum()
    of_subject, of_split, squares = weights.sum(1), weights.sum(0), (weights**2).sum(0)
    total = ((weights * (model.y - at.mu)).sum(0) ** 2).sum()
    shared = weights.T - np.outer(of_split, of_subject)
    own = np.diag(of_split) - np.outer(of_split, of_split)
    cross = np.outer(of_split, squares)
    noise = np.diag(squares) - cross - cross.T + np.outer(of_split, of_split) * squares.sum()
    covariances = shared @ shared.T, own @ own, noise  # [b b] of u, per unit of S, F and E
    q = np.array([np.trace(covariance) for covariance in covariances])
    v = np.array([of_subject @ of_subject, of_split @ of_split, squares.sum()])
    k = v[1] / q[1]
    r = np.zeros(3) if len(squares) == 2 else np.where(free, np.maximum(v - k * q, 0), 0) * [1, 0, 1]
    expected = k * (q @ at.theta) + r @ at.theta
    of_theta, whole = _covariance(model, at), sum(c * t for c, t in zip(covariances, at.theta, strict=True))
    spread = 2 * k**2 * (whole**2).sum() + 2 * k * (r @ of_theta @ (q * free)) + r @ of_theta @ r
    df = float(np.clip(2 * expected**2 / spread, min(model.tested.shape) - 1, model.num - 1))
    return float(k * total + r @ at.theta), df


def _covariance(model: _Model, at: _Point) -> Matrix:
    """That of the components [3 3]: the inverse information of the free ones, those found to be 0 included."""
    free, found = model.free, np.zeros((3, 3))
    info = _score_and_information(model, at)[1][np.ix_(free, free)]
    scale = np.sqrt(np.outer(np.diag(info), np.diag(info)))
    found[np.ix_(free, free)] = np.linalg.pinv(info / scale, rcond=1e-8, hermitian=True) / scale
    return found


def _warnings(num_splits: int, means: Vector, names: Sequence[str]) -> tuple[str, ...]:
    """What weakens the p of the test, as far as the splits and the `means` of the subjects show it."""
    warnings, top = [], int(np.argmax(np.abs(means - np.median(means))))
    if num_splits <= FEW_SPLITS:
        freedom = "1 degree" if num_splits == 2 else f"{num_splits - 1} degrees"
        warnings.append(f"{num_splits} splits, {freedom} of freedom: they decide nothing; at least 5 are advised, better 15")
    others = np.delete(means, top)
    if len(means) > 3 and abs(means[top] - others.mean()) > FAR * others.std(ddof=1) and not _skewed(others):
        difference = f"{names[top]}, mean difference {means[top]:+.3g}"
        warnings.append(f"one subject carries the variance ({difference}): the test is nearly blind")
    elif len(means) < FEW_SUBJECTS and _skewed(means):
        p = float(stats.wilcoxon(means[means != 0]).pvalue)
        beside = f"the rank test of the means of the {len(means)} subjects has p = {p:.2g}"
        warnings.append(f"differences are skewed: p can be two to three times too small; {beside}")
    return tuple(warnings)


def _skewed(values: Vector) -> bool:
    """Is the skewness of the sample beyond `SKEWED`, and beyond twice its standard error under normality?"""
    n = len(values)
    if n < 4 or constant(values):
        return False
    error = math.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    return abs(float(stats.skew(values, bias=False))) > max(SKEWED, 2 * error)
