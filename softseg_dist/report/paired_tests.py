"""Paired tests of every candidate against the one that all are compared with, and of the best against all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from softseg_dist.numerics.seeds import seed_of
from softseg_dist.numerics.statistics import (
    LEVEL,
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
from softseg_dist.report.ranking import RULES
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import Scores, scores_at_rule, split_means


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


def comparisons_with(
    ranked: Sequence[str], reference: str, scores: Scores, ratio: float, study: Mapping[str, Any]
) -> tuple[Comparison, ...]:
    """All tests of each of the `ranked` candidates less `reference`, in their order; Holm over all of them.

    Args:
        ranked: names, from the highest ranked down.
        reference: what they are compared with.
        scores: of the objective.
        ratio: test subjects over training subjects of a split.
        study: JSON of the study; its name and seed are those of the bootstrap.
    """
    found = []
    for name in ranked:
        if name == reference:
            continue
        table = scores.difference(name, reference)
        by_split = split_means(table, scores.splits)
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


@dataclass(frozen=True)
class Rival:
    """`candidate` less the highest ranked. `p_holm` adjusts the crossed test over all rivals."""

    candidate: str
    crossed: CrossedTest
    p_holm: float = NAN

    @property
    def tied(self) -> bool:
        """Not shown to differ from the highest ranked at the 5 % level, or not testable."""
        return not self.p_holm < 1 - LEVEL


def rivals_of(ranked: Sequence[str], scores: Scores) -> tuple[Rival, ...]:
    """Crossed tests of all others less the first of the `ranked` candidates; Holm over all of them.

    The first was picked by the scores that it is tested on, so those not told apart from it may be too few: the p-values
    describe, they do not confirm.
    """
    found = [Rival(name, crossed_test(scores.difference(name, ranked[0]))) for name in ranked[1:]]
    adjusted = holm([rival.crossed.p for rival in found])
    return tuple(Rival(rival.candidate, rival.crossed, p) for rival, p in zip(found, adjusted, strict=True))


BASE = "fixed"


@dataclass(frozen=True)
class RuleTest:
    """Dice of one candidate at the threshold of `rule` less that at 0.5, on the same subjects and fits."""

    candidate: str
    rule: str
    crossed: CrossedTest
    p_holm: float = NAN


def rule_tests(run: RunData, test: pd.DataFrame, names: Sequence[str]) -> tuple[RuleTest, ...]:
    """Crossed tests of every rule against 0.5, candidate by candidate; Holm over all of them."""
    dice = {rule: scores_at_rule(test, run.finished, "dice", rule) for rule in RULES}
    found = [
        RuleTest(name, rule, crossed_test(dice[rule].of(name) - dice[BASE].of(name)))
        for name in names
        for rule in RULES
        if rule != BASE
    ]
    adjusted = holm([one.crossed.p for one in found])
    return tuple(replace(one, p_holm=p) for one, p in zip(found, adjusted, strict=True))
