"""The rule of the race: a candidate that is significantly worse than one that has run fully gets no more splits.

The rule is in docs/statistics.md. The looks overlap, so Bonferroni's 1 / L in place of 1 / sqrt(L) would be too strict: for equal
candidates, 5 to 40 splits and a level of .1 the chance that any look puts one out is .09 to .11 (simulated;
tests/unit/search/test_race.py). Why t: the smallest p of an exact Wilcoxon test (Optuna's WilcoxonPruner) of 3 splits is 1/8, so it
needs a third to a half more fits (tests/benchmarks/bench_racing.py). With two objectives an opponent must be better in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

from softseg_dist.record.ledger import RaceRecord
from softseg_dist.study import Race

ROUNDING = 1e-12  # of the scores: a difference as small as this is none
ScoresBySplit = Mapping[int, tuple[float, ...]]
"""split -> the values of the objectives on validation, in their own units."""


def num_looks(race: Race, num_splits: int) -> int:
    """How often a candidate can be put out: after `start` splits and each further one; after the last there is nothing to save."""
    return max(0, num_splits - race.start)


def p_worse(differences: npt.ArrayLike, rounding: float = ROUNDING) -> float:
    """One-sided p of the paired t-test that the mean of `differences` [n] is below 0; small is worse.

    n >= 2. Equal differences have no variance: p is 0, 1/2 or 1 if they are below, at or above 0, up to `rounding`.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(values.size)
    if abs(mean) <= rounding:
        return 0.5
    return float(stdtr(values.size - 1, mean / max(error, rounding)))


def raced_out(
    race: Race, num_splits: int, signs: Sequence[int], candidate: tuple[str, ScoresBySplit], opponents: Mapping[str, ScoresBySplit]
) -> RaceRecord | None:
    """The record of the race that `candidate` has lost, against the opponent that beats it most clearly; None if it stays in.

    `signs` are +1 for an objective of which more is better, else -1. `opponents` have run all splits.
    """
    name, own = candidate
    lost = []
    for opponent, other in opponents.items():
        shared = sorted(own.keys() & other.keys())
        if race.start <= len(shared) < num_splits:
            ours, theirs = np.array([own[j] for j in shared]), np.array([other[j] for j in shared])
            differences, rounding = ours - theirs, ROUNDING * np.abs([ours, theirs]).max()
            p = [p_worse(s * d, rounding) for s, d in zip(signs, differences.T, strict=True)]
            if max(p) < race.level / math.sqrt(num_looks(race, num_splits)):
                lost.append((max(p), opponent, len(shared), differences.mean(axis=0), p))
    if not lost:
        return None
    _, winner, after, means, p = min(lost, key=lambda found: found[0])
    values = tuple(map(float, np.mean([other for _, other in sorted(opponents[winner].items())], axis=0) + means))
    second = {"second_difference": float(means[1]), "second_p": p[1]} if len(signs) > 1 else {}
    return RaceRecord(candidate=name, incumbent=winner, after=after, difference=float(means[0]), p=p[0], values=values, **second)


def look(sign: int, own: ScoresBySplit, best: ScoresBySplit | None) -> tuple[float, float]:
    """How good a candidate looks by its first objective, to be compared between candidates, more is better; -inf without a score.

    Its mean paired difference to the `best` that has run fully; while there is none, how far it has run, and then its mean.
    """
    if not own:
        return -math.inf, 0.0
    if best is None:
        return len(own), sign * fmean(values[0] for values in own.values())
    return sign * fmean(own[j][0] - best[j][0] for j in own.keys() & best.keys()), 0.0
