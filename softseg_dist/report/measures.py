"""All that was measured beside the objective, of every candidate: what a run has no rows of is empty or None."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from softseg_dist.report.breakdown import Raters, Site, by_site, raters_of
from softseg_dist.report.calibration import Reliability, reliability_of
from softseg_dist.report.lesions import Lesions, lesions_of
from softseg_dist.report.run_folder import RunData
from softseg_dist.report.scores import Scores
from softseg_dist.report.surfaces import Surfaces, surfaces_of
from softseg_dist.report.uncertainty import Uncertainty, uncertainty_of
from softseg_dist.report.volumes import Agreement, Repeatability, agreements_of, repeatability_of


@dataclass(frozen=True)
class Measures:
    """By candidate: calibration, volumes, lesions, surfaces; by site: winner and reference; all raters; by method: uncertainty."""

    reliability: dict[str, Reliability]
    agreements: dict[str, tuple[Agreement, ...]]
    repeatability: dict[str, tuple[Repeatability, ...]]
    lesions: dict[str, Lesions]
    surfaces: dict[str, Surfaces]
    sites: tuple[Site, ...]
    raters: Raters | None
    uncertainty: dict[str, tuple[Uncertainty, ...]]


def measures_of(run: RunData, test: pd.DataFrame, scores: Scores, winner: str, reference: str) -> Measures:
    """Of the rows on test; `scores` are of the objective, which is broken down by site for `winner` and `reference`."""
    site_of = (run.run.get("data") or {}).get("site_of") or {}
    return Measures(
        reliability=reliability_of(test),
        agreements=agreements_of(test),
        repeatability=repeatability_of(test),
        lesions=lesions_of(test, run.finished, run.study.get("seed", 0)),
        surfaces=surfaces_of(test, run.finished),
        sites=by_site(scores, site_of, winner, reference) if site_of else (),
        raters=raters_of(test, run.finished, list(scores.tables)),
        uncertainty=uncertainty_of(test, run.ensemble),
    )
