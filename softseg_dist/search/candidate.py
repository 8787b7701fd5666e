"""The state of a candidate in a session: what is left to run, what runs, its results, and decisions about it."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from softseg_dist.data.splits import Split
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.study import Recipe, TuneEach
from softseg_dist.training.task import FitResult, FitTask, Slot

Origin = Literal["fixed", "proposed", "tuning"]


@dataclass(eq=False)
class CandidateState:
    """`objectives` are the metrics that it is judged by; `note` is a remark on the tuning of its learning rate.

    `scores` are its values on validation by split, means over repeats, where all have ended and every objective has one.
    """

    name: str
    recipe: Recipe
    origin: Origin
    objectives: tuple[str, ...]
    repeats: int  # of every split
    todo: deque[tuple[Split, int, int]]  # with the repeat, and the attempt that is due
    number: int  # of the candidates that were opened before it
    raced: RaceRecord | None = None
    running: set[Slot] = field(default_factory=set)
    states: dict[Slot, str] = field(default_factory=dict)  # of its fits that have ended; `record` adds them
    results: dict[Slot, FitResult] = field(default_factory=dict)  # of those, until its end was reported
    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    lost: dict[Slot, str] = field(default_factory=dict)  # why it was given up in this session
    moves: Counter[Slot] = field(default_factory=Counter)  # how often it was lost blamelessly in this session
    tuning: bool = False  # it waits for the trials of its learning rate
    note: str = ""
    counted: int = 0  # of its fits, those that the searcher has counted
    rank: tuple[float, float, float, int] | None = None  # of those with fits to emit the lowest is next; ends with its number
    _by_split: dict[int, list[tuple[float | None, ...]]] = field(default_factory=dict)  # one value for each objective
    _failed: bool = False

    @property
    def ended(self) -> bool:
        """Nothing of it runs or is left to run in this session."""
        return not self.todo and not self.running

    @property
    def failed(self) -> bool:
        """One of its fits has no score."""
        return self._failed or bool(self.lost)

    @property
    def closed(self) -> bool:
        """It runs no further splits, whatever is left: it was raced out, or has failed and is not one of the study file."""
        return self.raced is not None or (self.failed and self.origin != "fixed")

    @property
    def num_planned(self) -> int:
        """Its fits: ended, given up, running and left to run."""
        return len(self.states) + len(self.lost) + len(self.running) + len(self.todo)

    @property
    def means(self) -> tuple[float, ...] | None:
        """The mean over splits of each objective; None if a fit has failed, or an objective is undefined in all of them."""
        by_split = [[_mean(column) for column in zip(*fits, strict=True)] for fits in self._by_split.values()]
        known = [[value for value in column if value is not None] for column in zip(*by_split, strict=True)]
        if self.failed or not all(known):
            return None
        return tuple(map(fmean, known))

    @property
    def values(self) -> tuple[float, ...] | None:
        """What Optuna gets when it has ended: those of the race that it lost, else `means`; None if it failed."""
        return self.means if self.raced is None or self.failed else self.raced.values

    def record(self, result: FitResult) -> None:
        """A fit has ended."""
        self.results[result.slot] = result
        self.states[result.slot] = result.state
        self._failed |= result.score is None
        fits = self._by_split.setdefault(result.split, [])
        fits.append((result.score, *(result.scores.get(name) for name in self.objectives[1:])))
        if len(fits) == self.repeats:
            known = [[value for value in values if value is not None] for values in fits]
            if all(len(values) == len(self.objectives) for values in known):
                self.scores[result.split] = tuple(map(fmean, zip(*known, strict=True)))

    def again(self, task: FitTask, attempt: int) -> None:
        """A fit that was emitted did not end: it runs again, before all others, if it is still needed."""
        if not self.closed and task.slot not in self.states:
            self.todo.appendleft((task.split, task.repeat, attempt))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def tuning_name(candidate: str, number: int) -> str:
    """`hard-dice~2`; no candidate of a study file has a `~` in its name."""
    return f"{candidate}~{number}"


def is_tuning(candidate: str) -> bool:
    """Is this the name of such a trial?"""
    return "~" in candidate


def tuned(recipe: Recipe, tune: TuneEach, trials: Sequence[CandidateState], sign: int) -> tuple[Recipe, str]:
    """The recipe with the rate that won, and ""; as it is, and a note, if all trials have failed.

    Among equal means the rate nearest to the recipe's own wins, by ratio; `sign` is that of the objective.
    """
    means = [trial.means for trial in trials]
    known = [(sign * mean[0], rate) for mean, rate in zip(means, tune.rates, strict=True) if mean]
    own = recipe.optim.lr
    if not known:
        return recipe, f"every learning rate that was tried has failed: it keeps its own, {own:g}"
    _, rate = max(known, key=lambda found: (found[0], -abs(math.log(found[1] / own))))
    return with_rate(recipe, rate), ""


def with_rate(recipe: Recipe, rate: float) -> Recipe:
    """The same recipe at another learning rate."""
    return recipe.replace(optim=recipe.optim.replace(lr=rate))
