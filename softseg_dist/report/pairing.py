"""What two runs have in common: splits with the same people, and people who were tested in both; and what is in the way.

Scores of two runs are paired by subject and split only where that is legitimate: a subject is the same person if the data
sets are the same people's, a split is the same if the same people train, validate and test in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softseg_dist.data.splits import Split
from softseg_dist.report.run_folder import RunData

WHOSE = (
    "type",
    "folder",
    "shape",
    "seed",
)  # fields of a data set that say whose images they are; others say what is read
ENOUGH = 2  # splits; one says nothing about the variation between training runs


@dataclass(frozen=True)
class Pairing:
    """`splits` are (index in A, index in B) of splits with the same people, `subjects` those tested in both runs.

    `obstacle` says in words why scores cannot be paired by subject and split; "" if they can.
    """

    splits: tuple[tuple[int, int], ...]
    subjects: tuple[str, ...]
    obstacle: str = ""


def pairing_of(a: RunData, b: RunData) -> Pairing:
    """What can be paired of two runs, whatever their candidates are."""
    if obstacle := _other_people(a.study["data"], b.study["data"]):
        return Pairing((), (), obstacle)
    subjects = tuple(sorted(tested(a) & tested(b)))
    if not subjects:
        return Pairing((), (), "no subject was tested in both")
    splits = _equal_splits(a, b)
    return Pairing(splits, subjects, "" if len(splits) >= ENOUGH else _few_splits(a, b, len(splits)))


def tested(run: RunData) -> set[str]:
    """Everybody who is in a test set."""
    return {subject for split in run.splits for subject in split.test}


def _equal_splits(a: RunData, b: RunData) -> tuple[tuple[int, int], ...]:
    """One to one, in the order of A: chance may give two equal splits to a run of few people."""
    left: dict[tuple[frozenset[str], ...], list[int]] = defaultdict(list)
    for split in b.splits:
        left[_people(split)].append(split.index)
    return tuple((split.index, left[_people(split)].pop(0)) for split in a.splits if left[_people(split)])


def _people(split: Split) -> tuple[frozenset[str], ...]:
    return frozenset(split.train), frozenset(split.validation), frozenset(split.test)


def _other_people(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    if all(a.get(field) == b.get(field) for field in WHOSE):
        return ""
    return f"A is about {_data_set(a)}, B about {_data_set(b)}: subjects of the same name are other people"


def _data_set(data: Mapping[str, Any]) -> str:
    fields = ", ".join(str(data[field]) for field in WHOSE[1:] if data.get(field) is not None)
    return f"{data['type']}({fields})"


def _few_splits(a: RunData, b: RunData, num_equal: int) -> str:
    everyone_a, everyone_b = ({s for split in run.splits for s in _everyone(split)} for run in (a, b))
    people = (
        ""
        if everyone_a == everyone_b
        else f"; {len(everyone_a)} people took part in A, {len(everyone_b)} in B, {len(everyone_a & everyone_b)} in both"
    )
    which = "only one split" if num_equal else "no split"
    return f"{which} of A has the same people in training, validation and test as one of B{people}"


def _everyone(split: Split) -> tuple[str, ...]:
    return (*split.train, *split.validation, *split.test)
