"""Paired tests: candidates against the reference and the best, factors and their interactions.

The primary test is the crossed random-effects test over subjects and splits. All comparisons with the control on the objective
are the one primary family, the other tables are secondary families; each is corrected by Holm. Wilcoxon's test, the corrected
t-test, the bootstrap and, from three sites on, a t-test over sites stand beside it without correction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from softseg_dist.frozen import canonical_json, grouped
from softseg_dist.numerics.crossed_test import CrossedTest, crossed_test
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.statistics import SplitTest, TTest, corrected_t_test, holm, paired_bootstrap, subject_test, wilcoxon_test
from softseg_dist.report.run_folder import RecordedCandidate
from softseg_dist.report.scores import ScoreTable, ScoreTables, mean_of, split_means
from softseg_dist.words import ALPHA, interval_clause, number, p_clause

FEWEST_SITES = 3  # for a test over sites
UNLIMITED = (-math.inf, math.inf)
ONE_DF = 1.5  # below, degrees of freedom are one when rounded
Tested = TypeVar("Tested", "Comparison", "Rival", "Effect", "Interaction")
OF_MODELS = "t-test over subjects: it speaks about new subjects for these trained models, not about new training runs"


def holm_corrected(found: Sequence[Tested]) -> tuple[Tested, ...]:
    """The same entries with `p_holm`: the p of their crossed tests, corrected by Holm over all of them."""
    adjusted = holm([entry.crossed.p for entry in found])
    return tuple(replace(entry, p_holm=p) for entry, p in zip(found, adjusted, strict=True))


def primary_test(scores: ScoreTables, table: ScoreTable, limits: tuple[float, float] = UNLIMITED) -> CrossedTest:
    """The crossed test of values [subject x split]; of trained models the t-test over subjects, which says so.

    Without an interval that is not estimable: on one degree of freedom, or outside of the scale, which the warnings say.
    """
    if scores.of_models:
        of_subjects = subject_test(table[:, 0])
        warnings = (OF_MODELS,) if math.isfinite(of_subjects.p) else ()
        test = CrossedTest(**vars(of_subjects) | {"warnings": warnings}, num_splits=1, num_pairs=of_subjects.num_subjects)
    else:
        test = crossed_test(table, scores.subjects)
    if test.df < ONE_DF:
        why = "it stands on one degree of freedom"
    elif test.low < limits[0] or test.high > limits[1]:
        why = f"it leaves the scale of the score, which ends at {limits[0] if test.low < limits[0] else limits[1]:g}"
    else:
        return test
    return replace(test, low=math.nan, high=math.nan, warnings=(*test.warnings, f"interval not estimable: {why}"))


def effect_in_words(test: TTest, p: float, p_name: str = "p") -> str:
    """`+0.012, 95 % interval +0.001 to +0.023, p = 0.032`; without a p, the difference and why it was not tested."""
    difference = number(test.mean, signed=True)
    if math.isnan(test.p):
        return f"{difference}; not tested: {test.note}"
    why = " (one degree of freedom)" if math.isnan(test.low) else ""
    return f"{difference}, {interval_clause(test.low, test.high, signed=True)}{why}, {p_clause(p, p_name)}"


@dataclass(frozen=True)
class Comparison:
    """`candidate` minus `reference`, paired by subject and split. `p_holm` adjusts the primary, crossed test over all rows.

    `new_sites` is the t-test over the mean differences of the sites, None for fewer than three.
    """

    candidate: str
    reference: str
    crossed: CrossedTest
    p_holm: float
    wilcoxon: SplitTest
    corrected: SplitTest
    bootstrap: tuple[float, float]  # the ends of its interval
    new_sites: TTest | None = None


def comparisons_with(
    ranked: Sequence[str], reference: str, scores: ScoreTables, ratio: float, study: Mapping[str, Any], site_of: Mapping[str, str]
) -> tuple[Comparison, ...]:
    """All tests of each of the `ranked` candidates minus `reference`, in their order; Holm over all of them.

    `scores` are of the objective, `ratio` is test over training subjects of a split; the JSON of the `study` seeds the bootstrap.
    """
    found = []
    for name in (name for name in ranked if name != reference):
        table = scores.difference(name, reference)
        means = np.array(list(split_means(table, scores.splits).values()))
        found.append(
            Comparison(
                candidate=name,
                reference=reference,
                crossed=primary_test(scores, table),
                p_holm=math.nan,
                wilcoxon=wilcoxon_test(means),
                corrected=corrected_t_test(means, ratio),
                bootstrap=paired_bootstrap(table, seed_of("bootstrap", study["name"], study.get("seed", 0))),
                new_sites=new_sites_test(table, scores.subjects, site_of),
            )
        )
    return holm_corrected(found)


def new_sites_test(differences: ScoreTable, subjects: Sequence[str], site_of: Mapping[str, str]) -> TTest | None:
    """The t-test over sites, which speaks about new sites: the mean difference of a site is that of its subjects' means.

    None for fewer than three sites; subjects of an unknown site, "", are left out.
    """
    tested = [(subject, row) for subject, row in zip(subjects, differences, strict=True) if not np.isnan(row).all()]
    of_site = grouped((site_of[subject], mean_of(row)) for subject, row in tested if site_of.get(subject))
    return subject_test(np.array([np.mean(means) for means in of_site.values()])) if len(of_site) >= FEWEST_SITES else None


@dataclass(frozen=True)
class Rival:
    """`candidate` minus the highest ranked. `p_holm` adjusts the crossed test over all rivals."""

    candidate: str
    crossed: CrossedTest
    p_holm: float = math.nan

    @property
    def tied(self) -> bool:
        """Not shown to differ from the highest ranked at the 5 % level, or not testable."""
        return not self.p_holm < ALPHA


def rivals_of(ranked: Sequence[str], scores: ScoreTables) -> tuple[Rival, ...]:
    """Crossed tests of all others minus the first of the `ranked` candidates; Holm over all of them.

    Where the first was chosen by tested subjects, too few candidates may count as tied: the p-values describe, not confirm.
    """
    return holm_corrected([Rival(name, primary_test(scores, scores.difference(name, ranked[0]))) for name in ranked[1:]])


@dataclass(frozen=True)
class Effect:
    """`level` minus `base` of one factor. `num_cells` pairs of candidates, equal in all other factors, are averaged."""

    factor: str
    level: str
    base: str
    num_cells: int
    crossed: CrossedTest
    p_holm: float = math.nan


@dataclass(frozen=True)
class Interaction:
    """What `level` instead of `base` does with `other_level`, minus what it does with `other_base` of the other factor.

    `num_cells` such differences of differences, equal in all further factors, are averaged. 0: the two effects add up.
    """

    factor: str
    level: str
    base: str
    other: str
    other_level: str
    other_base: str
    num_cells: int
    crossed: CrossedTest
    p_holm: float = math.nan


def factorial_tests(
    candidates: Sequence[RecordedCandidate], control: str | None, scores: ScoreTables
) -> tuple[tuple[Effect, ...], tuple[Interaction, ...]]:
    """What every factor does, and how far that depends on another, if the candidates of the study file are a complete factorial.

    Levels are compared with those of the control. A subject in a split counts if all candidates were tested on it. Holm corrects
    over all effects, and over all interactions. Both are () unless there are two factors or more.
    """
    fixed = [c for c in candidates if c.planned]
    fields = fixed[0].planned if fixed else ()
    levels = {f: {canonical_json(value): value for value in (c.planned.get(f) for c in fixed)} for f in fields}
    factors = {f: _level_names(values) for f, values in levels.items() if len(values) > 1}  # {field: {JSON of a level: its name}}
    cells = {tuple(canonical_json(c.planned[f]) for f in factors): c.name for c in fixed}
    if len(factors) < 2 or not len(fixed) == len(cells) == np.prod([len(named) for named in factors.values()]):
        return (), ()
    start = next((c for c in fixed if c.name == control), fixed[0])
    of_cells = np.array([scores.of(cells[cell]) for cell in itertools.product(*factors.values())])
    table = of_cells.reshape(*map(len, factors.values()), *of_cells.shape[1:])  # [L1 L2 .. subjects splits]
    steps = []
    for axis, (factor, named) in enumerate(factors.items()):
        base, names = list(named).index(canonical_json(start.planned[factor])), list(named.values())
        steps.append([_Step(factor, names[at], names[base], axis, at, base) for at in range(len(names)) if at != base])
    pairs = [pair for one, other in itertools.combinations(steps, 2) for pair in itertools.product(one, other)]
    effects = [Effect(*step[:3], *_tested(scores, table, step)) for step in itertools.chain(*steps)]
    interactions = [Interaction(*one[:3], *other[:3], *_tested(scores, table, one, other)) for one, other in pairs]
    return holm_corrected(effects), holm_corrected(interactions)


class _Step(NamedTuple):
    """From the base level of a factor to another one: their names, and where both are along an axis of the table of cells."""

    factor: str
    level: str
    base: str
    axis: int
    at: int
    base_at: int


def _tested(scores: ScoreTables, table: ScoreTable, *steps: _Step) -> tuple[int, CrossedTest]:
    """What a step, or one step to another, does to scores [levels .. subjects splits]: number of cells, test of their mean."""
    for step in steps:
        table = table.take([step.at], step.axis) - table.take([step.base_at], step.axis)
    cells = table.reshape(-1, *table.shape[-2:])
    return len(cells), primary_test(scores, cells.mean(axis=0))


def _level_names(levels: Mapping[str, Any]) -> dict[str, str]:
    kinds = [kind_of(value) for value in levels.values()]
    if None not in kinds and len(set(kinds)) == len(kinds):
        return dict(zip(levels, map(str, kinds), strict=True))
    if all(isinstance(value, dict) and "type" in value for value in levels.values()):
        return {key: _written(value, levels.values()) for key, value in levels.items()}
    return {key: value if isinstance(value, str) else key for key, value in levels.items()}


def kind_of(value: Any) -> str | None:
    """`Dice`, the class of an object, or `Affine + Flip`, those of a list of objects; None for anything else."""
    if isinstance(value, (list, tuple)):
        kinds = [kind_of(item) for item in value]
        return None if None in kinds else " + ".join(map(str, kinds)) or "none"
    return value["type"] if isinstance(value, dict) and "type" in value else None


def _written(value: Mapping[str, Any], among: Any) -> str:
    varying = [k for k in value if k != "type" and len({canonical_json(other.get(k)) for other in among}) > 1]
    return f"{value['type']}({', '.join(f'{k}={value[k]}' for k in varying)})"
