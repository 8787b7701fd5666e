"""Counts and orders in the searcher decide as its plain rule does, which looks at every candidate at every event."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from driven_search import failed, finished, searcher

from softseg_dist import MonteCarlo, Optim, Phantom, Race, Recipe, Search, Study, TuneEach
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.search.candidate import CandidateState
from softseg_dist.search.race import look, raced_out
from softseg_dist.search.searcher import StudySearcher
from softseg_dist.training.task import FitTask

SEED = 24  # in this one opponents change while others are underway, with and without a second objective
BASE = Recipe(optim=Optim(epochs=1))


def plain_scores(candidate: CandidateState) -> dict[int, tuple[float, ...]]:
    found = {}
    for split in sorted({split for split, _ in candidate.results}):
        fits = [result for result in candidate.results.values() if result.split == split]
        values = [(fit.score, *map(fit.scores.get, candidate.objectives[1:])) for fit in fits]
        if len(values) == candidate.repeats and None not in sum(values, ()):
            found[split] = tuple(map(fmean, zip(*values, strict=True)))
    return found


class PlainRule:
    """What the docstring of `StudySearcher` says, from the candidates alone."""

    def __init__(self, search: StudySearcher) -> None:
        self.race, self.start, self.signs = search._race, search._start, search._signs
        self.control, self.num_splits, self.all = search.study.control, len(search.splits), list(search.candidates.values())
        self.scores = {c.name: plain_scores(c) for c in self.all}
        full = [c for c in self.all if c.origin != "tuning" and c.raced is None and len(self.scores[c.name]) == self.num_splits]
        self.full = full if self.race else []
        self.best = max(self.full, key=lambda c: self.signs[0] * (c.means or (-np.inf,))[0], default=None)

    def is_raced(self, candidate: CandidateState) -> bool:
        known = self.race is not None and candidate.origin != "tuning" and candidate.name != self.control
        return known and (candidate.origin == "proposed" or self.race.fixed)

    def is_underway(self, candidate: CandidateState) -> bool:
        emitted = len(candidate.results) + len(candidate.lost) + len(candidate.running)
        return self.is_raced(candidate) and emitted >= self.start

    def look(self, candidate: CandidateState) -> tuple[float, float]:
        return look(self.signs[0], self.scores[candidate.name], self.scores[self.best.name] if self.best else None)

    def order(self, candidate: CandidateState) -> tuple[float, ...]:
        split, repeat, _ = candidate.todo[0]
        worse = tuple(-value for value in self.look(candidate))
        return (self.num_splits, *worse) if self.is_underway(candidate) else (split.index, repeat)

    def next(self, num_to_ask: int) -> CandidateState | None:
        """The candidate that emits next; None for a proposal, or for none."""
        open_ones = [c for c in self.all if c.todo and not c.tuning]
        ahead = [c for c in open_ones if self.is_underway(c) and len(c.results) >= self.start]
        leader = max(ahead, key=self.look, default=None)
        if leader and self.best and self.look(leader)[0] < 0:
            leader = None
        free = [c for c in open_ones if c is leader or not self.is_underway(c) or (self.best and not c.running)]
        return min(free or (() if num_to_ask else open_ones), key=self.order, default=None)

    def losers(self) -> list[RaceRecord]:
        opponents = {c.name: self.scores[c.name] for c in ([self.best] if len(self.signs) == 1 else self.full)} if self.best else {}
        racing = [c for c in self.all if self.is_raced(c) and c.todo and not c.failed]
        found = (raced_out(self.race, self.num_splits, self.signs, (c.name, self.scores[c.name]), opponents) for c in racing)
        return [record for record in found if record is not None]


class Checked(StudySearcher):
    """Fails where it does not decide as the plain rule."""

    def _next(self) -> CandidateState | None:
        plain, asked = PlainRule(self), self._num_to_ask
        expected, found = plain.next(asked), super()._next()
        assert expected is found or (expected is None and asked and found not in plain.all)
        return found

    def _run_race(self) -> None:
        expected, before = PlainRule(self).losers(), {name for name, c in self.candidates.items() if c.raced}
        super()._run_race()
        assert [c.raced for name, c in self.candidates.items() if c.raced and name not in before] == expected
        assert self._best is PlainRule(self).best

    def _settle(self, candidate: CandidateState) -> None:
        super()._settle(candidate)
        assert not any(c.ended and self._optuna and c.name in self._optuna._open for c in self.candidates.values())

    def states(self) -> dict[str, tuple[Any, ...]]:
        """What a session reports of a candidate."""
        assert self.ended == (not self._num_to_ask and all(c.ended for c in self.candidates.values()))
        later = self._num_to_ask * len(self.splits) * self.study.repeats
        assert self.num_planned == sum(c.num_planned for c in self.candidates.values()) + later
        return {name: (c.ended, c.raced, c.note) for name, c in self.candidates.items()}


def propose(trial: Any) -> Recipe:
    return BASE.replace(optim=Optim(epochs=1, lr=trial.suggest_float("lr", 1e-4, 1e-1, log=True)))


def make_study(splits: int, *names: str, **fields: Any) -> Study:
    known = {"name": "s", "question": "?", "data": Phantom(subjects=10), "splits": MonteCarlo(count=splits)}
    return Study(**known, candidates=dict.fromkeys(names, BASE), **fields)


def search(trials: int, race: Race | None, startup: int = 3) -> Search:
    return Search(propose, trials=trials, startup_trials=startup, race=race)


STUDIES = {
    "fixed": make_study(3, "a", "b", "c", control="b", repeats=2),
    "tuned": make_study(2, "a", "b", tune_each=TuneEach(trials=2, splits=1)),
    "search": make_study(2, "a", search=search(5, None)),
    "race": make_study(4, "a", control="a", search=search(6, Race(level=0.3))),
    "race of all": make_study(4, *"abc", control="c", search=search(2, Race(fixed=True, level=0.4))),
    "race of repeats": make_study(4, repeats=2, search=search(3, Race(level=0.4), startup=2)),
    "two objectives": make_study(4, "a", second_objective="brier", search=search(6, Race(level=0.45))),
}


def happens(to: Checked, task: FitTask, generator: np.random.Generator) -> None:
    """Let a running fit end somehow."""
    event = generator.choice(["finished", "failed", "lost", "moved", "interrupted"], p=[0.85, 0.03, 0.04, 0.04, 0.04])
    noise = np.random.default_rng(seed_of(task.key)).normal(0, 0.05, 2)
    if event == "finished":
        level = seed_of(task.candidate) % 7 / 10  # few levels: two candidates may be equal but for their noise
        to.finish(finished(task, round(level + noise[0], 2), second=round(level / 2 + noise[1], 2)))
    elif event == "failed":
        to.finish(failed(task))
    elif event == "interrupted":
        to.interrupt(task)
    else:
        to.lose(task, event, blameless=event == "moved")


@pytest.mark.parametrize("kind", STUDIES)
def test_every_decision_is_that_of_the_plain_rule_over_all_candidates(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("driven_search.StudySearcher", Checked)
    generator, num_ended = np.random.default_rng(SEED), 0
    for width in (1, 2, 5, 3, 1, 8, 1, 2):
        one, running, goes_on = searcher(tmp_path, STUDIES[kind]), [], True
        assert isinstance(one, Checked)
        while goes_on or running:
            while goes_on and len(running) < width and (task := one.next_fit()) is not None:
                running.append(task)
            before = one.states()
            one.changed()
            if not running:
                break
            happens(one, running.pop(generator.integers(len(running))), generator)
            goes_on &= generator.random() > 0.02
            num_ended += 1
            now = one.states()
            assert {name for name in now if now[name] != before.get(name)} <= {c.name for c in one.changed()}
    assert one.ended
    assert num_ended >= len(one.candidates)


def test_an_interrupted_fit_is_the_next_again_and_is_counted_once(tmp_path: Path) -> None:
    one = searcher(tmp_path, STUDIES["fixed"])
    tasks = [one.next_fit() for _ in range(one.num_planned)]
    assert one.next_fit() is None
    one.interrupt(tasks[4])
    assert one.next_fit() == tasks[4]
    assert one.num_planned == len(tasks)
    assert not one.ended
