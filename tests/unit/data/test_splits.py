"""Splits of people: disjoint, stratified, extendable, the same everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_classes import assert_covered

from softseg_dist.data.splits import GivenSplit, GivenSplits, KFold, LeaveOneSiteOut, MonteCarlo, Split, Splits, splits_final
from softseg_dist.errors import UserError

PEOPLE = {f"p{i:02d}": "AAB"[i % 3] for i in range(30)}
RULES = [MonteCarlo(count=4), KFold(folds=5), KFold(folds=3, validation=0.4), KFold(folds=3, rounds=2)]
SITES = {f"p{i:02d}": "ABC"[i % 3] for i in range(30)}
GIVEN = GivenSplits(
    "splits.json", given=(GivenSplit(train=tuple("abcdef"), test=("g",)), GivenSplit(train=tuple("bcdefg"), test=("a",)))
)
people = st.dictionaries(st.text(min_size=1, max_size=6), st.sampled_from(["A", "B", ""]), min_size=6, max_size=40)


def test_the_suite_runs_over_every_public_rule() -> None:
    assert_covered(Splits, [*RULES, LeaveOneSiteOut(), GIVEN])  # the last two have tests of their own: not anybody will do


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
def test_a_small_rule_has_the_first_two_splits(rule: Splits) -> None:
    assert rule.small().make(PEOPLE, 3) == rule.make(PEOPLE, 3)[:2]


def test_a_smaller_count_keeps_the_first_splits() -> None:
    for rule in (MonteCarlo(), KFold(), KFold(rounds=2), LeaveOneSiteOut()):
        assert rule.replace(count=2).make(SITES, 3) == rule.make(SITES, 3)[:2]
    assert KFold(count=100).make(PEOPLE, 3) == KFold().make(PEOPLE, 3)


@pytest.mark.parametrize("rule", [LeaveOneSiteOut(), GIVEN], ids=str)
def test_a_rule_that_needs_all_people_has_a_small_one_that_does_not(rule: Splits) -> None:
    assert len(rule.small().make(dict.fromkeys("xyz", ""), 0)) == 2


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


def test_a_split_has_all_parts_or_trains_a_final_model_or_judges_predictions() -> None:
    assert Split(index=0, train=("a",)).test == ()
    assert Split(index=0, test=("a",)).train == ()
    for parts in ({}, {"validation": ("a",)}, {"train": ("a",), "test": ("b",)}, {"validation": ("a",), "test": ("b",)}):
        with pytest.raises(ValueError, match="must each have a subject"):
            Split(index=0, **parts)


def test_a_split_survives_json() -> None:
    split = MonteCarlo(count=1).make(PEOPLE, 0)[0]
    assert Split.model_validate_json(split.model_dump_json()) == split
    assert split.name == "000"


@given(subjects=people, seed=st.integers(0, 99), rounds=st.integers(1, 3), folds=st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_kfold_tests_every_person_once_in_each_round(subjects: dict[str, str], seed: int, rounds: int, folds: int) -> None:
    splits = KFold(folds=folds, rounds=rounds).make(subjects, seed)
    assert [split.index for split in splits] == list(range(folds * rounds))
    for number in range(rounds):
        tested = Counter(s for split in splits[number * folds : (number + 1) * folds] for s in split.test)
        assert tested == dict.fromkeys(subjects, 1)


def test_another_round_of_folds_extends_the_first_and_differs_from_it() -> None:
    once, twice = (KFold(folds=3, rounds=rounds).make(PEOPLE, 0) for rounds in (1, 2))
    assert twice[:3] == once
    assert {split.test for split in twice[3:]}.isdisjoint(split.test for split in once)


@given(sites=st.lists(st.sampled_from("ABCD"), min_size=9, max_size=30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_each_site_is_the_test_set_once(sites: list[str], seed: int) -> None:
    subjects = {f"p{i}": site for i, site in enumerate([*"ABC", *sites])}
    splits = LeaveOneSiteOut().make(subjects, seed)
    assert [sorted({subjects[s] for s in split.test}) for split in splits] == [[site] for site in sorted(set(subjects.values()))]
    for split in splits:
        assert sorted((*split.train, *split.validation, *split.test)) == sorted(subjects)
        assert len(split.validation) == max(1, round(0.2 * (len(subjects) - len(split.test))))
    assert splits == LeaveOneSiteOut().make(dict(reversed(subjects.items())), seed)


def test_validation_of_a_left_out_site_is_spread_over_the_others() -> None:
    for split in LeaveOneSiteOut().make(SITES, 0):
        assert sorted(Counter(SITES[s] for s in split.validation).values()) == [2, 2]


def test_leaving_out_sites_needs_three_that_are_known() -> None:
    with pytest.raises(UserError, match="at least 3 sites, got 2: A, B; use MonteCarlo"):
        LeaveOneSiteOut().make({f"p{i}": "AB"[i % 2] for i in range(9)}, 0)
    with pytest.raises(UserError, match=r"got none for p3; .*participants.tsv"):
        LeaveOneSiteOut().make({f"p{i}": "ABC-"[i % 4].strip("-") for i in range(6)} | {"p5": "B"}, 0)


def write(tmp_path: Path, content: object, name: str = "splits_final.json") -> GivenSplits:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return GivenSplits(tmp_path / name)


TEN = {f"p{i}": "" for i in range(10)}


def test_what_nnunet_validates_on_is_the_test_set_and_a_fifth_of_its_training_set_validates(tmp_path: Path) -> None:
    val = [["p0", "p1"], ["p2", "p3"]]
    rule = write(tmp_path, [{"train": sorted(TEN.keys() - {*test}), "val": test} for test in val])
    splits = rule.make(TEN, 0)
    assert [list(split.test) for split in splits] == val
    assert [(len(split.train), len(split.validation)) for split in splits] == [(6, 2)] * 2
    assert splits == rule.make(TEN, 0)
    assert [split.validation for split in splits] != [split.validation for split in rule.make(TEN, 1)]
    assert splits_final(splits, {s: s for s in TEN}) == json.loads((tmp_path / "splits_final.json").read_text())


def test_the_splits_of_a_run_can_be_given_and_come_back(tmp_path: Path) -> None:
    splits = MonteCarlo(count=3).make(TEN, 0)
    assert write(tmp_path, [split.model_dump(mode="json") for split in splits]).make(TEN, 7) == splits
    text = "".join(
        f"- {{train: [{','.join(s.train)}], val: [{','.join(s.validation)}], test: [{','.join(s.test)}]}}\n" for s in splits
    )
    assert write(tmp_path, text, "splits.yaml").make(TEN, 7) == splits


def test_names_may_be_those_of_cases_and_persons(tmp_path: Path) -> None:
    cases = {f"{person}_ses-{session}": person for person in TEN for session in (1, 2)}
    by_case = {"train": sorted(case for case, person in cases.items() if person > "p1"), "test": ["p0_ses-1", "p1", "p0_ses-2"]}
    (split,) = write(tmp_path, [by_case]).of_cases(TEN, cases, 0)
    assert split.test == ("p0", "p1")
    assert sorted((*split.train, *split.validation)) == sorted(TEN.keys() - {"p0", "p1"})
    assert splits_final([split], cases)[0]["val"] == ["p0_ses-1", "p0_ses-2", "p1_ses-1", "p1_ses-2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["a1", "b1"], "test": ["c1", "x"]}], "split 0: test names 'x', neither a case nor a subject"),
        ([{"train": ["a1", "b1"], "test": ["c1"]}], "split 0: a2 of the data set in no part"),
        ([{"train": ["a1", "b1", "a2"], "test": ["c1", "b1"]}], "split 0: 'b1' is in train and in test"),
        ([{"train": ["a1", "a", "b1"], "test": ["c1"]}], "split 0: 'a' is in train and in train"),
        (
            [{"train": ["a", "b"], "test": ["c"]}, {"train": ["a1", "b1"], "test": ["a2", "c1"]}],
            "split 1: sessions of one person never cross, got a1 in train, a2 in test, both of a",
        ),
        ([{"train": ["a"], "validation": ["b"]}], "split 0: a split has .*, got train/validation"),
        ([{"train": [1, "b"], "val": ["c"]}], "split 0: train is a list of at least one name, as text, got 1"),
        ([{"train": ["a"], "val": []}], "val is a list of at least one name, as text, got none"),
        ([{"train": ["a"], "validation": [], "test": ["b"]}], "validation is a list of at least one name"),
        ([["a"]], "split 0: a split has"),
        ({}, "a list of splits"),
        ("[", "not JSON"),
        ([{"train": ["a"], "test": ["b", "c"]}], "the validation set is drawn from train, got a"),
    ],
)
def test_a_bad_file_of_splits_is_refused_with_file_split_and_name(tmp_path: Path, content: object, message: str) -> None:
    cases = {"a1": "a", "a2": "a", "b1": "b", "c1": "c"}
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path, content).of_cases(dict.fromkeys("abc", ""), cases, 0)
    assert "splits_final.json" in str(caught.value)


def test_a_missing_or_broken_file_of_splits_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the splits .*none.json: No such file"):
        GivenSplits(tmp_path / "none.json").make(TEN, 0)
    with pytest.raises(UserError, match=r"splits.yaml: not YAML"):
        write(tmp_path, "a: [", "splits.yaml").make(TEN, 0)


def test_the_content_of_a_file_of_splits_is_part_of_the_rule(tmp_path: Path) -> None:
    names = sorted(TEN)
    before = write(tmp_path, [{"train": names[2:], "val": names[:2]}]).bound(Path())
    assert GivenSplits.model_validate_json(before.model_dump_json()) == before
    assert before.bound(Path()) is before
    after = write(tmp_path, [{"train": names[3:], "val": names[:3]}]).bound(Path())
    assert after.fingerprint != before.fingerprint
    assert len(before.make(TEN, 0)[0].test) == 2  # what was read stays
