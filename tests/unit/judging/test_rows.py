"""Rows of a case: which there are, that they say what the metrics say, and what they cost."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softseg_dist import Metric, Scale
from softseg_dist.judging.judge import Grid, Measurement, Yardstick, case_rows
from softseg_dist.judging.thresholds import CURVE
from softseg_dist.numerics.metrics import METRICS, Map, PerClass, confusion, hard_scores
from softseg_dist.numerics.raters import ged2
from softseg_dist.numerics.structures import SURFACE_METRICS

SPACING_MM, VOXEL_MM3 = (0.5, 0.5), 0.5  # slices 2 mm apart
LESIONS = 4 * (1 + 3) + 3 + 1
MEAN_MM3 = (10.0, 12.0)
BOTH, GM = Yardstick(("GM", "WM"), MEAN_MM3), Yardstick(("GM",), MEAN_MM3[:1])


def stack(*slices: int) -> Grid:
    return Grid(SPACING_MM, VOXEL_MM3, slices)


def random_case(seed: int, raters: int = 2) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A prediction [3 2 6 5] and its references: the mean and, of two or more, each rater."""
    generator = np.random.default_rng(seed)
    masks = (generator.random((raters, 3, 2, 6, 5)) < 0.4).astype(np.float32)
    prediction = (0.7 * masks.mean(axis=0) + 0.3 * generator.random((3, 2, 6, 5))).astype(np.float32)
    each = {f"rater{r}": mask for r, mask in enumerate(masks)} if raters > 1 else {}
    return prediction, {"mean": masks.mean(axis=0)} | each


def rows_of(prediction: np.ndarray, references: dict[str, np.ndarray], grid: Grid | None = None) -> list[Measurement]:
    return measured(prediction, references, BOTH, grid or stack(0, 1, 2), (0.5, 0.392))


def measured(
    prediction: np.ndarray,
    references: dict[str, np.ndarray],
    yardstick: Yardstick,
    grid: Grid,
    thresholds: tuple[float, ...] = (0.5,),
) -> list[Measurement]:
    maps = {name: grid.case(reference) for name, reference in references.items()}
    return case_rows(grid.case(prediction), maps, yardstick, thresholds, grid.scale(yardstick.mean_volumes_mm3))


def test_rows_hold_every_metric_once():
    prediction, references = random_case(2)
    rows = rows_of(prediction, references)
    keys = [row[:4] for row in rows]
    against_each, against_mean = 3 * (10 + 2 + 2 * 6), 3 + len(CURVE) - 1  # 0.5 is in both
    on_shape, calibration = 2 * (len(SURFACE_METRICS) + LESIONS), 3 * 10
    assert len(set(keys)) == len(keys) == 2 * (against_each + against_mean + on_shape + calibration + 3 + 1)  # the empty map
    assert {row.threshold for row in rows if row.metric == "dice" and row.reference == "mean"} == {*CURVE, 0.392}
    assert {row.threshold for row in rows if row.metric in ("iou", "hd95_mm", "lesion_fdr")} == {0.392, 0.5}
    assert {row.reference for row in rows if row.metric in ("hd95_mm", "lesions_true", "reliability_voxels")} == {"mean"}


def test_rows_say_what_the_metrics_say():
    prediction, references = random_case(2)
    found = {row[:4]: row.value for row in rows_of(prediction, references)}
    assert found["WM", "rater1", 0.392, "iou"] == hard_scores(confusion(prediction, references["rater1"], [0.392]))["iou"][1, 0]
    assert found["GM", "mean", 0.25, "dice"] == hard_scores(confusion(prediction, references["mean"], [0.25]))["dice"][0, 0]
    assert found["WM", "mean", None, "volume_pred_mm3"] == pytest.approx(VOXEL_MM3 * prediction[:, 1].sum())
    skill = 1 - VOXEL_MM3 * np.square(prediction - references["mean"])[:, 1].sum(dtype=float) / MEAN_MM3[1]
    assert found["WM", "mean", None, "brier_skill"] == pytest.approx(skill)
    empty = {row[:4]: row.value for row in rows_of(np.zeros_like(prediction), references)}
    for class_name in ("GM", "WM"):  # what a map of zeros scores stands beside every prediction
        assert found[class_name, "mean", None, "empty_map"] == empty[class_name, "mean", None, "brier_skill"] < 1
    masks = np.stack([references["rater0"], references["rater1"]])[:, :, 1] >= 0.5
    assert found["WM", "raters", None, "ged2"] == ged2(prediction[:, 1], masks)


def test_the_reliability_rows_add_up_to_the_calibration_error():
    prediction, references = random_case(3)
    rows = [row for row in rows_of(prediction, references) if row.class_name == "GM"]
    voxels, p, y = (
        np.array([row.value for row in rows if row.metric == f"reliability_{name}"])
        for name in ("voxels", "prediction", "reference")
    )
    maps = [stack(0, 1, 2).case(each) for each in (prediction, references["mean"])]
    assert np.abs(p - y).sum() / voxels.sum() == pytest.approx(METRICS["ece"](*maps, stack(0, 1, 2).scale(MEAN_MM3))[0])
    edges = [row.threshold for row in rows if row.metric == "reliability_voxels"]
    assert edges == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def test_one_rater_is_all_raters_and_has_nobody_to_agree_with():
    prediction, references = random_case(1, raters=1)
    rows = rows_of(prediction, references | {"truth": references["mean"]})
    assert {row.reference for row in rows} == {"mean", "truth", "raters"}
    assert {row.metric for row in rows if row.reference == "raters"} == {"volume_crps_mm3", "ged2"}


class Faintest(Metric):
    """The smallest value of the prediction."""

    short = "faintest"

    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        """[K]."""
        return prediction.min(axis=(0, *range(2, prediction.ndim)))


def test_a_metric_of_the_user_is_measured_against_every_reference():
    prediction, references = random_case(1)
    rows = measured(prediction, references, Yardstick(("GM", "WM"), MEAN_MM3, (Faintest(),)), stack(0, 1, 2))
    found = {row[:4]: row.value for row in rows if row.metric == "faintest"}
    assert found == {
        (of, name, None, "faintest"): prediction[:, k].min() for k, of in enumerate(("GM", "WM")) for name in references
    }


def test_slices_are_measured_as_a_volume_and_gaps_keep_them_apart():
    maps = np.zeros((3, 1, 8, 8), dtype=np.float32)
    maps[:, 0, 2:6, 2:6] = 1  # a bar through all three slices
    without_last = maps.copy()
    without_last[2] = 0

    def of(grid: Grid) -> dict[str, float]:
        rows = measured(without_last, {"mean": maps}, GM, grid)
        return {row.metric: row.value for row in rows if row.threshold == 0.5}

    whole, gap = of(stack(4, 5, 6)), of(stack(4, 5, 9))
    assert (whole["lesions_true"], whole["lesions_found"]) == (1, 1)
    assert (gap["lesions_true"], gap["lesions_found"]) == (2, 1)
    assert whole["hd95_mm"] == pytest.approx(2.0)  # the last slice is 2 mm behind the last predicted one
    assert gap["hd95_mm"] == pytest.approx(4 * 2.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 1.0]), st.sampled_from([0.0, 0.02, 1.0]))
@settings(max_examples=25, deadline=None)
def test_every_value_is_finite_or_nan_on_empty_full_and_sparse_maps(seed: int, predicted: float, labelled: float):
    generator = np.random.default_rng(seed)
    prediction = (generator.random((3, 2, 6, 5)) < predicted).astype(np.float32)
    masks = [(generator.random((3, 2, 6, 5)) < labelled).astype(np.float32) for _ in range(2)]
    references = {"mean": np.mean(masks, axis=0), "a": masks[0], "b": masks[1]}
    for row in rows_of(prediction, references, stack(0, 1, 5)):
        assert np.isfinite(row.value) or np.isnan(row.value), row
        if row.metric.startswith(("lesions_", "reliability_", "ged2")):
            assert np.isfinite(row.value), row


def test_a_case_is_measured_in_milliseconds():
    """20 slices of 96 x 96 against 5 references: 33 ms of processor time when written; the bound leaves room for a busy machine."""
    distance = np.hypot(*(np.indices((96, 96)) - 48))
    prediction = np.repeat(np.clip((15 - distance) / 6 + 0.5, 0, 1).astype(np.float32)[None, None], 20, axis=0)
    references = dict.fromkeys(("mean", "a", "b", "c", "d"), 0.9 * prediction)
    durations = []
    for _ in range(5):
        start = time.process_time()
        measured(prediction, references, GM, stack(*range(20)), (0.5, 0.4, 0.392))
        durations.append(time.process_time() - start)
    assert min(durations) < 0.2
