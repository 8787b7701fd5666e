"""Which fit runs next: fixed candidates first, the control before all, then what Optuna proposes.

Only this module knows Optuna, and it knows nothing of Ray: it hands out `FitTask`s and is told what became of them. All
its state can be rebuilt from the ledger. Proposals are the same again only if results arrive in the same order, as they do
with one fit at a time.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json, json_to_distribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

from softseg_dist.data.splits import Split
from softseg_dist.errors import UserError
from softseg_dist.numerics.metrics import OBJECTIVES
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.search.ledger import CandidateRecord, Ledger, json_of
from softseg_dist.study import Recipe, Study
from softseg_dist.study_file import describe
from softseg_dist.training.task import FitResult, FitTask

MAX_ATTEMPTS = 2  # a fit whose process dies gets one more
MAX_MOVES = (
    20  # so often a fit may lose its machine in a session; spot machines come and go, but a fit may also take them down
)
PROPOSED = re.compile(r"trial-\d+")

MakeTask = Callable[[str, Recipe, Split, int], FitTask]
"""(candidate, recipe, split, attempt) -> the task, with the folders and resources that a searcher need not know."""


@dataclass
class Candidate:
    """A candidate in this session: what it still has to run, what runs, and what came out."""

    name: str
    recipe: Recipe
    todo: deque[tuple[Split, int]]  # with the attempt that is due
    running: set[int] = field(default_factory=set)
    results: dict[int, FitResult] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)  # split -> why it was given up in this session
    moves: Counter[int] = field(default_factory=Counter)  # split -> machines lost in this session
    trial: optuna.Trial | None = None

    @property
    def ended(self) -> bool:
        """Nothing of it runs or is left to run in this session."""
        return not self.todo and not self.running

    @property
    def failed(self) -> bool:
        """One of its fits has no score."""
        return bool(self.lost) or any(result.score is None for result in self.results.values())

    @property
    def mean_score(self) -> float:
        """Mean of the objective on validation over splits."""
        scores = [result.score for result in self.results.values() if result.score is not None]
        return sum(scores) / len(scores)


class StudySearcher:
    """Emits the fits of a study and keeps ledger and Optuna up to date.

    A candidate's splits are emitted in order. A new candidate is proposed only when the open ones have nothing left to emit,
    so each proposal knows as many results as possible and no worker waits. A failed fit (a loss that is not finite) is final: a
    fixed candidate runs its other splits, so that the report can count failures; a proposed one emits no more and Optuna is told
    FAIL. Fixed candidates are no Optuna trials.

    Raises UserError if `propose` raises, returns no Recipe, or uses choices that cannot be stored.
    """

    def __init__(self, study: Study, splits: Sequence[Split], ledger: Ledger, make_task: MakeTask) -> None:
        self.study, self.splits, self.ledger, self._make_task = study, tuple(splits), ledger, make_task
        self.candidates: dict[str, Candidate] = {}
        self.stopped = False
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        direction = "maximize" if OBJECTIVES[study.objective].sign > 0 else "minimize"
        self._optuna = optuna.create_study(direction=direction, pruner=optuna.pruners.NopPruner())
        self._asked = 0  # trials that Optuna knows; the number of the next one
        self._replay()

    def next_fit(self) -> FitTask | None:
        """The next fit to start; None if there is nothing to start now (see `ended`)."""
        if self.stopped:
            return None
        candidate = next((c for c in self.candidates.values() if c.todo), None)
        if candidate is None and self._asked < self._trials:
            candidate = self._propose(self._asked)
        if candidate is None:
            return None
        split, attempt = candidate.todo.popleft()
        candidate.running.add(split.index)
        return self._make_task(candidate.name, candidate.recipe, split, attempt)

    @property
    def ended(self) -> bool:
        """No fit runs and none will be emitted any more."""
        if any(c.running for c in self.candidates.values()):
            return False
        return self.stopped or (all(c.ended for c in self.candidates.values()) and self._asked >= self._trials)

    @property
    def num_planned(self) -> int:
        """Fits of the whole study, the ended ones included; those a failed proposal will not run are left out."""
        asked = sum(len(c.results) + len(c.lost) + len(c.todo) + len(c.running) for c in self.candidates.values())
        return asked + max(0, self._trials - self._asked) * len(self.splits)

    def finish(self, result: FitResult) -> None:
        """A fit has ended, finished or failed: record it."""
        candidate = self.candidates[result.candidate]
        self.ledger.write_result(result)
        candidate.running.discard(result.split)
        candidate.results[result.split] = result
        self._settle(candidate)

    def lose(self, task: FitTask, reason: str, node_lost: bool = False) -> bool:
        """A fit's process died, hung or raised. True: it will be tried again; False: it is given up in this session.

        A fit that went with its machine (`node_lost`) goes on elsewhere: that is no attempt of its own.

        What is given up is not recorded in the ledger, so that running the study again tries it again.
        """
        candidate = self.candidates[task.candidate]
        candidate.running.discard(task.split.index)
        given_up = candidate.trial is not None and candidate.failed
        candidate.moves[task.split.index] += node_lost
        attempt = task.attempt if node_lost else task.attempt + 1
        again = attempt < MAX_ATTEMPTS and candidate.moves[task.split.index] <= MAX_MOVES and not given_up
        if again:
            candidate.todo.appendleft((task.split, attempt))
        else:
            candidate.lost[task.split.index] = reason
        self._settle(candidate)
        return again

    def interrupt(self, task: FitTask) -> None:
        """A fit was asked to stop and did; it goes on from its checkpoint in another session."""
        candidate = self.candidates[task.candidate]
        candidate.running.discard(task.split.index)
        candidate.todo.appendleft((task.split, task.attempt))

    def stop(self) -> None:
        """Emit nothing more."""
        self.stopped = True

    @property
    def _trials(self) -> int:
        return self.study.search.trials if self.study.search else 0

    def _settle(self, candidate: Candidate) -> None:
        if candidate.trial is None:
            return
        if candidate.failed:
            candidate.todo.clear()
        if not candidate.ended:
            return
        if candidate.failed:
            self._optuna.tell(candidate.trial, state=TrialState.FAIL)
        else:
            self._optuna.tell(candidate.trial, candidate.mean_score)
        candidate.trial = None

    def _open(self, name: str, recipe: Recipe, results: dict[int, FitResult]) -> Candidate:
        todo = deque((split, 0) for split in self.splits if split.index not in results)
        candidate = self.candidates[name] = Candidate(name, recipe, todo, results=results)
        return candidate

    def _replay(self) -> None:
        """Bring candidates and Optuna to where the ledger says they were."""
        results: dict[str, dict[int, FitResult]] = {}
        for (name, split), result in self.ledger.results().items():
            results.setdefault(name, {})[split] = result
        records = self.ledger.candidates()
        for number, (name, recipe) in enumerate(_control_first(self.study)):
            if self.study.search and PROPOSED.fullmatch(name):
                raise UserError(
                    f"candidate {name!r}: names like trial-<number> belong to proposed candidates; give another name"
                )
            if name not in records:
                self.ledger.write_candidate(_record(name, "fixed", number, recipe))
            self._open(name, recipe, results.get(name, {}))
        proposed = {record.number: record for record in records.values() if record.origin == "proposed"}
        for number in range(max(proposed, default=-1) + 1):
            if number in proposed:
                self._recall(proposed[number], results.get(proposed[number].name, {}))
            else:
                self._propose(
                    number
                )  # its folder was removed by hand: ask anew, so that the later ones keep their numbers

    def _recall(self, record: CandidateRecord, results: dict[int, FitResult]) -> None:
        """A proposed candidate of an earlier session: told as it ended, or open again."""
        recipe = Recipe.model_validate(record.recipe)
        if json_of(recipe) != record.recipe:
            raise UserError(
                f"{record.name}: the code of a class in its recipe has changed since it ran; "
                "undo the change, or give the study a new name"
            )
        failed = any(result.score is None for result in results.values())
        if not failed and len(results) < len(self.splits):
            self._optuna.enqueue_trial(record.params)
            self._propose(record.number, record, results)
            return
        candidate = self._open(record.name, recipe, results)
        candidate.todo.clear()
        self._asked += 1
        self._optuna.add_trial(
            create_trial(
                params=record.params,
                distributions={name: json_to_distribution(text) for name, text in record.distributions.items()},
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                value=None if failed else candidate.mean_score,
            )
        )

    def _propose(
        self, number: int, known: CandidateRecord | None = None, results: dict[int, FitResult] | None = None
    ) -> Candidate:
        """Ask Optuna for trial `number`; a `known` one gets its recorded parameters back."""
        assert self.study.search is not None
        self._optuna.sampler = _sampler(self.study, number)
        trial = self._optuna.ask()
        assert trial.number == number == self._asked, (trial.number, number, self._asked)
        self._asked += 1
        recipe = proposed_recipe(self.study, trial)
        record = _record(f"trial-{number:03d}", "proposed", number, recipe, trial)
        if known is None:
            self.ledger.write_candidate(record)
        elif known.recipe != record.recipe:
            raise UserError(
                f"trial {number}: propose() gave another recipe than before for {_show(trial.params)}; "
                "it must depend on the trial alone: undo the change, or give the study a new name"
            )
        candidate = self._open(record.name, recipe, results or {})
        candidate.trial = trial
        return candidate


def proposed_recipe(study: Study, trial: optuna.Trial) -> Recipe:
    """What `propose` gives for a trial. Raises UserError, naming the trial, if that cannot be used."""
    assert study.search is not None
    number = trial.number
    try:
        recipe = study.search.propose(trial)
    except Exception as error:
        raise UserError(
            f"trial {number}: propose() raised {describe(error)}; parameters {_show(trial.params)}"
        ) from error
    if not isinstance(recipe, Recipe):
        raise UserError(f"trial {number}: propose() must return a Recipe, got {type(recipe).__name__}")
    for name, distribution in trial.distributions.items():
        for choice in distribution.choices if isinstance(distribution, CategoricalDistribution) else ():
            if not isinstance(choice, str | int | float | None):
                raise UserError(
                    f"trial {number}: parameter {name!r} has the choice {choice!r}, which cannot be stored; "
                    "suggest names or numbers and look the object up in propose()"
                )
    try:
        study.check_recipe(f"trial-{number:03d}", recipe)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe


def sample_proposals(study: Study, count: int = 3) -> dict[str, Recipe]:
    """A few recipes of `propose`, drawn at random and thrown away, so that its mistakes show before the first fit.

    Raises UserError as the search would.
    """
    if study.search is None:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler(seed=seed_of(study.seed, "sample") % 2**32)
    trials = optuna.create_study(sampler=sampler)
    return {f"trial-{number:03d}": proposed_recipe(study, trials.ask()) for number in range(count)}


def _control_first(study: Study) -> list[tuple[str, Recipe]]:
    return sorted(
        study.candidates.items(), key=lambda item: item[0] != study.control
    )  # stable: the others keep their order


def _sampler(study: Study, number: int) -> TPESampler:
    """Seeded by the trial's number: one sampler for all would repeat its first draws after a resume.

    All arguments that matter are named, since Optuna's defaults have changed between versions. `group` models conditional
    parameters jointly; `constant_liar` keeps candidates that run at the same time apart.
    """
    assert study.search is not None
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", optuna.exceptions.ExperimentalWarning
        )  # `group` may change; the lock file pins Optuna
        return TPESampler(
            n_startup_trials=study.search.startup_trials,
            n_ei_candidates=24,
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed_of(study.seed, "trial", number) % 2**32,
        )


def _record(name: str, origin: Any, number: int, recipe: Recipe, trial: optuna.Trial | None = None) -> CandidateRecord:
    return CandidateRecord(
        name=name,
        origin=origin,
        number=number,
        recipe=json_of(recipe),
        params=dict(trial.params) if trial else {},
        distributions={k: distribution_to_json(d) for k, d in trial.distributions.items()} if trial else {},
    )


def _show(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in params.items()) or "none yet"
