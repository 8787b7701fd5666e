"""The search in Optuna: its ask-and-tell interface, and the journal that optuna-dashboard shows.

Only this module knows Optuna. Everything here can be rebuilt from the ledger, and is when a session starts: `optuna.log` in the
run folder is written again then, so that it always agrees. `optuna-dashboard optuna.log` opens it. Fixed candidates are no trials
and are not in it, because no search space contains them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json, json_to_distribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from softseg_dist.errors import UserError
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.record.ledger import CandidateRecord, json_of
from softseg_dist.search.candidate import CandidateState
from softseg_dist.study import Recipe, Study
from softseg_dist.study_file import check_restart, describe

optuna.logging.set_verbosity(optuna.logging.ERROR)

OPTUNA_LOG = "optuna.log"
CANDIDATE, RACED = "candidate", "raced out by"  # what Optuna keeps of ours with a trial
# All arguments that matter are named, as Optuna's defaults have changed. `group` models conditional parameters jointly;
# `constant_liar` keeps candidates that run at the same time apart.
SAMPLER: dict[str, Any] = {"n_ei_candidates": 24, "multivariate": True, "group": True, "constant_liar": True}
# The run folder's own lock keeps other drivers out; one that a killed driver has left must not be waited for.
NO_LOCK = SimpleNamespace(acquire=lambda: True, release=lambda: None)


class OptunaStudy:
    """Trials by number; `asked` is the number of the next one. `log` is the journal to write."""

    def __init__(self, study: Study, log: Path) -> None:
        assert study.search is not None
        self._study, self._search, self.asked = study, study.search, 0
        self._open: dict[str, optuna.Trial] = {}
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what is experimental may change; Optuna is pinned
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(log), lock_obj=NO_LOCK))
        directions = ["maximize" if metric.row.sign > 0 else "minimize" for metric in study.objectives]
        self._optuna = optuna.create_study(storage=storage, study_name=study.name, directions=directions)
        self._optuna.set_metric_names([metric.row.name for metric in study.objectives])

    @property
    def num_to_ask(self) -> int:
        """Trials that are still to be asked for."""
        return max(0, self._search.trials - self.asked)

    @property
    def num_startup(self) -> int:
        """How many of them are drawn at random."""
        return min(self._search.startup_trials - self.asked, self.num_to_ask)

    def ask(self, known: CandidateRecord | None = None) -> tuple[CandidateRecord, Recipe]:
        """The next trial, open until `tell`; a `known` one gets its recorded parameters back.

        Raises UserError if `propose` raises, gives no Recipe, or a known trial another one, or has choices that cannot be stored.
        """
        if known is not None:
            self._optuna.enqueue_trial(known.params)
        number = self.asked
        seed = seed_of(self._study.seed, "trial", number) % 2**32  # one sampler for all would repeat its first draws after a resume
        self._optuna.sampler = TPESampler(n_startup_trials=self._search.startup_trials, seed=seed, **SAMPLER)
        trial = self._optuna.ask()
        assert trial.number == number, (trial.number, number)
        self.asked += 1
        recipe = proposed_recipe(self._study, trial)
        record = CandidateRecord(
            name=trial_name(number),
            origin="proposed",
            number=number,
            recipe=json_of(recipe),
            params=dict(trial.params),
            distributions={k: distribution_to_json(d) for k, d in trial.distributions.items()},
        )
        if known is not None and known.recipe != record.recipe:
            to_do = "it must depend on the trial alone: undo the change, or give the study a new name"
            raise UserError(f"trial {number}: propose() gave another recipe than before for {_show(trial.params)}; {to_do}")
        trial.set_user_attr(CANDIDATE, record.name)
        self._open[record.name] = trial
        return record, recipe

    def tell(self, candidate: CandidateState) -> None:
        """Tell Optuna how an ended candidate did. One that was raced out is complete: a pruned one is ranked by its last split."""
        if (trial := self._open.pop(candidate.name, None)) is not None:
            if candidate.raced:
                trial.set_user_attr(RACED, candidate.raced.incumbent)
            self._optuna.tell(trial, candidate.values, None if candidate.values else TrialState.FAIL)

    def add(self, record: CandidateRecord, candidate: CandidateState) -> None:
        """Add a trial that ended in an earlier session, with the values that it had then."""
        assert record.number == self.asked, (record.number, self.asked)
        self.asked += 1
        self._optuna.add_trial(
            create_trial(
                params=record.params,
                distributions={name: json_to_distribution(text) for name, text in record.distributions.items()},
                state=TrialState.COMPLETE if candidate.values else TrialState.FAIL,
                values=candidate.values,
                user_attrs={CANDIDATE: record.name} | ({RACED: candidate.raced.incumbent} if candidate.raced else {}),
            )
        )


def trial_name(number: int) -> str:
    """`trial-007`: the candidate of a trial."""
    return f"trial-{number:03d}"


def proposed_recipe(study: Study, trial: optuna.Trial) -> Recipe:
    """What `propose` gives for a trial. Raises UserError, naming the trial, if that cannot be used."""
    assert study.search is not None
    number = trial.number
    try:
        recipe = study.search.propose(trial)
    except Exception as error:
        raise UserError(f"trial {number}: propose() raised {describe(error)}; parameters {_show(trial.params)}") from error
    if not isinstance(recipe, Recipe):
        raise UserError(f"trial {number}: propose() must return a Recipe, got {type(recipe).__name__}")
    for name, distribution in trial.distributions.items():
        for choice in distribution.choices if isinstance(distribution, CategoricalDistribution) else ():
            if not isinstance(choice, str | int | float | None):
                to_do = "suggest names or numbers and look the object up in propose()"
                raise UserError(f"trial {number}: parameter {name!r} has the choice {choice!r}, which cannot be stored; {to_do}")
    check_restart(recipe, f"trial {number}: propose() gave a recipe that cannot be recorded")
    try:
        study.check_recipe(trial_name(number), recipe)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe


def sample_proposals(study: Study) -> dict[str, Recipe]:
    """Three random recipes of `propose`, which are not used: they show its mistakes, as UserErrors, before the first fit."""
    if study.search is None:
        return {}
    sampler = optuna.samplers.RandomSampler(seed=seed_of(study.seed, "sample") % 2**32)
    trials = optuna.create_study(sampler=sampler)
    return {trial_name(number): proposed_recipe(study, trials.ask()) for number in range(3)}


def _show(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in params.items()) or "none yet"
