"""Main effects of a factorial study: what one factor does, averaged over all levels of the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softseg_dist.frozen import canonical_json
from softseg_dist.numerics.statistics import NAN, CrossedTest, crossed_test, holm
from softseg_dist.report.run_folder import Candidate
from softseg_dist.report.scores import Scores


@dataclass(frozen=True)
class Effect:
    """`level` less `base` of one factor. `num_cells` pairs of candidates, equal in all other factors, are averaged."""

    factor: str
    level: str
    base: str
    num_cells: int
    crossed: CrossedTest
    p_holm: float = NAN


def main_effects(candidates: Sequence[Candidate], scores: Scores, control: str | None) -> tuple[Effect, ...]:
    """Crossed tests of every factor's levels against the level of the control; Holm over all of them.

    Empty unless the candidates of the study file are a complete factorial of at least two factors. A subject in a split
    counts if all candidates were tested on it.
    """
    fixed = [c for c in candidates if not c.proposed and c.recipe]
    factors = _factors(fixed)
    cells = {tuple(canonical_json(c.recipe[f]) for f in factors): c for c in fixed}
    if len(factors) < 2 or not len(fixed) == len(cells) == np.prod([len(levels) for levels in factors.values()]):
        return ()
    start = next((c for c in fixed if c.name == control), fixed[0])
    found = [
        _effect(name, level, canonical_json(start.recipe[name]), factors, cells, scores)
        for name, levels in factors.items()
        for level in levels
        if level != canonical_json(start.recipe[name])
    ]
    adjusted = holm([effect.crossed.p for effect in found])
    return tuple(Effect(**(vars(e) | {"p_holm": p})) for e, p in zip(found, adjusted, strict=True))


def _factors(candidates: Sequence[Candidate]) -> dict[str, dict[str, str]]:
    """Fields of the recipe with more than one value: {field: {JSON of a level: its name}}, in order of appearance."""
    fields = candidates[0].recipe if candidates else ()
    values = {name: [c.recipe.get(name) for c in candidates] for name in fields}
    levels = {name: {canonical_json(v): v for v in found} for name, found in values.items()}
    return {name: _level_names(found) for name, found in levels.items() if len(found) > 1}


def _level_names(levels: Mapping[str, Any]) -> dict[str, str]:
    kinds = [v["type"] if isinstance(v, dict) and "type" in v else None for v in levels.values()]
    if None in kinds:
        return {key: value if isinstance(value, str) else key for key, value in levels.items()}
    if len(set(kinds)) == len(kinds):
        return dict(zip(levels, map(str, kinds), strict=True))
    return {key: _written(value, levels.values()) for key, value in levels.items()}


def _written(value: Mapping[str, Any], among: Any) -> str:
    varying = [k for k in value if k != "type" and len({canonical_json(other.get(k)) for other in among}) > 1]
    return f"{value['type']}({', '.join(f'{k}={value[k]}' for k in varying)})"


def _effect(
    factor: str,
    level: str,
    base: str,
    factors: Mapping[str, Mapping[str, str]],
    cells: Mapping[tuple[str, ...], Candidate],
    scores: Scores,
) -> Effect:
    others = [list(levels) if name != factor else [level] for name, levels in factors.items()]
    place = list(factors).index(factor)
    pairs = [(cell, (*cell[:place], base, *cell[place + 1 :])) for cell in itertools.product(*others)]
    differences = np.array([scores.difference(cells[one].name, cells[other].name) for one, other in pairs])
    names = factors[factor]
    return Effect(factor, names[level], names[base], len(pairs), crossed_test(differences.mean(axis=0)))
