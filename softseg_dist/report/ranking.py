"""The ranking: one standing per candidate, by the paired difference on validation to the candidate that all are compared with."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from softseg_dist.numerics.metrics import row_of
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.paired_tests import primary_test
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import RULES, ScoreTables, mean_of, scores_by_rule, soft_rows, soft_scores, split_means, undefined

BESIDE = ("volume_error", "volume_error_abs", "brier", "ece")  # shown beside the objective


@dataclass(frozen=True)
class Standing:
    """One candidate in the ranking (see `ranked`); `rank` is None without a score.

    `chosen_by` is the mean that ranks it: on validation, or on test in a run without scores on validation. `mean` is on test, over
    all scores, one of a subject in a split; the 95 % interval, `low` to `high`, is that of the crossed random-effects model, which
    weighs them, and is NaN where `no_interval` says why; `sd` is over the means of the splits. `beside` has further metrics; at the
    threshold of each rule `dice` has the Dice, `mask_volume` the volume error of the mask; `thresholds` has the mean one chosen;
    `by_reference` and `by_class` the objective against each rater and in each class. `undefined` of the `values` are NaN.
    """

    rank: int | None
    name: str
    proposed: bool
    chosen_by: float
    mean: float
    sd: float
    low: float
    high: float
    no_interval: str
    by_split: dict[int, float]
    num_subjects: int
    num_splits: int
    num_scores: int
    beside: dict[str, float]
    dice: dict[str, float]
    mask_volume: dict[str, float]
    thresholds: dict[str, float]
    by_reference: dict[str, float]
    by_class: dict[str, float]
    undefined: int
    values: int


def best_complete(scores: ScoreTables, sign: int) -> str:
    """The best mean among the candidates with the most scores: what others are compared with where there is no control."""
    return max(scores.tables, key=lambda name: (np.isfinite(scores.of(name)).sum(), sign * mean_of(scores.of(name))))


def level(scores: ScoreTables, name: str, reference: str) -> float:
    """The mean of `reference` plus the paired difference to it; without a pair the candidate's own mean, NaN without a score.

    Equal to the candidate's mean where no fit is missing; so a hard split that it lacks is no gain.
    """
    paired = mean_of(scores.difference(name, reference))
    return mean_of(scores.of(name)) if math.isnan(paired) else mean_of(scores.of(reference)) + paired


def ranked(
    standings: Sequence[Standing], given_up: Collection[str], reference: str, choice: ScoreTables, sign: int
) -> tuple[Standing, ...]:
    """By the paired difference to the reference, so that a candidate does not gain by a hard split that it lacks.

    `choice` are scores on validation: what is tested chooses nothing. With all fits there this is the order of their means.
    Candidates that share no pair with the reference go by their mean. Those that were `given_up` come after all others: validation
    has shown them to be worse than one of these, and the few splits that they have must not make one of them the winner.
    """
    known = [s for s in standings if not math.isnan(s.mean)]
    known.sort(key=lambda s: (s.name not in given_up, sign * level(choice, s.name, reference)), reverse=True)
    unknown = [s for s in standings if math.isnan(s.mean)]
    return tuple([replace(s, rank=i) for i, s in enumerate(known, 1)] + unknown)


def standings_of(run: RunData, test: pd.DataFrame, scores: ScoreTables, choice: ScoreTables) -> list[Standing]:
    """A standing without rank for every candidate, in the order of the study; `scores` (test) and `choice` are of the objective."""
    objective = row_of(run.study["objective"])
    metric = objective.name
    references = [str(r) for r in sorted(test.loc[test["metric"] == metric, "reference"].unique()) if r != "mean"]
    classes = [str(c) for c in sorted(test["class"].unique())]
    tables = {
        "beside": {name: soft_scores(test, name) for name in BESIDE},
        "dice": scores_by_rule(test, run.finished, "dice"),
        "mask_volume": scores_by_rule(test, run.finished, "mask_volume_error"),
        "by_reference": {name: soft_scores(test, metric, reference=name) for name in references},
        "by_class": {name: soft_scores(test, metric, only_class=name) for name in classes} if len(classes) > 1 else {},
    }
    counts = undefined(soft_rows(test, metric))
    standings = []
    for candidate in run.candidates:
        name = candidate.name
        whole, by_split = primary_test(scores, scores.of(name), objective.limits), split_means(scores.of(name), scores.splits)
        chosen = [fit.thresholds for fit in run.finished if fit.candidate == name]
        num_undefined, num_values = counts.get(name, (0, 0))
        standings.append(
            Standing(
                rank=None,
                name=name,
                proposed=candidate.proposed,
                chosen_by=mean_of(choice.of(name)),
                mean=mean_of(scores.of(name)),
                sd=float(np.std(list(by_split.values()), ddof=1)) if len(by_split) > 1 else NAN,
                low=whole.low,
                high=whole.high,
                no_interval=whole.remarks[-1] if math.isnan(whole.low) else "",
                by_split=by_split,
                num_subjects=whole.num_subjects,
                num_splits=whole.num_splits,
                num_scores=whole.num_pairs,
                **{part: {k: mean_of(s.of(name)) for k, s in group.items()} for part, group in tables.items()},
                thresholds={r: float(np.mean(taus)) for r in RULES if (taus := [of[r] for of in chosen if r in of])},
                undefined=num_undefined,
                values=num_values,
            )
        )
    return standings
