"""Volumes: do they agree with the reference, and do they repeat in the sessions of one person?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from softseg_dist.numerics.repeatability import (
    BlandAltman,
    Icc,
    WithinSubject,
    bland_altman,
    coefficient_of_variation,
    icc,
)

PREDICTED, TRUE = "volume_pred_mm3", "volume_true_mm3"
REFERENCE = ""  # the name under which the reference's own repeatability stands


@dataclass(frozen=True)
class Agreement:
    """Soft volumes of one candidate and class against those of the soft reference, one pair per subject, in mm3.

    `true_mm3` and `predicted_mm3` are means over the cases and splits of a subject, in the order of `subjects`.
    `limits` are those of predicted less true.
    """

    name: str
    class_name: str
    subjects: tuple[str, ...]
    true_mm3: tuple[float, ...]
    predicted_mm3: tuple[float, ...]
    limits: BlandAltman


@dataclass(frozen=True)
class Repeatability:
    """How the soft volumes of one candidate and class repeat over the cases of a subject; `name` is "" for the reference.

    A case's volume is the mean over the splits that tested it. Only subjects with two cases or more count.
    """

    name: str
    class_name: str
    icc: Icc
    variation: WithinSubject


def agreements_of(test: pd.DataFrame) -> dict[str, tuple[Agreement, ...]]:
    """By candidate: one agreement for each class; {} if no volume was recorded."""
    means = _volumes(test, ["candidate", "class", "subject"])
    found: dict[str, list[Agreement]] = {}
    for (name, class_name), part in means.groupby(["candidate", "class"], observed=True):
        subjects = part.index.get_level_values("subject").astype(str)
        true, predicted = (part[metric].to_numpy(np.float64) for metric in (TRUE, PREDICTED))
        pairs = tuple(true.tolist()), tuple(predicted.tolist())
        limits = bland_altman(predicted, true)
        found.setdefault(str(name), []).append(Agreement(str(name), str(class_name), tuple(subjects), *pairs, limits))
    return {name: tuple(of_classes) for name, of_classes in found.items()}


def repeatability_of(test: pd.DataFrame) -> dict[str, tuple[Repeatability, ...]]:
    """By candidate, and for the reference under "": one for each class; {} unless a subject has two cases or more."""
    means = _volumes(test, ["candidate", "class", "subject", "case"])
    num_cases = means.reset_index().groupby("subject", observed=True)["case"].nunique()
    if not (num_cases > 1).any():
        return {}
    repeated = means[means.index.get_level_values("subject").isin(num_cases[num_cases > 1].index)]
    of_reference = repeated.groupby(["class", "subject", "case"], observed=True)[TRUE].mean()
    tables = {(REFERENCE, str(k)): _sessions(part) for k, part in of_reference.groupby("class", observed=True)}
    by_candidate = repeated[PREDICTED].groupby(["candidate", "class"], observed=True)
    tables |= {(str(name), str(k)): _sessions(part) for (name, k), part in by_candidate}
    found: dict[str, tuple[Repeatability, ...]] = {}
    for (name, k), table in tables.items():
        one = Repeatability(name, k, icc(table), coefficient_of_variation(table))
        found[name] = (*found.get(name, ()), one)
    return found


def _volumes(test: pd.DataFrame, unit: list[str]) -> pd.DataFrame:
    """Mean true and predicted volume per unit; no row if either was not recorded."""
    rows = test[test["metric"].isin((PREDICTED, TRUE)) & (test["reference"] == "mean") & test["threshold"].isna()]
    means = rows.groupby([*unit, "metric"], observed=True)["value"].mean().unstack("metric")
    return means.reindex(columns=[PREDICTED, TRUE]).dropna()


def _sessions(volumes: pd.Series[float]) -> np.ndarray:
    """[subjects sessions] of volumes indexed by subject and case: the cases of a subject in the order of their names."""
    ordered = volumes.sort_index().reset_index()
    session = ordered.groupby("subject", observed=True).cumcount()
    by_session = ordered.assign(session=session).pivot(index="subject", columns="session", values=ordered.columns[-1])
    return by_session.to_numpy(np.float64)
