"""From rows of the results table to the unit of analysis: the score of one subject in one split.

A subject's score is the mean over its cases of the mean over classes, against the mean of the raters, on test, and then the mean
over the repeats of the split; what is NaN (both maps empty) is left out. Tables are [subject x split], NaN without a test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from softseg_dist.judging.thresholds import CURVE
from softseg_dist.numerics.statistics import NAN
from softseg_dist.training.task import FitResult

ScoreTable = npt.NDArray[np.float64]
UNIT = ["candidate", "split", "subject"]
RULES = {"fixed": "fixed 0.5", "grid": "grid", "dice_optimal": "Dice-optimal"}  # as `judging.thresholds` and readers name them


@dataclass(frozen=True)
class ScoreTables:
    """All test scores of one metric. `subjects` and `splits` name the rows and columns of every table.

    `of_models`: they are of trained models, one per subject, as predictions that were judged without splits have them.
    """

    subjects: tuple[str, ...]
    splits: tuple[int, ...]
    tables: Mapping[str, ScoreTable]
    of_models: bool = False

    def of(self, candidate: str) -> ScoreTable:
        """Scores [subject x split] of a candidate; all NaN if none of its fits has finished."""
        empty = np.full((len(self.subjects), len(self.splits)), np.nan)
        return self.tables.get(candidate, empty)

    def difference(self, candidate: str, reference: str) -> ScoreTable:
        """`candidate` minus `reference`, where both were tested on the subject in the split."""
        return self.of(candidate) - self.of(reference)


def soft_rows(test: pd.DataFrame, *metrics: str, reference: str = "mean") -> pd.DataFrame:
    """The rows of metrics without a threshold."""
    return test[test["metric"].isin(metrics) & (test["reference"] == reference) & test["threshold"].isna()]


def soft_scores(test: pd.DataFrame, metric: str, reference: str = "mean", only_class: str | None = None) -> ScoreTables:
    """Scores of a metric without threshold, over all classes or one of them."""
    rows = soft_rows(test, metric, reference=reference)
    return tables_of(rows if only_class is None else rows[rows["class"] == only_class], test)


def rows_at_rule(
    test: pd.DataFrame, fits: Iterable[FitResult], metric: str, rules: Sequence[str], reference: str = "mean"
) -> pd.DataFrame:
    """The rows of a thresholded metric at the threshold of each fit: that of the first of the `rules` that it has."""
    chosen = {(f.candidate, *f.slot): f.thresholds[rule] for f in fits for rule in reversed(rules) if rule in f.thresholds}
    rows = test[(test["metric"] == metric) & (test["reference"] == reference) & test["threshold"].notna()]
    if rows.empty:
        return rows
    keys = pd.MultiIndex.from_arrays([rows["candidate"].astype(str), rows["split"], rows["repeat"]])
    wanted = pd.Series(chosen, dtype=np.float64).reindex(keys).to_numpy()
    return rows[np.isclose(rows["threshold"], wanted, rtol=0, atol=1e-9)]


def scores_by_rule(test: pd.DataFrame, fits: Iterable[FitResult], metric: str) -> dict[str, ScoreTables]:
    """By rule: scores of a thresholded metric, at the threshold that each fit chose on validation."""
    return {rule: tables_of(rows_at_rule(test, fits, metric, [rule]), test) for rule in RULES}


def dice_curves(test: pd.DataFrame, candidates: Sequence[str]) -> dict[str, list[float]]:
    """Mean Dice over all subjects and splits at each threshold of `CURVE`, for every candidate that was tested."""
    rows = test[(test["metric"] == "dice") & (test["reference"] == "mean") & test["threshold"].notna()]
    on_curve = rows["threshold"].round(9).isin(CURVE)
    means = _subject_means(rows[on_curve], ["threshold"]).groupby(["candidate", "threshold"], observed=True).mean()
    table = means.unstack("threshold").reindex(columns=list(CURVE))
    curves = dict(zip(table.index.astype(str), table.to_numpy(np.float64).tolist(), strict=True))
    return {name: curves[name] for name in candidates if name in curves}


def undefined(rows: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Per candidate: how many values of `rows` are NaN, and how many there are."""
    grouped = rows["value"].isna().groupby(rows["candidate"], observed=True).agg(["sum", "count"])
    return {str(name): (int(missing), int(total)) for name, missing, total in grouped.itertuples()}


def _subject_means(rows: pd.DataFrame, also: Sequence[str] = ()) -> pd.Series[float]:
    unit = [*UNIT, *also]
    by_fit = [*unit, "repeat"] if rows["repeat"].any() else unit
    by_case = rows.groupby([*by_fit, "case"], observed=True)["value"].mean()
    means = by_case.groupby(by_fit, observed=True).mean()
    return means if by_fit == unit else means.groupby(unit, observed=True).mean()


def tables_of(rows: pd.DataFrame, test: pd.DataFrame) -> ScoreTables:
    """Subject by split, from rows of one metric; all tables of one `test` have the same rows and columns."""
    subjects, splits = sorted(map(str, test["subject"].unique())), sorted(map(int, test["split"].unique()))
    tables: dict[str, ScoreTable] = {}
    if not rows.empty:  # most studies lack some metrics, and pandas groups an empty table as slowly as a full one
        means = _subject_means(rows).reset_index().astype({"candidate": str, "subject": str})
        at_row = pd.Index(subjects).get_indexer(pd.Index(means["subject"]))
        at_column = pd.Index(splits).get_indexer(pd.Index(means["split"]))
        for name, places in means.groupby("candidate").indices.items():
            tables[str(name)] = table = np.full((len(subjects), len(splits)), np.nan)
            table[at_row[places], at_column[places]] = means["value"].to_numpy()[places]
    return ScoreTables(tuple(subjects), tuple(splits), tables)


def split_means(table: ScoreTable, splits: Sequence[int]) -> dict[int, float]:
    """Mean over subjects in every split that has one; a split without a score is left out."""
    return {j: mean_of(column) for j, column in zip(splits, table.T, strict=True) if not np.isnan(column).all()}


def mean_of(values: ScoreTable) -> float:
    """The mean of what is known; NaN if nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else NAN
