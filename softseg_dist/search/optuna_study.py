"""The search in Optuna: its ask-and-tell interface, and the journal that optuna-dashboard shows.

Only this module knows Optuna. Everything here can be rebuilt from the ledger, and is when a session starts: `optuna.log` in the
run folder is written again then, so that it always agrees. `optuna-dashboard optuna.log` opens it. Fixed candidates are no trials
and are not in it, because no search space contains them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, distribution_to_json, json_to_distribution
from optuna.samplers import TPESampler
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState, create_trial
from typing_extensions import override

from softseg_dist.errors import UserError
from softseg_dist.numerics.metrics import OBJECTIVES
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.record.ledger import CandidateRecord, json_of
from softseg_dist.study import Recipe, Study
from softseg_dist.study_file import check_restart, describe
from softseg_dist.training.task import FitResult

OPTUNA_LOG = "optuna.log"
CANDIDATE, RACED = "candidate", "raced out by"  # what Optuna keeps of ours with a trial


class OptunaStudy:
    """Trials by number; `asked` is the number of the next one. `log` is the journal to write, None keeps the trials in memory.

    A trial's intermediate values are its candidate's scores by split, if there is one objective.
    """

    def __init__(self, study: Study, log: Path | None = None) -> None:
        assert study.search is not None
        self._study, self.asked = study, 0
        self._open: dict[str, optuna.Trial] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna.create_study(
            storage=InMemoryStorage() if log is None else _journal(log),
            study_name=study.name,
            directions=["maximize" if OBJECTIVES[name].sign > 0 else "minimize" for name in study.objectives],
            pruner=optuna.pruners.NopPruner(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._optuna.set_metric_names(list(study.objectives))

    def ask(self, known: CandidateRecord | None = None) -> tuple[CandidateRecord, Recipe]:
        """The next trial, open until `tell`; a `known` one gets its recorded parameters back.

        Raises UserError if `propose` raises, returns no Recipe, uses choices that cannot be stored, or gives a known trial
        another recipe than before.
        """
        if known is not None:
            self._optuna.enqueue_trial(known.params)
        number = self.asked
        self._optuna.sampler = _sampler(self._study, number)
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
            raise UserError(
                f"trial {number}: propose() gave another recipe than before for {_show(trial.params)}; "
                "it must depend on the trial alone: undo the change, or give the study a new name"
            )
        trial.set_user_attr(CANDIDATE, record.name)
        self._open[record.name] = trial
        return record, recipe

    def is_open(self, name: str) -> bool:
        """Was this trial asked for in this session, and is its value not known yet?"""
        return name in self._open

    def score(self, result: FitResult) -> None:
        """A fit has ended: if it is one of an open trial, its score is an intermediate value."""
        if len(self._study.objectives) == 1 and result.candidate in self._open and result.score is not None:
            self._open[result.candidate].report(result.score, result.split)

    def tell(self, name: str, values: Sequence[float] | None, raced_by: str = "") -> None:
        """How an open trial ended: its values, None if it failed. One that was raced out is complete, too.

        Optuna would rank a pruned trial by its last split alone.
        """
        trial = self._open.pop(name)
        if raced_by:
            trial.set_user_attr(RACED, raced_by)
        if values is None:
            self._optuna.tell(trial, state=TrialState.FAIL)
        else:
            self._optuna.tell(trial, list(values))

    def add(
        self, record: CandidateRecord, values: Sequence[float] | None, results: Mapping[int, FitResult], raced_by: str = ""
    ) -> None:
        """Add a trial that ended in an earlier session, with the values that it had then."""
        assert record.number == self.asked, (record.number, self.asked)
        self.asked += 1
        scores = {split: result.score for split, result in results.items() if result.score is not None}
        self._optuna.add_trial(
            create_trial(
                params=record.params,
                distributions={name: json_to_distribution(text) for name, text in record.distributions.items()},
                state=TrialState.FAIL if values is None else TrialState.COMPLETE,
                values=None if values is None else list(values),
                user_attrs={CANDIDATE: record.name} | ({RACED: raced_by} if raced_by else {}),
                intermediate_values=scores if len(self._study.objectives) == 1 else {},
            )
        )


class _Unlocked(JournalFileOpenLock):
    """The run folder's own lock keeps other drivers out; one that a killed driver has left must not be waited for."""

    @override
    def acquire(self) -> bool:
        return True

    @override
    def release(self) -> None:
        """Nothing was acquired."""


def _journal(path: Path) -> JournalStorage:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Unlocked(str(path))))


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
                raise UserError(
                    f"trial {number}: parameter {name!r} has the choice {choice!r}, which cannot be stored; "
                    "suggest names or numbers and look the object up in propose()"
                )
    check_restart(recipe, f"trial {number}: propose() gave a recipe that cannot be recorded")
    try:
        study.check_recipe(trial_name(number), recipe)
    except ValueError as error:
        raise UserError(str(error)) from error
    return recipe


def sample_proposals(study: Study, count: int = 3) -> dict[str, Recipe]:
    """A few random recipes of `propose`, which are not used: they show its mistakes before the first fit.

    Raises UserError as the search would.
    """
    if study.search is None:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler(seed=seed_of(study.seed, "sample") % 2**32)
    trials = optuna.create_study(sampler=sampler)
    return {trial_name(number): proposed_recipe(study, trials.ask()) for number in range(count)}


def _sampler(study: Study, number: int) -> TPESampler:
    """Seeded by the trial's number: one sampler for all would repeat its first draws after a resume.

    All arguments that matter are named, since Optuna's defaults have changed between versions. `group` models conditional
    parameters jointly; `constant_liar` keeps candidates that run at the same time apart.
    """
    assert study.search is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group` may change; the lock file pins Optuna
        return TPESampler(
            n_startup_trials=study.search.startup_trials,
            n_ei_candidates=24,
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed_of(study.seed, "trial", number) % 2**32,
        )


def _show(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in params.items()) or "none yet"
