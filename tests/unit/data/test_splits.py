"""Splits of people: disjoint, stratified, extendable, the same everywhere."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_classes import assert_covered

from softseg_dist.data.splits import KFold, MonteCarlo, Split, Splits
from softseg_dist.errors import UserError

PEOPLE = {f"p{i:02d}": "AAB"[i % 3] for i in range(30)}
RULES = [MonteCarlo(count=4), KFold(folds=5), KFold(folds=3, validation=0.4)]
people = st.dictionaries(st.text(min_size=1, max_size=6), st.sampled_from(["A", "B", ""]), min_size=6, max_size=40)


def test_the_suite_runs_over_every_public_rule() -> None:
    assert_covered(Splits, RULES)


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(subjects=people, seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_every_person_is_in_one_part_of_each_split(rule: Splits, subjects: dict[str, str], seed: int) -> None:
    for split in rule.make(subjects, seed):
        assert sorted((*split.train, *split.validation, *split.test)) == sorted(subjects)
        assert split.train
        assert split.validation
        assert split.test


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_splits_do_not_depend_on_the_order_of_people(rule: Splits) -> None:
    assert rule.make(PEOPLE, 1) == rule.make(dict(reversed(PEOPLE.items())), 1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_another_seed_gives_other_splits(rule: Splits) -> None:
    assert rule.make(PEOPLE, 1) != rule.make(PEOPLE, 2)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_first_splits_of_a_rule_are_its_own(rule: Splits) -> None:
    assert rule.first(2).make(PEOPLE, 3) == rule.make(PEOPLE, 3)[:2]
    assert rule.first(100).make(PEOPLE, 3) == rule.make(PEOPLE, 3)


def test_a_larger_count_extends_monte_carlo_splits() -> None:
    assert MonteCarlo(count=9).make(PEOPLE, 0)[:4] == MonteCarlo(count=4).make(PEOPLE, 0)


def test_kfold_tests_every_person_once() -> None:
    tested = Counter(s for split in KFold(folds=4).make(PEOPLE, 0) for s in split.test)
    assert set(tested) == set(PEOPLE)
    assert set(tested.values()) == {1}


@pytest.mark.parametrize("rule", [MonteCarlo(count=20), KFold(folds=5)], ids=str)
def test_each_site_is_in_each_part_in_proportion(rule: Splits) -> None:
    share = {"A": 20 / 30, "B": 10 / 30}
    for split in rule.make(PEOPLE, 5):
        for part in (split.train, split.validation, split.test):
            counts = Counter(PEOPLE[s] for s in part)
            assert all(abs(counts[site] - share[site] * len(part)) <= 1.5 for site in share), (split.index, counts)


def test_everybody_is_tested_about_equally_often_by_monte_carlo() -> None:
    tested = Counter(s for split in MonteCarlo(count=500).make(PEOPLE, 0) for s in split.test)
    expected = 500 * 0.2
    standard_deviation = (500 * 0.2 * 0.8) ** 0.5
    assert all(abs(tested[s] - expected) < 5 * standard_deviation for s in PEOPLE)


def test_splits_are_the_same_on_every_machine() -> None:
    assert MonteCarlo(count=1).make({f"p{i}": "" for i in range(6)}, 0)[0].test == ("p1",)


@pytest.mark.parametrize(("rule", "number"), [(MonteCarlo(), 2), (KFold(folds=2), 2), (KFold(folds=5), 4)], ids=str)
def test_too_few_people_are_refused_with_their_number(rule: Splits, number: int) -> None:
    with pytest.raises(UserError, match=f"got {number}"):
        rule.make({f"p{i}": "" for i in range(number)}, 0)


def test_fractions_must_add_up_to_one() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        MonteCarlo(fractions=(0.5, 0.2, 0.2))


def test_a_split_with_a_person_in_two_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="two"):
        Split(index=0, train=("a", "b"), validation=("b",), test=("c",))


def test_a_split_survives_json() -> None:
    split = MonteCarlo(count=1).make(PEOPLE, 0)[0]
    assert Split.model_validate_json(split.model_dump_json()) == split
    assert split.name == "000"
