"""The rules of docs/yardstick.md, over every row of the table: perfect values, existence, empty predictions, and what is proper."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from softseg_dist.judging.judge import Yardstick, case_rows
from softseg_dist.numerics.metrics import METRICS, TABLE, Row, Scale

PROPERTY = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
SHAPE, SPACING_MM = (5, 9, 8), (2.0, 0.5, 1.0)
SCALE = Scale(1.0, (3.0, 7.0), SPACING_MM)
DIAGONAL_MM = math.hypot(*(n * mm for n, mm in zip(SHAPE, SPACING_MM, strict=True)))
NUM_VOXELS = math.prod(SHAPE)
TINY = 1e-6
THRESHOLDS = (0.5, 0.3)
Found = dict[tuple[str, str, float | None, str], float]


def masks(seed: int, raters: int, soft: bool) -> np.ndarray:
    """Raters [R 1 2 *S] of two classes: blobs that each rater draws differently, sometimes nothing at all."""
    generator = np.random.default_rng(seed)
    base = generator.random(SHAPE) < generator.choice([0.0, 0.01, 0.3])
    drawn = np.stack([[base & (generator.random(SHAPE) < 0.7), base] for _ in range(raters)])[:, None].astype(np.float32)
    levels = generator.choice(np.array([0.05, 0.25, 0.5, 0.75, 1], np.float32), drawn.shape)
    return drawn * levels if soft else drawn


def measured(prediction: np.ndarray, raters: np.ndarray) -> Found:
    """All values of a case, by class, reference, threshold and metric."""
    each = {f"rater{r}": rater for r, rater in enumerate(raters)} if len(raters) > 1 else {}
    references = {"mean": raters.mean(axis=0)} | each
    yardstick = Yardstick(("a", "b"), SCALE.mean_volumes_mm3, (), {"a": (1.2, -0.3), "b": (1.2, -0.3)})
    rows = case_rows(prediction.astype(np.float32), references, yardstick, THRESHOLDS, SCALE)
    return {row[:4]: row.value for row in rows if row.metric != "dice" or row.threshold in THRESHOLDS}


def of_row(found: Found, row: Row) -> Found:
    return {key: value for key, value in found.items() if key[3] == row.name}


def is_empty(row: Row, reference: np.ndarray) -> bool:
    """Of one class, as the table defines it; QUBIQ looks at levels from .1 on."""
    level = 0.5 if row.at_threshold else 0.1 if row.name == "qubiq" else TINY
    return not (reference >= np.float32(level)).any()


def references(raters: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """By class and name of the reference; all raters as their mean."""
    mean = raters.mean(axis=0)
    named = {"mean": mean, "raters": mean} | {f"rater{r}": rater for r, rater in enumerate(raters)}
    return {(of, name): maps[0, k] for name, maps in named.items() for k, of in enumerate("ab")}


@pytest.mark.parametrize("row", TABLE.values(), ids=list(TABLE))
def test_every_row_of_the_table_is_measured_against_what_it_says_and_at_thresholds_if_it_says_so(row: Row):
    found = of_row(measured(masks(3, 3, soft=False).mean(axis=0), masks(3, 3, soft=False)), row)
    against = {"mean": {"mean"}, "raters": {"raters"}, "each": {"mean", "rater0", "rater1", "rater2"}}[row.against]
    assert {key[1] for key in found} == against
    assert {key[2] for key in found} == (set(THRESHOLDS) if row.at_threshold else {None})


@given(SEEDS, st.integers(1, 4), st.booleans())
@PROPERTY
def test_a_prediction_that_equals_its_reference_is_perfect(seed: int, num_raters: int, soft: bool):
    raters = masks(seed, num_raters, soft)
    found = measured(raters.mean(axis=0), raters)
    one_hard = num_raters == 1 and not soft
    for (of, reference, tau, name), value in found.items():
        row = TABLE.get(name)
        if row is None or reference not in ("mean", "raters") or math.isnan(value):
            continue
        if row.perfect == "always" or (row.perfect == "at .5" and tau == 0.5) or (row.perfect == "one hard rater" and one_hard):
            assert value == pytest.approx(row.best, abs=1e-6), (of, name)


def test_what_is_marked_as_not_perfect_is_not():
    half = np.full((1, 1, 2, *SHAPE), 0.5, dtype=np.float32)
    found = measured(half[0], half)
    for row in TABLE.values():
        if row.perfect in ("no", "one hard rater"):
            values = [value for key, value in of_row(found, row).items() if key[2] in (None, 0.5)]
            assert not np.isclose(values, row.best, atol=0.01).any(), row.name


@given(SEEDS, st.integers(1, 4), st.booleans())
@PROPERTY
def test_whether_a_value_exists_depends_on_the_reference_alone(seed: int, num_raters: int, soft: bool):
    raters = masks(seed, num_raters, soft)
    generator = np.random.default_rng(seed)
    empty = np.zeros(raters.shape[1:])
    predictions = (empty, empty + TINY, empty + 1, generator.random(empty.shape), raters.mean(axis=0))
    found = [measured(prediction, raters) for prediction in predictions]
    there = [{key for key, value in values.items() if not math.isnan(value)} for values in found]
    assert all(values.keys() == found[0].keys() for values in found)
    assert all(keys == there[0] for keys in there)
    for (of, reference), maps in references(raters).items():
        for row in TABLE.values():
            values = [value for key, value in of_row(found[0], row).items() if key[:2] == (of, reference)]
            if is_empty(row, maps):
                assert np.isnan(values).all() != row.exists_when_empty or not values, row.name
            elif row.name != "specificity":  # none where the reference fills the image
                assert not np.isnan(values).any(), row.name


@given(SEEDS, st.integers(1, 4), st.booleans())
@PROPERTY
def test_an_empty_prediction_has_the_value_that_the_table_says(seed: int, num_raters: int, soft: bool):
    raters = masks(seed, num_raters, soft)
    found = measured(np.zeros(raters.shape[1:]), raters)
    for (of, reference, _, name), value in found.items():
        row = TABLE.get(name)
        if row is not None and row.when_prediction_empty is not None and not is_empty(row, references(raters)[of, reference]):
            expected = DIAGONAL_MM if row.when_prediction_empty == "diagonal" else row.when_prediction_empty
            assert value == pytest.approx(expected), (of, reference, name)


@given(SEEDS, st.integers(1, 4), st.booleans())
@PROPERTY
def test_a_map_of_one_millionth_is_as_good_as_an_empty_one(seed: int, num_raters: int, soft: bool):
    raters = masks(seed, num_raters, soft)
    empty = np.zeros(raters.shape[1:])
    nothing, faint = measured(empty, raters), measured(empty + TINY, raters)
    for key, value in nothing.items():
        if key[3] not in TABLE:
            continue
        if key[2] is not None:
            assert faint[key] == pytest.approx(value, abs=0, nan_ok=True), key
            continue
        labelled = references(raters)[key[0], key[1]].sum(dtype=float) or 1.0
        added = NUM_VOXELS * TINY * max(1, SCALE.voxel_mm3) * max(1, 1 / labelled)  # of volume, in voxels, in mm3, or relative
        assert faint[key] == pytest.approx(value, abs=3 * added, nan_ok=True), key


def test_a_control_that_is_right_to_one_millionth_counts_as_one_that_is_exactly_right():
    """Six patients that both candidates segment equally, four healthy controls: exact zeros must not be spared what others get."""
    control = np.zeros((1, 1, 2, *SHAPE), np.float32)
    exact, faint = measured(control[0], control), measured(control[0] + TINY, control)
    for name in METRICS:
        means = [np.nanmean([0.8] * 6 + [found["a", "mean", None, name]] * 4) for found in (exact, faint)]
        assert means[0] == pytest.approx(means[1], abs=1e-3), name


def test_the_brier_skill_of_the_worked_example():
    p, y = (np.array(values).reshape(1, 1, 4) for values in ((0.8, 0.5, 0.1, 0.0), (1.0, 0.5, 0.0, 0.0)))
    scale = Scale(2.0, (3.0,), (1.0,))
    assert METRICS["brier_skill"](p, y, scale) == pytest.approx(1 - 2 * (0.2**2 + 0.1**2) / 3)
    assert METRICS["brier_skill"](p, y, scale) == pytest.approx(0.966667, abs=1e-6)
    assert METRICS["brier_skill"](0 * p, y, scale) == pytest.approx(1 - 2 * (1 + 0.25) / 3)
    assert METRICS["brier_skill_case"](p, y, scale) == pytest.approx(1 - 0.05 / 1.5)


def test_an_empty_map_scores_0_on_average_for_one_hard_rater_and_above_it_where_labels_are_soft():
    generator = np.random.default_rng(0)
    hard = (generator.random((20, 1, 1, 6, 6)) < generator.uniform(0, 0.5, (20, 1, 1, 1, 1))).astype(float)

    def of_empty(cases: np.ndarray) -> float:
        scale = Scale(2.0, (2.0 * cases.sum(axis=(1, 2, 3, 4)).mean(),), (1.0, 1.0))
        return float(np.mean([METRICS["brier_skill"](0 * y, y, scale)[0] for y in cases]))

    assert of_empty(hard) == pytest.approx(0)
    assert of_empty(0.5 * hard) == pytest.approx(0.5)


SIZE, RADIUS = 32, 8.0
DISTANCE = np.hypot(*(np.indices((SIZE, SIZE)) - (SIZE - 1) / 2)) - RADIUS  # to the mean boundary, in voxels
TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rounded": lambda m: (m >= 0.5).astype(float),
    "sharpened": lambda m: m**2 / (m**2 + (1 - m) ** 2),
    "blurred": lambda m: (m + np.roll(m, 1, 0) + np.roll(m, -1, 0)) / 3,
    "median": lambda m: 3 * m**2 - 2 * m**3,  # of three masks, in expectation
    "shrunk": lambda m: 0.8 * m,
    "eroded": lambda m: np.minimum(np.roll(m, 1, 0), np.roll(m, -1, 0)),
    "shifted": lambda m: np.roll(m, 1, 1),
}


def disc_masks(sd: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """[count X Y] discs whose boundary moves by a normal draw of `sd` voxels: a voxel is inside with probability ndtr(-d / sd)."""
    return (generator.normal(0, sd, (count, 1, 1)) > DISTANCE).astype(np.float32)


def mean_score(name: str, prediction: np.ndarray, cases: np.ndarray) -> float:
    """Over cases [count X Y], which are measured as classes of one case, all at once."""
    scale = Scale(1.0, (float((DISTANCE < 0).sum()),) * len(cases), (1.0, 1.0))
    tiled = np.broadcast_to(prediction.astype(np.float32), cases.shape)
    return float(METRICS[name](tiled[None], cases[None], scale).mean())


@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0])
def test_no_transform_of_the_mean_map_scores_better_over_10000_masks(sd: float):
    drawn, mean = disc_masks(sd, 10_000, np.random.default_rng(1)), ndtr(-DISTANCE / sd)
    best = mean_score("brier_skill", mean, drawn)
    for name, transform in TRANSFORMS.items():
        assert mean_score("brier_skill", transform(mean), drawn) < best, name


@pytest.mark.parametrize("sd", [0.5, 1.0, 2.0])
def test_four_raters_with_boundary_noise_rank_the_true_mean_map_above_every_transform_of_it(sd: float):
    generator = np.random.default_rng(2)
    cases = disc_masks(sd, 4 * 500, generator).reshape(500, 4, SIZE, SIZE).mean(axis=1)
    mean = ndtr(-DISTANCE / sd)
    best = mean_score("brier_skill", mean, cases)
    for name, transform in TRANSFORMS.items():
        assert mean_score("brier_skill", transform(mean), cases) < best, name


def test_soft_dice_rewards_rounding_the_true_map_which_is_why_it_is_not_the_primary_score():
    mean = ndtr(-DISTANCE)
    cases = disc_masks(1.0, 2000, np.random.default_rng(3))
    rounded = TRANSFORMS["rounded"](mean)
    assert mean_score("dice_dml", rounded, cases) > mean_score("dice_dml", mean, cases)
    assert mean_score("brier", rounded, cases) > mean_score("brier", mean, cases)  # lower is better


PAGE = Path(__file__).parents[3] / "docs/yardstick.md"
ROWS = re.compile(r"(<!-- rows: python [^\n]* -->\n)(.*?)(<!-- rows: end -->)", re.DOTALL)
PERFECT = {"always": "{}, yes", "at .5": "{}, at tau = .5", "one hard rater": "{}, one hard rater only", "no": "no"}
BETTER = {True: "higher", False: "lower", None: "neither"}


def lines_of_the_page() -> str:
    """The table of docs/yardstick.md, from the one that the package measures by."""
    lines = [
        "| row | formula | better | at p = y | reference empty | prediction empty | against |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in TABLE.values():
        empty = "as it comes" if row.when_prediction_empty is None else row.when_prediction_empty
        name = f"`{row.name}`" + (" at tau" if row.at_threshold else "") + (" (primary)" if row.name == "brier_skill" else "")
        cells = name, row.meaning, BETTER[row.higher_is_better], PERFECT[row.perfect].format(row.best)
        lines.append(f"| {' | '.join(cells)} | {'exists' if row.exists_when_empty else 'none'} | {empty} | {row.against} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_table_that_is_measured_by():
    found = ROWS.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    assert found[2] == lines_of_the_page(), "python tests/unit/judging/test_yardstick.py writes the table"


if __name__ == "__main__":
    PAGE.write_text(
        ROWS.sub(lambda found: found[1] + lines_of_the_page() + found[3], PAGE.read_text(encoding="utf-8")), encoding="utf-8"
    )
