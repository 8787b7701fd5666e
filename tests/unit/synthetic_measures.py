"""Rows of what a fit measures beside overlap, made of random numbers with a known structure: see `synthetic_run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

ALL = ("overlap", "reliability", "recalibrated", "volume", "surface", "lesions", "raters", "uncertainty")
Measured = tuple[str, float | None, str, float]  # reference, threshold, metric, value

LESIONS = {"lt20": 4, "20to100": 3, "gt100": 2}  # true lesions of a case, by size
FOUND = {"lt20": 0.4, "20to100": 0.75, "gt100": 0.95}  # planted sensitivities
OVERCONFIDENCE = 0.05  # what the reference lies below the prediction, in every bin
RECALIBRATED = {"brier_skill": (0.7, 0.8), "ece": (None, 0.01), "ece_max": (0.3, 0.1)}  # before and after it; ece is in every run
MISSED = 0.02  # of the volume of the reference: where the map is 0
VOLUME_BIAS = 0.1  # of the true volume
INTER_RATER = 0.82
OF_SAMPLES = ("entropy", "expected_entropy", "mutual_information", "variance", "volume_cv", "pairwise_dice")
OF_SAMPLES += ("samples_iou", "dice_dml", "brier", "ece")
TO_RATERS = ("ged2",)


def measured_rows(
    measured: Sequence[str], thresholds: Mapping[str, float], raters: Sequence[str], true_mm3: float, generator: np.random.Generator
) -> list[Measured]:
    """The rows of one case and class: those of the `measured` kinds."""
    rows: list[Measured] = []
    for tau in sorted(set(thresholds.values())):
        if "overlap" in measured:
            rows += [
                (reference, tau, metric, float(generator.uniform(0.7, 0.9)))
                for reference in ("mean", *raters)
                for metric in ("iou", "precision", "recall", "specificity", "mask_volume_error")
            ]
        if "surface" in measured:
            rows += [("mean", tau, metric, value) for metric, value in _surfaces(generator).items()]
        if "lesions" in measured:
            rows += [("mean", tau, metric, value) for metric, value in _lesions(generator).items()]
    if "reliability" in measured:
        rows += _reliability(generator)
    if "recalibrated" in measured:
        rows += [("mean", None, name, before) for name, (before, _) in RECALIBRATED.items() if before is not None]
        rows += [("mean", None, f"{name}_recalibrated", after) for name, (_, after) in RECALIBRATED.items()]
        rows += [("mean", None, "volume_at_0_mm3", MISSED * true_mm3)]
    if "volume" in measured:
        predicted = true_mm3 * (1 + VOLUME_BIAS) + generator.normal(0, 0.03 * true_mm3)
        rows += [("mean", None, "volume_pred_mm3", float(predicted)), ("mean", None, "volume_true_mm3", true_mm3)]
    if "raters" in measured and len(raters) > 1:
        rows += [
            ("raters", None, "inter_rater_dice", INTER_RATER + 0.1 * float(np.sin(true_mm3))),
            ("raters", None, "ged2", float(generator.uniform(0.1, 0.3))),
        ]
    if "uncertainty" in measured:
        for method in ("mc_dropout", "tta"):
            rows += [("mean", None, f"{method}_{m}", float(generator.uniform(0.1, 0.3))) for m in OF_SAMPLES]
            if len(raters) > 1:
                rows += [("raters", None, f"{method}_{m}", float(generator.uniform(0.3, 0.5))) for m in TO_RATERS]
    return rows


def _surfaces(generator: np.random.Generator) -> dict[str, float]:
    empty = generator.uniform() < 0.02  # then there is no surface
    values = {
        "hd95_mm": float(generator.uniform(1, 4)),
        "asd_mm": float(generator.uniform(0.2, 0.6)),
        "surface_dice_1mm": float(generator.uniform(0.7, 0.95)),
    }
    return {name: float("nan") if empty else value for name, value in values.items()}


def _lesions(generator: np.random.Generator) -> dict[str, float]:
    found = {size: int(generator.binomial(num, FOUND[size])) for size, num in LESIONS.items()}
    false = int(generator.integers(0, 3))
    true, hits = sum(LESIONS.values()), sum(found.values())
    by_size = {f"lesions_true_{size}": num for size, num in LESIONS.items()}
    by_size |= {f"lesions_found_{size}": num for size, num in found.items()}
    counts = {"lesions_true": true, "lesions_found": hits, "lesions_predicted": hits + false, "false_lesions": false}
    ratios = {"lesion_sensitivity": hits / true, "lesion_fdr": false / max(hits + false, 1)}
    return {name: float(num) for name, num in (counts | by_size | ratios).items()}


def _reliability(generator: np.random.Generator) -> list[Measured]:
    rows: list[Measured] = []
    for bin_ in range(10):
        voxels = 4000 if bin_ == 0 else int(generator.integers(50, 300))
        prediction = (bin_ + 0.5) / 10
        observed = max(0.0, prediction - OVERCONFIDENCE)
        sums = {"voxels": voxels, "prediction": voxels * prediction, "reference": voxels * observed}
        rows += [("mean", round(bin_ / 10, 1), f"reliability_{name}", float(value)) for name, value in sums.items()]
    return rows
