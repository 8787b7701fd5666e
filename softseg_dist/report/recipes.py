"""What candidates are: the fields in which their recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from softseg_dist.report.run_folder import Candidate


def varying_fields(candidates: Sequence[Candidate]) -> dict[str, dict[str, str]]:
    """Per candidate the fields of its recipe that are not the same for all; nested fields are joined by a dot."""
    flat = {c.name: flattened(c.recipe) for c in candidates if c.recipe}
    fields = dict.fromkeys(field for recipe in flat.values() for field in recipe)
    differing = [f for f in fields if len({recipe.get(f) for recipe in flat.values()}) > 1]
    return {name: {f: recipe[f] for f in differing if f in recipe} for name, recipe in flat.items()}


def learning_rates(candidates: Sequence[Candidate]) -> tuple[float, ...]:
    """All learning rates of the candidates, once each."""
    return tuple(sorted({c.recipe["optim"]["lr"] for c in candidates if "lr" in c.recipe.get("optim", {})}))


def flattened(value: Any, path: str = "") -> dict[str, str]:
    """The JSON of a recipe as {path of a field, joined by dots: its value as text}."""
    if isinstance(value, Mapping):
        head = {path: str(value["type"])} if path and "type" in value else {}
        inner = [flattened(v, f"{path}.{k}" if path else k) for k, v in value.items() if k not in ("type", "code")]
        return head | {k: v for part in inner for k, v in part.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return {
            path: ", ".join(str(item.get("type", item)) if isinstance(item, Mapping) else str(item) for item in value)
        }
    return {path: f"{value:g}" if isinstance(value, float) else str(value)}
