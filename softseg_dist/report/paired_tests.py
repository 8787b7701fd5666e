"""Paired tests: candidates against the reference and the best, thresholds against 0.5, factors and their interactions.

The primary test is the crossed random-effects test over subjects and splits. All comparisons with the control on the objective
are the one primary family, the other tables are secondary families; each is corrected by Holm. Wilcoxon's test, the corrected
t-test, the bootstrap and, from three sites on, a t-test over sites stand beside it without correction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import pandas as pd

from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.crossed_test import CrossedTest, crossed_test
from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.statistics import (
    LEVEL,
    NAN,
    SplitTest,
    TTest,
    corrected_t_test,
    holm,
    paired_bootstrap,
    subject_test,
    wilcoxon_test,
)
from softseg_dist.report.run_folder import RecordedCandidate, RunData
from softseg_dist.report.scores import ScoreTable, ScoreTables, mean_of, scores_by_rule, split_means
from softseg_dist.words import interval_clause, number, p_clause

FEWEST_SITES = 3  # for a test over sites
UNLIMITED = (-math.inf, math.inf)
ONE_DF = 1.5  # below, degrees of freedom are one when rounded
OF_MODELS = "t-test over subjects: it speaks about new subjects for these trained models, not about new training runs"


class _Tested(Protocol):
    """A frozen dataclass with a crossed test and a `p_holm`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def crossed(self) -> CrossedTest: ...


Tested = TypeVar("Tested", bound=_Tested)


def holm_corrected(found: Sequence[Tested]) -> tuple[Tested, ...]:
    """The same entries with `p_holm`: the p of their crossed tests, corrected by Holm over all of them."""
    adjusted = holm([entry.crossed.p for entry in found])
    return tuple(replace(entry, p_holm=p) for entry, p in zip(found, adjusted, strict=True))


def paired_test(scores: ScoreTables, candidate: str, reference: str) -> CrossedTest:
    """The test of `candidate` minus `reference` (see `primary_test`); its warnings name subjects."""
    return primary_test(scores, scores.difference(candidate, reference))


def primary_test(scores: ScoreTables, table: ScoreTable, limits: tuple[float, float] = UNLIMITED) -> CrossedTest:
    """The crossed test of values [subject x split]; of trained models the t-test over subjects, which says so."""
    if not scores.of_models:
        return estimated(table, scores.subjects, limits)
    test = subject_test(table[:, 0])
    warnings = (OF_MODELS,) if math.isfinite(test.p) else ()
    return _estimable(CrossedTest(**vars(test) | {"warnings": warnings}, num_splits=1, num_pairs=test.num_subjects), limits)


def estimated(table: ScoreTable, subjects: Sequence[str] = (), limits: tuple[float, float] = UNLIMITED) -> CrossedTest:
    """The crossed test, without an interval that is not estimable: on one degree of freedom, or outside of the scale."""
    return _estimable(crossed_test(table, subjects), limits)


def _estimable(test: CrossedTest, limits: tuple[float, float]) -> CrossedTest:
    """The test without such an interval, and why among its warnings."""
    if test.df < ONE_DF:
        why = "it stands on one degree of freedom"
    elif test.low < limits[0] or test.high > limits[1]:
        why = f"it leaves the scale of the score, which ends at {limits[0] if test.low < limits[0] else limits[1]:g}"
    else:
        return test
    return replace(test, low=NAN, high=NAN, warnings=(*test.warnings, f"interval not estimable: {why}"))


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

    `scores` are of the objective, `ratio` is test over training subjects of a split; name and seed of the bootstrap are those
    of the JSON of the `study`.
    """
    found = []
    for name in (name for name in ranked if name != reference):
        table = scores.difference(name, reference)
        means = np.array(list(split_means(table, scores.splits).values()))
        found.append(
            Comparison(
                candidate=name,
                reference=reference,
                crossed=paired_test(scores, name, reference),
                p_holm=NAN,
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
    of_site: dict[str, list[float]] = {}
    for subject, row in zip(subjects, differences, strict=True):
        if site_of.get(subject) and not np.isnan(row).all():
            of_site.setdefault(site_of[subject], []).append(mean_of(row))
    return subject_test(np.array([np.mean(means) for means in of_site.values()])) if len(of_site) >= FEWEST_SITES else None


@dataclass(frozen=True)
class Rival:
    """`candidate` minus the highest ranked. `p_holm` adjusts the crossed test over all rivals."""

    candidate: str
    crossed: CrossedTest
    p_holm: float = NAN

    @property
    def tied(self) -> bool:
        """Not shown to differ from the highest ranked at the 5 % level, or not testable."""
        return not self.p_holm < 1 - LEVEL


def rivals_of(ranked: Sequence[str], scores: ScoreTables) -> tuple[Rival, ...]:
    """Crossed tests of all others minus the first of the `ranked` candidates; Holm over all of them.

    Where the first was chosen by subjects who are tested, too few candidates may count as tied: the p-values describe, they do
    not confirm.
    """
    return holm_corrected([Rival(name, paired_test(scores, name, ranked[0])) for name in ranked[1:]])


@dataclass(frozen=True)
class RuleTest:
    """Dice of one candidate at the threshold of `rule` minus that at 0.5, on the same subjects and fits."""

    candidate: str
    rule: str
    crossed: CrossedTest
    p_holm: float = NAN


def rule_tests(run: RunData, test: pd.DataFrame, names: Sequence[str]) -> tuple[RuleTest, ...]:
    """Crossed tests of every rule against 0.5, candidate by candidate; Holm over all of them."""
    others = scores_by_rule(test, run.finished, "dice")
    base = others.pop("fixed")
    tests = {(name, rule): estimated(dice.of(name) - base.of(name)) for name in names for rule, dice in others.items()}
    return holm_corrected([RuleTest(*of, crossed) for of, crossed in tests.items() if crossed.num_pairs])


@dataclass(frozen=True)
class Effect:
    """`level` minus `base` of one factor. `num_cells` pairs of candidates, equal in all other factors, are averaged."""

    factor: str
    level: str
    base: str
    num_cells: int
    crossed: CrossedTest
    p_holm: float = NAN


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
    p_holm: float = NAN


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
    names = {f: list(named.values()) for f, named in factors.items()}
    base = [list(named).index(canonical_json(start.planned[f])) for f, named in factors.items()]
    of_cells = np.array([scores.of(cells[cell]) for cell in itertools.product(*factors.values())])
    table = of_cells.reshape(*map(len, names.values()), *of_cells.shape[1:])  # [L1 L2 .. subjects splits]
    return _main_effects(names, base, table, scores.subjects), _interactions(names, base, table, scores.subjects)


def _main_effects(
    factors: Mapping[str, Sequence[str]], bases: Sequence[int], table: ScoreTable, subjects: Sequence[str]
) -> tuple[Effect, ...]:
    found = []
    for i, ((factor, names), base) in enumerate(zip(factors.items(), bases, strict=True)):
        of_level = np.moveaxis(table, i, 0).reshape(len(names), -1, *table.shape[-2:])  # [level cell subjects splits]
        for level in (level for level in range(len(names)) if level != base):
            test = estimated((of_level[level] - of_level[base]).mean(axis=0), subjects)
            found.append(Effect(factor, names[level], names[base], of_level.shape[1], test))
    return holm_corrected(found)


def _interactions(
    factors: Mapping[str, Sequence[str]], bases: Sequence[int], table: ScoreTable, subjects: Sequence[str]
) -> tuple[Interaction, ...]:
    found = []
    for (i, (one, names)), (j, (other, others)) in itertools.combinations(enumerate(factors.items()), 2):
        base, other_base = bases[i], bases[j]
        of_levels = np.moveaxis(table, (i, j), (0, 1)).reshape(len(names), len(others), -1, *table.shape[-2:])
        for level, other_level in itertools.product(range(len(names)), range(len(others))):
            if level != base and other_level != other_base:
                effect = of_levels[level] - of_levels[base]  # [other level, cell, subjects, splits]
                test = estimated((effect[other_level] - effect[other_base]).mean(axis=0), subjects)
                words = names[level], names[base], other, others[other_level], others[other_base]
                found.append(Interaction(one, *words, of_levels.shape[2], test))
    return holm_corrected(found)


def _level_names(levels: Mapping[str, Any]) -> dict[str, str]:
    kinds = [_kind(value) for value in levels.values()]
    if None not in kinds and len(set(kinds)) == len(kinds):
        return dict(zip(levels, map(str, kinds), strict=True))
    if all(isinstance(value, dict) and "type" in value for value in levels.values()):
        return {key: _written(value, levels.values()) for key, value in levels.items()}
    return {key: value if isinstance(value, str) else key for key, value in levels.items()}


def _kind(value: Any) -> str | None:
    """The class of an object, those of a list of objects joined; None for anything else."""
    if isinstance(value, (list, tuple)):
        kinds = [_kind(item) for item in value]
        return None if None in kinds else " + ".join(map(str, kinds)) or "none"
    return value["type"] if isinstance(value, dict) and "type" in value else None


def _written(value: Mapping[str, Any], among: Any) -> str:
    varying = [k for k in value if k != "type" and len({canonical_json(other.get(k)) for other in among}) > 1]
    return f"{value['type']}({', '.join(f'{k}={value[k]}' for k in varying)})"
