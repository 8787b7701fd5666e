"""What was measured of uncertainty: by dropout at test time, by test-time augmentation, by an ensemble over splits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pandas as pd

from softseg_dist.report.scores import mean_of, soft_scores

METHODS = {
    "mc_dropout": "dropout at test time",
    "tta": "test-time augmentation",
    "ensemble": "ensemble over splits",
}
MEASURES = {  # as `numerics.uncertainty` names them
    "disagreement_correlation": "entropy and disagreement",
    "ged2": "GED²",
    "entropy": "entropy (bits)",
    "expected_entropy": "expected entropy",
    "mutual_information": "mutual information",
    "variance": "variance",
    "volume_cv": "CV of the volume",
    "pairwise_dice": "Dice in pairs",
    "samples_iou": "IoU of all samples",
    "dice_dml": "soft Dice (DML form)",
    "brier": "Brier score",
    "ece": "ECE",
    "members": "fits",
}


@dataclass(frozen=True)
class Uncertainty:
    """Means over subjects and splits of one candidate and one method, by measure: the metric's name without the method's."""

    name: str
    method: str
    measures: dict[str, float]
    num_subjects: int


def uncertainty_of(*tables: pd.DataFrame | None) -> dict[str, tuple[Uncertainty, ...]]:
    """By method: one entry for every candidate it was measured for; {} if none was.

    Args:
        tables: rows on test. An ensemble over splits has a table of its own, in which its one split is -1.
    """
    known = [(table, set(table["metric"].unique())) for table in tables if table is not None]
    found = {}
    for (test, there), method in itertools.product(known, METHODS):
        mine = [metric for measure in MEASURES if (metric := f"{method}_{measure}") in there]
        if not mine:
            continue
        rows = test[test["metric"].isin(mine) & test["threshold"].isna()]
        reference = rows.groupby("metric", observed=True)["reference"].first()
        scores = {metric: soft_scores(rows, metric, reference=str(reference[metric])) for metric in mine}
        people = rows.groupby("candidate", observed=True)["subject"].nunique()
        found[method] = tuple(
            Uncertainty(
                str(name),
                method,
                {metric.removeprefix(f"{method}_"): mean_of(table.of(str(name))) for metric, table in scores.items()},
                int(count),
            )
            for name, count in people.items()
        )
    return found
