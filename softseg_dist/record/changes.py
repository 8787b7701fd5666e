"""What differs between two studies, and whether one of them extends the other or is another study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from softseg_dist.sources import Sources, code_changes

FREE = ("question", "control", "resources", "subjects", "splits")
"""Fields of a study that change no finished fit. `subjects` and `splits` act through the splits, which are compared themselves."""

Json = dict[str, Any]


class Difference(NamedTuple):
    """A leaf in which two JSON objects differ: where it is, and both values as text."""

    path: tuple[str, ...]
    old: str
    new: str
    tag: str = ""  # of the class or function whose code differs

    @property
    def field(self) -> str:
        """`optim.lr`"""
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"{self.field}: {self.old} -> {self.new}"


def holdout_change(old: Sequence[str], new: Sequence[str]) -> str:
    """How the held-out subjects differ, in one line; "" if they do not."""
    return "" if sorted(old) == sorted(new) else f"held-out subjects: {_sample(old)} -> {_sample(new)}"


def study_changes(
    old: Json, new: Json, old_splits: Sequence[Json], new_splits: Sequence[Json], sources: tuple[Sources, Sources] | None = None
) -> tuple[list[str], list[str]]:
    """Changes that would mix two studies in one table, and those that only add: one line for each, as `path: old -> new`.

    Studies and splits are JSON. `sources` has the texts of both studies, to show the code that has changed.
    Allowed: more candidates, a search where there was none, more trials, repeats, or splits (the old ones first, unchanged;
    outer ones as well), and whatever is in `FREE`. Everything else changes results.
    """
    refused: list[str] = []
    extended: list[str] = []
    users: dict[str, list[str]] = {}  # line about a change of code -> where that code is used
    for field in sorted(old.keys() | new.keys()):
        for found in differences(old.get(field), new.get(field), field):
            if _extends(found.path, old, new):
                extended.append(str(found))
            elif found.tag and sources:
                for line in code_changes(*sources, *found.tag.split(":")):
                    users.setdefault(line, []).append(".".join(found.path[:-1]))
            else:
                refused.append(str(found))
    refused += [f"{line} (used by {_sample(places)})" for line, places in users.items()]
    splits = _split_changes(old_splits, new_splits)
    if splits:
        refused += [splits, *(line for line in extended if line.startswith(("splits.", "subjects:", "nested")))]
    return refused, extended


def _extends(path: tuple[str, ...], old: Json, new: Json) -> bool:
    if path[0] in FREE:
        return True
    if path[0] == "nested":  # acts through the splits that are recorded, which are the outer ones then
        return bool(old.get("nested") and new.get("nested"))
    if path[0] == "candidates" and len(path) > 1:
        return path[1] not in old["candidates"]
    if path == ("repeats",):
        return bool(new["repeats"] >= old.get("repeats", 1))
    if path == ("search",):
        return old.get("search") is None
    return path == ("search", "trials") and bool(new["search"]["trials"] > old["search"]["trials"])


def differences(old: Any, new: Any, *path: str) -> Iterator[Difference]:
    """Leaves in which two JSON values differ, depth first; objects of two types differ in their type alone.

    >>> old, new = {"type": "Optim", "lr": 0.1, "epochs": 9}, {"type": "Optim", "lr": 0.2, "epochs": 9}
    >>> [str(found) for found in differences(old, new, "optim")]
    ['optim.lr: 0.1 -> 0.2']
    """
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("type") != new.get("type"):
            yield Difference(path, _show(old), _show(new))
            return
        tag = new.get("type") or new.get("function") or ""
        for key in sorted(old.keys() | new.keys()):
            if key == "code" and old.get(key) != new.get(key):
                yield Difference((*path, key), _show(old.get(key)), _show(new.get(key)), tag)
            else:
                yield from differences(old.get(key), new.get(key), *path, key)
    elif _objects(old) and _objects(new) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, *path, str(index))
    else:
        yield Difference(path, _show(old), _show(new))


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return str(value.get("type", "given"))
    if isinstance(value, list):
        return f"({', '.join(map(_show, value))})"
    return str(value)


def _split_changes(old: Sequence[Json], new: Sequence[Json]) -> str:
    if len(new) < len(old):
        return f"number of splits: {len(old)} -> {len(new)}"
    for before, after in zip(old, new, strict=False):
        for part in ("train", "validation", "test"):
            if before[part] != after[part]:
                return f"split {before['index']}, {part} subjects: {_sample(before[part])} -> {_sample(after[part])}"
    return ""


def _sample(subjects: Sequence[str]) -> str:
    return "none" if not subjects else f"{len(subjects)} ({', '.join(subjects[:3])}{', ...' if len(subjects) > 3 else ''})"
