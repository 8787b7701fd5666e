"""A candidate in a session: what it still has to run, what runs, what came out, and what was decided about it."""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Literal

from softseg_dist.data.splits import Split
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.search.race import Scores
from softseg_dist.study import Recipe
from softseg_dist.training.task import FitResult

Origin = Literal["fixed", "proposed", "tuning"]


@dataclass
class Candidate:
    """`objectives` are the metrics that it is judged by.

    `tuning` names the trials of its learning rate that it waits for; `note` is what came of them that people should know.
    """

    name: str
    recipe: Recipe
    origin: Origin
    objectives: tuple[str, ...]
    todo: deque[tuple[Split, int]]  # with the attempt that is due
    running: set[int] = field(default_factory=set)
    results: dict[int, FitResult] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # split -> why it was given up in this session
    moves: Counter[int] = field(default_factory=Counter)  # split -> how often it was lost blamelessly in this session
    raced: RaceRecord | None = None
    tuning: tuple[str, ...] = ()
    note: str = ""

    @property
    def ended(self) -> bool:
        """Nothing of it runs or is left to run in this session."""
        return not self.todo and not self.running

    @property
    def failed(self) -> bool:
        """One of its fits has no score."""
        return bool(self.lost) or any(result.score is None for result in self.results.values())

    @property
    def closed(self) -> bool:
        """It runs no further splits, whatever is left: it was raced out, or has failed and is not one of the study file."""
        return self.raced is not None or (self.failed and self.origin != "fixed")

    @property
    def num_planned(self) -> int:
        """Its fits: ended, given up, running and still to come."""
        return len(self.results) + len(self.lost) + len(self.running) + len(self.todo)

    @property
    def num_emitted(self) -> int:
        """Its fits that were emitted, now or in earlier sessions."""
        return self.num_planned - len(self.todo)

    @property
    def scores(self) -> Scores:
        """Its values on validation by split, where all objectives have one."""
        found = {}
        for split, result in sorted(self.results.items()):
            values = self._values(result)
            if None not in values:
                found[split] = tuple(value for value in values if value is not None)
        return found

    @property
    def means(self) -> tuple[float, ...] | None:
        """The mean over splits of each objective; None if a fit has failed, or an objective is undefined in all of them."""
        columns = [
            [value for value in column if value is not None]
            for column in zip(*map(self._values, self.results.values()), strict=True)
        ]
        if self.failed or not all(columns):
            return None
        return tuple(math.fsum(column) / len(column) for column in columns)

    def drop(self) -> None:
        """Emit nothing more."""
        self.todo.clear()

    def again(self, split: Split, attempt: int) -> None:
        """A fit that was emitted did not end: it runs again, before all others, unless that is not needed any more."""
        if not self.closed and split.index not in self.results:
            self.todo.appendleft((split, attempt))

    def _values(self, result: FitResult) -> tuple[float | None, ...]:
        return (result.score, *(result.scores.get(name) for name in self.objectives[1:]))
