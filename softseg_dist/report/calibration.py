"""Calibration: where a prediction says 0.7, does the structure fill 0.7 of the voxel?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from softseg_dist.numerics.statistics import NAN

SUMS = ("reliability_voxels", "reliability_prediction", "reliability_reference")


@dataclass(frozen=True)
class Reliability:
    """The reliability table of one candidate: the voxels of all tested cases, classes and splits pooled.

    Of each bin of the prediction, from `edges` up: the number of `voxels`, their mean prediction `predicted` and mean reference
    `observed`, both NaN in an empty bin. `ece` = sum over bins of (share of voxels) |predicted - observed|; the ECE of the
    ranking is a mean over subjects and so somewhat larger. Of `num_cases` a case counts once per split.
    """

    name: str
    edges: tuple[float, ...]
    voxels: tuple[float, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    ece: float
    num_cases: int
    num_subjects: int

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of all voxels that is in each bin."""
        return tuple(count / sum(self.voxels) for count in self.voxels)


def reliability_of(test: pd.DataFrame) -> dict[str, Reliability]:
    """The pooled table of every candidate that has one, by name."""
    rows = test[test["metric"].isin(SUMS) & (test["reference"] == "mean")]
    rows = rows.assign(edge=rows["threshold"].round(9))
    return {str(name): _pooled(str(name), part) for name, part in rows.groupby("candidate", observed=True)}


def _pooled(name: str, rows: pd.DataFrame) -> Reliability:
    sums = rows.groupby(["edge", "metric"], observed=True)["value"].sum().unstack("metric").sort_index()
    voxels, prediction, reference = (sums[metric].to_numpy(np.float64) for metric in SUMS)
    known = np.where(voxels > 0, voxels, NAN)
    gaps = np.abs(prediction - reference)
    return Reliability(
        name=name,
        edges=tuple(sums.index.tolist()),
        voxels=tuple(voxels.tolist()),
        predicted=tuple((prediction / known).tolist()),
        observed=tuple((reference / known).tolist()),
        ece=float(gaps.sum() / voxels.sum()) if voxels.sum() else NAN,
        num_cases=len(rows[["split", "case"]].drop_duplicates()),
        num_subjects=int(rows["subject"].nunique()),
    )
