"""All numbers of a report, as one frozen Summary: ranking, tests, effects, measures, the search, held-out subjects, fits.

The page prints this object and `softseg report --json` dumps it, so both say the same. Tests are on the objective, as measured on
test, ranks on the objective, as measured on validation; the unit of analysis is a subject in a split (see `report.scores`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

import numpy as np

from softseg_dist.frozen import Frozen
from softseg_dist.judging.thresholds import CURVE
from softseg_dist.numerics.metrics import Row, row_of
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.report import fits
from softseg_dist.report.breakdown import ScoreChecks, score_checks
from softseg_dist.report.held_out import HoldoutTable, holdout_of
from softseg_dist.report.measures import Measures, measures_of
from softseg_dist.report.paired_tests import Comparison, Effect, Interaction, Rival, comparisons_with, factorial_tests, rivals_of
from softseg_dist.report.ranking import Standing, best_complete, ranked, standings_of
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import RULES, dice_curves, soft_rows, soft_scores, tables_of


@dataclass(frozen=True)
class Summary:
    """Everything that a report says in numbers.

    `reference` is the candidate that all others are compared with: the control; if the study has none, or it no score, the best of
    those with most scores. `chosen_on` is the subset whose scores rank candidates: validation, or test where one of them lacks
    scores on validation; `chosen_tested` of its subjects are tested in some split. `num_tested` subjects, of `num_subjects` in
    splits, were in a test set; `num_cases` are theirs. `rivals` compare the highest ranked with all others. `raced` says why
    candidates were given up early. `curves` are mean Dice at each threshold of `CURVE`. `splits` are numbers of subjects,
    `varying` the fields in which recipes differ, per candidate. `of_models`: see `ScoreTables`.
    """

    name: str
    question: str
    objective: Row
    of_models: bool
    control: str | None
    reference: str
    chosen_on: Literal["validation", "test"]
    chosen_tested: int
    num_planned: int
    num_subjects: int
    num_tested: int
    num_cases: int
    test_to_train: float
    tested_times: tuple[int, int]
    ranking: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]
    rivals: tuple[Rival, ...]
    effects: tuple[Effect, ...]
    interactions: tuple[Interaction, ...]
    holdout: HoldoutTable | None
    pareto: fits.Pareto | None
    raced: dict[str, RaceRecord]
    tuned: tuple[fits.Tuned, ...]
    measures: Measures
    checks: ScoreChecks
    training: tuple[fits.TrainingSummary, ...]
    failures: dict[str, str]
    notes: dict[str, str]
    compute: fits.Compute
    curve_thresholds: tuple[float, ...]
    curves: dict[str, list[float]]
    splits: tuple[dict[str, int], ...]
    varying: dict[str, dict[str, str]]

    @property
    def winner(self) -> Standing:
        """The highest ranked candidate: the best on validation (see `chosen_on`). What is tested chooses nothing."""
        return self.ranking[0]

    @property
    def trained(self) -> bool:
        """Whether there were fits: predictions that existed already took no time."""
        return self.compute.hours > 0

    @property
    def used_rules(self) -> tuple[str, ...]:
        """The rules for thresholds that any fit has: predictions without validation maps have 0.5 alone."""
        return tuple(rule for rule in RULES if any(rule in standing.thresholds for standing in self.ranking))


def summarise(run: RunData) -> Summary:
    """Compute the summary of a run, finished or not; with fits missing, comparisons use the pairs that both sides have."""
    test = run.results
    objective = row_of(run.study["objective"])
    scores = soft_scores(test, objective.name)
    scores = replace(scores, of_models=run.of_models)
    control: str = run.study.get("control") or ""
    validation = tables_of(soft_rows(run.validation, objective.name), run.validation)
    choice = validation if set(scores.tables) <= set(validation.tables) else scores
    reference = control if control in scores.tables else best_complete(choice, objective.sign)
    raced = {candidate.name: candidate.raced for candidate in run.candidates if candidate.raced}
    ranking = ranked(standings_of(run, test, scores, choice), raced, reference, choice, objective.sign)
    sizes = [{"index": s.index, "train": len(s.train), "validation": len(s.validation), "test": len(s.test)} for s in run.splits]
    times = Counter(subject for split in run.splits for subject in split.test)
    names = [standing.name for standing in ranking if standing.rank is not None]
    effects, interactions = factorial_tests(run.candidates, control, scores)
    by_name = {candidate.name: candidate for candidate in run.candidates}
    training = tuple(fits.training_of(run, by_name[standing.name]) for standing in ranking)
    everyone = run.subjects
    ratio = math.nan if run.of_models else float(np.mean([of["test"] / of["train"] for of in sizes]))
    return Summary(
        name=run.study["name"],
        question=run.study["question"],
        objective=objective,
        of_models=run.of_models,
        control=control or None,
        reference=reference,
        chosen_on="test" if choice is scores else "validation",
        chosen_tested=len(set(choice.subjects) & run.tested),
        num_planned=run.num_planned,
        num_subjects=len(everyone),
        num_tested=len(scores.subjects),
        num_cases=int(test["case"].nunique()),
        test_to_train=ratio,
        tested_times=(min(times[s] for s in everyone), max(times[s] for s in everyone)),
        ranking=ranking,
        comparisons=comparisons_with(names, reference, scores, ratio, run.study, run.site_of),
        rivals=rivals_of(names, scores),
        effects=effects,
        interactions=interactions,
        holdout=holdout_of(run, objective),
        pareto=fits.pareto_of(run, scores, reference),
        raced=raced,
        tuned=fits.tuned_of(run),
        measures=measures_of(run, test, scores, ranking[0].name, reference),
        checks=score_checks(test, run.prepared, scores, objective, (ranking[0].name, reference)),
        training=training,
        failures={fit.key: fit.reason for fit in run.fits if fit.state == "failed"},
        notes={candidate.name: candidate.note for candidate in run.candidates if candidate.note},
        compute=fits.compute_of(run),
        curve_thresholds=CURVE,
        curves=dice_curves(test, [standing.name for standing in ranking]),
        splits=tuple(sizes),
        varying=fits.varying_fields(run.candidates),
    )


def plain(value: Any) -> Any:
    """A summary (or a part of it) as JSON can hold it: NaN becomes None, tuples lists, keys text."""
    if isinstance(value, Frozen) or is_dataclass(value):
        return {name: plain(item) for name, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
