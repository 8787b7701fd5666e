"""Subjects in no inner split: the held-out subjects of a study, and the outer test subjects of a nested study.

Held-out subjects are predicted by the fits of winner and control of every split. Outer test subjects are predicted by the
winner that was chosen without them, so their scores measure the whole procedure, not one model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.metrics import Row, row_of
from softseg_dist.report.paired_tests import effect_in_words, primary_test
from softseg_dist.report.run_folder import OuterData, RunData
from softseg_dist.report.scores import mean_of, scores_by_rule, soft_scores
from softseg_dist.study import WINNER
from softseg_dist.words import count, interval_clause, number


@dataclass(frozen=True)
class HeldOutScore:
    """The objective of one candidate on the held-out subjects, each predicted by the fit of every split, and its Dice by rule."""

    name: str
    score: CrossedTest
    dice: dict[str, float]


@dataclass(frozen=True)
class HoldoutTable:
    """Who was held out, and what the last opening showed. `opened` has the time of every opening.

    `scores` and `crossed` (winner minus control) are empty and None while nothing was opened, or for a lone winner.
    """

    num_subjects: int
    opened: tuple[str, ...]
    winner: str | None
    scores: tuple[HeldOutScore, ...]
    crossed: CrossedTest | None


def holdout_of(run: RunData, objective: Row) -> HoldoutTable | None:
    """The table of the last opening; None if no subject was held out."""
    record, rows = run.holdout_record, run.holdout
    if record is None:
        return None
    opened = tuple(opening.at for opening in record.opened)
    if rows is None or not opened:
        return HoldoutTable(len(record.subjects), opened, None, (), None)
    winner, control = record.opened[-1].winner, record.opened[-1].control
    scores, dice = soft_scores(rows, objective.name), scores_by_rule(rows, run.finished, "dice")
    found = []
    for name in dict.fromkeys(name for name in (winner, control) if name is not None and name in scores.tables):
        score = primary_test(scores, scores.of(name), objective.limits)
        found.append(HeldOutScore(name, score, {rule: mean_of(of_rule.of(name)) for rule, of_rule in dice.items()}))
    crossed = primary_test(scores, scores.difference(found[0].name, found[1].name)) if len(found) == 2 else None
    return HoldoutTable(len(record.subjects), opened, winner, tuple(found), crossed)


@dataclass(frozen=True)
class OuterTable:
    """All outer splits that are complete, of `planned`. `score` and `difference` (winners minus control) are crossed tests.

    `rows` has their records in outer.json: who won inside, and means of the objective, None where it is undefined everywhere. A
    score is that of a subject in an outer split: the mean over the fits of its winner. Without a control `difference` is None.
    """

    name: str
    question: str
    objective: Row
    control: str | None
    planned: int
    rows: tuple[Mapping[str, Any], ...]
    score: CrossedTest
    control_score: CrossedTest | None
    difference: CrossedTest | None


def outer_table(outer: OuterData) -> OuterTable:
    """The numbers of a nested study, finished or not."""
    record = outer.record
    objective = row_of(record["objective"])
    scores, control = soft_scores(outer.results, objective.name), record["control"]
    return OuterTable(
        name=record["study"],
        question=outer.question,
        objective=objective,
        control=control,
        planned=record["planned"],
        rows=tuple(record["outer"]),
        score=primary_test(scores, scores.of(WINNER), objective.limits),
        control_score=primary_test(scores, scores.of(control), objective.limits) if control else None,
        difference=primary_test(scores, scores.difference(WINNER, control)) if control else None,
    )


def outer_answer(table: OuterTable) -> str:
    """What the procedure scores, and how far it is from the control, in one sentence."""
    score, difference = table.score, table.difference
    sample = f"{count(score.num_subjects, 'outer test subject')}, {count(score.num_splits, 'outer split')}"
    scores = f"{number(score.mean)} in {table.objective.title} on subjects who had no part in it"
    procedure = "The whole procedure, with its search and the choice of a winner"
    found = f"{procedure}, scores {scores} ({interval_clause(score.low, score.high)}; {sample})"
    if difference is None or table.control_score is None:
        return f"{found}."
    control = f"the control {table.control} scores {number(table.control_score.mean)} there"
    return f"{found}; {control}: difference {effect_in_words(difference, difference.p)}."
