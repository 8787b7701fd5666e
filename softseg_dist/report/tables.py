"""All numbers of a report, as one frozen Summary: ranking, comparisons, main effects, threshold curves, splits.

The page prints this object and `softseg report --json` dumps it, so both say the same. Ranks and tests are on the
objective metric, measured on test; the unit of analysis is a subject in a split (see `report.scores`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from softseg_dist.numerics.metrics import OBJECTIVES
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.statistics import (
    NAN,
    BootstrapInterval,
    CrossedTest,
    SplitTest,
    corrected_t_test,
    crossed_test,
    holm,
    paired_bootstrap,
    wilcoxon_test,
)
from softseg_dist.numerics.thresholds import CURVE
from softseg_dist.report.effects import Effect, main_effects
from softseg_dist.report.run_folder import Candidate, RunData
from softseg_dist.report.scores import (
    Scores,
    Table,
    dice_at_rule,
    dice_curves,
    on_test,
    soft_scores,
    undefined_cases,
)
from softseg_dist.training.task import FitResult

BESIDE = ("volume_error", "volume_error_abs", "brier", "ece")  # shown beside the objective
RULES = ("fixed", "grid", "dice_optimal")


@dataclass(frozen=True)
class Standing:
    """One candidate in the ranking. Ranks follow the paired difference to the reference; None without a score.

    `mean` is over all subjects and splits with its 95 % interval from `low` to `high` by the crossed random-effects model,
    `sd` over the means of the splits. `beside` has further metrics, `dice` the Dice at the threshold of each rule,
    `thresholds` the mean threshold chosen, `by_reference` and `by_class` the objective against each rater and in each
    class. Of `values` (case, class, split) `undefined` are NaN.
    """

    rank: int | None
    name: str
    proposed: bool
    mean: float
    sd: float
    low: float
    high: float
    by_split: dict[int, float]
    num_subjects: int
    num_splits: int
    num_scores: int
    beside: dict[str, float]
    dice: dict[str, float]
    thresholds: dict[str, float]
    by_reference: dict[str, float]
    by_class: dict[str, float]
    undefined: int
    values: int


@dataclass(frozen=True)
class Training:
    """How the fits of one candidate went. `dead_share` is a mean over fits, None if not recorded; `duration_s` a median."""

    name: str
    finished: int
    failed: int
    missing: int
    not_converged: int
    best_epoch: float
    epochs: float
    dead_share: float | None
    parameters: int | None
    duration_s: float


@dataclass(frozen=True)
class Comparison:
    """`candidate` less `reference`, paired by subject and split. `p_holm` adjusts the primary, crossed test over all rows."""

    candidate: str
    reference: str
    crossed: CrossedTest
    p_holm: float
    wilcoxon: SplitTest
    corrected: SplitTest
    bootstrap: BootstrapInterval
    by_split: dict[int, float]


@dataclass(frozen=True)
class SplitSizes:
    """Numbers of subjects of one split."""

    index: int
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Summary:
    """Everything that a report says in numbers.

    `reference` is the candidate that all others are compared with: the control, or the highest ranked if the study
    has none (or its control no score). `num_tested` subjects, of `num_subjects`, were in a test set; `num_cases`
    are theirs. `curves` are mean Dice at each threshold of `CURVE`. `varying` has the fields in which recipes
    differ, per candidate.
    """

    name: str
    question: str
    objective: str
    objective_title: str
    sign: int
    control: str | None
    reference: str
    num_planned: int
    num_subjects: int
    num_tested: int
    num_cases: int
    test_to_train: float
    tested_times: tuple[int, int]
    ranking: tuple[Standing, ...]
    comparisons: tuple[Comparison, ...]
    effects: tuple[Effect, ...]
    training: tuple[Training, ...]
    failures: dict[str, str]
    curve_thresholds: tuple[float, ...]
    curves: dict[str, list[float]]
    splits: tuple[SplitSizes, ...]
    varying: dict[str, dict[str, str]]
    learning_rates: tuple[float, ...]

    @property
    def winner(self) -> Standing:
        """The highest ranked candidate."""
        return self.ranking[0]

    @property
    def num_finished(self) -> int:
        """Fits with a score."""
        return sum(t.finished for t in self.training)


def summarise(run: RunData) -> Summary:
    """Compute the summary of a run, finished or not; with fits missing, comparisons use the pairs that both sides have."""
    test = on_test(run.results)
    objective = OBJECTIVES[run.study["objective"]]
    scores = soft_scores(test, objective.metric)
    control: str = run.study.get("control") or ""
    reference = control if control in scores.tables else _best_complete(scores, objective.sign)
    ranking = _ranking(_standings(run, test, scores), reference, scores, objective.sign)
    sizes = tuple(SplitSizes(s.index, len(s.train), len(s.validation), len(s.test)) for s in run.splits)
    times = Counter(subject for split in run.splits for subject in split.test)
    everyone = {subject for split in run.splits for subject in (*split.train, *split.validation, *split.test)}
    ratio = float(np.mean([s.test / s.train for s in sizes]))
    return Summary(
        name=run.study["name"],
        question=run.study["question"],
        objective=objective.metric,
        objective_title=objective.title,
        sign=objective.sign,
        control=control or None,
        reference=reference,
        num_planned=len(run.candidates) * len(run.splits),
        num_subjects=len(everyone),
        num_tested=len(scores.subjects),
        num_cases=int(test["case"].nunique()),
        test_to_train=ratio,
        tested_times=(min(times[s] for s in everyone), max(times[s] for s in everyone)),
        ranking=ranking,
        comparisons=_comparisons([s.name for s in ranking if s.rank is not None], reference, scores, ratio, run.study),
        effects=main_effects(run.candidates, scores, control),
        training=tuple(_training(run, standing.name) for standing in ranking),
        failures={f"{fit.candidate}/{fit.split:03d}": fit.reason for fit in run.fits if fit.state == "failed"},
        curve_thresholds=CURVE,
        curves=dice_curves(test, [standing.name for standing in ranking]),
        splits=sizes,
        varying=_varying(run.candidates),
        learning_rates=_learning_rates(run.candidates),
    )


def plain(value: Any) -> Any:
    """A summary (or a part of it) as JSON can hold it: NaN becomes None, tuples lists, keys text."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _best_complete(scores: Scores, sign: int) -> str:
    """The best mean among the candidates with the most scores: what others are compared with where there is no control."""
    return max(scores.tables, key=lambda name: (np.isfinite(scores.of(name)).sum(), sign * _mean(scores.of(name))))


def _ranking(standings: Sequence[Standing], reference: str, scores: Scores, sign: int) -> tuple[Standing, ...]:
    """By the paired difference to the reference, so that a candidate does not gain by a hard split that it lacks.

    With all fits there this is the order of the means. Candidates that share no pair with the reference go by their
    mean.
    """

    def gain(standing: Standing) -> float:
        paired = _mean(scores.difference(standing.name, reference))
        return sign * (standing.mean - _mean(scores.of(reference)) if math.isnan(paired) else paired)

    known = sorted((s for s in standings if not math.isnan(s.mean)), key=gain, reverse=True)
    unknown = [s for s in standings if math.isnan(s.mean)]
    return tuple([Standing(**(vars(s) | {"rank": i})) for i, s in enumerate(known, 1)] + unknown)


def _standings(run: RunData, test: pd.DataFrame, scores: Scores) -> list[Standing]:
    metric = run.study["objective"]
    references = [str(r) for r in sorted(test.loc[test["metric"] == metric, "reference"].unique()) if r != "mean"]
    classes = [str(c) for c in sorted(test["class"].unique())]
    fits = run.finished
    tables = {
        "beside": {name: soft_scores(test, name) for name in BESIDE},
        "dice": {rule: dice_at_rule(test, fits, rule) for rule in RULES},
        "by_reference": {name: soft_scores(test, metric, reference=name) for name in references},
        "by_class": {name: soft_scores(test, metric, only_class=name) for name in classes} if len(classes) > 1 else {},
    }
    undefined = undefined_cases(test, metric)
    standings = []
    for candidate in run.candidates:
        name = candidate.name
        table = scores.of(name)
        whole = crossed_test(table)
        by_split = _split_means(table, scores.splits)
        standings.append(
            Standing(
                rank=None,
                name=name,
                proposed=candidate.proposed,
                mean=whole.mean,
                sd=float(np.std(list(by_split.values()), ddof=1)) if len(by_split) > 1 else NAN,
                low=whole.low,
                high=whole.high,
                by_split=by_split,
                num_subjects=whole.num_subjects,
                num_splits=whole.num_splits,
                num_scores=whole.num_pairs,
                **{part: {k: _mean(s.of(name)) for k, s in group.items()} for part, group in tables.items()},
                thresholds=_mean_thresholds([fit for fit in fits if fit.candidate == name]),
                undefined=undefined.get(name, (0, 0))[0],
                values=undefined.get(name, (0, 0))[1],
            )
        )
    return standings


def _comparisons(
    ranked: Sequence[str], reference: str, scores: Scores, ratio: float, study: Mapping[str, Any]
) -> tuple[Comparison, ...]:
    found = []
    for name in ranked:
        if name == reference:
            continue
        table = scores.difference(name, reference)
        by_split = _split_means(table, scores.splits)
        means = np.array(list(by_split.values()))
        found.append(
            Comparison(
                candidate=name,
                reference=reference,
                crossed=crossed_test(table),
                p_holm=NAN,
                wilcoxon=wilcoxon_test(means),
                corrected=corrected_t_test(means, ratio),
                bootstrap=paired_bootstrap(table, seed_of("bootstrap", study["name"], study.get("seed", 0))),
                by_split=by_split,
            )
        )
    adjusted = holm([c.crossed.p for c in found])
    return tuple(Comparison(**(vars(c) | {"p_holm": p})) for c, p in zip(found, adjusted, strict=True))


def _training(run: RunData, name: str) -> Training:
    fits = [fit for fit in run.fits if fit.candidate == name]
    finished = [fit for fit in fits if fit.state == "finished"]
    dead = [fit.dead_share for fit in finished if fit.dead_share is not None]
    return Training(
        name=name,
        finished=len(finished),
        failed=len(fits) - len(finished),
        missing=len(run.splits) - len(fits),
        not_converged=sum(fit.converged is False for fit in finished),
        best_epoch=_median([fit.best_epoch for fit in finished if fit.best_epoch is not None]),
        epochs=_median([fit.epochs for fit in finished]),
        dead_share=float(np.mean(dead)) if dead else None,
        parameters=next((fit.parameters for fit in finished if fit.parameters is not None), None),
        duration_s=_median([fit.duration_s for fit in finished]),
    )


def _split_means(table: Table, splits: Sequence[int]) -> dict[int, float]:
    """Mean over subjects in every split that has one; a split without a score is left out."""
    return {j: _mean(column) for j, column in zip(splits, table.T, strict=True) if not np.isnan(column).all()}


def _mean_thresholds(fits: Sequence[FitResult]) -> dict[str, float]:
    found = {rule: [fit.thresholds[rule] for fit in fits if rule in fit.thresholds] for rule in RULES}
    return {rule: float(np.mean(values)) for rule, values in found.items() if values}


def _mean(values: Table) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else NAN


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else NAN


def _learning_rates(candidates: Sequence[Candidate]) -> tuple[float, ...]:
    return tuple(sorted({c.recipe["optim"]["lr"] for c in candidates if "lr" in c.recipe.get("optim", {})}))


def _varying(candidates: Sequence[Candidate]) -> dict[str, dict[str, str]]:
    """Per candidate the fields of its recipe that are not the same for all; nested fields are joined by a dot."""
    flat = {c.name: _flatten(c.recipe) for c in candidates if c.recipe}
    fields = dict.fromkeys(field for recipe in flat.values() for field in recipe)
    differing = [f for f in fields if len({recipe.get(f) for recipe in flat.values()}) > 1]
    return {name: {f: recipe[f] for f in differing if f in recipe} for name, recipe in flat.items()}


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        head = {path: str(value["type"])} if path and "type" in value else {}
        inner = [_flatten(v, f"{path}.{k}" if path else k) for k, v in value.items() if k not in ("type", "code")]
        return head | {k: v for part in inner for k, v in part.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return {
            path: ", ".join(str(item.get("type", item)) if isinstance(item, Mapping) else str(item) for item in value)
        }
    return {path: f"{value:g}" if isinstance(value, float) else str(value)}
