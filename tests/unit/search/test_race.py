"""The rule of the race: who is put out, how seldom an equal is, and that rounding decides nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from softseg_dist import Race
from softseg_dist.search.race import ScoresBySplit, look, num_looks, p_worse, raced_out

RACE = Race()
SCORE = st.floats(-1, 1).map(lambda x: round(x, 6))


def scores(*columns: np.ndarray) -> ScoresBySplit:
    return {split: tuple(map(float, values)) for split, values in enumerate(zip(*columns, strict=True))}


def test_p_is_that_of_the_one_sided_paired_t_test():
    differences = [-0.02, -0.03, 0.01, -0.025]
    assert p_worse(differences) == pytest.approx(ttest_1samp(differences, 0, alternative="less").pvalue)


@pytest.mark.parametrize(("constant", "p"), [(-0.1, 0.0), (0.0, 0.5), (0.1, 1.0)])
def test_differences_without_noise_decide_by_their_sign(constant, p):
    assert p_worse([constant] * 3) == pytest.approx(p, abs=1e-9)


@given(quality=st.lists(SCORE, min_size=2, max_size=8), difficulty=st.lists(SCORE, min_size=4, max_size=10))
def test_without_noise_the_best_is_never_put_out_and_all_others_are_at_once(quality, difficulty):
    """Sums of floats are not exact: what is equal but for rounding is equal."""
    tables = [scores(np.add(difficulty, q)) for q in quality]
    best = int(np.argmax(quality))
    for row, table in enumerate(tables):
        own = {split: table[split] for split in range(3)}
        record = raced_out(RACE, len(difficulty), (1,), (str(row), own), {str(best): tables[best]})
        assert (record is None) == (quality[row] == quality[best])
        if record is not None:
            assert record.difference == pytest.approx(quality[row] - quality[best])
            assert record.values[0] == pytest.approx(np.mean(difficulty) + quality[row])


def test_the_order_of_less_is_better_is_the_other_way_round():
    worse, better = scores(np.array([0.3, 0.32, 0.31, 0.3])), scores(np.array([0.2, 0.21, 0.2, 0.2]))
    own = {split: worse[split] for split in range(3)}
    assert raced_out(RACE, 4, (1,), ("a", own), {"b": better}) is None
    record = raced_out(RACE, 4, (-1,), ("a", own), {"b": better})
    assert record is not None
    assert record.difference == pytest.approx(0.1 + 0.02 / 3)


@pytest.mark.parametrize(("num_splits", "start"), [(5, 3), (6, 4), (10, 3), (15, 3), (15, 6), (40, 3)])
def test_an_equal_candidate_is_put_out_as_seldom_as_the_level_says(num_splits, start):
    """All looks together, over 4,000 pairs of equal candidates; 3 standard errors of that are .014."""
    generator = np.random.default_rng(0)
    differences = generator.normal(size=(4000, num_splits))
    limit = RACE.level / math.sqrt(num_looks(RACE.replace(start=start), num_splits))
    out = np.zeros(len(differences), bool)
    for after in range(start, num_splits):
        part = differences[:, :after]
        out |= ttest_1samp(part, 0, axis=1, alternative="less").pvalue < limit
    assert abs(out.mean() - RACE.level) < 0.026


def test_nobody_is_put_out_before_the_start_nor_after_the_last_split():
    bad, good = scores(np.zeros(5)), scores(np.ones(5))
    for after in range(6):
        record = raced_out(RACE, 5, (1,), ("bad", {j: bad[j] for j in range(after)}), {"good": good})
        assert (record is not None) == (after in (3, 4))
        if record is not None:
            assert (record.after, record.incumbent, record.values) == (after, "good", (0.0,))


def test_with_two_objectives_one_opponent_must_be_better_in_both():
    generator = np.random.default_rng(1)
    noise = generator.normal(0, 0.01, (2, 6))
    mine = scores(0.5 + noise[0], 0.3 + noise[1])
    own = {split: mine[split] for split in range(4)}
    accurate, calibrated = scores(np.full(6, 0.8), np.full(6, 0.4)), scores(np.full(6, 0.4), np.full(6, 0.1))
    signs = (1, -1)
    assert raced_out(RACE, 6, signs, ("mine", own), {"accurate": accurate, "calibrated": calibrated}) is None
    both = scores(np.full(6, 0.7), np.full(6, 0.2))
    record = raced_out(RACE, 6, signs, ("mine", own), {"accurate": accurate, "both": both})
    assert record is not None
    assert (record.incumbent, len(record.values)) == ("both", 2)
    assert record.second_difference == pytest.approx(0.1, abs=0.02)


def test_looks_are_compared_by_pairs_once_somebody_has_run_fully():
    hard_splits, easy_splits = {0: (0.1,), 1: (0.1,)}, {2: (0.8,), 3: (0.8,)}
    best = {0: (0.2,), 1: (0.2,), 2: (0.9,), 3: (0.9,)}
    assert look(1, hard_splits, best) == (pytest.approx(-0.1), 0.0)
    assert look(1, easy_splits, best) == (pytest.approx(-0.1), 0.0)
    assert look(1, hard_splits, None) < look(1, easy_splits, None)
    assert look(1, {**hard_splits, 2: (0.0,)}, None) > look(1, easy_splits, None)  # further on
