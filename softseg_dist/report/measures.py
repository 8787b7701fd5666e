"""What is measured beside the objective: calibration, volumes, lesions, surfaces, uncertainty.

Each function takes rows of the results table about test subjects and returns frozen tables by candidate. Sums (voxels of a
reliability bin, lesions) are pooled over cases, classes and splits; means are over subjects and splits, as those of the ranking.
Intervals of pooled counts resample subjects. What no case has is left out: a measure that was not recorded gives {}.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from softseg_dist.numerics.metrics import RECALIBRATED, TABLE
from softseg_dist.numerics.statistics import NAN, BlandAltman, bland_altman
from softseg_dist.numerics.structures import SURFACE_METRICS
from softseg_dist.report.breakdown import RULE, Raters, Site, by_site, raters_of
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import ScoreTables, mean_of, rows_at_rule, soft_rows, soft_scores, tables_of, undefined
from softseg_dist.training.task import FitResult

SUMS = ("reliability_voxels", "reliability_prediction", "reliability_reference")


@dataclass(frozen=True)
class ReliabilityTable:
    """The reliability table of one candidate: the voxels of all tested cases, classes and splits pooled.

    Of each bin of the prediction, from `edges` up: the number of `voxels`, their mean prediction `predicted` and mean reference
    `observed`, both NaN in an empty bin. `ece` = sum over bins of (share of voxels) |predicted - observed|; the ECE of the
    ranking is a mean over subjects and so somewhat larger. Of `num_cases` a case counts once per fit.
    """

    name: str
    edges: tuple[float, ...]
    voxels: tuple[float, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    ece: float
    num_cases: int

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of all voxels that is in each bin."""
        return tuple(count / (sum(self.voxels) or 1) for count in self.voxels)


def reliability_of(test: pd.DataFrame) -> dict[str, ReliabilityTable]:
    """The pooled table of every candidate that has one, by name."""
    rows = test[test["metric"].isin(SUMS) & (test["reference"] == "mean")]
    found = {}
    for name, part in rows.assign(edge=rows["threshold"].round(9)).groupby("candidate", observed=True):
        sums = part.groupby(["edge", "metric"], observed=True)["value"].sum().unstack("metric").sort_index()
        voxels, prediction, reference = (sums[metric].to_numpy(np.float64) for metric in SUMS)
        known = np.where(voxels > 0, voxels, NAN)
        found[str(name)] = ReliabilityTable(
            name=str(name),
            edges=tuple(sums.index.tolist()),
            voxels=tuple(voxels.tolist()),
            predicted=tuple((prediction / known).tolist()),
            observed=tuple((reference / known).tolist()),
            ece=float(np.abs(prediction - reference).sum() / voxels.sum()) if voxels.sum() else NAN,
            num_cases=len(part[["split", "repeat", "case"]].drop_duplicates()),
        )
    return found


PREDICTED, TRUE, AT_0 = "volume_pred_mm3", "volume_true_mm3", "volume_at_0_mm3"


@dataclass(frozen=True)
class Recalibrated:
    """Means over subjects and splits of one candidate, by metric; `missed` is the share of the reference where its map is 0."""

    name: str
    before: dict[str, float]
    after: dict[str, float]
    missed: float


def recalibrated_of(test: pd.DataFrame) -> dict[str, Recalibrated]:
    """Of every candidate all of whose fits are recalibrated, by name."""
    after, found = {name: f"{name}_recalibrated" for name in RECALIBRATED}, {}
    rows = soft_rows(test, *after, *after.values(), TRUE, AT_0)
    for name, part in rows.groupby("candidate", observed=True):
        of = {str(metric): values for metric, values in part.groupby("metric", observed=True)["value"]}
        if AT_0 in of and len(of[AT_0]) == len(of[TRUE]):
            means = {metric: mean_of(soft_scores(part, metric).of(str(name))) for metric in (*after, *after.values())}
            both = {m: means[m] for m in after}, {m: means[of_m] for m, of_m in after.items()}
            found[str(name)] = Recalibrated(str(name), *both, float(of[AT_0].sum() / of[TRUE].sum()))
    return found


@dataclass(frozen=True)
class Agreement:
    """Soft volumes of one candidate and class against those of the soft reference, one pair per subject, in mm3.

    `true_mm3` and `predicted_mm3` are means over the cases and splits of a subject, in the order of `subjects`.
    `limits` are those of predicted minus true.
    """

    name: str
    class_name: str
    subjects: tuple[str, ...]
    true_mm3: tuple[float, ...]
    predicted_mm3: tuple[float, ...]
    limits: BlandAltman


def agreements_of(test: pd.DataFrame) -> dict[str, tuple[Agreement, ...]]:
    """By candidate: one agreement for each class; {} if no volume was recorded."""
    rows = soft_rows(test, PREDICTED, TRUE)
    means = rows.groupby(["candidate", "class", "subject", "metric"], observed=True)["value"].mean().unstack("metric")
    means = means.reindex(columns=[PREDICTED, TRUE]).dropna()
    found: dict[str, tuple[Agreement, ...]] = {}
    for (name, class_name), part in means.groupby(["candidate", "class"], observed=True):
        subjects, true, predicted = part.index.get_level_values("subject").astype(str), part[TRUE], part[PREDICTED]
        limits = bland_altman(predicted.to_numpy(np.float64), true.to_numpy(np.float64))
        one = Agreement(str(name), str(class_name), tuple(subjects), tuple(true.tolist()), tuple(predicted.tolist()), limits)
        found[str(name)] = (*found.get(str(name), ()), one)
    return found


SIZES = {"lt20": "below 20 voxels", "20to100": "20 to 100 voxels", "gt100": "above 100 voxels", "": "all"}


@dataclass(frozen=True)
class LesionRate:
    """`count` of `total` lesions, pooled over cases, classes and splits; an evaluation has the mean of the fits of a case."""

    count: float
    total: float
    share: float


@dataclass(frozen=True)
class Lesions:
    """One candidate at the threshold that each fit chose on its grid.

    `sensitivity` by size of the true lesion: lesions found of those that there are. `false_discovery`: predicted lesions
    that match no true one, of all predicted.
    """

    name: str
    sensitivity: dict[str, LesionRate]
    false_discovery: LesionRate
    num_cases: int


def lesions_of(test: pd.DataFrame, fits: Sequence[FitResult]) -> dict[str, Lesions]:
    """The pooled counts of every candidate that has them, by name."""
    pairs = {size: (f"lesions_found_{size}".rstrip("_"), f"lesions_true_{size}".rstrip("_")) for size in SIZES}
    pairs["false"] = "false_lesions", "lesions_predicted"
    tables = {metric: rows_at_rule(test, fits, metric, RULE) for pair in pairs.values() for metric in pair}
    sums = {metric: rows.groupby("candidate", observed=True)["value"].sum() for metric, rows in tables.items()}
    found = {}
    for name, part in tables["lesions_true"].groupby("candidate", observed=True):
        counts = {key: (float(sums[count][name]), float(sums[total][name])) for key, (count, total) in pairs.items()}
        rates = {key: LesionRate(count, total, count / total if total else NAN) for key, (count, total) in counts.items()}
        false, num_cases = rates.pop("false"), len(part[["split", "repeat", "case"]].drop_duplicates())
        found[str(name)] = Lesions(str(name), rates, false, num_cases)
    return found


@dataclass(frozen=True)
class Surfaces:
    """Means over subjects and splits of one candidate.

    Of `values` (case, class, split) `undefined` have no surface in the reference; in `missed` the prediction is empty, and its
    distance counts as the diagonal of the image.
    """

    name: str
    hd95_mm: float
    asd_mm: float
    surface_dice_1mm: float
    undefined: int
    values: int
    missed: int


def surfaces_of(test: pd.DataFrame, fits: Sequence[FitResult]) -> dict[str, Surfaces]:
    """The means of every candidate that has them, by name."""
    rows = [rows_at_rule(test, fits, metric, RULE) for metric in SURFACE_METRICS]
    scores = [tables_of(part, test) for part in rows]
    predicted = rows_at_rule(test, fits, "lesions_predicted", RULE)
    keys = ["candidate", "split", "repeat", "case", "class"]
    there = rows[0][rows[0]["value"].notna()].merge(predicted[predicted["value"] == 0][keys], on=keys)
    missed = there.groupby("candidate", observed=True).size()
    found = {}
    for name, counts in undefined(rows[0]).items():
        hd95, asd, dice = (mean_of(of_metric.of(name)) for of_metric in scores)
        found[name] = Surfaces(name, hd95, asd, dice, *counts, int(missed.get(name, 0)))
    return found


METHODS = {"mc_dropout": "dropout at test time", "tta": "test-time augmentation", "ensemble": "ensemble over splits"}
MEASURES = {  # as `judging.uncertainty` names them
    "ged2": "GED²",
    "entropy": "entropy (bits)",
    "expected_entropy": "expected entropy",
    "mutual_information": "mutual information",
    "variance": "variance",
    "volume_cv": "CV of the volume",
    "pairwise_dice": "Dice in pairs",
    "samples_iou": "IoU of all samples",
    **{name: TABLE[name].title for name in ("dice_dml", "brier")},
    "ece": "ECE",
    "members": "fits",
}


@dataclass(frozen=True)
class UncertaintyMeans:
    """Means over subjects and splits of one candidate and one method, by measure: the metric's name without the method's."""

    name: str
    method: str
    measures: dict[str, float]
    num_subjects: int


def uncertainty_of(*tables: pd.DataFrame | None) -> dict[str, tuple[UncertaintyMeans, ...]]:
    """By method: one entry for every candidate it was measured for; {} if none was.

    `tables` have rows on test. An ensemble over splits has a table of its own, in which its one split is -1.
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
        entries = []
        for name, num_subjects in rows.groupby("candidate", observed=True)["subject"].nunique().items():
            means = {metric.removeprefix(f"{method}_"): mean_of(table.of(str(name))) for metric, table in scores.items()}
            entries.append(UncertaintyMeans(str(name), method, means, int(num_subjects)))
        found[method] = tuple(entries)
    return found


@dataclass(frozen=True)
class Measures:
    """By candidate: calibration, volumes, lesions, surfaces; by site: winner and reference; all raters; by method: uncertainty."""

    reliability: dict[str, ReliabilityTable]
    recalibrated: dict[str, Recalibrated]
    agreements: dict[str, tuple[Agreement, ...]]
    lesions: dict[str, Lesions]
    surfaces: dict[str, Surfaces]
    sites: tuple[Site, ...]
    raters: Raters | None
    uncertainty: dict[str, tuple[UncertaintyMeans, ...]]


def measures_of(run: RunData, test: pd.DataFrame, scores: ScoreTables, winner: str, reference: str) -> Measures:
    """Of the rows on test; `scores` are of the objective, which is broken down by site for `winner` and `reference`."""
    return Measures(
        reliability=reliability_of(test),
        recalibrated=recalibrated_of(test),
        agreements=agreements_of(test),
        lesions=lesions_of(test, run.finished),
        surfaces=surfaces_of(test, run.finished),
        sites=by_site(scores, run.site_of, winner, reference) if run.site_of else (),
        raters=raters_of(test, run.finished, list(scores.tables)),
        uncertainty=uncertainty_of(test, run.ensemble),
    )
