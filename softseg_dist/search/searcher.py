"""Which fit runs next: fixed candidates first, the control before all, then what Optuna proposes, as long as it keeps up.

Knows no Ray: it gives `FitTask`s and takes their results. All its state can be rebuilt from the ledger. Proposals
and races are the same again only if results arrive in the same order, as they do with one fit at a time.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import product
from operator import attrgetter

from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.record.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.search.candidate import CandidateState, Origin, tuned, tuning_name, with_rate
from softseg_dist.search.optuna_study import OPTUNA_LOG, OptunaStudy
from softseg_dist.search.race import look, num_looks, raced_out
from softseg_dist.study import Race, Recipe, Study
from softseg_dist.training.task import FitResult, FitTask, fit_name

MAX_ATTEMPTS = 2  # a fit whose process dies gets one more
MAX_MOVES = 20  # so often a fit may lose its machine in a session: spot machines end, but a fit may also crash them
PROPOSED = re.compile(r"trial-\d+")
NUMBER, RANK = attrgetter("number"), attrgetter("rank")

MakeTask = Callable[[str, Recipe, Split, int, int], FitTask]
"""(candidate, recipe, split, repeat, attempt) -> the task, with folder and resources."""


class StudySearcher:
    """Emits the fits of a study and keeps ledger and Optuna up to date.

    Of all open candidates the one with the lowest split is next, and of one split that with the lowest repeat. A candidate in the
    race (proposed, or fixed with `Race(fixed=True)`, but never the control) runs `Race.start` splits so. Then it waits for each of
    its results, which may end it, and the one that looks best goes first: all others are tested against the best that has run
    fully. Only the leader does not wait, as long as none has run fully or it looks no worse than the best that has.

    A new candidate is proposed only when the open ones have nothing to emit now, so each proposal knows as many results as
    possible; with a race all startup trials, which are random anyway, are opened at once. Where nothing else is left, candidates
    that wait emit. With `tune_each` a fixed candidate waits for the trials of its learning rate, which are candidates, too.

    A failed fit (a loss that is not finite) is final. A fixed candidate runs its other splits, so that the report can count
    failures; a proposed one, or a trial of a rate, emits no more, and is FAIL in Optuna. Raises UserError as `OptunaStudy.ask`.
    """

    def __init__(self, study: Study, splits: Sequence[Split], ledger: Ledger, make_task: MakeTask) -> None:
        self.study, self.splits, self.ledger, self._make_task = study, tuple(splits), ledger, make_task
        self.candidates: dict[str, CandidateState] = {}
        self._num_fits = 0  # of all candidates
        self._queue: list[CandidateState] = []  # those with fits to emit, by rank
        self._unended: set[CandidateState] = set()
        self._unsettled: set[CandidateState] = set()  # have changed since the last `_settle`
        self._changed: set[CandidateState] = set()  # and since the last `changed`
        self._full: set[CandidateState] = set()  # have run fully, in a study with a race
        self._best: CandidateState | None = None  # of those
        self._signs = tuple(metric.row.sign for metric in study.objectives)
        race = study.search.race if study.search else None
        self._race: Race | None = race if race and num_looks(race, len(self.splits)) else None
        self._start = self._race.start * study.repeats if self._race else 0  # fits
        self._optuna = OptunaStudy(study, ledger.working / OPTUNA_LOG) if study.search else None
        self._fixed = dict(sorted(study.candidates.items(), key=lambda item: item[0] != study.control))  # the control first
        self._records, self._results, self._races = ledger.candidates(), ledger.results(), ledger.races()
        self._replay()

    def next_fit(self) -> FitTask | None:
        """The next fit to start; None if there is nothing to start now (see `ended`)."""
        if (candidate := self._next()) is None:
            return None
        task = self._make_task(candidate.name, candidate.recipe, *candidate.todo.popleft())
        candidate.running.add(task.slot)
        self._sort(candidate)
        return task

    @property
    def ended(self) -> bool:
        """No fit runs and none will be emitted any more."""
        return not self._num_to_ask and not self._unended

    @property
    def num_planned(self) -> int:
        """Fits of the whole study, the ended ones included; those that a race or a failure saves are left out once it has."""
        return self._num_fits + self._num_to_ask * len(self.splits) * self.study.repeats

    def finish(self, result: FitResult) -> None:
        """A fit has ended, finished or failed: record it."""
        candidate = self.candidates[result.candidate]
        self.ledger.write_result(result)
        candidate.running.discard(result.slot)
        candidate.record(result)
        self._settle(candidate)

    def lose(self, task: FitTask, reason: str, blameless: bool = False) -> bool:
        """A fit's process died, hung or raised. True: it will be tried again; False: it is given up in this session.

        A `blameless` fit, such as one whose machine was lost, continues elsewhere, and its attempts are not counted.
        A given-up fit is not recorded in the ledger, so that running the study again tries it again.
        """
        candidate = self.candidates[task.candidate]
        candidate.running.discard(task.slot)
        candidate.moves[task.slot] += blameless
        attempt = task.attempt if blameless else task.attempt + 1
        again = attempt < MAX_ATTEMPTS and candidate.moves[task.slot] <= MAX_MOVES and not candidate.closed
        if again:
            candidate.again(task, attempt)
        elif candidate.raced is None:
            candidate.lost[task.slot] = reason
        self._settle(candidate)
        return again

    def interrupt(self, task: FitTask) -> None:
        """A fit was interrupted; it continues from its checkpoint in another session."""
        candidate = self.candidates[task.candidate]
        candidate.running.discard(task.slot)
        candidate.again(task, task.attempt)
        self._update(candidate)

    def changed(self) -> list[CandidateState]:
        """The candidates that were opened, or of which a fit has ended, since the last call."""
        found, self._changed = self._changed, set()
        return sorted(found, key=NUMBER)

    # What is next.

    def _next(self) -> CandidateState | None:
        """The candidate whose split is emitted next."""
        first = self._queue[0] if self._queue else None
        if first is not None and not self._is_underway(first):
            return first
        # All that are open are underway, the best-looking first: they wait for results that may put them out of the race.
        leader = next((c for c in self._queue if len(c.states) >= self._start), None)
        if leader and self._best and self._look(leader)[0] < 0:
            leader = None
        free = (c for c in self._queue if c is leader or (self._best and not c.running))
        if (ready := next(free, None)) is None and self._optuna and self._optuna.num_to_ask:
            together = self._optuna.num_startup if self._race else 1  # startup trials are random whatever is known
            ready, *_ = [self._propose() for _ in range(max(1, together))]
        return ready or first

    def _rank(self, candidate: CandidateState) -> tuple[float, float, float, int]:
        """Breadth-first; those that are underway in the race come last, the best-looking first."""
        if not self._is_underway(candidate):
            split, repeat, _ = candidate.todo[0]
            return split.index, repeat, 0, candidate.number
        first, then = self._look(candidate)
        return len(self.splits), -first, -then, candidate.number

    def _look(self, candidate: CandidateState) -> tuple[float, float]:
        """How good a candidate looks, to be compared as it is."""
        return look(self._signs[0], candidate.scores, self._best.scores if self._best else None)

    def _is_underway(self, candidate: CandidateState) -> bool:
        return self._is_raced(candidate) and candidate.num_planned - len(candidate.todo) >= self._start

    def _is_raced(self, candidate: CandidateState) -> bool:
        if self._race is None or candidate.origin == "tuning" or candidate.name == self.study.control:
            return False
        return candidate.origin == "proposed" or self._race.fixed

    @property
    def _num_to_ask(self) -> int:
        return self._optuna.num_to_ask if self._optuna else 0

    # What follows from results.

    def _settle(self, candidate: CandidateState) -> None:
        """Apply what follows from the latest change of a candidate."""
        if candidate.closed:
            candidate.todo.clear()
        if candidate.origin == "tuning":
            self._choose_rate(candidate.name.rpartition("~")[0])
        self._update(candidate)
        self._run_race()
        for other in sorted(self._unsettled, key=NUMBER):
            if self._optuna and other.ended:
                self._optuna.tell(other)
        self._unsettled.clear()

    def _update(self, candidate: CandidateState) -> None:
        """Note what has changed in a candidate, so that no event needs to look at all of them."""
        self._num_fits += candidate.num_planned - candidate.counted
        candidate.counted = candidate.num_planned
        (self._unended.discard if candidate.ended else self._unended.add)(candidate)
        self._unsettled.add(candidate)
        self._changed.add(candidate)
        self._sort(candidate)

    def _sort(self, candidate: CandidateState) -> None:
        """Put a candidate in its place among those with fits to emit."""
        if candidate.rank is not None:
            del self._queue[bisect_left(self._queue, candidate.rank, key=RANK)]
        candidate.rank = self._rank(candidate) if candidate.todo and not candidate.tuning else None
        if candidate.rank is not None:
            insort(self._queue, candidate, key=RANK)

    def _run_race(self) -> None:
        """End the candidates that lose now. Depends on the results alone, so that a resumed session decides the same."""
        if self._race is None:
            return
        changed, best = sorted(self._unsettled, key=NUMBER), self._best
        ours = {c for c in changed if c.origin != "tuning" and c.raced is None and len(c.scores) == len(self.splits)}
        if full := ours - self._full:
            self._full |= full
            rivals = sorted(full | ({best} if best else set()), key=NUMBER)
            self._best = max(rivals, key=lambda c: self._signs[0] * (c.means or (-math.inf,))[0])
        if self._best is None:
            return
        several = len(self._signs) > 1
        scores = {c.name: c.scores for c in (sorted(self._full, key=NUMBER) if several else [self._best])}
        if (several and full) or self._best is not best:
            changed = sorted(self._queue, key=NUMBER)  # without another opponent only who has changed can lose
            for candidate in changed:
                self._sort(candidate)  # it looks otherwise beside another one
        for candidate in changed:
            if self._is_raced(candidate) and candidate.todo and not candidate.failed:
                own = candidate.name, candidate.scores
                candidate.raced = raced_out(self._race, len(self.splits), self._signs, own, scores)
                if candidate.raced is not None:
                    self.ledger.write_race(candidate.raced)
                    candidate.todo.clear()
                    self._update(candidate)

    # From the ledger.

    def _replay(self) -> None:
        """Restore candidates and Optuna from the ledger."""
        for name, recipe in self._fixed.items():
            if self.study.search and PROPOSED.fullmatch(name):
                raise UserError(f"candidate {name!r}: names like trial-<number> belong to proposed candidates; give another name")
            self._open_fixed(name, recipe)
        for number, (name, recipe) in enumerate(self._fixed.items()):
            self._open_tuning(name, number, recipe)
        proposed = {record.number: record for record in self._records.values() if record.origin == "proposed"}
        for number in range(max(proposed, default=-1) + 1):
            if number in proposed:
                self._recall(proposed[number])
            else:
                self._propose()  # its folder was removed by hand: a new proposal keeps the later numbers
        self._run_race()

    def _open_fixed(self, name: str, recipe: Recipe) -> None:
        """A candidate of the study file; one that is still to be tuned waits for its trials, and is recorded after them."""
        tune, record = self.study.tune_each, self._records.get(name)
        if tune is not None and record is not None:
            recipe = with_rate(recipe, record.recipe["optim"]["lr"])
        candidate = self._open(name, recipe, "fixed")
        candidate.tuning = tune is not None and record is None
        self._sort(candidate)
        if tune is None and record is None:
            self._record_fixed(candidate)

    def _record_fixed(self, candidate: CandidateState) -> None:
        recipe, note = json_of(candidate.recipe), candidate.note
        record = CandidateRecord(name=candidate.name, origin="fixed", number=candidate.number, recipe=recipe, note=note)
        self.ledger.write_candidate(record)

    def _open_tuning(self, name: str, number: int, recipe: Recipe) -> None:
        """The trials of a candidate's learning rate; none of them runs any more once it is recorded."""
        if (tune := self.study.tune_each) is None:
            return
        for trial, rate in enumerate(tune.rates):
            tried, trial_of = with_rate(recipe, rate), tuning_name(name, trial)
            if trial_of not in self._records:
                order = number * tune.trials + trial
                self.ledger.write_candidate(CandidateRecord(name=trial_of, origin="tuning", number=order, recipe=json_of(tried)))
            candidate = self._open(trial_of, tried, "tuning")
            if name in self._records or candidate.closed:
                candidate.todo.clear()
                self._update(candidate)
        self._choose_rate(name)

    def _choose_rate(self, name: str) -> None:
        """When all trials of a fixed candidate have ended, give it the rate that did best."""
        candidate, tune = self.candidates[name], self.study.tune_each
        assert tune is not None
        trials = [self.candidates[tuning_name(name, trial)] for trial in range(tune.trials)]
        if candidate.tuning and all(trial.ended for trial in trials):
            candidate.tuning = False
            candidate.recipe, candidate.note = tuned(candidate.recipe, tune, trials, self._signs[0])
            self._record_fixed(candidate)
            self._update(candidate)

    def _recall(self, record: CandidateRecord) -> None:
        """A proposed candidate of an earlier session: added with its values, or open again."""
        recipe = Recipe.model_validate(record.recipe)
        if json_of(recipe) != record.recipe:
            changed = "the code of a class in its recipe has changed since it ran"
            raise UserError(f"{record.name}: {changed}; undo the change, or give the study a new name")
        candidate = self._open(record.name, recipe, "proposed")
        assert self._optuna is not None
        if candidate.todo and not candidate.closed:
            self._optuna.ask(record)
            return
        candidate.todo.clear()
        self._update(candidate)
        self._optuna.add(record, candidate)

    def _propose(self) -> CandidateState:
        """Open the next trial."""
        assert self._optuna is not None
        record, recipe = self._optuna.ask()
        self.ledger.write_candidate(record)
        return self._open(record.name, recipe, "proposed")

    def _open(self, name: str, recipe: Recipe, origin: Origin) -> CandidateState:
        """A candidate with the fits that earlier sessions left."""
        splits, repeats = self.splits, self.study.repeats
        objectives = tuple(metric.row.name for metric in self.study.objectives)
        if origin == "tuning" and self.study.tune_each is not None:
            splits, objectives, repeats = splits[: self.study.tune_each.splits], objectives[:1], 1
        candidate = CandidateState(name, recipe, origin, objectives, repeats, deque(), len(self.candidates), self._races.get(name))
        for split, repeat in product(splits, range(repeats)):
            if (result := self._results.get(f"{name}/{fit_name(split.index, repeat)}")) is not None:
                candidate.record(result)
            elif candidate.raced is None:
                candidate.todo.append((split, repeat, 0))
        self.candidates[name] = candidate
        self._update(candidate)
        return candidate
