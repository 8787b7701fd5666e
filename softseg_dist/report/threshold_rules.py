"""Where to cut a soft prediction: does a threshold from validation give a better Dice than 0.5?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from softseg_dist.numerics.statistics import NAN, CrossedTest, crossed_test, holm
from softseg_dist.report.ranking import RULES
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import scores_at_rule

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
