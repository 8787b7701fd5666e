"""Effects in a factorial study: what one factor does, averaged over the others, and whether that depends on another factor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.statistics import NAN, CrossedTest, crossed_test
from softseg_dist.report.paired_tests import holm_corrected
from softseg_dist.report.run_folder import RecordedCandidate
from softseg_dist.report.scores import ScoreTable, ScoreTables

Cell = tuple[str, ...]  # the JSON of a level of each factor


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
    """A complete factorial: {factor: {JSON of a level: its name}}, the candidate of every cell, and the cell of the base levels."""

    factors: Mapping[str, Mapping[str, str]]
    cells: Mapping[Cell, str]
    base: Cell

    def contrasts(self, place: int) -> list[tuple[str, str]]:
        """(level, base) of the factor at `place`, for each of its other levels."""
        base = self.base[place]
        return [(level, base) for level in list(self.factors.values())[place] if level != base]

    def others(self, *places: int) -> list[Cell]:
        """Every combination of the factors that are not at `places`, which keep their base levels."""
        levels = [[self.base[i]] if i in places else list(named) for i, named in enumerate(self.factors.values())]
        return list(itertools.product(*levels))

    def difference(self, scores: ScoreTables, cell: Cell, place: int, level: str, base: str) -> ScoreTable:
        """`level` minus `base` at `place`, in the cell that is `cell` otherwise."""
        return scores.difference(self.cells[_at(cell, place, level)], self.cells[_at(cell, place, base)])


def factorial_of(candidates: Sequence[RecordedCandidate], control: str | None) -> Factorial | None:
    """The factorial that the candidates of the study file are, with the levels of the control as base.

    None unless it is complete and has at least two factors.
    """
    fixed = [c for c in candidates if c.planned]
    factors = _factors(fixed)
    cells = {tuple(canonical_json(c.planned[f]) for f in factors): c.name for c in fixed}
    if len(factors) < 2 or not len(fixed) == len(cells) == np.prod([len(levels) for levels in factors.values()]):
        return None
    start = next((c for c in fixed if c.name == control), fixed[0])
    return Factorial(factors, cells, tuple(canonical_json(start.planned[f]) for f in factors))


def main_effects(design: Factorial, scores: ScoreTables) -> tuple[Effect, ...]:
    """Crossed tests of every factor's levels against its base; Holm over all of them.

    A subject in a split counts if all candidates were tested on it.
    """
    found = []
    for place, (factor, names) in enumerate(design.factors.items()):
        cells = design.others(place)
        for level, base in design.contrasts(place):
            table = np.array([design.difference(scores, cell, place, level, base) for cell in cells]).mean(axis=0)
            found.append(Effect(factor, names[level], names[base], len(cells), crossed_test(table)))
    return holm_corrected(found)


def interactions(design: Factorial, scores: ScoreTables) -> tuple[Interaction, ...]:
    """Crossed tests of every two factors' levels against their bases; Holm over all of them."""
    found = []
    for (i, one), (j, other) in itertools.combinations(enumerate(design.factors), 2):
        cells, names, other_names = design.others(i, j), design.factors[one], design.factors[other]
        for (level, base), (other_level, other_base) in itertools.product(design.contrasts(i), design.contrasts(j)):
            with_level, with_base = (
                np.array([design.difference(scores, _at(cell, j, value), i, level, base) for cell in cells])
                for value in (other_level, other_base)
            )
            test = crossed_test((with_level - with_base).mean(axis=0))
            words = names[level], names[base], other, other_names[other_level], other_names[other_base]
            found.append(Interaction(one, *words, len(cells), test))
    return holm_corrected(found)


def _at(cell: Cell, place: int, level: str) -> Cell:
    return (*cell[:place], level, *cell[place + 1 :])


def _factors(candidates: Sequence[RecordedCandidate]) -> dict[str, dict[str, str]]:
    """Fields of the recipe with more than one value: {field: {JSON of a level: its name}}, in order of appearance."""
    fields = candidates[0].planned if candidates else ()
    levels = {name: {canonical_json(value): value for c in candidates for value in [c.planned.get(name)]} for name in fields}
    return {name: _level_names(found) for name, found in levels.items() if len(found) > 1}


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
