"""Paired tests of every candidate against the one that all are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from softseg_dist.report.scores import Scores, split_means


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
