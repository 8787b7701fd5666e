"""Effects in a factorial study: what one factor does, averaged over the others, and whether that depends on another factor.

Main effects and interactions are secondary families: the primary one is that of all comparisons with the control.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.paired_tests import estimated, holm_corrected
from softseg_dist.report.run_folder import RecordedCandidate
from softseg_dist.report.scores import ScoreTables


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


@dataclass(frozen=True)
class Factorial:
    """A complete factorial: {factor: names of its levels}, the index of each one's base level, and the candidates of all cells.

    Candidates are in the order of `itertools.product` over the levels.
    """

    factors: Mapping[str, Sequence[str]]
    base: Sequence[int]
    candidates: Sequence[str]

    def scores(self, scores: ScoreTables) -> npt.NDArray[np.float64]:
        """[L1 L2 .. subjects splits]: an axis for the levels of every factor, then the scores of a cell."""
        tables = np.array([scores.of(name) for name in self.candidates])
        return tables.reshape(*map(len, self.factors.values()), *tables.shape[1:])


def factorial_of(candidates: Sequence[RecordedCandidate], control: str | None) -> Factorial | None:
    """The factorial that the candidates of the study file are, with the levels of the control as base.

    None unless it is complete and has at least two factors.
    """
    fixed = [c for c in candidates if c.planned]
    fields = fixed[0].planned if fixed else ()
    levels = {f: {canonical_json(value): value for value in (c.planned.get(f) for c in fixed)} for f in fields}
    factors = {f: _level_names(values) for f, values in levels.items() if len(values) > 1}  # {field: {JSON of a level: its name}}
    cells = {tuple(canonical_json(c.planned[f]) for f in factors): c.name for c in fixed}
    if len(factors) < 2 or not len(fixed) == len(cells) == np.prod([len(named) for named in factors.values()]):
        return None
    start = next((c for c in fixed if c.name == control), fixed[0])
    base = [list(named).index(canonical_json(start.planned[f])) for f, named in factors.items()]
    names = {f: list(named.values()) for f, named in factors.items()}
    return Factorial(names, base, [cells[cell] for cell in itertools.product(*factors.values())])


def main_effects(design: Factorial, scores: ScoreTables) -> tuple[Effect, ...]:
    """Crossed tests of every factor's levels against its base; Holm over all of them.

    A subject in a split counts if all candidates were tested on it.
    """
    found, table = [], design.scores(scores)
    for i, ((factor, names), base) in enumerate(zip(design.factors.items(), design.base, strict=True)):
        of_level = np.moveaxis(table, i, 0).reshape(len(names), -1, *table.shape[-2:])  # [level cell subjects splits]
        for level in (level for level in range(len(names)) if level != base):
            test = estimated((of_level[level] - of_level[base]).mean(axis=0), scores.subjects)
            found.append(Effect(factor, names[level], names[base], of_level.shape[1], test))
    return holm_corrected(found)


def interactions(design: Factorial, scores: ScoreTables) -> tuple[Interaction, ...]:
    """Crossed tests of every two factors' levels against their bases; Holm over all of them."""
    found, table = [], design.scores(scores)
    for (i, (one, names)), (j, (other, others)) in itertools.combinations(enumerate(design.factors.items()), 2):
        base, other_base = design.base[i], design.base[j]
        of_levels = np.moveaxis(table, (i, j), (0, 1)).reshape(len(names), len(others), -1, *table.shape[-2:])
        for level, other_level in itertools.product(range(len(names)), range(len(others))):
            if level != base and other_level != other_base:
                effect = of_levels[level] - of_levels[base]  # [other level, cell, subjects, splits]
                test = estimated((effect[other_level] - effect[other_base]).mean(axis=0), scores.subjects)
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
