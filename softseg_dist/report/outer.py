"""A nested study: what its whole procedure, search included, scores on subjects of outer splits, who had no part in it."""

from __future__ import annotations

from dataclasses import dataclass

from softseg_dist.numerics.metrics import OBJECTIVES
from softseg_dist.numerics.statistics import CrossedTest, crossed_test
from softseg_dist.report.run_folder import OuterData
from softseg_dist.report.scores import soft_scores
from softseg_dist.study import WINNER
from softseg_dist.words import count, interval, number, p_clause


@dataclass(frozen=True)
class OuterRow:
    """One outer split: who won inside it, and means of the objective. None: undefined everywhere, or no control."""

    split: int
    run: str
    winner: str
    validation: float | None
    test: float | None
    control: float | None


@dataclass(frozen=True)
class OuterTable:
    """All outer splits that are complete, of `planned`. `score` and `difference` (winners less control) are crossed tests.

    A score is that of a subject in an outer split: the mean over the fits of that split's winner. `difference` is None without
    a control.
    """

    name: str
    question: str
    objective: str
    objective_title: str
    sign: int
    control: str | None
    planned: int
    rows: tuple[OuterRow, ...]
    score: CrossedTest
    control_score: CrossedTest | None
    difference: CrossedTest | None

    @property
    def winners(self) -> dict[str, int]:
        """How many outer splits each winner won."""
        names = [row.winner for row in self.rows]
        return {name: names.count(name) for name in dict.fromkeys(names)}


def outer_table(outer: OuterData) -> OuterTable:
    """The numbers of a nested study, finished or not."""
    record = outer.record
    objective = OBJECTIVES[record["objective"]]
    scores, control = soft_scores(outer.results, objective.metric), record["control"]
    named = ("split", "run", "winner", "validation_score", "holdout_score", "control_holdout_score")
    return OuterTable(
        name=record["study"],
        question=outer.question,
        objective=objective.metric,
        objective_title=objective.title,
        sign=objective.sign,
        control=control,
        planned=record["planned"],
        rows=tuple(OuterRow(*(found[field] for field in named)) for found in record["outer"]),
        score=crossed_test(scores.of(WINNER)),
        control_score=crossed_test(scores.of(control)) if control else None,
        difference=crossed_test(scores.difference(WINNER, control)) if control else None,
    )


def outer_answer(table: OuterTable) -> str:
    """What the procedure scores, and how far it is from the control, in one sentence."""
    score, difference = table.score, table.difference
    sample = f"{count(score.num_subjects, 'outer test subject')}, {count(score.num_splits, 'outer split')}"
    found = (
        f"The whole procedure, with its search and the choice of a winner, scores {number(score.mean)} in "
        f"{table.objective_title} on subjects who had no part in it (95 % interval {interval(score.low, score.high)}; {sample})"
    )
    if difference is None or table.control_score is None:
        return f"{found}."
    tested = p_clause(difference.p) if difference.p == difference.p else f"not tested: {difference.note}"
    return (
        f"{found}; the control {table.control} scores {number(table.control_score.mean)} there: difference "
        f"{number(difference.mean, signed=True)}, 95 % interval {interval(difference.low, difference.high, signed=True)}, {tested}."
    )
