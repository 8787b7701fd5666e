"""The held-out subjects: what winner and control score on people who were in no split."""

from __future__ import annotations

from dataclasses import dataclass

from softseg_dist.numerics.statistics import CrossedTest, crossed_test
from softseg_dist.report.ranking import RULES
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import mean_of, scores_at_rule, soft_scores


@dataclass(frozen=True)
class HeldOutScore:
    """The objective of one candidate on the held-out subjects, each predicted by the fit of every split."""

    name: str
    mean: float
    low: float
    high: float
    dice: dict[str, float]
    num_subjects: int
    num_splits: int


@dataclass(frozen=True)
class HoldoutTable:
    """Who was held out, and what the last opening showed. `opened` has the time of every opening.

    `scores` and `crossed` (winner less control) are empty and None while nothing was opened, or for a lone winner.
    """

    num_subjects: int
    opened: tuple[str, ...]
    winner: str | None
    control: str | None
    scores: tuple[HeldOutScore, ...]
    crossed: CrossedTest | None


def holdout_of(run: RunData, metric: str) -> HoldoutTable | None:
    """The table of the last opening; None if nobody was held out."""
    record, rows = run.holdout_record, run.holdout
    if record is None:
        return None
    opened = tuple(opening.at for opening in record.opened)
    if rows is None or not opened:
        return HoldoutTable(len(record.subjects), opened, None, None, (), None)
    winner, control = record.opened[-1].winner, record.opened[-1].control
    scores = soft_scores(rows, metric)
    dice = {rule: scores_at_rule(rows, run.finished, "dice", rule) for rule in RULES}
    found = []
    for name in dict.fromkeys(name for name in (winner, control) if name is not None and name in scores.tables):
        test = crossed_test(scores.of(name))
        cut = {rule: mean_of(of_rule.of(name)) for rule, of_rule in dice.items()}
        found.append(HeldOutScore(name, test.mean, test.low, test.high, cut, test.num_subjects, test.num_splits))
    crossed = crossed_test(scores.difference(found[0].name, found[1].name)) if len(found) == 2 else None
    return HoldoutTable(len(record.subjects), opened, winner, control, tuple(found), crossed)
