"""Maps are judged on the grid of the file: as on whole arrays, whatever region is looked at, and perfect where they are perfect."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from softseg_dist import Phantom, Preprocess
from softseg_dist.data.cases import CaseData
from softseg_dist.data.geometry import Geometry
from softseg_dist.data.own_masks import OwnMasks
from softseg_dist.judging.judge import Measurement, Yardstick, case_rows, judge
from softseg_dist.numerics.metrics import TABLE, Map, Metric, PerClass, Scale

SHAPE = (20, 24, 9)
AFFINE = np.diag([0.8, 0.7, 3.0, 1.0])
CLASSES = ("cord", "lesion")
YARDSTICK = Yardstick(CLASSES, (300.0, 40.0))
THRESHOLDS = (0.35, 0.5)
Key = tuple[str, str, float | None, str]


def own_masks(raters: np.ndarray) -> OwnMasks:
    """What the raters [R K *SHAPE] drew."""
    return OwnMasks.of(CaseData(raters[0, :1], raters, None, AFFINE, Geometry(raters.shape[2:], AFFINE)))


def drawn(num_raters: int = 3, seed: int = 0) -> np.ndarray:
    """Hard masks [R K *SHAPE] of raters that differ a little."""
    generator = np.random.default_rng(seed)
    grid = np.indices(SHAPE)
    raters = np.zeros((num_raters, 2, *SHAPE), dtype=np.float32)
    for r in range(num_raters):
        for k, radius in enumerate((5.0, 2.5)):
            center = np.array([9, 12, 4]) + generator.normal(0, 0.7, 3)
            raters[r, k] = ((grid - center[:, None, None, None]) ** 2).sum(axis=0) < radius**2
    return raters


def values(rows: list[Measurement]) -> dict[Key, float]:
    """Rows by what they are of."""
    return {(row.class_name, row.reference, row.threshold, row.metric): row.value for row in rows}


def judged(maps: np.ndarray, raters: np.ndarray) -> dict[Key, float]:
    """The rows of a case."""
    return values(judge(maps, own_masks(raters), [f"r{r}" for r in range(len(raters))], YARDSTICK, THRESHOLDS))


def test_a_part_of_the_image_gives_the_rows_of_the_whole() -> None:
    raters = drawn()
    maps = np.zeros((2, *SHAPE), dtype=np.float32)
    maps[:, 5:14, 7:18, 2:8] = np.random.default_rng(1).random((2, 9, 11, 6), dtype=np.float32)
    references = {"mean": raters.mean(axis=0)[None]} | {f"r{r}": raters[r][None] for r in range(3)}
    scale = Scale(0.8 * 0.7 * 3, YARDSTICK.mean_volumes_mm3, (0.8, 0.7, 3.0))
    whole = values(case_rows(maps[None], references, YARDSTICK, THRESHOLDS, scale))
    found = judged(maps, raters)
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), key


@pytest.mark.parametrize("num_raters", [1, 4])
def test_the_mean_of_the_raters_is_perfect_where_the_table_says_so(num_raters: int) -> None:
    raters = drawn(num_raters)
    found = judged(raters.mean(axis=0), raters)
    checked = set()
    for (_, reference, threshold, metric), value in found.items():
        row = TABLE.get(metric)
        if row is None or reference != ("raters" if row.against == "raters" else "mean"):
            continue
        perfect = row.perfect == "always" or (row.perfect == "at .5" and threshold == 0.5)
        if perfect or (row.perfect == "one hard rater" and num_raters == 1):
            assert value == pytest.approx(row.best, abs=1e-6), (metric, threshold)
            checked.add(metric)
    assert {"brier_skill", "dice", "hd95_mm", "ece", "lesion_f1", "volume_error"} <= checked


def test_a_healthy_control_has_the_same_rows_whatever_is_predicted() -> None:
    raters = np.zeros((2, 2, *SHAPE), dtype=np.float32)
    empty, faint = (judged(np.full((2, *SHAPE), p, dtype=np.float32), raters) for p in (0.0, 1e-6))
    assert empty.keys() == faint.keys()
    for key, value in empty.items():
        assert math.isnan(value) == math.isnan(faint[key]), key
    assert empty["cord", "mean", None, "brier_skill"] == 1.0
    assert math.isnan(empty["cord", "mean", None, "dice_dml"])
    assert empty["cord", "mean", 0.5, "false_lesions"] == 0


def test_a_missed_structure_has_the_worst_value() -> None:
    raters = drawn(1)
    found = judged(np.zeros((2, *SHAPE), dtype=np.float32), raters)
    diagonal = math.hypot(20 * 0.8, 24 * 0.7, 9 * 3.0)
    assert found["cord", "mean", 0.5, "hd95_mm"] == pytest.approx(diagonal)
    assert found["cord", "mean", 0.5, "dice"] == 0
    assert found["cord", "mean", 0.5, "surface_dice_1mm"] == 0
    volume = raters[0, 0].sum() * 0.8 * 0.7 * 3
    assert found["cord", "mean", None, "brier_skill"] == pytest.approx(1 - volume / 300)


def test_a_single_slice_is_a_plane() -> None:
    raters = drawn(1)[..., 4:5]
    shifted = np.roll(raters[0], 1, axis=1)
    found = values(judge(shifted, own_masks(raters), ["r0"], YARDSTICK, (0.5,)))
    assert 0 < found["cord", "mean", 0.5, "asd_mm"] < 0.8  # in a stack of one, every voxel would be surface


class VoxelsSeen(Metric):
    """How many voxels a metric of a study sees."""

    short = "voxels_seen"

    def __call__(self, prediction: Map, reference: Map, scale: Scale) -> PerClass:
        return np.full(prediction.shape[1], float(prediction[0, 0].size))


def test_a_metric_of_a_study_sees_the_whole_image() -> None:
    raters = drawn(1)
    yardstick = Yardstick(CLASSES, YARDSTICK.mean_volumes_mm3, (VoxelsSeen(),))
    found = values(judge(raters[0], own_masks(raters), ["r0"], yardstick, (0.5,)))
    assert found["lesion", "mean", None, "voxels_seen"] == math.prod(SHAPE)


def test_a_phantom_restored_from_its_own_grid_is_judged_against_every_rater_and_the_truth(tmp_path: Path) -> None:
    data, preprocess = Phantom(subjects=1, size=(40, 40), num_slices=3, raters=3), Preprocess(dim=2, crop=(32, 32))
    sample = preprocess.apply(data.cases(None)[0])
    maps = preprocess.restore(sample.raters.mean(axis=1), sample.placement)
    found = values(judge(maps, sample.own, sample.rater_names, Yardstick(data.classes, (100.0,) * len(data.classes)), (0.5,)))
    assert {reference for _, reference, _, _ in found} == {"mean", "raters", "truth", *sample.rater_names}
    assert found[data.classes[0], "mean", None, "brier_skill"] == pytest.approx(1, abs=1e-6)  # the crop holds the whole cord
