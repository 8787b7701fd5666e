"""What scores are made of: by site, case by case, beside an empty map, on the grid of training; and overlap rater by rater."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from softseg_dist.judging.judge import NOT_RATERS
from softseg_dist.numerics.crossed_test import CrossedTest
from softseg_dist.numerics.metrics import Row
from softseg_dist.numerics.statistics import NAN
from softseg_dist.report.paired_tests import primary_test
from softseg_dist.report.scores import ScoreTables, mean_of, rows_at_rule, soft_rows, soft_scores, tables_of
from softseg_dist.training.task import FitResult

RULE = ("grid", "fixed")  # the threshold that each fit chose on validation; 0.5 where there was none


@dataclass(frozen=True)
class Site:
    """The objective of two candidates on the subjects of one site. `crossed` is the paired difference, `one` minus `other`."""

    site: str
    num_subjects: int
    num_scores: int
    one: float
    other: float
    crossed: CrossedTest


@dataclass(frozen=True)
class AgainstRaters:
    """One candidate: Dice against each rater at the threshold chosen on the grid, and GED² against all; NaN if not recorded."""

    name: str
    dice: dict[str, float]
    ged2: float


@dataclass(frozen=True)
class Raters:
    """All raters: `inter_rater`, mean Dice in pairs over `num_subjects`, quartiles `low` and `high`; NaN without two raters."""

    names: tuple[str, ...]
    inter_rater: float
    low: float
    high: float
    num_subjects: int
    candidates: dict[str, AgainstRaters]


def by_site(scores: ScoreTables, site_of: Mapping[str, str], one: str, other: str) -> tuple[Site, ...]:
    """One row per site, by name; () unless the tested subjects come from two sites or more."""
    sites = np.array([site_of.get(subject, "") for subject in scores.subjects])
    if len(set(sites.tolist())) < 2:
        return ()
    found = []
    for site in sorted(set(sites.tolist())):
        here = sites == site
        scored, means = ~np.isnan(scores.of(one)[here]), (mean_of(scores.of(one)[here]), mean_of(scores.of(other)[here]))
        of_site = replace(scores, subjects=tuple(subject for subject, known in zip(scores.subjects, here, strict=True) if known))
        difference = primary_test(of_site, scores.difference(one, other)[here])
        found.append(Site(site, int(scored.any(axis=1).sum()), int(scored.sum()), *means, difference))
    return tuple(found)


def raters_of(test: pd.DataFrame, fits: Sequence[FitResult], candidates: Sequence[str]) -> Raters | None:
    """None unless cases were measured against two raters or more."""
    names = tuple(sorted(str(r) for r in test["reference"].unique() if r not in (*NOT_RATERS, "raters")))
    if len(names) < 2:
        return None
    dice = {rater: tables_of(rows_at_rule(test, fits, "dice", RULE, reference=rater), test) for rater in names}
    ged2 = soft_scores(test, "ged2", reference="raters")
    of_rater = {name: {rater: mean_of(scores.of(name)) for rater, scores in dice.items()} for name in candidates}
    return Raters(names, *_inter_rater(test), {n: AgainstRaters(n, each, mean_of(ged2.of(n))) for n, each in of_rater.items()})


def _inter_rater(test: pd.DataFrame) -> tuple[float, float, float, int]:
    """It is the same for all candidates and splits, so each subject counts once, with the mean over its cases and classes."""
    rows = test[(test["metric"] == "inter_rater_dice") & test["value"].notna()]
    of_case = rows.groupby(["subject", "case", "class"], observed=True)["value"].mean()
    subjects = of_case.groupby(["subject", "case"], observed=True).mean().groupby("subject", observed=True).mean()
    if subjects.empty:
        return NAN, NAN, NAN, 0
    low, high = np.quantile(subjects, [0.25, 0.75])
    return float(subjects.mean()), float(low), float(high), len(subjects)


LARGEST = 3  # cases whose share of the volume is said


@dataclass(frozen=True)
class CaseScore:
    """The objective of one tested case for winner and reference: means over classes, and over the splits that tested it.

    `difference` (winner minus reference) is over the splits of both. `volume_mm3` is that of the mean of the raters, of all classes
    together. What does not exist is NaN.
    """

    case: str
    subject: str
    num_splits: int
    volume_mm3: float
    winner: float
    reference: float
    difference: float


@dataclass(frozen=True)
class Learned:
    """Brier skill of a candidate on test, and `crossed`: that minus the Brier skill of a map that is 0 everywhere."""

    name: str
    skill: float
    crossed: CrossedTest


@dataclass(frozen=True)
class ScoreChecks:
    """Checks of the scores on test.

    `empty_map` is the mean Brier skill of a map that is 0 everywhere, NaN if not recorded; `learned` compares winner and reference
    with it. `prepared` has the differences to the reference on the grid of training, by candidate, and `case_skill` the Brier skill
    of a case, in which small structures count as much as large ones. The `LARGEST` of all cases hold `largest_share` of the
    reference volume, NaN if there are no more.
    """

    empty_map: float
    learned: tuple[Learned, ...]
    cases: tuple[CaseScore, ...]
    largest_share: float
    prepared: dict[str, float]
    case_skill: dict[str, float]

    @property
    def unlearned(self) -> tuple[Learned, ...]:
        """Those of `learned` whose interval does not lie above 0; without an interval, whose difference does not."""
        return tuple(one for one in self.learned if one.crossed.low <= 0 or not one.crossed.mean > 0)


def score_checks(
    test: pd.DataFrame, prepared: pd.DataFrame, scores: ScoreTables, objective: Row, pair: tuple[str, str]
) -> ScoreChecks:
    """All checks of the rows on test; `prepared` are those of the `objective` on that grid, `pair` are winner and reference."""
    on_training = replace(soft_scores(prepared, objective.name), of_models=scores.of_models)
    minus = {name: on_training.difference(name, pair[1]) for name in on_training.tables if name != pair[1]}
    of_class = soft_rows(test, "volume_true_mm3").groupby(["case", "class"], observed=True)["value"].mean()
    skills, volumes = soft_scores(test, "brier_skill_case"), of_class.groupby("case", observed=True).sum()
    share = float(volumes.nlargest(LARGEST).sum() / volumes.sum()) if len(volumes) > LARGEST and volumes.sum() else NAN
    empty, learned = _learned(test, scores.of_models, list(dict.fromkeys(pair)))
    return ScoreChecks(
        empty_map=empty,
        learned=learned,
        cases=_cases(soft_rows(test, objective.name), volumes, pair, objective.sign),
        largest_share=share,
        prepared={name: primary_test(on_training, table).mean for name, table in minus.items()},
        case_skill={name: mean_of(skills.of(name)) for name in skills.tables},
    )


def _learned(test: pd.DataFrame, of_models: bool, names: Sequence[str]) -> tuple[float, tuple[Learned, ...]]:
    """The mean skill of the empty map, and the tests of `names` against it; (NaN, ()) where it was not recorded."""
    skills, empty = soft_scores(test, "brier_skill"), soft_scores(test, "empty_map")
    if not empty.tables:
        return NAN, ()
    of_subject = {s: mean_of(np.stack([t[i] for t in empty.tables.values()])) for i, s in enumerate(empty.subjects)}
    column = np.array(list(of_subject.values()))[:, None]  # the same for all candidates and splits
    tables = ScoreTables(skills.subjects, skills.splits, skills.tables, of_models)
    found = [Learned(n, mean_of(tables.of(n)), primary_test(tables, tables.of(n) - column)) for n in names if n in tables.tables]
    return mean_of(column + 0 * tables.of(names[0])), tuple(found)


def _cases(rows: pd.DataFrame, volumes: pd.Series[float], pair: tuple[str, str], sign: int) -> tuple[CaseScore, ...]:
    """From the best to the worst case of the winner; cases without a score at the end."""
    means = rows.groupby(["candidate", "subject", "case", "split"], observed=True)["value"].mean().unstack("candidate")
    table = pd.DataFrame({"winner": means.get(pair[0], np.nan), "reference": means.get(pair[1], np.nan)}, index=means.index)
    table["difference"] = table["winner"] - table["reference"]
    of_case = table.groupby(["subject", "case"], observed=True)
    found = of_case.mean().assign(num_splits=of_case.size()).sort_values("winner", ascending=sign < 0, kind="stable").reset_index()
    found["volume_mm3"] = found["case"].map(volumes).astype(np.float64)
    return tuple(CaseScore(*row) for row in found[[field.name for field in fields(CaseScore)]].itertuples(index=False))
